"""standardize, whiten and Whitening: formulas, invariants, masks, running statistics, bad arguments.

Standardization, freezing and what is saved: test_running_statistics.py.
"""

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


DECORRELATING = [method for method in METHODS if method != "phi_s"]


@pytest.mark.parametrize("method", DECORRELATING)
def test_whitened_features_have_the_identity_as_covariance(method):
    x = features()
    white = whiten(x, method=method, eps=0.0)
    assert covariance_error(white) < 1e-10
    assert white.mean(0).abs().max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_float32_and_16_bit_are_whitened_in_float64(method):
    x = features(2000, 20)
    torch.testing.assert_close(
        whiten(x.float(), method=method, eps=0.0), whiten(x.float().double(), method=method, eps=0.0).float()
    )
    assert whiten(x.bfloat16(), method=method).dtype == torch.bfloat16


@pytest.mark.parametrize("c", [1, 2, 3, 7, 8, 12, 65])
def test_phi_s_is_a_rotation_and_one_scale_to_equal_variances(c):
    x = features(500, c)
    out = whiten(x, method="phi_s", eps=1e-3)
    torch.testing.assert_close(out.var(0), torch.ones(c, dtype=torch.float64))
    assert out.mean(0).abs().max() < 1e-12
    centered, variance = x - x.mean(0), torch.cov(x.T).reshape(c, c).trace() / c
    torch.testing.assert_close(out @ out.T, centered @ centered.T / variance)  # angles and ratios of lengths stay
    torch.testing.assert_close(whiten(x, method="phi_s", eps=0.5), out)  # the shrinkage has no part in it


def test_phi_s_rotates_by_what_looks_like_a_hadamard_matrix():
    """The literal composition: principal components, a rotation whose entries are about 1/√C, one scale."""
    x = features(500, 8)
    centered = x - x.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    rotation = torch.linalg.lstsq(centered @ vectors * values.mean().rsqrt(), whiten(x, method="phi_s")).solution
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(8, dtype=torch.float64))
    assert rotation.abs().max() <= math.sqrt(2 / 8) + 1e-9  # Hadamard: 1/√8
    torch.testing.assert_close((rotation.T * values @ rotation).diagonal(), values.mean().expand(8))


def test_zca_is_symmetric_pca_is_ordered_cholesky_is_the_published_formula():
    x = features()
    centered = x - x.mean(0)
    lower = torch.linalg.cholesky(torch.cov(x.T))
    expected = torch.linalg.solve_triangular(lower, centered.T, upper=False).T
    torch.testing.assert_close(whiten(x, method="cholesky", eps=0.0), expected)
    zca = torch.linalg.lstsq(centered, whiten(x, eps=0.0)).solution
    torch.testing.assert_close(zca, zca.T)
    pca = torch.linalg.lstsq(centered, whiten(x, method="pca", eps=0.0)).solution
    norms = (centered @ (pca / pca.norm(dim=0))).var(0)
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


def test_float64_mask_weights_too_small_for_float32_count():
    x, weights = features(40), torch.rand(40, dtype=torch.float64)
    for function in (standardize, lambda x, mask: whiten(x, mask=mask)):
        torch.testing.assert_close(function(x.float(), mask=1e-50 * weights), function(x.float(), mask=weights))


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


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: whiten(torch.randn(4)), ValueError, r"features must have the shape .*got \(4,\)"),
        (lambda: whiten(torch.randn(0, 4)), ValueError, "features has no rows"),
        (lambda: whiten(torch.randn(5, 4), method="svd"), ValueError, "method must be one of 'zca'.*got 'svd'"),
        (lambda: whiten(torch.randn(5, 4), eps=-0.1), ValueError, "eps must be .*got -0.1"),
        (lambda: whiten(torch.ones(5, 4, dtype=torch.int)), TypeError, "features .*got a int32"),
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
