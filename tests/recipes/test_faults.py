"""What can go wrong in a run: disks, files, folders, worker processes, images that cannot be read."""

import multiprocessing
import os
import resource
import signal
import sys
import time

import pytest
import torch

from tests.recipes.toy import TOY, distill, stopped_before, train
from vkd_kernels.files import partial_files
from vkd_kernels.recipes import compare, jobs, loading, runs, task
from vkd_kernels.recipes.config import OptionError
from vkd_kernels.recipes.runs import RunError

STUDENT = "vkd/seed-00/student.safetensors"


class Items:
    """Of which some cannot be read."""

    def __init__(self, broken=()):
        self.broken = broken

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("damaged")
        return index


def with_a_draw(index):
    return index, torch.rand(())


def read(keys, workers=0, broken=(), at_once=0):
    run = task.Run(workers=workers)
    return loading.read(loading.Views(Items(broken), with_a_draw), keys, list, run=run, at_once=at_once)


def take(start, count, workers=0, broken=()):
    def key(epoch, image):
        return loading.Key(image, (3, epoch, image))

    stream = read(loading.epochs(10, 4, seed=3, start=start, mine=slice(None), key=key), workers, broken)
    return [[(index, draw.item()) for (index, draw), _ in next(stream)] for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_depend_on_seed_and_step_alone(workers):
    whole = take(0, 5)
    assert take(3, 2, workers) == whole[3:]
    rows = [[index for index, _ in batch] for batch in whole]
    assert len({*rows[0], *rows[1]}) == len({*rows[2], *rows[3]}) == 8 and rows[0] != rows[2]
    assert [len(batch) for batch in read(map(loading.Key, range(9)), workers, at_once=5)] == [5, 4]
    with pytest.raises(RunError, match=r"^cannot read image 3 \(damaged\)"):
        take(0, 3, workers, broken=(3,))
    with pytest.raises(OptionError, match=r"optim\.batch_size: 4, but there are only 3"):
        next(loading.epochs(3, 4, seed=3, start=0, mine=slice(None), key=loading.Key))


# ---- disks, files and folders ----------------------------------------------------------------------------------------


def test_a_full_disk_says_so_and_the_last_checkpoint_is_intact(tmp_path, finished):
    with stopped_before(10), pytest.raises(jobs.Interrupted):
        train(tmp_path)
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
    assert checkpoint.read_bytes() == before and not partial_files(tmp_path)
    train(tmp_path)
    assert (tmp_path / STUDENT).read_bytes() == (finished / STUDENT).read_bytes()


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path):
    with stopped_before(10), pytest.raises(jobs.Interrupted):
        train(tmp_path)
    with pytest.raises(RunError, match=r"checkpoint\.pt: model is of another architecture: .*size mismatch"):
        train(tmp_path, student__width=6)
    path = tmp_path / "vkd/seed-00/checkpoint.pt"
    runs.save_tensors(path, {k: v for k, v in runs.load(path).items() if k != "ema"})
    with pytest.raises(RunError, match=r"checkpoint\.pt: ema is of another architecture"):
        train(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match=r"checkpoint\.pt.*delete this file"):
        train(tmp_path)


def test_damaged_files_are_named(tmp_path):
    for content in ("[]", "{", "null"):
        (tmp_path / "result.json").write_text(content)
        with pytest.raises(RunError, match=r"result\.json.*delete this file"):
            runs.load(tmp_path / "result.json")
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match=r"teacher\.weights: cannot read tensors from .*x\.safetensors"):
        runs.load_weights(tmp_path / "x.safetensors", "teacher.weights")


