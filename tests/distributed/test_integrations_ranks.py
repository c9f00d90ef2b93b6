"""DDP and FSDP2 as people run them, on two gloo ranks: steps, accumulation, checkpoints, faults on one rank.

Every check compares with one process that holds all rows. Gradients of single steps under DDP: test_distributed.py.
"""

import copy
import re
import traceback
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import vkd_kernels as vk
from tests.helpers import processes
from vkd_kernels.ops.ortho_proj_loss.api import NORMALIZATIONS

OPTIONS = [{"normalization": name} for name in NORMALIZATIONS] + [{"loss": "mse", "affine": False}]
FIRST = {"even": 10, "uneven": 4, "empty": 0}  # rows of the first rank, of 20
ROWS = 20
TIGHT = {"rtol": 1e-7, "atol": 1e-9}  # float64; Adam divides by small numbers


class Distiller(nn.Module):
    def __init__(self, group=None, dtype=torch.float64, **options):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Linear(6, 5, dtype=dtype)
        options = {"affine": True, "scale": "learned", "eps": 1e-2, **options}
        self.loss = vk.OrthoProjLoss(5, 9, dtype=dtype, process_group=group, **options)

    def forward(self, x, y, mask=None):
        return self.loss(self.student(x), y, mask)


def batch(seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(ROWS, 9, generator=generator, dtype=torch.float64) * 2 + 0.5
    return x.to(dtype), y.to(dtype), torch.rand(ROWS, generator=generator) > 0.3


def part(whole, first=10):
    """This rank's rows."""
    return [v[:first] if dist.get_rank() == 0 else v[first:] for v in whole]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)


def train(module, batches):
    """Losses of steps of AdamW, and the parameters at the end."""
    optimizer, losses = adamw(module), []
    for arguments in batches:
        optimizer.zero_grad()
        loss = module(*arguments)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, [whole(p.detach()) for p in module.parameters()]


def same(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **{**TIGHT, **tolerance})


def orthogonality_error(p):
    p = p.detach().double()
    return (p.T @ p - torch.eye(p.shape[1])).abs().max().item()


def agree(tensor):
    """Every rank holds the same bits."""
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor.detach().contiguous())
    assert torch.equal(*both)


def sharded(module, separately=False, **options):
    if separately:
        fully_shard(module.loss, **options)
    return fully_shard(module, **options)


class TakesLabels(nn.Sequential):
    def forward(self, x, **_):
        return super().forward(x)


