"""PyTorch's setting for float32 products, by the API of the installed version and by the one before PyTorch 2.9."""

import types

import pytest
import torch

from vkd_kernels.ops import tf32
from vkd_kernels.ops.ortho_proj_loss import chunks


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
    with pytest.raises(KeyError), tf32.ieee_products(torch.device("cuda")):
        assert not tf32.tf32_allowed()
        raise KeyError
    assert tf32.tf32_allowed() == allowed
    with tf32.ieee_products(torch.device("cpu")):
        assert tf32.tf32_allowed() == allowed


@pytest.mark.skipif(not tf32.HAS_PRECISION, reason="PyTorch before 2.9 has no setting of all backends")
def test_a_setting_of_all_backends_goes_on_reaching_cublas():
    before, own = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "none"  # of its own
    try:
        torch.backends.fp32_precision = "tf32"
        with tf32.ieee_products(torch.device("cuda")):
            assert not tf32.tf32_allowed()
        assert tf32.tf32_allowed()
        torch.backends.fp32_precision = "ieee"
        assert not tf32.tf32_allowed()
    finally:
        torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before, own


@pytest.mark.parametrize(
    ("kind", "capability", "there"), [("cuda", 90, True), ("hip", 942, True), ("hip", 950, False), ("hip", 900, False)]
)
def test_triton_multiplies_in_tf32_where_it_can(setting, kind, capability, there):
    triton = pytest.importorskip("vkd_kernels.ops.ortho_proj_loss.triton", reason="needs Triton")
    setting(True)
    chip = triton.tiles.Chip(kind, capability)
    assert triton.launch.precision(torch.float32, chip) == ("tf32" if there else "ieee")


@pytest.mark.parametrize(
    ("hip", "version", "accumulation", "dtype", "direct"),
    [
        (None, "2.8.0", False, torch.float16, True),
        (None, "2.14.0", True, torch.float16, False),
        (None, "2.14.0", True, torch.bfloat16, True),
        ("6.4", "2.8.0", False, torch.bfloat16, False),
        ("7.0", "2.10.0", False, torch.bfloat16, True),
    ],
)
def test_16_bit_products_with_a_float32_result(monkeypatch, hip, version, accumulation, dtype, direct):
    """PyTorch refuses them on ROCm before 2.10, and in float16 where float16 may accumulate."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    matmul = types.SimpleNamespace(allow_fp16_accumulation=accumulation)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    assert chunks._multiplies_into_float32(dtype) == direct
