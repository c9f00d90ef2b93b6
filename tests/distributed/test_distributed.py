"""Two gloo ranks give the loss and the gradients of one process that holds every row."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import vkd_kernels as vk
from tests.helpers import processes

NORMALIZATIONS = ("layer_norm", "batch_norm", "whiten", "none")
SPLITS = {"even": 10, "uneven": 4, "empty": 0, "one rank all masked": 10}
BACKENDS = (None, "torch")
WITHOUT_A_GRAPH = ({}, {"affine": False, "scale": 1.0, "projection": "identity"})
needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)


class Distiller(nn.Module):
    """Student and loss inside one module, as they must be for gradients to be reduced."""

    def __init__(self, normalization, backend, group=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Linear(6, 5, dtype=torch.float64)
        self.loss = vk.OrthoProjLoss(
            5,
            9,
            normalization=normalization,
            eps=1e-2,
            dtype=torch.float64,
            backend=backend,
            process_group=group,
            **{"affine": True, "scale": "learned", **options},
        )

    def forward(self, x, y, mask):
        return self.loss(self.student(x), y, mask)


def rows(split):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(20, 9, generator=generator, dtype=torch.float64) * 2 + 0.5
    mask = torch.rand(20, generator=generator) > 0.3
    if split == "one rank all masked":
        mask[:10] = False
    return x, y, mask


def gradients(module, arguments):
    value = module(*arguments)
    value.backward()
    return value.detach(), [p.grad.clone() for p in module.parameters()]


def worker(rank):
    for normalization, backend, (split, first) in itertools.product(NORMALIZATIONS, BACKENDS, SPLITS.items()):
        whole = rows(split)
        mine = [x[:first] if rank == 0 else x[first:] for x in whole]
        module = Distiller(normalization, backend, dist.group.WORLD)
        assert copy.deepcopy(module).loss.process_group is dist.group.WORLD
        value, grads = gradients(DistributedDataParallel(module), mine)
        expected, wanted = gradients(Distiller(normalization, None), whole)
        case = lambda text, case=(normalization, backend, split): f"{case}: {text}"  # noqa: E731
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12, msg=case)
        for got, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11, msg=case)
    check_whitening(rank)
    check_a_group_given_later()


def check_a_group_given_later():
    for module in (vk.OrthoProjLoss(6, 9), vk.Standardization(9), vk.Whitening(9)):
        with pytest.raises(TypeError, match="process_group must be None or"):
            module.process_group = "world"
        module.process_group = dist.group.WORLD
        unpickled = pickle.loads(pickle.dumps(module))
        assert unpickled.process_group is None
    for of_all in (vk.Standardization(9, momentum=0.1), vk.Whitening(9, momentum=0.1)):
        vk.OrthoProjLoss(6, 9, normalization=of_all, process_group=dist.group.WORLD)
        pair = {"student": "", "teacher": "", "dims": (6, 9), "normalization": of_all}
        other = dist.new_group()
        vk.FeatureDistiller(nn.Identity(), nn.Identity(), [pair]).process_group = other
        assert of_all.process_group is dist.group.WORLD  # its own, that of the first loss
    for kind, owner in itertools.product((vk.Standardization, vk.Whitening), ("loss", "distiller")):
        check_a_group_that_changes(kind(9, momentum=0.1), owner)
    x, y, _ = (tensor.detach() for tensor in rows("even"))
    torch.manual_seed(0)
    given, later = vk.OrthoProjLoss(6, 9, process_group=dist.group.WORLD), vk.OrthoProjLoss(6, 9)
    later.load_state_dict(given.state_dict())
    later.process_group = dist.group.WORLD
    ranks_rows = slice(0, 4 + dist.get_rank())
    assert torch.equal(later.double()(x[ranks_rows], y[ranks_rows]), given.double()(x[ranks_rows], y[ranks_rows]))


def check_a_group_that_changes(targets, owner):
    if owner == "loss":
        module = vk.OrthoProjLoss(6, 9, normalization=targets, process_group=dist.group.WORLD)
    else:
        pair = {"student": "", "teacher": "", "dims": (6, 9), "normalization": targets}
        module = vk.FeatureDistiller(nn.Identity(), nn.Identity(), [pair], process_group=dist.group.WORLD)
    for group in (None, dist.new_group(), dist.group.WORLD, None):
        module.process_group = group
        assert targets.process_group is group
    if dist.get_rank() == 0:  # alone now: no collective to wait in
        targets(torch.randn(5, 9))
    targets.process_group = own = dist.new_group()
    for group in (dist.group.WORLD, None):
        module.process_group = group
        assert targets.process_group is own


def check_whitening(rank):
    _, y, mask = rows("even")
    ours, alone = vk.Whitening(9, momentum=0.1, process_group=dist.group.WORLD), vk.Whitening(9, momentum=0.1)
    mine = slice(0, 4) if rank == 0 else slice(4, 20)
    for _ in range(2):
        torch.testing.assert_close(ours(y[mine], mask[mine]), alone(y, mask)[mine])
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[name])


def one_rank_without_a_graph(rank):
    """Where the student of the first rank's rows is frozen, their statistics have no gradient, but the others' have."""
    x, y, mask = rows("uneven")
    mine = slice(0, 4) if rank == 0 else slice(4, 20)
    for backend, options in itertools.product(BACKENDS, WITHOUT_A_GRAPH):
        ours, alone = (Distiller("batch_norm", backend, group, **options) for group in (dist.group.WORLD, None))
        features = ours.student(x[mine]).detach() if rank == 0 else ours.student(x[mine])
        ours.loss(features, y[mine], mask[mine]).backward()
        features = torch.cat([alone.student(x[:4]).detach(), alone.student(x[4:])])
        alone.loss(features, y, mask).backward()
        for (name, parameter), theirs in zip(ours.named_parameters(), alone.parameters(), strict=True):
            if theirs.grad is not None:
                check_averaged_gradient(parameter, theirs.grad, f"{backend}, {options}, {name}")


def check_averaged_gradient(parameter, expected, message):
    """What DistributedDataParallel would make of the ranks' gradients."""
    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    dist.all_reduce(grad)
    torch.testing.assert_close(grad / 2, expected, rtol=1e-8, atol=1e-11, msg=message)


