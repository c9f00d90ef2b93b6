"""Whitening and Standardization: literal formulas, running statistics, freezing, casts, saving, loops people have."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import vkd_kernels as vk
from tests.helpers import processes
from vkd_kernels.ops.normalization import reference
from vkd_kernels.ops.normalization.api import METHODS

MODULES = {
    **{method: (lambda method=method, **o: vk.Whitening(7, method=method, eps=1e-2, **o)) for method in METHODS},
    "standardization": lambda **o: vk.Standardization(7, **o),
    "isotropic": lambda **o: vk.Standardization(7, isotropic=True, **o),
}
modules = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def features(n=50, c=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(c, c, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return torch.randn(n, c, dtype=torch.float64, generator=generator) @ mixing + 3


# ---------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("weights", [None, "mask", "weights"])
def test_standardization_of_a_batch_is_its_formula(weights, isotropic, dtype):
    x, w = features().to(dtype), None
    if weights is not None:
        w = (
            torch.arange(50) % 3 > 0
            if weights == "mask"
            else torch.rand(50, dtype=torch.float64) * (torch.rand(50) > 0.3)
        )
    rows, count = x.double(), torch.ones(50, dtype=torch.float64) if w is None else w.double()
    mean = (rows * count[:, None]).sum(0) / count.sum()
    variance = ((rows - mean).square() * count[:, None]).sum(0) / count.sum()
    expected = (rows - mean) / ((variance.mean() if isotropic else variance) + 1e-2).sqrt() * (count > 0)[:, None]
    got = vk.Standardization(7, isotropic=isotropic, eps=1e-2)(x.view(5, 10, 7), None if w is None else w.view(5, 10))
    assert got.dtype == dtype and got.shape == (5, 10, 7) and not got.requires_grad
    torch.testing.assert_close(got.view(50, 7), expected.to(dtype))


def test_standardization_of_a_batch_stands_a_mean_far_from_zero():
    x = features().float() + 1e4
    got = vk.Standardization(7)(x).double()
    rows = x.double()
    torch.testing.assert_close(
        got, (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5).sqrt(), rtol=1e-5, atol=1e-5
    )


def test_isotropic_standardization_keeps_ratios_of_distances():
    x = features()
    ratio = torch.cdist(vk.Standardization(7, isotropic=True)(x), vk.Standardization(7, isotropic=True)(x))
    ratio = ratio[0, 1:] / torch.cdist(x, x)[0, 1:]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


@modules
def test_running_statistics_pool_small_batches_to_those_of_all_rows(make):
    """To the last digits of float64, with counts and shares that no float32 has rounded."""
    x = features(7 * 40)
    module = make(momentum=1e-3)  # a cumulative average for the first 1000 batches
    for batch in x.split(7):
        module(batch)
    torch.testing.assert_close(module.running_mean, x.mean(0), rtol=1e-13, atol=1e-13)
    spread = torch.cov(x.T, correction=0)
    got = getattr(module, module.spread_name)
    torch.testing.assert_close(got, spread if got.dim() == 2 else spread.diagonal(), rtol=1e-12, atol=1e-12)
    assert module.batches_seen == 40


@pytest.mark.parametrize("isotropic", [False, True])
def test_standardization_uses_the_running_statistics_in_both_modes(isotropic):
    module = vk.Standardization(7, momentum=0.5, isotropic=isotropic)
    batches = [features(seed=seed) for seed in range(3)]
    mean, variance = batches[0].mean(0), batches[0].var(0, correction=0)
    for share, batch in zip((1.0, 0.5, 0.5), batches, strict=True):
        delta = batch.mean(0) - mean
        variance = (1 - share) * variance + share * batch.var(0, correction=0) + share * (1 - share) * delta.square()
        mean = mean + share * delta
        expected = (batch - mean) / ((variance.mean() if isotropic else variance) + 1e-5).sqrt()
        torch.testing.assert_close(module(batch), expected)
    torch.testing.assert_close(module.eval()(batch), expected)


@modules
def test_before_the_first_update_features_are_at_most_rotated(make):
    """By mean 0 and covariance I: ``pca`` turns the order of the channels around, ``phi_s`` mixes them."""
    x, module = features(), make(momentum=0.1)
    out = module.eval()(x) * (1 + (module.eps if isinstance(module, vk.Standardization) else 0)) ** 0.5
    torch.testing.assert_close(out @ out.T, x @ x.T)
    if getattr(module, "method", None) not in ("pca", "phi_s"):
        torch.testing.assert_close(out, x)


@modules
def test_eval_mode_uses_running_statistics_and_leaves_them(make):
    module = make(momentum=0.1)
    for seed in range(5):
        module(features(seed=seed))
    module.eval()
    before = copy.deepcopy(module.state_dict())
    one_row = module(features(1))
    assert one_row.isfinite().all() and one_row.norm() > 0
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@modules
def test_a_masked_batch_leaves_running_statistics_alone(make):
    module = make(momentum=0.1)
    module(features())
    before = copy.deepcopy(module.state_dict())
    out = module(torch.full((4, 7), math.nan), mask=torch.zeros(4, dtype=torch.bool))
    assert bool((out == 0).all()) and all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert bool((make()(torch.full((4, 7), math.nan), mask=torch.zeros(4, dtype=torch.bool)) == 0).all())


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@modules
def test_a_batch_that_is_not_finite_shows_and_leaves_running_statistics_alone(make, poison):
    """The first batch of a run, or a later one: what follows is as if it had never been."""
    module, clean = make(momentum=0.1), make(momentum=0.1)
    spoilt = features(seed=5)
    spoilt[4, 3] = poison
    for seed in range(3):
        before = copy.deepcopy(module.state_dict())
        assert not module(spoilt)[4].isfinite().all()
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
        assert torch.equal(module(features(seed=seed)), clean(features(seed=seed)))
    module(spoilt, mask=torch.arange(50) != 4)
    assert module.batches_seen == 4  # without the row it is a batch like any other


@modules
def test_gradscaler_skips_a_teacher_batch_that_overflows(make):
    torch.manual_seed(0)
    distill = vk.OrthoProjLoss(4, 7, normalization=make(momentum=0.1), loss="mse")
    optimizer, scaler = torch.optim.SGD(distill.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=16.0)
    losses = []
    for step in range(6):
        x, y = torch.randn(20, 4, requires_grad=True), features(20, seed=step).float()
        if step == 2:
            y[3, 2] = math.inf
        optimizer.zero_grad()
        losses.append(distill(x, y))
        scaler.scale(losses[-1]).backward()
        scaler.step(optimizer)
        scaler.update()
    assert [bool(loss.isfinite()) for loss in losses] == [step != 2 for step in range(6)]
    assert scaler.get_scale() == 8.0 and distill.normalization.batches_seen == 5


# ------------------------------------------------------------------------------------------- freezing, saving, copies


@modules
def test_frozen_statistics_stay_through_training_saving_and_resuming(make):
    module = make(momentum=0.1)
    module(features())
    assert module.freeze() is module
    before = copy.deepcopy(module.state_dict())
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    resumed = make(momentum=0.1)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for copied in (module, resumed, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.training
        copied(features(seed=3))
        assert all(torch.equal(v, before[k]) for k, v in copied.state_dict().items())
        assert torch.equal(copied(features(seed=4)), module(features(seed=4)))
    module.reset_parameters()
    module(features(seed=3))
    assert module.batches_seen == 1


@modules
@pytest.mark.parametrize("frozen", [False, True])
def test_averages_of_models(frozen, make):
    """By AveragedModel, which subtracts buffers, and by hand, as timm's ModelEmaV2 does."""
    module = make(momentum=0.1)
    module(features())
    if frozen:
        module.freeze()
    averaged = torch.optim.swa_utils.AveragedModel(module, use_buffers=True)
    by_hand = {name: value.clone() for name, value in module.state_dict().items()}
    for _ in range(20):
        averaged.update_parameters(module)
        for name, value in module.state_dict().items():
            by_hand[name].copy_(0.999 * by_hand[name] + 0.001 * value)
    loaded = make(momentum=0.1)
    loaded.load_state_dict(by_hand)
    for copied in (averaged.module, loaded):
        assert copied.is_frozen == frozen and (copied.frozen != 0) == frozen
        torch.testing.assert_close(copied.eval()(features()), module.eval()(features()))


