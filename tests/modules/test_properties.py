"""Every module on drawn shapes, strides, dtypes, masks and options, against the functions and float64."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import event, given
from torch import nn

import vkd_kernels as vk
from tests.helpers.properties import (
    EPS,
    FULL,
    count,
    counted,  # noqa: F401 (a fixture)
    dims,
    drawn_rows,
    dtypes,
    examples,
    laid_out,
    layouts,
    mask_of,
    masks,
    normal,
    orthogonality_error,
    row_shapes,
    tall,
    weights_of,
)
from tests.modules.test_diagnostics import cka_of, hsic_of, rank_of
from vkd_kernels.ops.ortho_proj_loss import api, dispatch


@examples(60)
@given(dims, masks, st.sampled_from([None, 0.1, 1.0]), dtypes, st.integers(1, 3), st.integers(0, 99))
def test_whitening_module(channels, mask_kind, momentum, dtype, batches, seed):
    """With batch statistics it is the function; with running ones, training does and eval does not change them."""
    count("Whitening")
    module = vk.Whitening(channels, momentum=momentum, eps=0.1)
    for i in range(batches):
        x, _ = drawn_rows((2, 7), channels, dtype, "contiguous", 0, seed + i)
        mask = mask_of(mask_kind, (2, 7), seed + i)
        out = module(x, mask)
        assert out.dtype == dtype and out.shape == x.shape and out.isfinite().all()
        if momentum is None:
            assert torch.equal(out, vk.functional.whiten(x, eps=0.1, mask=mask))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.eval()
    twice = [module(x, mask) for _ in range(2)]
    assert torch.equal(*twice) and all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    if momentum is not None:
        assert module.batches_seen == (0 if mask_kind == "empty" else batches)


@examples(100)
@given(
    dims,
    dims,
    st.sampled_from(FULL),
    st.booleans(),
    st.sampled_from([1.0, 0.5, "match", "learned"]),
    st.sampled_from(api.NORMALIZATIONS),
    st.sampled_from(["mse", "smooth_l1"]),
    masks,
    st.sampled_from([-1, math.inf]),
    st.integers(0, 99),
)
def test_module_equals_function(s, t, dtype, affine, scale, normalization, loss, mask_kind, chunked_from, seed):
    count("OrthoProjLoss")
    torch.manual_seed(seed)
    options = {"normalization": normalization, "loss": loss, "eps": 0.1}
    module = vk.OrthoProjLoss(s, t, affine=affine, scale=scale, dtype=dtype, **options)
    if affine:
        nn.init.uniform_(module.projection.gain, 0.5, 2)
        nn.init.normal_(module.projection.bias)
    number = max(t / s, 1.0) ** 0.5 if isinstance(scale, str) else scale
    x, y = torch.randn(3, 4, s, dtype=dtype), torch.randn(3, 4, t, dtype=dtype)
    mask = mask_of(mask_kind, (3, 4), seed)
    p, gain, bias = module.projection.weight, module.projection.gain, module.projection.bias
    assert orthogonality_error(p) <= 1e-5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "CHUNKED_FROM", chunked_from)
        value = module(x, y, mask)
    expected = vk.functional.ortho_proj_loss(
        x, y, p, scale=number if gain is None else number * gain, bias=bias, mask=mask, backend="torch", **options
    )
    torch.testing.assert_close(value, expected, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-6)


# ---------------------------------------------------------------------------------------- FeatureDistiller, diagnostics


def pooled(x, pool, skip, mask):
    """(rows, their weights or None) of (n, positions, c), sample by sample; weights of samples (n,) or of positions."""
    weights = torch.ones(x.shape[:2]) if mask is None else mask.double().reshape(len(x), -1).expand(x.shape[:2])
    if pool == "class_token":
        return x[:, 0], weights[:, 0]
    x, weights = x[:, skip:], weights[:, skip:]
    if pool == "tokens":
        return x, weights
    if mask is None or mask.dim() == 1:
        return x.mean(1), weights[:, 0]
    kept = weights.sum(1) > 0
    means = [(a * w[:, None]).sum(0) / w.sum().clamp_min(1e-300) for a, w in zip(x, weights, strict=True)]
    return torch.stack(means), kept.double()


@examples(120)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    dims,
    dims,
    st.sampled_from(FULL),
    st.sampled_from(["class_token", "mean_tokens", "tokens", "spatial_mean", "spatial"]),
    st.integers(0, 2),
    st.integers(0, 2),
    st.sampled_from([None, "samples", "positions"]),
    st.sampled_from(["bool", "weights", "empty"]),
    st.sampled_from(api.NORMALIZATIONS),
    layouts,
    st.integers(0, 99),
)
def test_feature_distiller(n, h, w, s, t, dtype, pool, skip, other_skip, masked, kind, normalization, layout, seed):
    """Models that return their inputs: what is left is pooling, masks and the loss."""
    count("FeatureDistiller")
    maps = pool.startswith("spatial")
    skips = (0, 0) if maps or pool == "class_token" else (skip, other_skip)
    features = [
        laid_out(normal(n, skip + h * w, c, seed=seed + i).to(dtype), layout)
        for i, (skip, c) in enumerate(zip(skips, (s, t), strict=True))
    ]
    masks = [None, None]
    if masked:
        shapes = [(n,) if masked == "samples" else x.shape[:2] for x in features]
        masks = [mask_of(kind, shape, seed + i) for i, shape in enumerate(shapes)]
    pair = {"student": "", "teacher": "", "dims": (s, t), "name": "x", "normalization": normalization, "eps": 0.1}
    pair |= {"student_pool": pool, "teacher_pool": pool, "student_skip": skips[0], "teacher_skip": skips[1]}
    distiller = vk.FeatureDistiller(nn.Identity(), nn.Identity(), [pair], dtype=dtype)
    given_features, given_masks = features, masks
    if maps:
        given_features = [x.mT.unflatten(2, (h, w)) for x in features]
        given_masks = [m if m is None or m.dim() == 1 else m.unflatten(1, (h, w)) for m in masks]
    x, y = given_features
    losses = distiller(x, teacher_input=y, masks={"x": tuple(given_masks)} if masked else None)[1]

    hand = {"spatial": "tokens", "spatial_mean": "mean_tokens"}.get(pool, pool)
    (x, x_weight), (y, y_weight) = (
        pooled(z.double(), hand, skip, m) for z, skip, m in zip(features, skips, masks, strict=True)
    )
    weights = (x_weight * y_weight).to(dtype)
    if normalization in ("whiten", "batch_norm") and int((weights > 0).sum()) < 3:
        event("too few rows for statistics: finite is all there is to say")
        assert losses["x"].isfinite()
        return
    expected = vk.functional.ortho_proj_loss(
        x.to(dtype),
        y.to(dtype),
        distiller.projection("x"),
        mask=weights,
        normalization=normalization,
        eps=0.1,
        backend="torch",
    )
    torch.testing.assert_close(losses["x"], expected, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-6)


@examples(120)
@given(row_shapes, dims, dims, dtypes, layouts, masks, st.booleans(), st.integers(-2, 2), st.integers(0, 99))
def test_diagnostics(shape, s, t, dtype, layout, mask_kind, debiased, power, seed):
    """By their definitions: singular values, N x N matrices."""
    count("diagnostics")
    x, rows = drawn_rows(shape, s, dtype, layout, power, seed)
    y, other = drawn_rows(shape, t, dtype, layout, 0, seed + 2)
    mask = mask_of(mask_kind, shape, seed)
    kept = weights_of(mask, len(rows)) > 0
    rows, other = rows[kept], other[kept]
    rank, cka = vk.diagnostics.effective_rank(x, mask=mask), vk.diagnostics.cka(x, y, mask=mask, debiased=debiased)
    if kept.sum() < 2:
        assert rank == 0 and cka.isnan()
        return
    torch.testing.assert_close(rank, rank_of(rows) if (rows != rows[0]).any() else rank * 0, rtol=1e-5, atol=1e-5)
    if debiased and kept.sum() < 4:
        assert cka.isnan()
        return
    for z in (rows, other):
        if hsic_of(z, z, debiased) < 1e-6 * (z - z.mean(0)).square().sum() ** 2 / len(z) ** 2:
            event("a difference of equal sums")
            return
    assert cka <= 1 + 1e-9
    torch.testing.assert_close(cka, cka_of(rows, other, debiased), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- projections


@examples(80)
@given(dims, dims, st.sampled_from(FULL), st.booleans(), row_shapes, layouts, st.integers(-3, 3), st.integers(0, 99))
def test_orthogonal_linear(t, s, dtype, affine, shape, layout, power, seed):
    """Assigning any matrix of full rank sets its orthonormal QR factor; forward is the product."""
    count("OrthogonalLinear")
    layer = vk.OrthogonalLinear(s, t, affine=affine, dtype=dtype)
    matrix = normal(t, s, seed=seed)
    layer.weight = laid_out((matrix * 10.0**power).to(dtype), layout)
    q, r = torch.linalg.qr(tall(matrix))
    q = q * r.diagonal().sign()
    condition = torch.linalg.cond(tall(matrix)).item()
    torch.testing.assert_close(
        tall(layer.weight.detach()).double(), q, rtol=0, atol=100 * EPS[dtype] * max(condition, 1.0)
    )
    if affine:
        nn.init.normal_(layer.gain)
        nn.init.normal_(layer.bias)
    x = laid_out(normal(*shape, s, seed=seed + 1).to(dtype), layout)
    truth = x.double() @ layer.weight.double().T
    truth = truth * layer.gain.double() + layer.bias.double() if affine else truth
    torch.testing.assert_close(layer(x).double(), truth, rtol=0, atol=100 * EPS[dtype])


@examples(60)
@given(
    st.lists(st.integers(1, 3), max_size=2),
    dims,
    dims,
    st.sampled_from(FULL),
    st.sampled_from(["cayley", "matrix_exp", "householder"]),
    st.integers(0, 99),
)
def test_orthogonal(batch, t, s, dtype, orthogonal_map, seed):
    """A drop-in for any parameter: orthonormal at once, after assignment, and wherever the parameter is moved to."""
    count("orthogonal")
    holder = nn.Module()
    holder.kernel = nn.Parameter(normal(*batch, t, s, seed=seed).to(dtype))
    vk.orthogonal(holder, "kernel", orthogonal_map)
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    assert holder.kernel.shape == (*batch, t, s) and orthogonality_error(holder.kernel) <= limit
    holder.kernel.square().sum().backward()
    with torch.no_grad():
        holder.parametrizations.kernel.original.add_(normal(*batch, t, s, seed=seed + 1).to(dtype))
    assert orthogonality_error(holder.kernel) <= limit
