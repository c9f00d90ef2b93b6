"""The files of a FeatureStore: how many are open, and on which file systems they are written."""

import errno
import os
import stat

import pytest
import torch

from tests.helpers.stored_teachers import SAMPLES, Images, Teacher, build, live_tokens
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