def feature_distiller(group=None, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        student, teacher = (TakesLabels(nn.Linear(6, n), nn.GELU(), nn.Linear(n, 4)).double() for n in (5, 9))
    pairs = [{"student": "0", "teacher": "0", "scale": "learned", "eps": 1e-2}]
    return vk.FeatureDistiller(student, teacher, pairs, example_input=batch()[0].to(device), process_group=group)


# ----------------------------------------------------------------------------------------------------------------- DDP


def ddp_training():
    for kwargs in ({}, {"static_graph": True}, {"find_unused_parameters": True, "gradient_as_bucket_view": True}):
        for options in OPTIONS:
            batches = [batch(seed) for seed in range(3)]
            module = DistributedDataParallel(Distiller(dist.group.WORLD, **options), **kwargs)
            mine = [part(b, first) for b, first in zip(batches, FIRST.values(), strict=True)]
            for ours, theirs in zip(train(module, mine), train(Distiller(**options), batches), strict=True):
                same(ours, theirs)


def ddp_gradient_accumulation():
    module, alone = DistributedDataParallel(Distiller(dist.group.WORLD)), Distiller()
    batches = [batch(seed) for seed in range(3)]
    for b in batches[:2]:
        with module.no_sync():
            module(*part(b)).backward()
    module(*part(batches[2], 4)).backward()
    for b in batches:
        alone(*b).backward()
    same([p.grad for p in module.parameters()], [p.grad for p in alone.parameters()])


def ddp_student_and_loss_each_wrapped():
    """``DDP(student)`` and ``DDP(loss)`` side by side, the loss with its group: steps of AdamW equal one device's."""
    for options in OPTIONS:
        batches = [batch(seed) for seed in range(3)]
        module, alone = Distiller(dist.group.WORLD, **options), Distiller(**options)
        student, loss = DistributedDataParallel(module.student), DistributedDataParallel(module.loss)
        optimizer = adamw(module)
        for b, first in zip(batches, FIRST.values(), strict=True):
            x, y, mask = part(b, first)
            optimizer.zero_grad()
            loss(student(x), y, mask).backward()
            optimizer.step()
        same(module.parameters(), train(alone, batches)[1])
        for parameter in module.parameters():
            agree(parameter)


def ddp_nan_on_one_rank_skips_the_step_on_both():
    module = DistributedDataParallel(Distiller(dist.group.WORLD, dtype=torch.float32))
    before = [p.detach().clone() for p in module.parameters()]
    optimizer, scaler = adamw(module), torch.amp.GradScaler("cpu")
    x, y, _ = part(batch(dtype=torch.float32))
    if dist.get_rank() == 0:
        x[3, 2] = torch.nan
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(x, y)
    assert loss.isnan()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    same(module.parameters(), before, rtol=0, atol=0)


def ddp_all_ranks_masked():
    for options in OPTIONS:
        for rows in (part(batch()), part(batch(), ROWS)):  # the second: no row at all on one rank
            module = DistributedDataParallel(Distiller(dist.group.WORLD, **options))
            loss = module(rows[0], rows[1], torch.zeros(len(rows[0]), dtype=torch.bool))
            loss.backward()
            assert loss == 0 and all(not p.grad.any() for p in module.parameters())


def ddp_autocast():
    module = DistributedDataParallel(Distiller(dist.group.WORLD, dtype=torch.float32))
    x, y, mask = part(batch(dtype=torch.float32), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(x, y, mask).backward()
        alone = Distiller(dtype=torch.float32)
        alone(*batch(dtype=torch.float32)).backward()
    same([p.grad for p in module.parameters()], [p.grad for p in alone.parameters()], rtol=2e-2, atol=2e-4)


def ddp_of_a_feature_distiller():
    alone = feature_distiller()
    alone(batch()[0])[1]["total"].backward()
    theirs = [p.grad for p in alone.parameters() if p.grad is not None]
    for first in FIRST.values():
        module = DistributedDataParallel(feature_distiller(dist.group.WORLD), find_unused_parameters=True)
        module(part(batch(), first)[0])[1]["total"].backward()
        same([p.grad for p in module.parameters() if p.grad is not None], theirs)


def ddp_diagnostics_are_those_of_all_rows():
    mask = batch()[2]
    metrics = feature_distiller()(batch()[0], masks={"0->0": mask}, metrics=True)[2]
    assert len(metrics) == 6
    for first in FIRST.values():
        module = DistributedDataParallel(feature_distiller(dist.group.WORLD))
        x, mine = part((batch()[0], mask), first)
        theirs = module(x, masks={"0->0": mine}, metrics=True)[2]
        assert theirs.keys() == metrics.keys()
        same(theirs.values(), metrics.values())


def ddp_total_rows_are_those_of_all_ranks():
    expected = feature_distiller()(batch()[0])[1]["total"] / 2
    for first in FIRST.values():
        module = DistributedDataParallel(feature_distiller(dist.group.WORLD))
        same([module(part(batch(), first)[0], total_rows=2 * ROWS)[1]["total"]], [expected])


def ddp_items_are_those_of_all_ranks():
    """Trainer multiplies the loss by the number of ranks, because DDP averages their gradients."""
    x, labels = batch()[0], torch.where(batch()[2], 1, -100)
    given = {"num_items_in_batch": 2 * ROWS}
    expected = feature_distiller()(x, labels=labels, **given)[1]["total"] / 2
    for first in FIRST.values():
        module = DistributedDataParallel(feature_distiller(dist.group.WORLD))
        mine, of_mine = part((x, labels), first)
        same([module(mine, labels=of_mine, **given)[1]["total"]], [expected])


def ddp_evaluation_has_no_collective():
    module, (x,) = feature_distiller(dist.group.WORLD).eval(), part(batch()[:1], 4)
    with mock.patch.object(dist, "all_reduce", side_effect=AssertionError("a collective")):
        losses = module(x, total_rows=2 * ROWS, metrics=True)[1]
        module(x, labels=torch.ones(len(x)), num_items_in_batch=2 * ROWS)
    same([losses["total"]], [feature_distiller().eval()(x, total_rows=2 * ROWS)[1]["total"]])


# --------------------------------------------------------------------------------------------------------------- FSDP2


def fsdp_training():
    for separately in (False, True):
        for options in OPTIONS:
            batches = [batch(seed) for seed in range(3)]
            module = sharded(Distiller(dist.group.WORLD, **options), separately)
            mine = [part(b, first) for b, first in zip(batches, FIRST.values(), strict=True)]
            for ours, theirs in zip(train(module, mine), train(Distiller(**options), batches), strict=True):
                same(ours, theirs)


def fsdp_accumulation_clipping_and_checkpointing():
    class Checkpointed(Distiller):
        def forward(self, *arguments):
            return checkpoint(super().forward, *arguments, use_reentrant=False)

    module, alone = sharded(Checkpointed(dist.group.WORLD)), Distiller()
    for seed, last in ((0, False), (1, True)):
        module.set_requires_gradient_sync(last)
        module(*part(batch(seed), 4)).backward()
        alone(*batch(seed)).backward()
    same([whole(p.grad) for p in module.parameters()], [p.grad for p in alone.parameters()])
    norms = [whole(nn.utils.clip_grad_norm_(m.parameters(), 0.01)) for m in (module, alone)]
    same(norms[:1], norms[1:])
    # Clipping divides by the norm plus 1e-6, which PyTorch 2.8 adds to the part of the norm of each rank.
    slack = 1e-6 / norms[1].item()
    same([whole(p.grad) for p in module.parameters()], [p.grad for p in alone.parameters()], rtol=slack)


def fsdp_mixed_precision_keeps_the_projection_orthonormal():
    """The parameter comes in 16 bit; the matrix made of it is orthonormal in float32 all the same."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    seen = []

    class Watched(Distiller):
        def forward(self, x, y, mask=None):
            p = self.loss.projection.weight
            seen.append((self.student.weight.dtype, p.dtype, orthogonality_error(p)))
            assert self.loss.projection(self.student(x)).dtype == torch.bfloat16
            return super().forward(x, y, mask)

    module = sharded(Watched(dist.group.WORLD, dtype=torch.float32), mp_policy=policy)
    losses, parameters = train(module, [part(batch(dtype=torch.float32), 4)] * 30)
    assert all(state[:2] == (torch.bfloat16, torch.float32) and state[2] <= 1e-5 for state in seen)
    alone = train(Distiller(dtype=torch.float32), [batch(dtype=torch.float32)] * 30)
    assert all(p.dtype == torch.float32 for p in parameters)
    same(losses[-1:], alone[0][-1:], rtol=3e-2, atol=0)


def fsdp_starts_from_the_meta_device():
    with torch.device("meta"):
        module = Distiller(dist.group.WORLD)
    torch.manual_seed(dist.get_rank())  # ranks that draw different numbers must still agree
    sharded(module).to_empty(device="cpu")
    for child in module.modules():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()
    for state in (module.loss.projection.map.signs, *(whole(p) for p in module.loss.parameters())):
        agree(state)
    assert whole(module.loss.scale).item() == (9 / 5) ** 0.5
    module.unshard()
    assert orthogonality_error(module.loss.projection.weight) < 1e-12
    module.reshard()
    train(module, [part(batch())])


def fsdp_assignment_and_reading_of_the_projection():
    target = nn.init.orthogonal_(torch.empty(9, 5, dtype=torch.float64))
    module = sharded(Distiller(dist.group.WORLD))
    module.loss.projection.weight = target.roll(dist.get_rank(), 0)  # the first rank's is taken
    try:
        raise AssertionError(f"no error: {module.loss.projection.weight}")
    except TypeError as error:
        assert re.search(r"weight must be a whole tensor; got a DTensor of shape \(9, 5\).*unshard\(\)", str(error))
    module.unshard()
    p = module.loss.projection.weight.detach().clone()
    agree(p)
    if dist.get_rank() == 0:
        same([p], [target])
    module.reshard()


def fsdp_state_dicts():
    module = sharded(Distiller(dist.group.WORLD))
    module.loss.projection.weight = -torch.eye(9, 5, dtype=torch.float64)  # signs that a fresh module does not have
    train(module, [part(batch())])
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = get_model_state_dict(module, options=options)
    again = sharded(Distiller(dist.group.WORLD))
    set_model_state_dict(again, dict(state), options=options)  # which puts DTensors into the dict it is given
    assert torch.equal(again(*part(batch())), module(*part(batch())))
    expected = module(*part(batch()))
    if dist.get_rank() == 0:
        alone = Distiller()
        alone.load_state_dict(state)
        same([alone(*batch())], [expected])


def fsdp_evaluation_of_every_rank():
    """Between two steps: in eval mode a rank's loss is that of its own rows, and training goes on as without it."""
    module, alone = sharded(Distiller(dist.group.WORLD)), Distiller()
    optimizers = adamw(module), adamw(alone)
    for _ in range(2):
        for model, optimizer, arguments in zip((module, alone), optimizers, (part(batch(), 4), batch()), strict=True):
            optimizer.zero_grad()
            model.train()(*arguments).backward()
            optimizer.step()
        with torch.no_grad():
            same([module.eval()(*part(batch(seed=2), 4))], [alone.eval()(*part(batch(seed=2), 4))])
    module.reshard()
    same([whole(p.detach()) for p in module.parameters()], alone.parameters())


def fsdp_of_a_feature_distiller():
    alone = feature_distiller()
    alone(batch()[0])[1]["total"].backward()
    theirs = [p.grad for p in alone.parameters() if p.grad is not None]
    assert len(theirs) == 4  # the tapped layer, the projection, the scale
    for first in FIRST.values():
        module = fully_shard(feature_distiller(dist.group.WORLD))
        module(part(batch(), first)[0])[1]["total"].backward()
        same([whole(p.grad) for p in module.parameters() if p.grad is not None], theirs)
    copied = copy.deepcopy(alone)
    same([copied(batch()[0])[1]["total"]], [alone(batch()[0])[1]["total"]])


def fsdp_of_a_feature_distiller_from_the_meta_device():
    module = feature_distiller(dist.group.WORLD, device="meta")
    teacher = feature_distiller().teacher
    torch.manual_seed(dist.get_rank())  # ranks that draw different numbers must still agree
    fully_shard(module).to_empty(device="cpu")
    module.teacher.load_state_dict(teacher.state_dict())
    for child in module.modules():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()
    for state in (*module.pair_losses.buffers(), *(whole(p) for p in module.pair_losses.parameters())):
        agree(state)
    assert whole(module.pair_losses.of("0->0").scale).item() == (9 / 5) ** 0.5
    metrics = module(part(batch(), 4)[0], metrics=True)[2]
    assert metrics["diagnostics/0->0/orthogonality_error"] < 1e-12
    agree(metrics["loss"])


CHECKS = {name: f for name, f in vars().copy().items() if re.match("(ddp|fsdp)_", name)}


def worker(rank, folder):
    for name, check in CHECKS.items():
        try:
            check()
        except Exception:
            (folder / f"{name}-{rank}").write_text(traceback.format_exc()[-3000:])
            raise
        (folder / f"{name}-{rank}").touch()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{check: what each rank says of it}; ranks stay together, so the first failure is the last result."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    folder, reports = tmp_path_factory.mktemp("ranks"), {}
    try:
        processes.run_ranks(worker, folder, folder)
    except (AssertionError, TimeoutError) as error:
        reports["crash"] = str(error)
    return reports | {name: [path.read_text() for path in sorted(folder.glob(f"{name}-?"))] for name in CHECKS}


@pytest.mark.parametrize("name", CHECKS)
def test_ranks(results, name):
    assert not any(results[name]), "\n".join(results[name])
    assert len(results[name]) == 2, f"not reached: {results.get('crash')}"
