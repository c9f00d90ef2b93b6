"""PyTorch's setting for float32 products, by the API of the installed version and by the one before PyTorch 2.9."""

import types

import pytest
import torch

from vkd_kernels.ops import tf32


@pytest.fixture(params=["of the installed PyTorch", "before PyTorch 2.9"])
def setting(request, monkeypatch):
    """Sets what a user would set: True allows TF32."""
    if request.param == "before PyTorch 2.9":
        matmul = types.SimpleNamespace(allow_tf32=False)
        monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
        monkeypatch.setattr(tf32, "HAS_PRECISION", False)
        yield lambda allowed: setattr(matmul, "allow_tf32", allowed)
        return
    before = torch.get_float32_matmul_precision()
    yield lambda allowed: torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("allowed", [False, True])
def test_statistics_are_ieee_and_the_setting_comes_back(setting, allowed):
    setting(allowed)
    assert tf32.tf32_allowed() == allowed
    with pytest.raises(KeyError), tf32.ieee_products():
        assert not tf32.tf32_allowed()
        raise KeyError
    assert tf32.tf32_allowed() == allowed
