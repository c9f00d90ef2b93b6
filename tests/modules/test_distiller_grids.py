"""FeatureDistiller on grids: tokens as maps, grids of other sizes, layouts; masks follow."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vkd_kernels as vk
from tests.helpers.distillers import loss_like

S, T = 3, 5


def distill(x, y, mask=None, **fields):
    """(loss, the pair's loss as a module) of features that the models return as they get them."""
    pair = {"student": "", "teacher": "", "dims": (S, T), "name": "x", **fields}
    distiller = vk.FeatureDistiller(nn.Identity(), nn.Identity(), [pair], dtype=x.dtype)
    loss = distiller(x, teacher_input=y, masks=None if mask is None else {"x": mask})[1]["x"]
    return loss, loss_like(distiller, "x", S, T)


def as_map(tokens, h, w):  # (N, H·W, C) -> (N, H, W, C)
    return tokens.unflatten(1, (h, w))


def resized(x, h, w):  # (N, H, W, C) -> (N, h, w, C)
    return F.interpolate(x.permute(0, 3, 1, 2), (h, w), mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def test_tokens_of_a_vit_against_a_map_of_the_same_grid():
    """14x14 tokens with a class token against a CNN's (N, C, 14, 14); the grid of a rectangle comes from the map."""
    for h, w in ((4, 4), (2, 6)):
        x, y = torch.randn(2, 1 + h * w, S), torch.randn(2, T, h, w)
        loss, reference = distill(x, y, student_pool="tokens", student_skip=1, teacher_pool="spatial")
        torch.testing.assert_close(loss, reference(as_map(x[:, 1:], h, w), y.permute(0, 2, 3, 1)))


@pytest.mark.parametrize("resample", ["student", "teacher"])
def test_tokens_of_other_grids_are_resampled(resample):
    """Patch 16 against patch 14: 4x4 student tokens, 6x6 teacher tokens behind a class token and registers."""
    x, y = torch.randn(2, 16, S), torch.randn(2, 5 + 36, T)
    fields = {"student_pool": "tokens", "teacher_pool": "tokens", "teacher_skip": 5}
    loss, reference = distill(x, y, **fields, resample=resample)
    x, y = as_map(x, 4, 4), as_map(y[:, 5:], 6, 6)
    expected = reference(resized(x, 6, 6), y) if resample == "student" else reference(x, resized(y, 4, 4))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(("h", "w"), [(2, 8), (8, 2), (3, 5)])
def test_tokens_have_the_proportions_of_the_other_sides_map(h, w):
    """Also where their number is a square: 4x16 tokens against a map of 2x8, as of images of 16:9."""
    x, y = torch.randn(2, S, h, w), torch.randn(2, 4 * h * w, T)
    fields = {"student_pool": "spatial", "teacher_pool": "tokens", "resample": "teacher"}
    loss, reference = distill(x, y, **fields)
    y = resized(as_map(y, 2 * h, 2 * w), h, w)
    torch.testing.assert_close(loss, reference(x.permute(0, 2, 3, 1), y))


def test_tokens_of_a_rectangle_need_their_grid_said():
    x, y = torch.randn(2, 8, S), torch.randn(2, T, 3, 3)
    fields = {"student_pool": "tokens", "teacher_pool": "spatial", "resample": "teacher"}
    with pytest.raises(ValueError, match=r"\(2, 8, 3\).*\(2, 3, 3, 5\).*student_grid=\(H, W\) says which map"):
        distill(x, y, **fields)
    loss, reference = distill(x, y, **fields, student_grid=(2, 4))
    torch.testing.assert_close(loss, reference(as_map(x, 2, 4), resized(y.permute(0, 2, 3, 1), 2, 4)))
    with pytest.raises(ValueError, match=r"\(2, 10, 3\).*student_skip=1 leaves 9, a map of 3 x 3; student_grid="):
        distill(torch.randn(2, 10, S), y, **fields)
    with pytest.raises(ValueError, match=r"\(2, 11, 3\).*student_skip=4 leaves 9, a map of 3 x 3; student_grid="):
        distill(torch.randn(2, 13, S), y, **fields, student_skip=2)
    with pytest.raises(ValueError, match=r"\(2, 10, 3\).*\(2, 5\) \(channels last\)$"):
        distill(torch.randn(2, 10, S), y.mean((2, 3)), student_pool="tokens")
    with pytest.raises(ValueError, match=r"\(2, 9, 3\).*\(2, 2, 4, 5\).*student_grid=\(H, W\) says which map"):
        distill(torch.randn(2, 9, S), torch.randn(2, T, 2, 4), **fields)
    with pytest.raises(ValueError, match=r"student_grid=\(3, 3\) has 9 positions, but there are 8 tokens"):
        distill(x, y, **fields, student_grid=(3, 3))


def test_equal_numbers_of_tokens_on_different_grids_are_not_compared_one_by_one():
    x, y = torch.randn(2, 12, S), torch.randn(2, 12, T)
    fields = {"student_pool": "tokens", "teacher_pool": "tokens", "student_grid": (3, 4), "teacher_grid": (2, 6)}
    with pytest.raises(ValueError, match=r"resample='student' or 'teacher' makes them equal, as maps of \(3, 4\) and"):
        distill(x, y, **fields)
    loss, reference = distill(x, y, **fields, resample="student")
    torch.testing.assert_close(loss, reference(resized(as_map(x, 3, 4), 2, 6), as_map(y, 2, 6)))
    fields["teacher_grid"] = (3, 4)
    loss, reference = distill(x, y, **fields)
    torch.testing.assert_close(loss, reference(x, y))


@pytest.mark.parametrize("pool", ["spatial", "spatial_mean"])
def test_channels_last_maps_against_channels_first(pool):
    """Swin's (N, H, W, C) against a CNN's (N, C, H, W)."""
    x, y = torch.randn(2, 4, 6, S), torch.randn(2, T, 4, 6)
    loss, reference = distill(x, y, student_pool=pool, teacher_pool=pool, student_layout="NHWC")
    by_hand = (x, y.permute(0, 2, 3, 1)) if pool == "spatial" else (x.mean((1, 2)), y.mean((2, 3)))
    torch.testing.assert_close(loss, reference(*by_hand))


@pytest.mark.parametrize("kind", ["bool", "weights"])
def test_masks_follow_a_resampling_and_what_is_masked_may_be_anything(kind):
    """A mask of the teacher's patches, of which some hold NaN; the student's grid is coarser."""
    x, y = torch.randn(2, 9, S), torch.randn(2, 36, T)
    keep = torch.rand(2, 36) > 0.4
    keep[0, :15] = False
    mask = keep if kind == "bool" else keep * (torch.rand(2, 36) + 0.1)
    fields = {"student_pool": "tokens", "teacher_pool": "tokens", "resample": "teacher"}
    loss, reference = distill(x, torch.where(keep[..., None], y, torch.nan), mask=(None, mask), **fields)
    weights = as_map(mask, 6, 6).float()[..., None]
    rows = resized(weights, 3, 3)
    target = resized(as_map(y, 6, 6) * weights, 3, 3) / torch.where(rows > 0, rows, 1)
    expected = reference(as_map(x, 3, 3), target, rows[..., 0])
    torch.testing.assert_close(loss, expected)


def test_masks_of_both_sides_and_one_mask_for_both():
    x, y = torch.randn(2, 9, S), torch.randn(2, T, 6, 6)
    fields = {"student_pool": "tokens", "teacher_pool": "spatial", "resample": "teacher"}
    mine, theirs = torch.rand(2, 9) > 0.3, torch.rand(2, 6, 6) > 0.3
    rows = resized(theirs.float()[..., None], 3, 3)
    target = resized(y.permute(0, 2, 3, 1) * theirs[..., None], 3, 3) / torch.where(rows > 0, rows, 1)
    whole = resized(y.permute(0, 2, 3, 1), 3, 3)
    loss, reference = distill(x, y, mask=(mine, theirs), **fields)
    torch.testing.assert_close(loss, reference(as_map(x, 3, 3), target, rows[..., 0] * as_map(mine, 3, 3)))
    samples = torch.tensor([0.5, 2.0])
    for mask, weights in ((mine, as_map(mine, 3, 3).float()), (samples, samples[:, None, None].expand(2, 3, 3))):
        loss, reference = distill(x, y, mask=mask, **fields)
        torch.testing.assert_close(loss, reference(as_map(x, 3, 3), whole, weights))
    loss, reference = distill(x, y, mask=theirs, **fields)
    torch.testing.assert_close(loss, reference(as_map(x, 3, 3), target, rows[..., 0]))
    compared = torch.rand(2, 3, 3) > 0.4  # of the rows that are compared
    loss, reference = distill(x, y, mask=(None, compared), **fields)
    torch.testing.assert_close(loss, reference(as_map(x, 3, 3), whole, compared))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pool", ["mean_tokens", "class_token"])
def test_under_one_mask_a_sample_without_positions_on_one_side_is_no_row(pool, weighted):
    """The only position of the second sample is a prefix token of the teacher."""
    x, y = torch.randn(3, 5, S), torch.randn(3, 5, T)
    kept = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]) > 0
    weights = torch.tensor([0.5, 3.0, 2.0])
    mask = kept * weights[:, None] if weighted else kept
    loss, reference = distill(x, y, mask, student_pool=pool, teacher_pool="mean_tokens", teacher_skip=1)
    x, y = x[::2, :3].mean(1) if pool == "mean_tokens" else x[::2, 0], y[::2, 1:3].mean(1)
    counted = weighted and pool == "class_token"  # a mean has the weights of its positions in it
    torch.testing.assert_close(loss, reference(x, y, weights[::2] if counted else None))