@modules
def test_an_average_of_models_uses_its_averaged_statistics(make):
    """From its first step on: of the number of batches, an integer, the average stays 0 for long."""
    module, average = make(momentum=0.1), make(momentum=0.1).eval()
    fresh = average(features())
    for seed in range(20):
        module(features(seed=seed))
        for name, value in average.state_dict().items():  # as timm's ModelEmaV2 does
            value.copy_(0.99 * value + 0.01 * module.state_dict()[name])
    seen = make(momentum=0.1).eval()
    seen.load_state_dict({**average.state_dict(), "batches_seen": torch.tensor(20)})
    assert average.batches_seen == 0 and not torch.allclose(average(features()), fresh)
    assert torch.equal(average(features()), seen(features()))


def test_a_covariance_is_decomposed_when_it_has_changed(monkeypatch):
    decomposed, module = [], vk.Whitening(7, momentum=0.1)
    matrix = reference.whitening_matrix
    module(features())  # in training it is another one in every step, and not kept
    monkeypatch.setattr(reference, "whitening_matrix", lambda *a, **k: decomposed.append(1) or matrix(*a, **k))
    other = copy.deepcopy(module.freeze())
    expected = module(features(seed=1))
    assert torch.equal(module.eval()(features(seed=1)), expected) and len(decomposed) == 1
    assert torch.equal(other(features(seed=1)), expected) and len(decomposed) == 2
    with torch.inference_mode():
        assert torch.equal(module(features(seed=1)), expected) and len(decomposed) == 2
    other.load_state_dict(vk.Whitening(7, momentum=0.1).state_dict())
    assert not torch.allclose(other(features(seed=1)), expected) and len(decomposed) == 3
    module.eps = 0.5
    assert not torch.allclose(module(features(seed=1)), expected) and len(decomposed) == 4
    before = module(features(seed=1))
    module.running_covariance.data.mul_(100)  # not counted as a change, as what DDP copies into buffers
    torch.testing.assert_close(module(features(seed=1)), before / 10)


