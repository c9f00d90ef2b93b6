"""standardize, whiten and Whitening: formulas, invariants, masks, running statistics, bad arguments."""

import math

import pytest
import torch

import vkd_kernels as vk
from vkd_kernels.functional import standardize, whiten
from vkd_kernels.ops.normalization.api import METHODS


def covariance_error(rows):
    """max |cov(rows) - I| with N - 1 in the denominator."""
    return (torch.cov(rows.double().T) - torch.eye(rows.shape[1])).abs().max().item()


def features(n=500, c=7):
    return torch.randn(n, c, dtype=torch.float64) @ torch.randn(c, c, dtype=torch.float64) + 3


def test_standardize_equals_batch_norm():
    x = torch.randn(4, 6, 5)
    expected = torch.nn.functional.batch_norm(x.reshape(-1, 5), None, None, training=True, eps=1e-5).view_as(x)
    torch.testing.assert_close(standardize(x), expected)


def test_standardize_gradcheck_with_weights():
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: standardize(x, mask=weights, eps=1e-2), (x,))


@pytest.mark.parametrize("method", [*METHODS, "standardize"])
def test_masked_rows_count_nowhere_and_come_out_as_zero(method):
    x, keep = features(40), torch.arange(40) % 3 > 0

    def f(x, mask=None):
        return standardize(x, mask=mask) if method == "standardize" else whiten(x, method=method, mask=mask)

    spoilt = torch.where(keep[:, None], x, math.nan)
    out = f(spoilt, keep)
    torch.testing.assert_close(out[keep], f(x[keep]))
    assert bool((out[~keep] == 0).all())


@pytest.mark.parametrize("method", METHODS)
def test_whitened_features_have_the_identity_as_covariance(method):
    x = features()
    white = whiten(x, method=method, eps=0.0)
    assert covariance_error(white) < 1e-10
    assert white.mean(0).abs().max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_float32_and_16_bit_are_whitened_in_float64(method):
    x = features(2000, 20)
    assert covariance_error(whiten(x.float(), method=method, eps=0.0)) < 1e-4
    assert whiten(x.bfloat16(), method=method).dtype == torch.bfloat16


def test_zca_is_symmetric_pca_is_ordered_cholesky_is_the_published_formula():
    x = features()
    centred = x - x.mean(0)
    lower = torch.linalg.cholesky(torch.cov(x.T))
    expected = torch.linalg.solve_triangular(lower, centred.T, upper=False).T
    torch.testing.assert_close(whiten(x, method="cholesky", eps=0.0), expected)
    zca = torch.linalg.lstsq(centred, whiten(x, eps=0.0)).solution
    torch.testing.assert_close(zca, zca.T)
    pca = torch.linalg.lstsq(centred, whiten(x, method="pca", eps=0.0)).solution
    norms = (centred @ (pca / pca.norm(dim=0))).var(0)
    assert bool((norms[:-1] >= norms[1:] - 1e-9).all())


def test_shrinkage_is_the_documented_one():
    x, eps = features(), 0.3
    sigma = torch.cov(x.T)
    shrunk = (1 - eps) * sigma + eps * sigma.trace() / 7 * torch.eye(7)
    a = torch.linalg.lstsq(x - x.mean(0), whiten(x, method="cholesky", eps=eps)).solution
    torch.testing.assert_close(a.T @ shrunk @ a, torch.eye(7, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
def test_fewer_rows_than_channels_stay_finite(method):
    white = whiten(torch.randn(5, 64), method=method, eps=1e-3)
    assert white.isfinite().all() and white.norm() > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("x", [torch.full((6, 4), 2.5), torch.randn(1, 4)])
def test_rows_without_variance_whiten_to_zero(method, x):
    assert torch.equal(whiten(x, method=method), torch.zeros_like(x))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_whitening_does_not_depend_on_the_scale(method, scale):
    x = features()
    torch.testing.assert_close(whiten(x * scale, method=method), whiten(x, method=method), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_nan_makes_the_result_nan(method):
    x = features()
    x[3, 2] = math.nan
    assert whiten(x, method=method).isnan().all()


def test_whitening_without_momentum_is_the_function():
    x = features()
    assert torch.equal(vk.Whitening(7, method="cholesky", eps=0.1)(x), whiten(x, method="cholesky", eps=0.1))


def test_running_statistics_pool_small_batches_exactly():
    x = features(64 * 8, 6)
    module = vk.Whitening(6, momentum=1e-3)  # a cumulative average for the first 1000 batches
    for batch in x.split(8):
        module(batch)
    torch.testing.assert_close(module.running_mean, x.mean(0))
    torch.testing.assert_close(module.running_covariance, torch.cov(x.T, correction=0))
    assert module.batches_seen == 64


def test_eval_mode_uses_running_statistics_and_leaves_them():
    module = vk.Whitening(7, momentum=0.1, eps=1e-6)
    for _ in range(30):
        module(features(50))
    module.eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    one_row = module(features(1))
    assert one_row.isfinite().all() and one_row.norm() > 0
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    restored = vk.Whitening(7, momentum=0.1, eps=1e-6).eval()
    restored.load_state_dict(before)
    x = features(3)
    assert torch.equal(restored(x), module(x))


def test_a_masked_batch_leaves_running_statistics_alone():
    module = vk.Whitening(7, momentum=0.1)
    module(features(20))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    module(torch.full((4, 7), math.nan), mask=torch.zeros(4, dtype=torch.bool))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: whiten(torch.randn(4)), ValueError, r"teacher must have the shape .*got \(4,\)"),
        (lambda: whiten(torch.randn(0, 4)), ValueError, "teacher has no rows"),
        (lambda: whiten(torch.randn(5, 4), method="svd"), ValueError, "method must be one of 'zca'.*got 'svd'"),
        (lambda: whiten(torch.randn(5, 4), eps=-0.1), ValueError, "eps must be .*got -0.1"),
        (lambda: whiten(torch.ones(5, 4, dtype=torch.int)), TypeError, "teacher .*got a int32"),
        (lambda: standardize(torch.randn(5, 4), mask=torch.ones(4)), ValueError, r"mask .*\(5,\); got \(4,\)"),
        (lambda: standardize([1]), TypeError, "features must be a tensor; got list"),
        (lambda: vk.Whitening(0), ValueError, "num_features must be at least 1; got 0"),
        (lambda: vk.Whitening(4, momentum=0.0), ValueError, "momentum must be .*got 0.0"),
        (lambda: vk.Whitening(4)(torch.randn(3, 5)), ValueError, r"features must have 4 channels; .*\(3, 5\)"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