class DropsItsLastLayer(nn.Module):
    """As LayerDrop does it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]).double()
        self.drops = False

    def forward(self, x):
        x = self.layers[0](x)
        return x if self.drops else self.layers[1](x)


def an_optional_pair_skipped_on_one_rank(rank):
    """Its loss is that of the other rank's rows, as are its gradients."""
    x = rows("even")[0]
    for backend, projection in itertools.product(BACKENDS, ("orthogonal", "identity")):
        options = {"normalization": "batch_norm", "projection": projection, "optional": True}
        pairs = [{"student": f"layers.{i}", "teacher": "0", **options} for i in range(2)]
        torch.manual_seed(0)
        ours = vk.FeatureDistiller(
            DropsItsLastLayer(),
            nn.Sequential(nn.Linear(6, 9)).double(),
            pairs,
            example_input=x,
            backend=backend,
            process_group=dist.group.WORLD,
        )
        alone = copy.deepcopy(ours)
        alone.process_group = None
        ours.student.drops = rank == 0
        losses = ours(x[:10] if rank == 0 else x[10:])[1]
        losses["total"].backward()
        expected = alone(x[10:])[1]["layers.1->0"]
        torch.testing.assert_close(losses["layers.1->0"], expected, rtol=1e-9, atol=1e-12)
        (grad,) = torch.autograd.grad(expected, [alone.student.layers[1].weight])
        check_averaged_gradient(ours.student.layers[1].weight, grad, f"{backend}, {projection}")


def rank_without_a_graph(rank):
    one_rank_without_a_graph(rank)
    an_optional_pair_skipped_on_one_rank(rank)


@needs_gloo
def test_a_rank_without_a_graph_takes_part_in_the_backward_pass(tmp_path):
    processes.run_ranks(rank_without_a_graph, tmp_path, seconds=120)


@needs_gloo
def test_two_ranks_equal_one_process(tmp_path):
    processes.run_ranks(worker, tmp_path)


def leaves_a_file(rank, folder):
    (folder / f"rank-{rank}").touch()


@needs_gloo
def test_ranks_that_do_not_connect_try_once_more(tmp_path, monkeypatch):
    """Gloo's do so now and then on a busy machine; here a folder lies in the place of their store."""
    (tmp_path / "store-taken").mkdir()
    names = ["taken", "free", "taken", "taken"]
    monkeypatch.setattr(processes.uuid, "uuid4", lambda: names.pop(0))
    processes.run_ranks(leaves_a_file, tmp_path, tmp_path)
    assert {path.name for path in tmp_path.glob("rank-*")} == {"rank-0", "rank-1"}
    with pytest.raises(processes.NotConnected):
        processes.run_ranks(leaves_a_file, tmp_path, tmp_path)
