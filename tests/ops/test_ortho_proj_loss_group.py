"""Several losses at once, by PyTorch: each as it is alone. Their kernels: test_ortho_proj_loss_group_triton.py."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

import vkd_kernels as vk
from tests.helpers import processes
from tests.helpers.loss_groups import arguments, assert_equal, in_a_group_and_alone, masks_of
from vkd_kernels.functional import ortho_proj_loss, ortho_proj_losses
from vkd_kernels.ops.ortho_proj_loss import api, dispatch


@pytest.mark.parametrize("masks", ["no masks", "bool", "weights", "some", "one of them masked"])
@pytest.mark.parametrize("loss", api.LOSSES)
@pytest.mark.parametrize("normalization", api.NORMALIZATIONS)
@pytest.mark.parametrize("chunked_from", [float("inf"), -1], ids=["reference", "chunked"])
def test_each_is_as_it_is_alone(chunked_from, normalization, loss, masks, monkeypatch):
    monkeypatch.setattr(dispatch, "CHUNKED_FROM", chunked_from)
    options = {"normalization": normalization, "loss": loss, "eps": 1e-2}
    assert_equal(in_a_group_and_alone(*arguments(), masks_of(masks), **options), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", api.REDUCTIONS)
@pytest.mark.parametrize("scale", [None, 1.7, (), (4,)], ids=str)
def test_scales(scale, reduction):
    *tensors, _, bias = arguments()
    if isinstance(scale, tuple):
        scale = torch.rand(scale, dtype=torch.float64).requires_grad_()
    assert_equal(in_a_group_and_alone(*tensors, scale, bias, None, reduction=reduction), rtol=1e-9, atol=1e-12)


def test_rows_of_any_shape():
    students, teachers, weights, *_ = arguments([24, 8])
    mask = torch.arange(24) % 5 > 0
    flat = ortho_proj_losses(students, teachers, weights, masks=[mask, None])
    shaped = ortho_proj_losses(
        [students[0].view(2, 3, 4, 5), students[1].view(8, 1, 5)],
        [teachers[0].view(2, 3, 4, 9), teachers[1][:, None]],
        weights,
        masks=[mask.view(2, 3, 4), None],
    )
    torch.testing.assert_close(flat, shaped)


def test_autocast():
    students, teachers, weights, *_ = arguments(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = ortho_proj_losses(students, teachers, weights)
    expected = ortho_proj_losses([x.bfloat16() for x in students], teachers, weights)
    assert value.dtype == torch.float32 and torch.equal(value, expected)


GOOD = dict(zip(("students", "teachers", "weights"), arguments([4, 6], dtype=torch.float32), strict=False))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"students": torch.ones(2, 4, 5)}, TypeError, "students must be a list or tuple of tensors; got a float32"),
        ({"students": []}, ValueError, "students, teachers and masks .* got 0 students and 0 students"),
        ({"teachers": GOOD["teachers"][:1]}, ValueError, "got 2 students and 1 teachers"),
        ({"masks": [None]}, ValueError, "got 2 students and 1 masks"),
        ({"masks": None, "students": [GOOD["students"][0], 3]}, TypeError, r"students\[1\] must be .*got int 3"),
        ({"weights": torch.randn(9, 5)}, ValueError, r"weights must have the shape \(G, T, S\) with G = 2.*\(9, 5\)"),
        ({"weights": torch.randn(3, 9, 5)}, ValueError, r"weights must have .* got \(3, 9, 5\)"),
        ({"students": [torch.randn(4, 5), torch.randn(6, 4)]}, ValueError, r"students\[1\] .* S = 5.*got \(6, 4\)"),
        ({"students": [torch.randn(4, 5), torch.randn(5, 5)]}, ValueError, r"students\[1\] .*same rows"),
        ({"students": [torch.randn(4, 5), torch.randn(6, 5).half()]}, TypeError, r"one dtype; .*\[1\] torch.float16"),
        ({"scale": torch.ones(9)}, ValueError, r"shape \(\), \(G,\) or \(G, T\) = \(2, 9\); got \(9,\)"),
        ({"bias": torch.ones(9)}, ValueError, r"bias must have the shape \(G, T\) = \(2, 9\); got \(9,\)"),
        ({"masks": [None, torch.ones(5)]}, ValueError, r"masks\[1\] must have .* \(6,\); got \(5,\)"),
        ({"normalization": "bn"}, ValueError, "normalization must be one of"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        ortho_proj_losses(**{**GOOD, **changes})


@pytest.mark.parametrize("scale", [1.0, "match", "learned"])
def test_feature_distiller_groups_pairs_of_equal_shape_and_options(scale, monkeypatch):
    """Four pairs of one shape, of which the third has a loss of its own: three form a group."""
    calls, losses_of_a_group = [], api.projected_losses
    monkeypatch.setattr(
        api, "projected_losses", lambda xs, *a, **k: calls.append(len(xs)) or losses_of_a_group(xs, *a, **k)
    )
    student, teacher = (
        torch.nn.Sequential(*(torch.nn.Linear(c, c, dtype=torch.float64) for _ in range(4))) for c in (6, 9)
    )
    pairs = [{"student": str(i), "teacher": str(i), "dims": (6, 9), "scale": scale} for i in range(4)]
    pairs[2]["loss"] = "mse"
    distiller = vk.FeatureDistiller(student, teacher, pairs)
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 9, dtype=torch.float64)
    mask = torch.arange(7) > 2
    _, losses = distiller(x, teacher_input=y, masks={"1->1": mask})
    assert calls == [3]
    factor = 1.5**0.5 if scale != 1.0 else 1.0
    for i, pair in enumerate(distiller.pairs):
        expected = ortho_proj_loss(
            student[: i + 1](x),
            teacher[: i + 1](y),
            distiller.projection(pair.name),
            scale=factor,
            loss=pair.loss,
            mask=mask if i == 1 else None,
        )
        torch.testing.assert_close(losses[pair.name], expected)
    losses["total"].backward()
    assert all(p.grad is not None for p in distiller.parameters())


# ----------------------------------------------------------------------------------------------------- across two ranks


def rank(number):
    all_reduce, collectives = dist.all_reduce, []
    with mock.patch.object(
        dist, "all_reduce", lambda *args, **options: collectives.append(1) or all_reduce(*args, **options)
    ):
        check_rank(number, collectives)


def check_rank(number, collectives):
    group = dist.group.WORLD
    for normalization in api.NORMALIZATIONS:
        for masks in ("no masks", "weights"):
            torch.manual_seed(0)
            students, teachers, weights, scale, bias = arguments()
            masks = masks_of(masks)
            options = {"normalization": normalization, "eps": 1e-2, "scale": scale, "bias": bias}
            expected = ortho_proj_losses(students, teachers, weights, masks=masks, **options)
            truth = torch.autograd.grad(expected.sum(), [*students, weights, scale, bias])
            first = [slice(0, 20), slice(0, 0), slice(5, None), slice(0, None, 2)]
            second = [slice(20, None), slice(0, 1), slice(0, 5), slice(1, None, 2)]
            mine = (first, second)[number]
            shares = [x[rows].detach().requires_grad_() for x, rows in zip(students, mine, strict=True)]
            collectives.clear()
            losses = ortho_proj_losses(
                shares,
                [y[rows] for y, rows in zip(teachers, mine, strict=True)],
                weights,
                process_group=group,
                masks=None if masks is None else [m[rows] for m, rows in zip(masks, mine, strict=True)],
                **options,
            )
            # Σw (with the sums), second moments, loss; whiten: Σw, sums, second moments, loss.
            assert len(collectives) == {"batch_norm": 3, "whiten": 4}.get(normalization, 2), collectives
            torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
            got = torch.autograd.grad(losses.sum(), [*shares, weights, scale, bias])
            for gradient, rows, whole in zip(got[:4], mine, truth[:4], strict=True):
                torch.testing.assert_close(gradient / 2, whole[rows], rtol=1e-8, atol=1e-11)
            for gradient, whole in zip(got[4:], truth[4:], strict=True):
                dist.all_reduce(gradient)  # the average that data parallelism takes
                torch.testing.assert_close(gradient / 2, whole, rtol=1e-8, atol=1e-11)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_two_ranks_equal_one_process_and_share_their_collectives(tmp_path):
    processes.run_ranks(rank, tmp_path)
