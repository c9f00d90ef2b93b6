"""FeatureStore: a teacher's features stored once and read by index."""

import json
import os
import pickle
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, StackDataset, TensorDataset

import vkd_kernels as vk
from tests.helpers import processes
from tests.helpers.stored_teachers import BATCH, SAMPLES, SHARD, TAPS, Images, Teacher, build, live_tokens
from vkd_kernels.store.options import Options
from vkd_kernels.store.teacher import TappedTeacher, teacher_taps

SHARDS = -(-SAMPLES // SHARD)


# ---- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_features_are_those_of_the_teacher(tmp_path, dtype):
    teacher, data = Teacher(), Images()
    pooled = {"teacher": "2", "teacher_pool": "mean_tokens", "teacher_skip": 2}
    taps = [{"teacher": "2", "teacher_pool": "class_token"}, pooled, ""]
    store = build(tmp_path, teacher, data, taps, dtype=dtype)
    tokens = live_tokens(teacher, data.images)
    features = store[:]
    assert len(store) == SAMPLES and store.dtype == dtype
    expected = tokens[:, 0], tokens[:, 2:].mean(1), teacher.eval()(data.images).detach()
    for got, want in zip(features.values(), expected, strict=True):  # some processors round by the size of the batch
        torch.testing.assert_close(got, want.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_pairs_of_a_distiller_are_taps_and_a_module_may_be_tapped_twice(tmp_path):
    pairs = [
        vk.distiller.Pair("a", "2", teacher_pool="tokens", teacher_skip=1),
        {"student": "b", "teacher": "2", "teacher_pool": "tokens", "teacher_skip": 1, "weight": 0.5},
        {"student": "b", "teacher": "2", "teacher_pool": "mean_tokens"},
        {"student": "c", "teacher": ""},
    ]
    store = build(tmp_path, taps=pairs)
    tokens, mean = "'2' with teacher_pool='tokens', teacher_skip=1", "'2' with teacher_pool='mean_tokens'"
    assert [*store.taps] == [tokens, mean, ""]
    assert [tuple(tap.shape) for tap in store.taps.values()] == [(4, 6), (6,), (3,)]
    assert store.key_of(pairs[0]) == tokens
    with pytest.raises(ValueError, match=r"no features of teacher module '0' with teacher_pool='tokens'; it has '2'"):
        store.key_of(vk.distiller.Pair("a", "0", teacher_pool="tokens"))


def test_a_teacher_in_bfloat16_gets_its_own_dtype(tmp_path):
    teacher, data = Teacher().bfloat16(), Images()
    store = build(tmp_path, teacher, data, dtype=torch.bfloat16)
    assert torch.equal(store[:]["2"], live_tokens(teacher, data.images.bfloat16()))


def test_under_autocast_as_the_caller_says(tmp_path):
    teacher, data = Teacher(), Images()
    with torch.autocast("cpu", torch.bfloat16):
        store = build(tmp_path, teacher, data, dtype=torch.float32)
        expected = live_tokens(teacher, data.images)
    assert torch.equal(store[:]["2"], expected.float())


def test_the_mean_of_unmasked_tokens(tmp_path):
    teacher = Teacher()
    rows = [{"x": image, "attention_mask": torch.tensor([1, 1, 1, 0, 0])} for image in Images().images]
    taps = [{"teacher": "2", "teacher_pool": "mean_tokens"}]
    options = {"teacher_input": lambda batch: batch["x"], "mask": lambda batch: batch["attention_mask"].bool()}
    store = build(tmp_path, teacher, rows, taps, dtype=torch.float32, **options)
    assert torch.allclose(store[:]["2"], live_tokens(teacher, Images().images)[:, :3].mean(1), atol=1e-6)


class OnTwoDevices(nn.Linear):
    """Its weights on the CPU, its output on the meta device, which stands for a second GPU."""

    def forward(self, images):
        return super().forward(images).to("meta")


def test_a_mask_goes_where_the_features_are():
    taps = teacher_taps([{"teacher": "", "teacher_pool": "mean_tokens"}])
    options = Options(mask=lambda batch: batch[..., 0] > 0)
    with TappedTeacher(OnTwoDevices(4, 6), taps, options) as teacher:
        features = teacher(torch.randn(3, 5, 4), 3).features[""]
    assert features.is_meta and features.shape == (3, 6)


@pytest.mark.parametrize("form", ["tensors", "tuples", "dicts", "a function", "keywords by a function", "loader"])
def test_batches_of_every_form(tmp_path, form):
    teacher, images = Teacher(), Images().images
    data, options = {
        "tensors": (images, {}),
        "tuples": (TensorDataset(images, torch.arange(SAMPLES)), {}),
        "dicts": ([{"images": image} for image in images], {}),
        "a function": (TensorDataset(torch.arange(SAMPLES), images), {"teacher_input": lambda batch: batch[1]}),
        "keywords by a function": (
            [{"x": image} for image in images],
            {"teacher_input": lambda batch: {"images": batch["x"]}},
        ),
        "loader": (DataLoader(TensorDataset(images), batch_size=7, num_workers=2), {}),
    }[form]
    store = build(tmp_path, teacher, data, dtype=torch.float32, **options)
    assert torch.allclose(store[:]["2"], live_tokens(teacher, images), atol=1e-6)


def test_the_teacher_is_left_as_it_was(tmp_path):
    teacher = Teacher().train()
    teacher[3].eval()
    build(tmp_path, teacher)
    assert teacher.training and teacher[4].training and not teacher[3].training
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module._forward_hooks for module in teacher.modules())


def test_an_exported_teacher(tmp_path):
    teacher, data = nn.Sequential(*Teacher().eval()), Images()  # without its counter
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    exported = torch.export.export(teacher, (data.images,), dynamic_shapes=shapes).module()
    store = build(tmp_path, exported, taps=[""], dtype=torch.float32)
    assert torch.allclose(store[:][""], teacher(data.images).detach(), atol=1e-6)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_indices_in_any_order_and_repeated(tmp_path):
    store = build(tmp_path, taps=TAPS, dtype=torch.float32)
    every = store[:]
    order = torch.randint(SAMPLES, (200,))
    for indices in (order, order.tolist(), order.numpy(), tuple(order.tolist()), order.int()):
        features = store[indices]
        for key, values in every.items():
            assert torch.equal(features[key], values[order])
    assert torch.equal(store[SAMPLES - 1]["2"], every["2"][-1])
    assert torch.equal(store[numpy.int64(9)]["2"], every["2"][9])
    assert torch.equal(store[5:30:7]["2"], every["2"][5:30:7])
    assert store[[]]["2"].shape == (0, 4, 6)
    assert len([*store]) == SAMPLES


def test_indices_that_are_no_samples_are_refused(tmp_path):
    store = build(tmp_path)
    for indices in (SAMPLES, -1, [0, SAMPLES], torch.tensor([-1])):
        with pytest.raises(IndexError, match=rf"index (-1|{SAMPLES}) is not in the store's {SAMPLES} samples"):
            store[indices]
    for indices in ("2", 1.5, torch.tensor([0.0]), torch.ones(SAMPLES, dtype=torch.bool), torch.zeros(1, 1).long()):
        with pytest.raises(TypeError, match="indices must be"):
            store[indices]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_dataloader_workers_read_it(tmp_path, start):
    data = Images()
    store = build(tmp_path, data=data, dtype=torch.float32)
    every = store[:]["2"]  # mapped in this process, too
    workers = 2 if start == "fork" else 1  # a spawned one imports PyTorch first
    data = StackDataset(data, store)
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=workers, multiprocessing_context=start)
    met = []
    for (_, _, index), features in loader:
        assert torch.equal(features["2"], every[index])
        met += index.tolist()
    assert sorted(met) == [*range(SAMPLES)]


