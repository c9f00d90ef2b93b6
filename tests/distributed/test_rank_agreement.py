"""A loss with a process group whose ranks train projections of their own is an error; evaluation has no group."""

import copy
import pickle
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import vkd_kernels as vk
from tests.helpers import processes
from vkd_kernels.ops.ortho_proj_loss.ranks import checksums

S, T = 8, 32
SAID = re.compile(r"projections of the 2 ranks of process_group differ .* wrap\s+the loss too", re.DOTALL)

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)


def train(student, loss, rank, steps=20):
    """Steps of SGD, each rank on rows of its own; returns the largest difference of the ranks' projections."""
    generator = torch.Generator().manual_seed(100 + rank)
    x, y = torch.randn(32, 6, generator=generator), torch.randn(32, T, generator=generator)
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(student(x), y).backward()
        optimizer.step()
    weight = (loss.module if hasattr(loss, "module") else loss).projection.weight.detach()
    gathered = [torch.empty_like(weight) for _ in range(2)]
    dist.all_gather(gathered, weight.contiguous())
    return (gathered[0] - gathered[1]).abs().max().item()


def refused(action):
    with pytest.raises(RuntimeError, match=SAID):
        action()


def bare_loss_beside_ddp(rank, seed):
    torch.manual_seed(seed)
    student = DistributedDataParallel(nn.Linear(6, S))
    loss = vk.OrthoProjLoss(S, T, process_group=dist.group.WORLD)
    refused(lambda: train(student, loss, rank))


def bare_loss_beside_fully_shard(rank):
    torch.manual_seed(rank)
    student = nn.Linear(6, S)
    fully_shard(student)
    refused(lambda: train(student, vk.OrthoProjLoss(S, T, process_group=dist.group.WORLD), rank))


def distiller_with_a_sharded_student(rank):
    torch.manual_seed(rank)
    x = torch.randn(16, 6)
    pairs = [{"student": str(i), "teacher": "0", "dims": (S, T), "name": str(i)} for i in range(2)]
    distiller = vk.FeatureDistiller(
        nn.Sequential(nn.Linear(6, S), nn.Linear(S, S)),
        nn.Sequential(nn.Linear(6, T)),
        pairs,
        process_group=dist.group.WORLD,
    )
    fully_shard(distiller.student)
    refused(lambda: distiller(x))


def bare_scale_and_bias_of_a_projection_that_is_not_trained(rank, options, said):
    torch.manual_seed(0)
    student = DistributedDataParallel(nn.Linear(6, S))
    loss = vk.OrthoProjLoss(S, T, projection="identity", process_group=dist.group.WORLD, **options)
    with pytest.raises(RuntimeError, match=f"the {said} of the 2 ranks of process_group differ"):
        train(student, loss, rank)


def one_rank_near_the_limit(rank):
    """Where the difference is above the limit by one rank's size and below it by the other's, both raise."""
    torch.manual_seed(0)
    loss = vk.OrthoProjLoss(S, T, projection="linear", process_group=dist.group.WORLD)
    weight = loss.projection.weight
    (value,), (size,) = checksums([weight])
    u, v = (torch.arange(1, n + 1).float().sin() for n in (T, S))
    with torch.no_grad():  # a checksum of 3e-3 sizes; that of rank 1 is twice as large, and so is its size
        weight += (3e-3 * size - value) * torch.outer(u / u.norm(), v / v.norm())
        weight *= 1 + rank
    refused(lambda: loss(torch.randn(5, S), torch.randn(5, T)))


def both_wrapped(rank):
    torch.manual_seed(rank)
    for options in ({}, {"affine": True, "scale": "learned"}):
        student = DistributedDataParallel(nn.Linear(6, S))
        loss = DistributedDataParallel(vk.OrthoProjLoss(S, T, process_group=dist.group.WORLD, **options))
        assert train(student, loss, rank, steps=70) == 0.0


def counted_collectives(rank):
    """The checksum rides in the loss's; where it is compared, at the 1st, 2nd and 4th call, there is one more."""
    torch.manual_seed(0)
    sizes = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor, **options: sizes.append(tensor.numel()) or all_reduce(tensor, **options)
    try:
        loss = vk.OrthoProjLoss(S, T, process_group=dist.group.WORLD)
        for _ in range(3):
            loss(torch.randn(5, S), torch.randn(5, T))
        assert sizes == [1, 3, 1] * 2 + [1, 3]
        vk.OrthoProjLoss(S, T, process_group=dist.group.WORLD, reduction="sum")(torch.randn(5, S), torch.randn(5, T))
        assert sizes == [1, 3, 1] * 2 + [1, 3] + [3, 1]
    finally:
        dist.all_reduce = all_reduce


def evaluation_on_one_rank(rank):
    torch.manual_seed(0)
    loss = vk.OrthoProjLoss(S, T, process_group=dist.group.WORLD)
    loss.eval()
    if rank == 0:
        x, y = torch.randn(5, S), torch.randn(5, T)
        alone = vk.functional.ortho_proj_loss(x, y, loss.projection.weight)
        torch.testing.assert_close(loss(x, y), alone)
        assert loss.metrics(x, y)


def statistics_that_one_rank_has_loaded(rank):
    """DDP copies them, frozen, to the other rank, which then adds up no rows either."""

    def frozen(seed):
        rows = torch.randn(50, T, generator=torch.Generator().manual_seed(seed))
        module = vk.Whitening(T, momentum=1.0)
        module(rows * torch.rand(T, generator=torch.Generator().manual_seed(seed)))
        return module.freeze().state_dict()

    torch.manual_seed(0)
    whitening = vk.Whitening(T, momentum=0.1, process_group=dist.group.WORLD)
    loss = vk.OrthoProjLoss(S, T, normalization=whitening, process_group=dist.group.WORLD)
    model = DistributedDataParallel(loss)
    x, y = torch.randn(16, S), torch.randn(16, T)  # the same on both ranks
    for step in range(2):  # DDP's copies are not counted as changes in place
        if rank == 0:
            whitening.load_state_dict(frozen(step))
        model(x, y).backward()
        assert whitening.is_frozen
        matrices = [torch.empty(T, T, dtype=torch.float64) for _ in range(2)]
        dist.all_gather(matrices, whitening.matrix())
        assert torch.equal(*matrices)
    again = pickle.loads(pickle.dumps(whitening))
    again.process_group = dist.group.WORLD
    for changed in (again, copy.deepcopy(whitening)):
        changed.frozen.zero_()  # as a copy from another rank would write it
        changed(y)
        assert not changed.is_frozen


def worker(rank):
    bare_loss_beside_ddp(rank, seed=rank)  # as README's first example would be, with a group
    bare_loss_beside_ddp(rank, seed=0)  # the same at the start, apart after some steps
    bare_loss_beside_fully_shard(rank)
    distiller_with_a_sharded_student(rank)
    bare_scale_and_bias_of_a_projection_that_is_not_trained(rank, {"scale": "learned"}, "scales")
    bare_scale_and_bias_of_a_projection_that_is_not_trained(rank, {"affine": True, "loss": "mse"}, "scales|the biases")
    one_rank_near_the_limit(rank)
    both_wrapped(rank)
    counted_collectives(rank)
    evaluation_on_one_rank(rank)
    statistics_that_one_rank_has_loaded(rank)


def test_a_loss_beside_a_wrapped_student(tmp_path):
    processes.run_ranks(worker, tmp_path)
