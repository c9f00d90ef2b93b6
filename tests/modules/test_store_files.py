"""The files of a FeatureStore: how many are open."""

import os

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