def test_pickled_it_reads_anew(tmp_path):
    store = build(tmp_path)
    before = store[[3, 1]]["2"]
    text = pickle.dumps(store)
    assert len(text) < 2000
    assert torch.equal(pickle.loads(text)[[3, 1]]["2"], before)


def test_reading_needs_no_safetensors_and_building_says_what_to_install(tmp_path, monkeypatch):
    expected = build(tmp_path / "a")[:]["2"]
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert torch.equal(vk.FeatureStore(tmp_path / "a")[:]["2"], expected)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vkd_kernels\[store\]'"):
        build(tmp_path / "b")


# ---- resuming --------------------------------------------------------------------------------------------------------


def start_build_that_stops(folder):
    """In a process of its own: its teacher stops in the middle of the fourth shard."""
    return processes.Python([sys.executable, "-m", "tests.helpers.stored_teachers", str(folder), str(3 * SHARD + 4)])


def wait_for_shards(process, folder, count):
    deadline = time.monotonic() + 300
    while len(finished(folder)) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finished(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.safetensors")}


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_killed_while_building_it_continues_and_no_finished_shard_is_lost(tmp_path, sent):
    folder = tmp_path / "store"
    process = start_build_that_stops(folder)
    wait_for_shards(process, folder, 2)
    process.send_signal(sent)
    process.communicate(timeout=300)
    before = finished(folder)
    assert 2 <= len(before) < SHARDS
    with pytest.raises(ValueError, match=rf"incomplete: of {SHARDS} shards \d are missing .* with the same arguments"):
        vk.FeatureStore(folder)
    killed = [folder / f"shard-00006.safetensors.partial-{socket.gethostname()}-{pid}" for pid in (process.pid, 2**99)]
    for partial in killed:
        partial.write_bytes(b"of a process that was killed")
    teacher = Teacher()
    store = build(folder, teacher)
    assert teacher.images <= (SHARDS - len(before)) * SHARD + 3
    assert before.items() <= finished(folder).items()
    assert not [*folder.glob("*.partial*")]
    expected = live_tokens(teacher, Images().images)
    assert torch.equal(store[:]["2"], expected.half())


def test_what_others_are_writing_stays(tmp_path):
    writing = [
        f"shard-00003.safetensors.partial-{writer}" for writer in (f"{socket.gethostname()}-{os.getppid()}", "b-1")
    ]
    for name in writing:
        (tmp_path / name).write_bytes(b"half of a shard")
    build(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.partial-*")) == sorted(writing)


def test_two_jobs_that_build_one_store_both_finish(tmp_path, monkeypatch):
    """The other one finishes while this one writes its last shard."""
    write_bytes = Path.write_bytes

    def slow_write_bytes(path, content):
        count = write_bytes(path, content)
        if path.name.startswith("shard-00006"):
            monkeypatch.setattr(Path, "write_bytes", write_bytes)
            other = processes.run_python("-m", "tests.helpers.stored_teachers", str(tmp_path), "1000", seconds=300)
            assert other.returncode == 0, other.stderr
        return count

    monkeypatch.setattr(Path, "write_bytes", slow_write_bytes)
    assert torch.isfinite(build(tmp_path)[:]["2"]).all()
    assert not [*tmp_path.glob("*.partial*")]


def test_a_complete_store_is_opened_and_not_computed_again(tmp_path, capsys):
    build(tmp_path)
    teacher = Teacher()
    before = finished(tmp_path)
    build(tmp_path, teacher, progress=True)
    assert teacher.images == 3 and finished(tmp_path) == before
    assert capsys.readouterr().err == ""


def test_a_full_disk_leaves_what_is_finished(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(
            OSError, match="finished shards are kept: build it again with the same arguments to continue"
        ):
            build(tmp_path / "store", data=torch.randn(2000, 5, 4), shard_samples=1999)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [*tmp_path.glob("store/*partial*")]


def test_too_little_room_is_said_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 1000, 10))
    teacher = Teacher()
    with pytest.raises(OSError, match=r"needs 3 kB more in .*, where 10 B are free"):
        build(tmp_path, teacher)
    assert teacher.images <= 3 and [*tmp_path.iterdir()] == []  # another dtype may be tried in the same folder


def test_size_and_speed_are_said(tmp_path, capsys):
    build(tmp_path, progress=True)
    first, second, last = capsys.readouterr().err.splitlines()
    assert f"{SAMPLES} samples, 3 kB in float16 (60 B each), {SHARDS} shards; " in first and first.endswith("free")
    assert f"4 of {SAMPLES} samples, " in second and second.endswith("left")
    assert "complete after" in last


# ---- stale, foreign, damaged -----------------------------------------------------------------------------------------


def other_weights():
    teacher = Teacher()
    teacher[5].weight.data[0, 0] += 1e-3
    return teacher


def doubled(x):
    return 2 * x


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher": other_weights}, "weights: "),
        ({"taps": lambda: ["5"]}, "taps: '2' with teacher_pool='tokens'"),
        ({"taps": lambda: [{"teacher": "2", "teacher_pool": "tokens", "teacher_skip": 1}]}, "taps: "),
        ({"data": lambda: Images(SAMPLES - 1)}, f"samples: {SAMPLES} there, {SAMPLES - 1} now"),
        ({"data": lambda: Images(transform=doubled)}, r"transform:  there, <function doubled> now"),
        ({"data": lambda: Images().images * 1.1}, "the teacher's input for the same samples differs"),
        ({"teacher_input": lambda: lambda batch: batch[0].flip(1)}, "the teacher's input for the same samples differs"),
        ({"transform": lambda: "center crop"}, "transform:  there, center crop now"),
        ({"dtype": lambda: torch.float32}, "dtype: float16 there, float32 now"),
    ],
)
def test_a_stale_store_says_what_differs(tmp_path, changed, message):
    build(tmp_path)
    before = finished(tmp_path)
    with pytest.raises(ValueError, match=rf"built from something else \({message}.*choose another folder, or delete"):
        build(tmp_path, **{name: value() for name, value in changed.items()})
    assert finished(tmp_path) == before


