"""Every public function on drawn shapes, strides, dtypes, masks and options, against float64. Counts are printed.

The truths are written here or in test_ortho_proj_loss.literal, and share no code with the library.
"""

import collections
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from torch import nn

import vkd_kernels as vk
from tests.modules.test_diagnostics import cka_of, hsic_of, rank_of
from tests.ops.test_ortho_proj_loss import literal
from vkd_kernels.ops.ortho_proj_loss import api, dispatch

EXAMPLES = collections.Counter()
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
FULL, HALF = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)

dims = st.integers(1, 12)
dtypes = st.sampled_from(list(EPS))
layouts = st.sampled_from(["contiguous", "transposed", "sliced", "offset"])
masks = st.sampled_from([None, "bool", "weights", "ones", "empty"])


def examples(n):
    """The same examples in every run: a property that fails today failed yesterday."""
    return settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture(autouse=True, scope="module")
def _counted(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nproperties: {dict(EXAMPLES)}, {EXAMPLES.total()} examples in all")


def count(name):
    EXAMPLES[name] += 1


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def laid_out(x, layout):
    """The same values with other strides; what lies between them is NaN, and must not be read."""
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "contiguous":
        return x
    step, start = (2, 1) if layout == "sliced" else (1, 3)
    room = x.new_full((*x.shape[:-1], start + step * x.shape[-1]), torch.nan)
    room[..., start : start + step * x.shape[-1] : step] = x
    view = room[..., start : start + step * x.shape[-1] : step]
    assert torch.equal(view, x)
    return view


def mask_of(kind, rows, seed):
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(rows, generator=generator)
    weights = {"bool": drawn > 0.4, "weights": torch.where(drawn > 0.3, 3 * drawn, 0.0), "ones": torch.ones(rows)}
    return torch.zeros(rows, dtype=torch.bool) if kind == "empty" else weights[kind]


def tall(x):
    return x if x.shape[-2] >= x.shape[-1] else x.mT


def orthogonality_error(q):
    q = tall(q.detach().double())
    return (q.mT @ q - torch.eye(q.shape[-1], dtype=torch.float64)).abs().max().item()


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
    exact = w.detach().double().requires_grad_()
    q, truth = vk.cayley(w, backend=backend), literal_cayley(exact)
    assert q.shape == w.shape and q.dtype == dtype
    # Rounded once to the weight's dtype; what the scale costs, it costs the float64 inside (and the truth).
    limit = 10 * EPS[dtype] + 40 * 100.0 ** max(power, 0) * EPS[torch.float64]
    torch.testing.assert_close(q.double(), truth, rtol=0, atol=limit)
    g = normal(*batch, t, s, seed=seed + 1)
    (ours,), (theirs,) = torch.autograd.grad(q, w, g.to(dtype)), torch.autograd.grad(truth, exact, g)
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


# -------------------------------------------------------------------------------------------------------- normalisation


def drawn_rows(shape, channels, dtype, layout, power, seed):
    """Rows with an offset and unequal channels, rounded to dtype; and those very values in float64."""
    x = normal(*shape, channels, seed=seed) * (1 + torch.arange(channels) % 3) + normal(channels, seed=seed + 1)
    x = laid_out((x * 10.0**power).to(dtype), layout)
    return x, x.double().reshape(-1, channels)


def weights_of(mask, rows):
    return torch.ones(rows, dtype=torch.float64) if mask is None else mask.double().reshape(-1)


row_shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3)


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
    centred = (rows - (w * rows).sum(0) / total) * (w > 0)
    if not degrees > 1e-9 or not centred.any():
        event("no variance")
        assert not out.isnan().any()
        return
    sigma = (centred * w).T @ centred / degrees
    sigma = (1 - eps) * sigma + eps * sigma.trace() / channels * torch.eye(channels, dtype=torch.float64)
    truth = centred @ (
        centred.T * channels / sigma.trace() if method == "phi_s" else torch.linalg.solve(sigma, centred.T)
    )
    size = truth.abs().max().item()
    torch.testing.assert_close(out @ out.T, truth, rtol=1e-6, atol=50 * channels * EPS[dtype] * size)
    if method == "zca":
        values, vectors = torch.linalg.eigh(sigma)
        truth = centred @ vectors @ torch.diag(values**-0.5) @ vectors.T
        torch.testing.assert_close(out, truth, rtol=0, atol=max(1e-7, 20 * EPS[dtype]) * truth.abs().max().item())


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
    st.sampled_from(["none", "number", "per level", "per channel"]),
    st.sampled_from([-1, math.inf]),
    st.integers(0, 99),
)
def test_several_losses_are_each_its_own(
    levels, s, t, dtype, normalization, loss, reduction, scale, chunked_from, seed
):
    count("ortho_proj_losses")
    features = [
        [laid_out(normal(*shape, c, seed=seed + i + c).to(dtype), layout).requires_grad_(c == s) for c in (s, t)]
        for i, (shape, layout, _) in enumerate(levels)
    ]
    students, teachers = ([pair[side] for pair in features] for side in (0, 1))
    teachers = [y.detach() for y in teachers]
    found_masks = [mask_of(kind, shape, seed + i) for i, (shape, _, kind) in enumerate(levels)]
    weights = normal(len(levels), t, s, seed=seed).to(dtype).requires_grad_()
    scales = {"number": 0.7, "per level": normal(len(levels), seed=seed).to(dtype)}
    scales["per channel"] = normal(len(levels), t, seed=seed).to(dtype)
    scale = scales.get(scale)
    options = {"normalization": normalization, "loss": loss, "reduction": reduction, "eps": 0.1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "CHUNKED_FROM", chunked_from)
        values = vk.functional.ortho_proj_losses(students, teachers, weights, scale=scale, masks=found_masks, **options)
    apart = [
        vk.functional.ortho_proj_loss(
            x, y, w, scale=scale[i] if isinstance(scale, torch.Tensor) else scale, mask=m, backend="torch", **options
        )
        for i, (x, y, w, m) in enumerate(zip(students, teachers, weights, found_masks, strict=True))
    ]
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-10}
    told = [
        normalization in ("layer_norm", "none") or (weights_of(m, math.prod(shape)) > 0).sum() >= 3
        for m, (shape, _, _) in zip(found_masks, levels, strict=True)
    ]
    if not all(told):
        event("too few rows for statistics: finite is all there is to say")
        assert values.isfinite().all()
        return
    torch.testing.assert_close(values, torch.stack(apart), **tolerance)
    upstream = normal(len(levels), seed=seed).to(dtype)
    ours, theirs = (torch.autograd.grad(v, [weights, *students], upstream) for v in (values, torch.stack(apart)))
    torch.testing.assert_close(ours, theirs, **tolerance)


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
    number = {"match": (t / s) ** 0.5, "learned": (t / s) ** 0.5}.get(scale, scale)
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
    rank, found = vk.diagnostics.effective_rank(x, mask=mask), vk.diagnostics.cka(x, y, mask=mask, debiased=debiased)
    if kept.sum() < 2:
        assert rank == 0 and found.isnan()
        return
    torch.testing.assert_close(rank, rank_of(rows) if (rows != rows[0]).any() else rank * 0, rtol=1e-5, atol=1e-5)
    if debiased and kept.sum() < 4:
        assert found.isnan()
        return
    for z in (rows, other):
        if hsic_of(z, z, debiased) < 1e-6 * (z - z.mean(0)).square().sum() ** 2 / len(z) ** 2:
            event("a difference of equal sums")
            return
    assert found <= 1 + 1e-9
    torch.testing.assert_close(found, cka_of(rows, other, debiased), rtol=1e-6, atol=1e-6)


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
