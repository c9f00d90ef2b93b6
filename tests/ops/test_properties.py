"""Every function of vkd_kernels.functional on drawn shapes, strides, dtypes, masks and options, against float64.

The truths are written here or in test_ortho_proj_loss.literal, and share no code with the library.
"""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import event, given

import vkd_kernels as vk
from tests.helpers.properties import (
    EPS,
    FULL,
    HALF,
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
    weights_of,
)
from tests.ops.test_ortho_proj_loss import literal
from vkd_kernels.ops.ortho_proj_loss import api, dispatch

# --------------------------------------------------------------------------------------------------------------- Cayley


def literal_cayley(w):
    """The first columns of (I + K)⁻¹(I - K), K the t x t skew-symmetric matrix of w = [U; V]."""
    if w.shape[-2] < w.shape[-1]:
        return literal_cayley(w.mT).mT
    t, s = w.shape[-2:]
    u, v = w[..., :s, :], w[..., s:, :]
    k = torch.cat([torch.cat([u - u.mT, -v.mT], -1), torch.cat([v, v.new_zeros(*v.shape[:-2], t - s, t - s)], -1)], -2)
    eye = torch.eye(t, dtype=w.dtype)
    return torch.linalg.solve(eye + k, eye - k)[..., :s]


@examples(150)
@given(
    st.lists(st.integers(1, 3), max_size=2),
    dims,
    dims,
    st.sampled_from(FULL),
    layouts,
    st.integers(-4, 2),
    st.sampled_from([None, "torch"]),
    st.integers(0, 99),
)
def test_cayley(batch, t, s, dtype, layout, power, backend, seed):
    count("cayley")
    w = laid_out((normal(*batch, t, s, seed=seed) * 10.0**power).to(dtype), layout).requires_grad_()
    w64 = w.detach().double().requires_grad_()
    q, truth = vk.cayley(w, backend=backend), literal_cayley(w64)
    assert q.shape == w.shape and q.dtype == dtype
    # Rounded once to the weight's dtype; what the scale costs, it costs the float64 inside (and the truth).
    limit = 10 * EPS[dtype] + 40 * 100.0 ** max(power, 0) * EPS[torch.float64]
    torch.testing.assert_close(q.double(), truth, rtol=0, atol=limit)
    g = normal(*batch, t, s, seed=seed + 1)
    (ours,), (theirs,) = torch.autograd.grad(q, w, g.to(dtype)), torch.autograd.grad(truth, w64, g)
    assert ours.dtype == dtype and (ours.double() - theirs).norm() <= 10 * limit * g.norm()


@examples(150)
@given(
    dims,
    dims,
    st.sampled_from([-20, -3, 0, 1, 2, 3, 4]),
    st.sampled_from(["drawn", "columns", "rows", "nearly rank one"]),
    st.sampled_from([None, "torch"]),
    st.integers(0, 9999),
)
def test_cayley_is_orthonormal_for_entries_up_to_ten_thousand(t, s, power, kind, backend, seed):
    """Far beyond what training reaches, however unevenly the entries are distributed."""
    count("cayley, badly scaled")
    w = normal(t, s, seed=seed)
    if kind == "nearly rank one":
        w = normal(t, 1, seed=seed + 1) @ normal(1, s, seed=seed + 2) + 1e-6 * w
    elif kind != "drawn":
        w = w * 10.0 ** (-4 * normal(*((s,) if kind == "columns" else (t, 1)), seed=seed + 1).abs())
    w = (w * (10.0**power / w.abs().max())).float()
    assert orthogonality_error(vk.cayley(w, backend=backend)) <= 1e-5


@examples(100)
@given(dims, dims, st.sampled_from(FULL), st.sampled_from(["drawn", "permuted", "signs", "-I"]), st.integers(0, 99))
def test_cayley_inverse(t, s, dtype, kind, seed):
    count("cayley_inverse")
    n, m = max(t, s), min(t, s)
    q = torch.linalg.qr(normal(n, m, seed=seed)).Q
    if kind != "drawn":
        q = torch.eye(n, m, dtype=torch.float64)
        q = q[torch.randperm(n, generator=torch.Generator().manual_seed(seed))] if kind == "permuted" else -q
        q = q * normal(m, seed=seed).sign() if kind == "signs" else q
    q = (q if t >= s else q.mT).to(dtype)
    weight, signs = vk.functional.cayley_inverse(q)
    assert weight.dtype == signs.dtype == dtype and bool((signs.abs() == 1).all())
    torch.testing.assert_close(vk.cayley(weight) * signs, q, rtol=0, atol=100 * EPS[dtype])


# ------------------------------------------------------------------------------------------------------- normalization