@modules
def test_a_resumed_run_goes_on_bit_for_bit(make):
    run = make(momentum=0.3)
    for seed in range(3):
        run(features(seed=seed))
    resumed = make(momentum=0.3)
    resumed.load_state_dict(run.state_dict())
    for seed in range(3, 6):
        assert torch.equal(resumed(features(seed=seed)), run(features(seed=seed)))


def test_whitening_checkpoints_of_version_0_1_load():
    module = vk.Whitening(7, momentum=0.1)
    module(features())
    state = module.state_dict()
    del state["frozen"]
    other = vk.Whitening(7, momentum=0.1)
    other.load_state_dict(state)
    assert torch.equal(other.running_covariance, module.running_covariance) and not other.is_frozen


@modules
def test_casts_leave_the_statistics_in_float64(make):
    module = make(momentum=0.1)
    module(features())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for cast in ("half", "bfloat16", "float", "double"):
        for mode in ("train", "eval"):
            model = nn.Sequential(copy.deepcopy(module), nn.Linear(7, 3))
            getattr(model, cast)()
            getattr(model, mode)()
            assert all(torch.equal(v, before[k]) for k, v in model[0].state_dict().items())
            x = getattr(features(seed=1), cast)()
            assert model[0](x).dtype == x.dtype and model[0](x).isfinite().all()


@modules
def test_statistics_are_shared_with_other_processes(make):
    module = make(momentum=0.1)
    module.share_memory()
    assert all(buffer.is_shared() for buffer in module.buffers())


def test_pairs_of_a_distiller_with_statistics_of_their_own():
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 5), nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 7))
    targets = {"a": vk.Standardization(7, momentum=0.1), "b": vk.Whitening(7, method="phi_s", momentum=0.1)}
    pairs = [
        vk.Pair(student="", teacher=index, name=name, dims=(5, 7), normalization=module)
        for index, (name, module) in zip("01", targets.items(), strict=True)
    ]
    distiller = vk.FeatureDistiller(student, teacher, pairs)
    x = torch.randn(20, 4)
    for _ in range(2):
        losses = distiller(x)[1]
        losses["total"].backward()
    assert all(module.batches_seen == 2 for module in targets.values())
    saved = [name for name in distiller.state_dict() if name.endswith("batches_seen")]
    assert len(saved) == 2
    alone = vk.OrthoProjLoss(5, 7, normalization=copy.deepcopy(targets["b"]).eval())
    alone.projection.weight = distiller.projection("b")
    expected = alone(student(x), teacher(x))
    distiller.eval()
    torch.testing.assert_close(distiller(x)[1]["b"], expected)