def test_a_changed_pool_function_of_the_same_name_is_noticed(tmp_path):
    factor = {"factor": 1}

    def taps():
        return [{"teacher": "2", "teacher_pool": lambda x: factor["factor"] * x.mean(1)}]

    build(tmp_path, taps=taps())
    build(tmp_path, taps=taps())
    factor["factor"] = 2
    with pytest.raises(ValueError, match="features of the same samples differ: another pool"):
        build(tmp_path, taps=taps())


def test_another_number_of_samples_per_shard_or_batch_continues(tmp_path):
    folder = tmp_path / "store"
    build(folder)
    for path in sorted(folder.glob("shard-*.safetensors"))[1:]:
        path.unlink()
    store = build(folder, shard_samples=20, batch_size=11)
    assert len(finished(folder)) == SHARDS
    assert torch.equal(store[:]["2"], live_tokens(Teacher(), Images().images).half())


def test_taps_in_another_order_or_some_of_them_are_served_by_the_store(tmp_path):
    twice = [{"teacher": "2", "teacher_pool": "mean_tokens"}, {"teacher": "2", "teacher_pool": "class_token"}]
    before = build(tmp_path, taps=[*twice, ""])[:]
    for taps in (["", *twice], twice[1:], [""], twice[::-1]):
        teacher = Teacher()
        store = build(tmp_path, teacher, taps=taps)
        assert teacher.images == 3 and store[:].keys() == before.keys()
    next(tmp_path.glob("shard-*")).unlink()
    with pytest.raises(ValueError, match=r"missing need more taps: give '2' with teacher_pool='mean_tokens', too, to"):
        build(tmp_path, taps=["", twice[1]])
    after = build(tmp_path, taps=["", *twice])[:]
    assert all(torch.equal(after[key], values) for key, values in before.items())
    with pytest.raises(ValueError, match=r"taps: .*choose another folder, or delete this one if nothing needs it"):
        build(tmp_path, taps=["", "5"])


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match=r"not empty and holds no feature store \(it holds thesis.txt\)"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(FileExistsError, match="is a file"):
        build(tmp_path / "thesis.txt")
    with pytest.raises(FileNotFoundError, match=r"holds no feature store: FeatureStore.build makes one"):
        vk.FeatureStore(tmp_path)


