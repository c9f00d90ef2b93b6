"""FeatureStore.build on two ranks: each writes its share, one process reads all."""

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import vkd_kernels as vk
from tests.helpers import processes
from tests.helpers.stored_teachers import SAMPLES, SHARD, Images, Teacher, build

SHARDS = -(-SAMPLES // SHARD)


def share(rank, folder):
    teacher = Teacher(seconds=0.02 * rank)
    store = build(folder, teacher)
    assert len(store) == SAMPLES  # also on the faster rank, which waits for the other
    mine = sum(min(SHARD, SAMPLES - shard * SHARD) for shard in range(rank, SHARDS, 2))
    assert mine <= teacher.images <= mine + 6  # and what tells a stale store


def check(folder):
    teacher = Teacher()
    tokens = teacher[2](teacher[1](teacher[0](Images().images)))
    assert torch.equal(vk.FeatureStore(folder)[:]["2"], tokens.detach().half())


def test_two_ranks_write_shares_that_one_process_reads(tmp_path):
    processes.run_ranks(share, tmp_path, tmp_path / "features")
    check(tmp_path / "features")


def test_two_ranks_continue_what_one_process_began(tmp_path):
    build(tmp_path / "features")
    for shard in (1, 2, 5):
        (tmp_path / "features" / f"shard-{shard:05d}.safetensors").unlink()
    processes.run_ranks(continue_, tmp_path, tmp_path / "features")
    check(tmp_path / "features")


def continue_(rank, folder):
    build(folder)


def share_without_a_group(rank, folder):
    dist.destroy_process_group()
    with mock.patch.dict(os.environ, RANK=str(rank), WORLD_SIZE="2"):
        share(rank, folder)


def test_torchrun_needs_no_process_group(tmp_path):
    processes.run_ranks(share_without_a_group, tmp_path, tmp_path / "features")
    check(tmp_path / "features")


def test_a_rank_that_never_comes_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("vkd_kernels.store.build.LONGEST_SILENCE", 0.5)
    with pytest.raises(TimeoutError, match=r"no shard has come from the other ranks.*rank=0, world_size=1"):
        build(tmp_path, rank=0, world_size=2)
    build(tmp_path, rank=0, world_size=1)
    check(tmp_path)