@modules
def test_from_the_meta_device(make):
    with torch.device("meta"):
        module = make(momentum=0.1)
    module.to_empty(device="cpu")
    for value in module.state_dict().values():
        value.fill_(77)  # what it may hold
    module.reset_parameters()
    fresh = make(momentum=0.1)
    for _ in range(2):
        assert torch.equal(module(features()), fresh(features()))
    assert make().to("meta").reset_parameters() is None  # nothing to reset


@pytest.mark.parametrize("owner", ["none", "loss", "distiller"])
@pytest.mark.parametrize("name", ["zca", "standardization"])
def test_statistics_come_as_new_from_the_meta_device(name, owner, monkeypatch):
    """With ``to_empty()``, whatever the memory held. Resetting a loss or distiller leaves what has been seen."""
    with torch.device("meta"):
        targets = MODULES[name](momentum=0.1)
        pair = {"student": "", "teacher": "", "dims": (4, 7), "normalization": targets}
        if owner == "distiller":
            whole = vk.FeatureDistiller(nn.Identity(), nn.Identity(), [pair], balance="running_mean")
        else:
            whole = targets if owner == "none" else vk.OrthoProjLoss(4, 7, normalization=targets)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: empty_like(x, **options).fill_(77))
    whole.to_empty(device="cpu")
    if owner != "none":
        whole.reset_parameters()
    fresh = MODULES[name](momentum=0.1)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in targets.state_dict().items())
    if owner == "distiller":
        assert not any(buffer.any() for buffer in whole.balance.buffers())
    for _ in range(2):
        assert torch.equal(targets(features()), fresh(features()))
    if owner != "none":
        whole.reset_parameters()
    assert targets.batches_seen == 2


@modules
def test_without_momentum_nothing_is_kept_and_nothing_can_be_frozen(make):
    assert not make().state_dict()
    with pytest.raises(RuntimeError, match=r"freeze\(\) needs running statistics: build the module with momentum"):
        make().freeze()


# ------------------------------------------------------------------------------------------------ training stacks


def modules_to_compile():
    """Each kind with or without running statistics, in turn: a compilation takes a second."""
    cases = []
    for (i, name), (j, momentum) in itertools.product(enumerate(MODULES), enumerate([None, 0.3])):
        marks = [] if (i + j) % 2 else [pytest.mark.thorough]
        cases.append(pytest.param(MODULES[name], momentum, marks=marks, id=f"{name}-{momentum}"))
    return cases


@pytest.mark.parametrize("make, momentum", modules_to_compile())
def test_compile_full_graph(make, momentum):
    torch.compiler.reset()
    eager, compiled = make(momentum=momentum), make(momentum=momentum)
    function = torch.compile(compiled, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (20, 30):
        x, mask = features(n), torch.arange(n) % 4 > 0
        torch.testing.assert_close(function(x, mask), eager(x, mask))
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value)


@modules
@pytest.mark.parametrize("momentum", [None, 0.3])
def test_autocast_does_not_reach_the_statistics(make, momentum):
    plain, under = make(momentum=momentum), make(momentum=momentum)
    x = features().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = under(x)
    torch.testing.assert_close(got, plain(x), rtol=0, atol=0)


@modules
def test_a_teacher_under_inference_mode(make):
    for momentum in (None, 0.3):
        module = make(momentum=momentum)
        with torch.inference_mode():
            x = features()
        out = module(x)
        (nn.Parameter(torch.ones(7, dtype=torch.float64)) * out).sum().backward()
        assert not out.is_inference()