def test_other_files_beside_a_store_stay(tmp_path):
    build(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "shard-00002.safetensors").unlink()
    build(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_damaged_shards_are_named(tmp_path):
    build(tmp_path / "a")
    build(tmp_path / "b", other_weights())
    shard = tmp_path / "a" / "shard-00001.safetensors"
    content = shard.read_bytes()
    for damaged in (content[:-1], content[:20], b"", b"\xff" * 20, (tmp_path / "b" / shard.name).read_bytes()):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"shard-00001.* is damaged .*delete this file; FeatureStore.build"):
            vk.FeatureStore(tmp_path / "a")[SHARD]
    shard.unlink()
    assert torch.isfinite(build(tmp_path / "a")[SHARD]["2"]).all()
    (tmp_path / "a" / "store.json").write_text("{")
    with pytest.raises(ValueError, match=r"store.json is damaged .*delete the folder"):
        vk.FeatureStore(tmp_path / "a")
    (tmp_path / "a" / "store.json").write_text(json.dumps({"format": "of the future"}))
    with pytest.raises(ValueError, match="is not of the format 'vkd_kernels feature store 1'"):
        vk.FeatureStore(tmp_path / "a")


def test_a_file_that_cannot_be_read_is_not_to_be_deleted(tmp_path, monkeypatch):
    store = build(tmp_path)

    def refused(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refused)
        patch.setattr("pathlib.Path.read_text", refused)
        for read in (lambda: store[0], lambda: vk.FeatureStore(tmp_path)):
            with pytest.raises(PermissionError, match=r"cannot read .* \(Permission denied\)$"):
                read()
    (tmp_path / "shard-00000.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="shard-00000.safetensors is gone since .* computes it again"):
        store[0]


def test_a_relative_folder_is_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stores = build("features"), vk.FeatureStore("features")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for store in (*stores, pickle.loads(pickle.dumps(stores[1]))):
        assert store.folder == tmp_path / "features" and torch.isfinite(store[:]["2"]).all()


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_features_of_several_sizes_are_refused(tmp_path):
    data = [torch.randn(5 + (index == 30), 4) for index in range(SAMPLES)]
    with pytest.raises(ValueError, match=r"one shape for all samples, \(5, 6\); the samples 30 to 30 have \(6, 6\)"):
        build(tmp_path, nn.Linear(4, 6), data, [{"teacher": "", "teacher_pool": "tokens"}], batch_size=1)


class Stream(IterableDataset):
    def __iter__(self):
        yield from Images()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data": DataLoader(Images(), shuffle=True)}, ValueError, "all of it in order"),
        ({"data": Stream()}, TypeError, "data must have a length"),
        ({"data": DataLoader(Stream())}, ValueError, "all of it in order"),
        ({"data": DataLoader(Images(), batch_size=None)}, ValueError, "batch_size=None gives no batches"),
        ({"data": []}, ValueError, "data is empty"),
        ({"taps": []}, TypeError, "taps must be a list"),
        ({"taps": ["22"]}, ValueError, "teacher has no module '22'"),
        ({"taps": [3]}, TypeError, "taps must be names"),
        ({"taps": [{"teacher": "2", "pool": "tokens"}]}, TypeError, "pool"),
        ({"taps": ["2"]}, ValueError, r"must have the layout \(N, C\)"),
        (
            {"taps": [{"teacher": "2", "teacher_pool": lambda x: x.flatten(0, 1)}]},
            ValueError,
            "3 samples in this",
        ),
        ({"teacher": "resnet"}, TypeError, "teacher must be a torch.nn.Module"),
        ({"teacher": Teacher().to("meta")}, ValueError, r"its 0.weight is on the meta device"),
        ({"dtype": torch.int8}, ValueError, "dtype must be one of"),
        ({"dtype": "float16"}, ValueError, "dtype must be one of"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"shard_samples": 0}, ValueError, "shard_samples must be at least 1"),
        ({"rank": 1}, ValueError, "rank and world_size go together"),
        ({"rank": 2, "world_size": 2}, ValueError, r"rank must be in \[0, world_size\)"),
        ({"teacher_input": 3}, TypeError, "teacher_input must be a function"),
        ({"mask": lambda batch: torch.ones(2, 5)}, ValueError, r"mask must give .* for the 3 samples.*shape \(2, 5\)"),
        ({"mask": lambda batch: torch.ones(())}, ValueError, r"mask must give a tensor \(N, tokens\)"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        build(tmp_path, **arguments)
    assert not [*tmp_path.iterdir()]
