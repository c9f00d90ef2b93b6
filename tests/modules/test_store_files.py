"""The files of a FeatureStore: how many are open, whose they are, what they hold, on which file systems they are."""

import errno
import hashlib
import json
import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vkd_kernels as vk
from tests.helpers.stored_teachers import SAMPLES, SHARD, Images, Teacher, build, live_tokens
from vkd_kernels.store import build as builder
from vkd_kernels.store import reader


def open_files():
    return len(os.listdir("/dev/fd"))


def test_a_store_of_more_shards_than_a_process_may_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MOST_MAPS", 5)
    store = build(tmp_path, shard_samples=1)
    before = open_files()
    expected = live_tokens(Teacher(), Images().images).half()
    for indices in (torch.arange(SAMPLES), torch.randint(SAMPLES, (200,))):
        assert torch.equal(store[indices]["2"], expected[indices])
        assert open_files() == before + 5


def test_a_file_system_that_takes_no_fsync_of_folders(tmp_path, monkeypatch):
    fsync = os.fsync

    def of_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    assert len(build(tmp_path)) == SAMPLES
    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(OSError, match="cannot write .*No space left"):  # of a file it is an error as before
        build(tmp_path / "b")


def refused(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- whose they are --------------------------------------------------------------------------------------------------


OTHER = "the teacher's input for the same samples differs: other data, or another transform"


def other_images():
    """As many, of the same shape."""
    data = Images()
    data.images = data.images.flip(0)
    return data


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expected(data):
    return live_tokens(Teacher(), data.images).half()


def test_a_shard_of_other_data_is_noticed(tmp_path):
    build(tmp_path / "a")
    build(tmp_path / "b", data=other_images())
    shutil.copy(tmp_path / "a" / "shard-00001.safetensors", tmp_path / "b")
    store = build(tmp_path / "b", data=other_images())
    assert torch.equal(store[:SHARD]["2"], expected(other_images())[:SHARD])
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is damaged \(it belongs to another store\)"):
        store[SHARD]


def test_without_its_manifest_a_store_is_still_of_its_data(tmp_path):
    build(tmp_path)
    (tmp_path / "store.json").unlink()
    before = content_of(tmp_path)
    with pytest.raises(ValueError, match=OTHER):
        build(tmp_path, data=other_images())
    assert content_of(tmp_path) == before
    teacher = Teacher()
    store = build(tmp_path, teacher)
    assert teacher.images == 6 and torch.equal(store[:]["2"], expected(Images()))
    for name in ("store.json", "probe.safetensors"):
        (tmp_path / name).unlink()
    store = build(tmp_path, data=other_images())
    with pytest.raises(ValueError, match="belongs to another store"):
        store[0]


def meanwhile(monkeypatch, step, other_job):
    """The other job runs when this one comes to the step."""
    run_step = getattr(builder, step)

    def interrupted(*arguments):
        monkeypatch.setattr(builder, step, run_step)
        other_job()
        return run_step(*arguments)

    monkeypatch.setattr(builder, step, interrupted)


def no_link(*_):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("link", [os.link, no_link])
def test_a_job_of_other_data_that_comes_second_to_one_folder_is_refused(tmp_path, monkeypatch, link):
    monkeypatch.setattr(os, "link", link)
    meanwhile(monkeypatch, "check_views", lambda: build(tmp_path))
    with pytest.raises(ValueError, match=OTHER):
        build(tmp_path, data=other_images())
    assert torch.equal(vk.FeatureStore(tmp_path)[:]["2"], expected(Images()))
    assert not [*tmp_path.glob("*.partial*")]


@pytest.mark.parametrize("link", [os.link, no_link])
def test_a_job_that_has_written_its_samples_first_keeps_the_folder(tmp_path, monkeypatch, link):
    def other_job():
        with pytest.raises(ValueError, match=OTHER):
            build(tmp_path, data=other_images())

    monkeypatch.setattr(os, "link", link)
    meanwhile(monkeypatch, "check_fresh", other_job)
    assert torch.equal(build(tmp_path)[:]["2"], expected(Images()))


def test_two_jobs_of_one_store_agree_whichever_writes_the_manifest(tmp_path, monkeypatch):
    meanwhile(monkeypatch, "check_fresh", lambda: build(tmp_path, shard_samples=20))
    teacher = Teacher()
    store = build(tmp_path, teacher)
    assert teacher.images == 6 and torch.equal(store[:]["2"], expected(Images()))
    assert len([*tmp_path.glob("shard-*")]) == 3


def test_a_store_of_an_earlier_version_is_opened_and_continued(tmp_path):
    """Its manifest says nothing of the data."""
    build(tmp_path)
    manifest = json.loads((tmp_path / "store.json").read_text())
    del manifest["data"]
    (tmp_path / "store.json").write_text(json.dumps(manifest))
    signed = {name: value for name, value in manifest.items() if name not in ("format", "vkd_kernels")}
    identity = hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()[:16]
    for path in tmp_path.glob("shard-*"):
        save_file(load_file(path), path, {"store": identity})
    (tmp_path / "shard-00002.safetensors").unlink()
    assert torch.equal(build(tmp_path)[:]["2"], expected(Images()))
    assert torch.equal(vk.FeatureStore(tmp_path)[:]["2"], expected(Images()))


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path):
    data = Images()
    data.images[17] = 1e6
    with pytest.raises(ValueError, match=r"'2' are not finite in torch.float16 at sample 17: .*bfloat16 holds it"):
        build(tmp_path / "a", data=data)
    build(tmp_path / "b", data=data, dtype=torch.bfloat16)
    data.images[17] = float("nan")
    with pytest.raises(ValueError, match="at sample 17: the teacher itself gives NaN or Inf"):
        build(tmp_path / "c", data=data)
    faint = nn.Sequential(nn.Linear(4, 6, bias=False))
    data, taps = torch.ones(SAMPLES, 4), [{"teacher": "0"}]
    data[0] = 0  # of which zeros are right
    build(tmp_path / "d", faint, data, taps)
    nn.init.constant_(faint[0].weight, 1e-9)
    with pytest.raises(ValueError, match=r"'0' are all 0 in torch.float16 at sample 1: .* 4e-09; .*bfloat16 holds it"):
        build(tmp_path / "e", faint, data, taps)
    nn.init.constant_(faint.double()[0].weight, 1e-60)
    with pytest.raises(ValueError, match=r"all 0 in torch.bfloat16 .* 4e-60; dtype=torch.float64 holds it"):
        build(tmp_path / "f", faint, data.double(), taps, dtype=torch.bfloat16)


def test_world_size_without_a_rank_is_not_torchruns(tmp_path, monkeypatch):
    """As clusters set it: nobody would compute the other rank's shards."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert len(build(tmp_path)) == SAMPLES