@modules
@pytest.mark.parametrize("loss", ["smooth_l1", "mse", "cosine"])
def test_a_loss_whose_targets_a_module_makes(make, loss):
    """The module is part of the loss: it trains with it, is saved with it, and stays behind in eval mode."""
    distill = vk.OrthoProjLoss(4, 7, normalization=make(momentum=0.3), loss=loss, dtype=torch.float64)
    alone = make(momentum=0.3)
    x = torch.randn(50, 4, dtype=torch.float64)
    for seed in range(3):
        targets = alone(features(seed=seed))
        z = x @ distill.projection.weight.T
        expected = {
            "smooth_l1": lambda: nn.functional.smooth_l1_loss(z, targets),  # noqa: B023
            "mse": lambda: nn.functional.mse_loss(z, targets),  # noqa: B023
            "cosine": lambda: 1 - nn.functional.cosine_similarity(z, targets).mean(),  # noqa: B023
        }[loss]()
        torch.testing.assert_close(distill(x, features(seed=seed)), expected)
    resumed = vk.OrthoProjLoss(4, 7, normalization=make(momentum=0.3), loss=loss, dtype=torch.float64)
    resumed.load_state_dict(distill.state_dict())
    assert torch.equal(resumed(x, features(seed=3)), distill(x, features(seed=3)))
    before = copy.deepcopy(distill.state_dict())
    assert torch.equal(distill.eval()(x, features(seed=4)), resumed.eval()(x, features(seed=4)))
    distill.train().normalization.freeze()
    distill(x, features(seed=5))
    assert all(torch.equal(v, before[k]) for k, v in distill.state_dict().items() if "frozen" not in k)


def ranks_equal_one_process(rank):
    x = features(20)
    mask = torch.rand(20, generator=torch.Generator().manual_seed(1)) > 0.3
    for name, make in MODULES.items():
        for momentum in (None, 0.3):
            for first in (10, 4, 0):
                mine = slice(0, first) if rank == 0 else slice(first, 20)
                ours, alone = make(momentum=momentum, process_group=dist.group.WORLD), make(momentum=momentum)
                for _ in range(2):
                    expected = alone(x, mask)[mine]
                    torch.testing.assert_close(ours(x[mine], mask[mine]), expected, msg=f"{name}, {momentum}, {first}")
                for key, value in ours.state_dict().items():
                    torch.testing.assert_close(value, alone.state_dict()[key])
        spoilt = torch.where(torch.arange(20)[:, None] == 4, math.inf, x)[10 * rank : 10 * rank + 10]  # rank 0's alone
        before = copy.deepcopy(ours.state_dict())
        ours(spoilt)
        assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
        if rank == 0:  # validation on one rank alone: no collective to wait in
            ours.eval()(x)
        frozen = make(momentum=0.3, process_group=dist.group.WORLD)
        loss = vk.OrthoProjLoss(4, 7, normalization=frozen, dtype=torch.float64)
        if rank == 0:  # which alone loads a checkpoint, and from which DDP copies it
            frozen.freeze()
        nn.parallel.DistributedDataParallel(loss)(x[:10, :4], x[:10])
        assert frozen.is_frozen and frozen.batches_seen == 0
    dist.barrier()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_two_ranks_equal_one_process(tmp_path):
    processes.run_ranks(ranks_equal_one_process, tmp_path)


def test_a_graph_that_was_compiled_in_a_backward_pass_goes_on_counting():
    """A recomputation is told by what runs now, which must be no constant of the graph."""
    module = vk.Standardization(4, momentum=0.5)
    compiled = torch.compile(module, backend="aot_eager")
    x = torch.randn(6, 4, requires_grad=True)
    checkpoint(lambda x: compiled(x) + x, x, use_reentrant=True).sum().backward()
    before = module.batches_seen.item()
    for _ in range(3):
        compiled(x)
    assert module.batches_seen.item() == before + 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vk.Standardization(0), ValueError, "num_features must be at least 1; got 0"),
        (lambda: vk.Standardization(4, momentum=0.0), ValueError, "momentum must be .*got 0.0"),
        (lambda: vk.Standardization(4, momentum="0.1"), TypeError, "momentum must be a number; got str '0.1'"),
        (lambda: vk.Standardization(4, eps=-1.0), ValueError, "eps must be .*got -1.0"),
        (lambda: vk.Standardization(4, isotropic=1), TypeError, "isotropic must be True or False; got int 1"),
        (lambda: vk.Standardization(4, process_group="world"), TypeError, "process_group must be None or"),
        (lambda: vk.Standardization(4)(torch.randn(3, 5)), ValueError, r"features must have 4 channels; .*\(3, 5\)"),
        (lambda: vk.Standardization(4)(torch.randn(0, 4)), ValueError, "features has no rows"),
        (lambda: vk.Standardization(4)([1]), TypeError, "features must be a tensor; got list"),
        (
            lambda: vk.Standardization(4)(torch.randn(3, 4), torch.ones(3, 1)),
            ValueError,
            r"mask .*\(3,\); got \(3, 1\)",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