def test_folders_that_are_not_a_runs_are_not_touched(finished, tmp_path, monkeypatch, capsys):
    for name in ("thesis.partial-draft.tex", "downloads/.film.mkv.partial"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    few = ("--arms", "alone", "--seeds", 1, "optim.steps=2")
    for output, message in (
        (".", "neither empty nor a run"),
        (tmp_path / "thesis.partial-draft.tex" / "run", "cannot write"),
        ("/proc/vkd", "cannot write /proc/vkd"),
        (finished, "add --resume"),
    ):
        assert distill(output, *few) == 2
        assert message in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before
    assert distill("elsewhere", "--resume") == 2
    assert "elsewhere holds no run" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert distill(tmp_path / "empty", *few) == 0
    with runs.own_folder(tmp_path / "a"), pytest.raises(RunError, match="in use"), runs.own_folder(tmp_path / "a"):
        pass
    with runs.own_folder(tmp_path / "a"):
        pass


@pytest.mark.parametrize("content", ["", "{", "a: 1", "task: detection", f"task: {TOY}\noptim: {{steps: 3}}"])
def test_resume_refuses_a_damaged_or_foreign_folder(tmp_path, capsys, content):
    (tmp_path / "config.yaml").write_text(content)
    (tmp_path / "machine.json").write_text("{}")
    assert distill(tmp_path, "--resume", "optim.steps=4") == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "machine.json"]


def test_a_configuration_of_ones_own_is_not_overwritten(tmp_path, capsys):
    path, text = tmp_path / "config.yaml", f"task: {TOY}\noptim: {{steps: 2}}  # enough\n"
    path.write_text(text)
    for words, message in (((), "neither empty nor a run"), (("--resume",), "holds no run")):
        assert distill(tmp_path, "--config", path, *words) == 2
        assert message in capsys.readouterr().err and path.read_text() == text
    assert not {*os.listdir(tmp_path)} - {"config.yaml"}


@pytest.mark.parametrize("left", ["machine.json", "machine.json.partial-host-7", "config.yaml.partial-host-7"])
def test_a_run_that_was_killed_at_once_can_be_begun_again(left, tmp_path):
    (tmp_path / left).write_text("{}")  # what it writes first, or half of that
    with runs.own_folder(tmp_path):
        assert not partial_files(tmp_path)
    assert not runs.is_run(tmp_path)
    (tmp_path / "notes.partial-host-7").write_text("another program's")
    with pytest.raises(RunError, match=r"neither empty nor a run of this program \(it holds notes"):
        runs.own_folder(tmp_path).__enter__()


def test_a_package_that_the_report_needs_is_missed_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert distill(tmp_path / "run") == 2
    assert "matplotlib is missing: pip install 'vkd_kernels[recipes]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("ranks", "missing"), [(None, "WORLD_SIZE"), ("2", "LOCAL_WORLD_SIZE")])
def test_ranks_that_torchrun_did_not_start_are_refused(ranks, missing, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    if ranks:
        monkeypatch.setenv("WORLD_SIZE", ranks)
    assert distill(tmp_path / "run") == 2
    assert f"vkd: error: {missing} is missing, but RANK is 1: start ranks by torchrun" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("processes", [0, 1])
def test_an_error_in_a_training_is_the_commands(tmp_path, capsys, processes):
    assert distill(tmp_path / "run", f"data.missing={tmp_path}/nowhere", "--jobs", processes) == 2
    assert f"vkd: error: data.missing: there is no folder {tmp_path}/nowhere" in capsys.readouterr().err
    (tmp_path / "nowhere").mkdir()  # put right, it continues
    assert distill(tmp_path / "run", "--resume", "optim.steps=30") == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_is_said_by_that_rank_and_one_of_all_ranks_once(tmp_path, monkeypatch, capsys, rank):
    def train(**_):
        raise RunError("cannot read 7.jpg")

    monkeypatch.setattr(compare, "train", train)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert distill(tmp_path / "run", "--arms", "vkd") == 2
    assert capsys.readouterr().err == f"vkd: error: rank {rank}: cannot read 7.jpg\n"
    assert distill(tmp_path / "other", "--arms", "vkd", "teacher.width=101") == 2
    assert capsys.readouterr().err.count("teacher.width: at most 100") == (rank == 0)


# ---- worker processes and draws --------------------------------------------------------------------------------------


def test_a_failed_worker_ends_no_process_of_the_caller():
    bystander = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,))
    bystander.start()
    try:
        with pytest.raises(TypeError, match="quiet"):
            jobs.perform([[print]], processes=1, quiet=True)
        assert bystander.is_alive()
    finally:
        bystander.kill()
        bystander.join()


def test_seeds_of_several_numbers():
    task.seed_all(3, 1)
    first = torch.rand(4)
    assert torch.equal(first, torch.rand(4, generator=task.generator(3, 1)))
    assert not torch.equal(first, torch.rand(4, generator=task.generator(3, 2)))
