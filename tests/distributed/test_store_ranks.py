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
    dist.barrier()  # the other rank may still be connecting
    dist.destroy_process_group()
    with mock.patch.dict(os.environ, RANK=str(rank), WORLD_SIZE="2"):
        share(rank, folder)


def test_torchrun_needs_no_process_group(tmp_path):
    processes.run_ranks(share_without_a_group, tmp_path, tmp_path / "features")
    check(tmp_path / "features")


def test_a_rank_that_never_comes_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("vkd_kernels.store.build.LONGEST_SILENCE", 0.5)
    with pytest.raises(TimeoutError, match=r"no sign of work .* 3 shards of rank 1 are missing.*rank=0, world_size=1"):
        build(tmp_path, rank=0, world_size=2)
    build(tmp_path, rank=0, world_size=1)
    check(tmp_path)


def test_a_build_that_only_one_rank_called_says_soon_what_it_waits_for(tmp_path, monkeypatch, capsys):
    """As in Lightning's prepare_data, where the others wait in a barrier."""
    monkeypatch.setattr("vkd_kernels.store.build.NOTABLE_SILENCE", 0.3)
    monkeypatch.setattr("vkd_kernels.store.build.LONGEST_SILENCE", 1.5)
    with pytest.raises(TimeoutError):
        build(tmp_path, rank=0, world_size=3)
    said = capsys.readouterr().err
    assert said.count("no sign of work") == 1
    assert "shards of ranks 1, 2 are missing" in said and "pass rank=0, world_size=1" in said and str(tmp_path) in said


def share_slowly(rank, folder):
    """One shard, of the first rank; batches come more often than the other one's patience ends, the shard does not."""
    with mock.patch("vkd_kernels.store.build.LONGEST_SILENCE", 4.0):
        build(folder, Teacher(seconds=0.6), batch_size=5, shard_samples=SAMPLES)


def test_a_rank_without_work_waits_as_long_as_another_one_works(tmp_path):
    processes.run_ranks(share_slowly, tmp_path, tmp_path / "features")
    check(tmp_path / "features")
    assert not [*tmp_path.glob("features/*.partial*")]


def test_every_rank_has_a_share_of_the_default_shards_and_a_store_keeps_its_own(tmp_path):
    options = {"shard_samples": None, "world_size": 3}
    for rank in (2, 1):
        with mock.patch("vkd_kernels.store.build.wait_for_others"), pytest.raises(ValueError, match="incomplete"):
            build(tmp_path, rank=rank, **options)
    teacher = Teacher()
    assert len(build(tmp_path, teacher, rank=0, **options)) == SAMPLES
    assert len([*tmp_path.glob("shard-*")]) == 3 and teacher.images == 17 + 3
    next(tmp_path.glob("shard-*")).unlink()
    build(tmp_path, shard_samples=None)
    assert len([*tmp_path.glob("shard-*")]) == 3
    check(tmp_path)
