"""What can go wrong in a run: disks, files, folders, images that cannot be read."""

import resource
import signal

import pytest
import torch

from tests.recipes.toy import StopAt, distill, train
from vkd_kernels.recipes import engine, loading, runs
from vkd_kernels.recipes.config import OptionError
from vkd_kernels.recipes.runs import RunError


class Items:
    """Of which two cannot be read."""

    def __init__(self, broken=()):
        self.broken = broken

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("damaged")
        return index


def with_a_draw(index):
    return index, torch.rand(())


def read(keys, workers=0, broken=(), at_once=0):
    return loading.read(loading.Views(Items(broken), with_a_draw), keys, list, workers=workers, at_once=at_once)


def take(start, count, workers=0, broken=()):
    def key(epoch, image):
        return loading.Key(image, (3, epoch, image))

    stream = read(loading.epochs(10, 4, seed=3, start=start, mine=slice(None), key=key), workers, broken)
    return [[(index, draw.item()) for (index, draw), _ in next(stream)] for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_depend_on_seed_and_step_alone(workers):
    whole = take(0, 5)
    assert take(3, 2, workers) == whole[3:] and take(1, 2, workers) == whole[1:3]
    rows = [[index for index, _ in batch] for batch in whole]
    assert len({*rows[0], *rows[1]}) == len({*rows[2], *rows[3]}) == 8 and rows[0] != rows[2]
    assert [len(batch) for batch in read(map(loading.Key, range(9)), workers, at_once=5)] == [5, 4]
    with pytest.raises(RunError, match=r"cannot read image 3 \(damaged\)"):
        take(0, 3, workers, broken=(3,))
    with pytest.raises(OptionError, match=r"optim\.batch_size: 4, but there are only 3"):
        next(loading.epochs(3, 4, seed=3, start=0, mine=slice(None), key=loading.Key))


# ---- what can go wrong -----------------------------------------------------------------------------------------------


def test_a_full_disk_says_so_and_the_last_checkpoint_is_intact(tmp_path, finished):
    with pytest.raises(engine.Interrupted):
        train(tmp_path, StopAt(10))
    checkpoint = tmp_path / "vkd/seed-00/checkpoint.pt"
    before = checkpoint.read_bytes()
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))  # every write beyond it fails
    try:
        with pytest.raises(RunError, match=r"cannot write .*checkpoint\.pt: File too large; what was there before"):
            train(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint.read_bytes() == before and not list(tmp_path.rglob(f"*{runs.PARTIAL}"))
    train(tmp_path)
    name = "vkd/seed-00/student.safetensors"
    assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_a_checkpoint_of_another_architecture(tmp_path):
    with pytest.raises(engine.Interrupted):
        train(tmp_path, StopAt(3))
    with pytest.raises(RunError, match=r"checkpoint\.pt: model is of another architecture: .*size mismatch"):
        train(tmp_path, student__width=6)
    path = tmp_path / "vkd/seed-00/checkpoint.pt"
    runs.save_tensors(path, {k: v for k, v in runs.load_tensors(path).items() if k != "ema"})
    with pytest.raises(RunError, match=r"checkpoint\.pt: ema is missing"):
        train(tmp_path)
    runs.save_tensors(path, {"a": 1})
    with pytest.raises(RunError, match=r"checkpoint\.pt"):
        train(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '{"error": "x"}', '{"error": 1}', '{"error": NaN}', "null"])
def test_a_damaged_result_is_named(finished, tmp_path, capsys, content):
    folder = tmp_path / "run"
    assert distill(folder, "--seeds", 1, "--arms", "alone", "optim.steps=2") == 0
    (folder / "alone/seed-00/result.json").write_text(content)
    assert distill(folder, "--resume") == 2
    assert "result.json" in capsys.readouterr().err


def test_damaged_files_are_named(tmp_path):
    runs.save_tensors(tmp_path / "x.pt", {"a": torch.arange(5)})
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:100])
    with pytest.raises(RunError, match=r"x\.pt.*delete this file"):
        runs.load_tensors(tmp_path / "x.pt")
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match=r"teacher\.weights: cannot read tensors from .*x\.safetensors"):
        runs.load_weights(tmp_path / "x.safetensors", "teacher.weights")

    def fail(file):
        file.write(b"half of the n")
        raise OSError(28, "No space left on device")

    runs.write_text(tmp_path / "file", "old")
    with pytest.raises(RunError, match=r"cannot write .*file: No space left on device"):
        runs.write_atomically(tmp_path / "file", fail)
    assert (tmp_path / "file").read_text() == "old" and not list(tmp_path.glob(".*"))


def test_folders_are_locked_and_must_be_writable(tmp_path, capsys):
    with runs.own_folder(tmp_path / "a"), pytest.raises(RunError, match="in use"), runs.own_folder(tmp_path / "a"):
        pass
    with runs.own_folder(tmp_path / "a"):
        pass
    (tmp_path / "file").write_text("")
    assert distill(tmp_path / "file" / "run") == 2
    assert "vkd: error: cannot write" in capsys.readouterr().err


def test_an_error_in_a_training_is_the_commands(tmp_path, capsys):
    assert distill(tmp_path / "run", f"data.missing={tmp_path}/nowhere") == 2
    assert f"vkd: error: data.missing: there is no folder {tmp_path}/nowhere" in capsys.readouterr().err
    (tmp_path / "nowhere").mkdir()  # put right, it continues
    assert distill(tmp_path / "run", "--resume") == 0
