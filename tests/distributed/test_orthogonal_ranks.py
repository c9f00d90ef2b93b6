"""vkd_kernels.orthogonal under FSDP2 on two gloo ranks: sharding, 16-bit parameters, assignment, checkpoints."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import vkd_kernels as vk
from tests.helpers import processes

MAPS = ("cayley", "matrix_exp", "householder")


def model(orthogonal_map):
    torch.manual_seed(0)
    layers = nn.Linear(5, 9, bias=False), nn.Linear(9, 4, bias=False), nn.Linear(4, 4)
    return nn.Sequential(*(vk.orthogonal(layer, orthogonal_map=orthogonal_map) for layer in layers))


def train(module, x, steps=3):
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        module(x).float()[:, 0].square().mean().backward()
        optimizer.step()


def check_rank(rank):
    whole = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    mine = whole[:4] if rank == 0 else whole[4:]
    for orthogonal_map in MAPS:
        alone, sharded = model(orthogonal_map), model(orthogonal_map)
        for layer in sharded:
            fully_shard(layer)
        fully_shard(sharded)
        train(alone, whole)
        train(sharded, mine)
        state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
        loaded = model(orthogonal_map)
        if rank == 0:
            loaded.load_state_dict(state)
            for ours, theirs in zip(loaded, alone, strict=True):
                torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-4, atol=1e-5)

        in_16_bit = fully_shard(model(orthogonal_map), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        train(in_16_bit, mine)
        assert {p.dtype for p in in_16_bit.parameters()} == {torch.float32}
    # The matrix is whole between unshard() and reshard(); assigning it sets every rank's share.
    target = nn.init.orthogonal_(torch.empty(9, 5))
    dist.broadcast(target, 0)
    layer = fully_shard(vk.orthogonal(nn.Linear(5, 9, bias=False)))
    layer.weight = target
    layer.unshard()
    torch.testing.assert_close(layer.weight.detach(), target, rtol=0, atol=2e-6)
    layer.reshard()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_orthogonal_layers_train_and_save_when_they_are_sharded(tmp_path):
    processes.run_ranks(check_rank, tmp_path)