@examples(150)
@given(row_shapes, dims, dtypes, layouts, masks, st.integers(-2, 2), st.integers(0, 99))
def test_standardize(shape, channels, dtype, layout, mask_kind, power, seed):
    count("standardize")
    x, rows = drawn_rows(shape, channels, dtype, layout, power, seed)
    mask = mask_of(mask_kind, shape, seed)
    w, eps = weights_of(mask, len(rows))[:, None], 1e-2
    out = vk.functional.standardize(x, mask=mask, eps=eps)
    assert out.shape == x.shape and out.dtype == dtype
    total = w.sum().clamp_min(1e-300)
    mean = (w * rows).sum(0) / total
    truth = (rows - mean) / ((w * (rows - mean) ** 2).sum(0) / total + eps).sqrt() * (w > 0)
    # The statistics are float32's at best, of values up to 10 * 10**power, over a deviation of sqrt(eps) at least.
    statistics = EPS[torch.promote_types(dtype, torch.float32)] * 100 * max(1, 10.0**power) / eps
    torch.testing.assert_close(out.double().reshape(-1, channels), truth, rtol=EPS[dtype], atol=statistics)


@examples(150)
@given(
    row_shapes,
    dims,
    dtypes,
    layouts,
    masks,
    st.sampled_from(["zca", "cholesky", "pca", "phi_s"]),
    st.sampled_from([1e-3, 0.1, 1.0]),
    st.integers(-2, 2),
    st.integers(0, 99),
)
def test_whiten(shape, channels, dtype, layout, mask_kind, method, eps, power, seed):
    """Products of whitened rows are those of the centered rows through Σ⁻¹; with phi_s, those over tr Σ/C."""
    count("whiten")
    x, rows = drawn_rows(shape, channels, dtype, layout, power, seed)
    mask = mask_of(mask_kind, shape, seed)
    w = weights_of(mask, len(rows))[:, None]
    out = vk.functional.whiten(x, method=method, eps=eps, mask=mask)
    assert out.shape == x.shape and out.dtype == dtype and not out.requires_grad
    out = out.double().reshape(-1, channels)
    assert not out[w[:, 0] == 0].any()
    total = w.sum()
    degrees = total - (w * w).sum() / total
    centered = (rows - (w * rows).sum(0) / total) * (w > 0)
    if not degrees > 1e-9 or not centered.any():
        event("no variance")
        assert not out.isnan().any()
        return
    sigma = (centered * w).T @ centered / degrees
    sigma = (1 - eps) * sigma + eps * sigma.trace() / channels * torch.eye(channels, dtype=torch.float64)
    truth = centered @ (
        centered.T * channels / sigma.trace() if method == "phi_s" else torch.linalg.solve(sigma, centered.T)
    )
    size = truth.abs().max().item()
    torch.testing.assert_close(out @ out.T, truth, rtol=1e-6, atol=50 * channels * EPS[dtype] * size)
    if method == "zca":
        values, vectors = torch.linalg.eigh(sigma)
        truth = centered @ vectors @ torch.diag(values**-0.5) @ vectors.T
        torch.testing.assert_close(out, truth, rtol=0, atol=max(1e-7, 20 * EPS[dtype]) * truth.abs().max().item())


# ------------------------------------------------------------------------------------------------------------- the loss


def scale_and_bias(kind, t, seed):
    scales = {"none": None, "number": -0.7, "0-d": torch.tensor(1.3), "per channel": normal(t, seed=seed).float()}
    return scales[kind], normal(t, seed=seed + 1).float() if seed % 2 else None