def test_negative_weights_are_refused_before_two_masks_are_multiplied():
    x, y, negative = torch.randn(4, S), torch.randn(4, T), torch.tensor([1.0, -1.0, 1.0, 1.0])
    for mask in (negative, (negative, None), (negative, negative.clone())):
        with pytest.raises(ValueError, match=r"^masks\['x'\] must hold bools, or finite weights of at least 0"):
            distill(x, y, mask)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"student_layout": "CHW"}, ValueError, "student_layout must be one of 'NCHW', 'NHWC'; got 'CHW'"),
        ({"teacher_grid": 4}, TypeError, r"teacher_grid must be \(H, W\); got int 4"),
        ({"teacher_grid": (4, 0)}, ValueError, "teacher_grid must be at least 1; got 0"),
        ({"student_call": 1.0}, TypeError, "student_call must be None or an int; got float 1.0"),
        ({"student_output": ("x", None)}, TypeError, "student_output must be an int, a string or a tuple of them"),
        ({"optional": 1}, TypeError, "optional must be True or False; got int 1"),
    ],
)
def test_bad_fields(fields, error, message):
    with pytest.raises(error, match=message):
        vk.Pair("a", "b", **fields)


@pytest.mark.parametrize("pool", ["class_token", "mean_tokens", "tokens", "spatial_mean", "spatial", "a function"])
@pytest.mark.parametrize("mask", [torch.tensor(True), torch.ones(3), torch.ones(3, 4)])
@pytest.mark.parametrize("masked", ["student", "teacher", "both"])
def test_a_mask_of_other_samples_is_named(pool, mask, masked):
    x, y = (torch.randn(2, C, 2, 2) if "spatial" in pool else torch.randn(2, 4, C) for C in (S, T))
    pool = (lambda tokens: tokens) if pool == "a function" else pool
    given = mask if masked == "both" else tuple(mask if side == masked else None for side in ("student", "teacher"))
    with pytest.raises(ValueError, match=r"masks\['x'\] must have the shape .*\(2.*; got \((3, 4|3,|)\)"):
        distill(x, y, given, student_pool=pool, teacher_pool=pool)