@examples(400)
@given(
    row_shapes,
    dims,
    dims,
    dtypes,
    dtypes,
    layouts,
    layouts,
    masks,
    st.sampled_from(api.NORMALIZATIONS),
    st.sampled_from([("mse", 1.0), ("smooth_l1", 1.0), ("smooth_l1", 0.2)]),
    st.sampled_from([1e-3, 0.1]),
    st.sampled_from(["mean", "sum"]),
    st.sampled_from(["none", "number", "0-d", "per channel"]),
    st.sampled_from(["reference", "chunked", "torch"]),
    st.integers(0, 99),
)
def test_ortho_proj_loss(
    shape,
    s,
    t,
    dtype,
    teacher_dtype,
    layout,
    teacher_layout,
    mask_kind,
    normalization,
    loss,
    eps,
    reduction,
    scale,
    path,
    seed,
):
    count("ortho_proj_loss")
    if torch.float64 in (dtype, teacher_dtype):
        dtype = teacher_dtype = torch.float64
    weight_dtype = torch.promote_types(dtype, torch.float32)
    student = laid_out(normal(*shape, s, seed=seed).to(dtype), layout).requires_grad_()
    teacher = laid_out((normal(*shape, t, seed=seed + 1) * 2 + 0.7).to(teacher_dtype), teacher_layout)
    weight = laid_out((normal(t, s, seed=seed + 2) / s**0.5).to(weight_dtype), layout).requires_grad_()
    scale, bias = (v.to(weight_dtype) if isinstance(v, torch.Tensor) else v for v in scale_and_bias(scale, t, seed))
    mask = mask_of(mask_kind, shape, seed)
    options = {"normalization": normalization, "loss": loss[0], "beta": loss[1], "eps": eps}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "CHUNKED_FROM", -1 if path == "chunked" else math.inf)
        value = vk.functional.ortho_proj_loss(
            student,
            teacher,
            weight,
            scale=scale,
            bias=bias,
            mask=mask,
            reduction=reduction,
            backend="torch" if path == "torch" else None,
            **options,
        )
        grads = torch.autograd.grad(value, [student, weight])
    assert value.shape == () and value.dtype == weight_dtype
    assert [g.dtype for g in grads] == [dtype, weight_dtype]
    assert all(bool(g.isfinite().all()) for g in grads)

    w = weights_of(mask, math.prod(shape))
    if not w.any():
        event("all masked")
        assert value == 0 and not any(g.any() for g in grads)
        return
    if normalization in ("whiten", "batch_norm") and int((w > 0).sum()) < 3:
        event("too few rows for statistics: finite is all there is to say")
        assert value.isfinite()
        return
    leaves = [x.detach().double().requires_grad_() for x in (student.reshape(-1, s), weight)]
    scale, bias = (v.double() if isinstance(v, torch.Tensor) else v for v in (scale, bias))
    truth = literal(
        leaves[0],
        teacher.double().reshape(-1, t),
        leaves[1],
        scale=scale,
        bias=bias,
        mask=None if mask is None else mask.reshape(-1).double(),
        **options,
    )
    truth = truth * w.sum() * t if reduction == "sum" else truth
    # Products are of the student's dtype; batch_norm divides by deviations of sqrt(eps) at least.
    tolerance = {torch.float64: 1e-8, torch.float32: 3e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}[dtype]
    torch.testing.assert_close(value.double(), truth.detach(), rtol=tolerance, atol=tolerance * 0.1)
    if dtype in HALF:
        return
    for ours, theirs in zip(grads, torch.autograd.grad(truth, leaves), strict=True):
        ours = ours.double().reshape(theirs.shape)
        assert (ours - theirs).norm() <= 10 * tolerance * (theirs.norm() + truth.detach() * 0.1)


@examples(120)
@given(
    st.lists(st.tuples(row_shapes, layouts, masks), min_size=1, max_size=3),
    dims,
    dims,
    st.sampled_from(FULL),
    st.sampled_from(api.NORMALIZATIONS),
    st.sampled_from(["mse", "smooth_l1"]),
    st.sampled_from(["mean", "sum"]),
    st.sampled_from(["none", "number", "per loss", "per channel"]),
    st.sampled_from([-1, math.inf]),
    st.integers(0, 99),
)
def test_several_losses_are_each_its_own(drawn, s, t, dtype, normalization, loss, reduction, scale, chunked_from, seed):
    count("ortho_proj_losses")
    features = [
        [laid_out(normal(*shape, c, seed=seed + i + c).to(dtype), layout).requires_grad_(c == s) for c in (s, t)]
        for i, (shape, layout, _) in enumerate(drawn)
    ]
    students, teachers = ([pair[side] for pair in features] for side in (0, 1))
    teachers = [y.detach() for y in teachers]
    given_masks = [mask_of(kind, shape, seed + i) for i, (shape, _, kind) in enumerate(drawn)]
    weights = normal(len(drawn), t, s, seed=seed).to(dtype).requires_grad_()
    scales = {"number": 0.7, "per loss": normal(len(drawn), seed=seed).to(dtype)}
    scales["per channel"] = normal(len(drawn), t, seed=seed).to(dtype)
    scale = scales.get(scale)
    options = {"normalization": normalization, "loss": loss, "reduction": reduction, "eps": 0.1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "CHUNKED_FROM", chunked_from)
        values = vk.functional.ortho_proj_losses(students, teachers, weights, scale=scale, masks=given_masks, **options)
    apart = [
        vk.functional.ortho_proj_loss(
            x, y, w, scale=scale[i] if isinstance(scale, torch.Tensor) else scale, mask=m, backend="torch", **options
        )
        for i, (x, y, w, m) in enumerate(zip(students, teachers, weights, given_masks, strict=True))
    ]
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-10}
    told = [
        normalization in ("layer_norm", "none") or (weights_of(m, math.prod(shape)) > 0).sum() >= 3
        for m, (shape, _, _) in zip(given_masks, drawn, strict=True)
    ]
    if not all(told):
        event("too few rows for statistics: finite is all there is to say")
        assert values.isfinite().all()
        return
    torch.testing.assert_close(values, torch.stack(apart), **tolerance)
    upstream = normal(len(drawn), seed=seed).to(dtype)
    ours, theirs = (torch.autograd.grad(v, [weights, *students], upstream) for v in (values, torch.stack(apart)))
    torch.testing.assert_close(ours, theirs, **tolerance)
