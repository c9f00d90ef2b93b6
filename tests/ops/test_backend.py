"""Choice of backend, its errors, info(), and imports where the extension or Triton are missing."""

import importlib
import json
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

import vkd_kernels as vk
from tests.helpers import processes
from vkd_kernels import _info
from vkd_kernels.ops import implementations
from vkd_kernels.ops.implementations import Implementation

WITHOUT = """
import sys
sys.modules[{missing!r}] = None  # importing it fails
import warnings
from pathlib import Path
warnings.simplefilter("error")
import torch, vkd_kernels as vk
facts = vk.info()
print(facts["ops"]["{op}"]["{device}"])
"""


def python(code):
    result = processes.run_python("-c", code, seconds=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_imports_without_the_extension():
    out = python(
        WITHOUT.format(missing="vkd_kernels._C", op="cayley", device="cpu")
        + "warnings.simplefilter('always')\n"
        + "with warnings.catch_warnings(record=True) as seen:\n"
        + "    q = vk.cayley(torch.randn(5, 3)); vk.cayley(torch.randn(5, 3))\n"
        + "assert (q.T @ q - torch.eye(3)).abs().max() < 1e-6\n"
        + "print(len(seen), seen[0].message)\n"
    )
    assert "'served_by': [{'implementation': 'reference'" in out
    assert "1 vkd_kernels: cayley falls back to PyTorch (reference) because" in out


def test_imports_without_triton():
    out = python(WITHOUT.format(missing="triton", op="ortho_proj_loss", device="cuda"))
    assert "'served_by': [{'implementation': 'chunked'" in out and "Triton can't be imported" in out


def test_an_import_loads_no_compiler_and_no_optional_package():
    """torch._dynamo alone takes as long as PyTorch, in every worker process of a DataLoader."""
    code = (
        "import sys, torch; before = {*sys.modules}; import vkd_kernels\n"
        "print(sorted({m.split('.')[0] for m in {*sys.modules} - before} - {*sys.stdlib_module_names, 'torch'}))\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    result = processes.run([sys.executable, "-c", code], seconds=300)  # not forked: there it is imported already
    assert (result.returncode, result.stdout) == (0, "['vkd_kernels']\nFalse\n"), result.stderr


def test_a_stale_extension_is_diagnosed_and_not_loaded(monkeypatch):
    if implementations.extension()[0] is None:
        pytest.skip("no extension here")
    monkeypatch.setattr(implementations, "_build_record", lambda: {"torch": "2.0.1"})
    module, reason = implementations.extension.__wrapped__()
    assert module is None
    start = f"the extension was built with PyTorch 2.0.1 and this is {torch.__version__}: install the package anew: pip"
    assert reason.startswith(start) and "--no-cache-dir" in reason


@pytest.mark.parametrize("reason", ["VKD_KERNELS_BUILD=0 at installation", "no C++ compiler was found"])
def test_an_extension_of_an_earlier_build_is_not_loaded(monkeypatch, reason):
    """An editable tree keeps it after a build in pure Python."""
    monkeypatch.setattr(implementations, "_build_record", lambda: {"build": "python", "reason": reason})
    monkeypatch.setattr(implementations.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(implementations.importlib, "import_module", lambda name: pytest.fail(f"{name} was loaded"))
    assert implementations.extension.__wrapped__() == (None, f"the extension is not built: {reason}")


def test_an_extension_that_does_not_load_is_diagnosed(monkeypatch):
    def fails(name):
        raise OSError("undefined symbol: a")

    monkeypatch.setattr(implementations, "_build_record", dict)
    monkeypatch.setattr(implementations.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(implementations.importlib, "import_module", fails)
    assert implementations.extension.__wrapped__() == (
        None,
        "the extension can't be loaded: OSError: undefined symbol: a",
    )


@pytest.mark.parametrize(
    ("cuda", "op", "implementation", "device", "dtype", "reason"),
    [
        (None, "cayley", "triton", "cpu", torch.float32, "cayley has no 'triton' backend; it has 'extension', 'torch'"),
        (None, "ortho_proj_loss", "triton", "cuda", torch.float64, r"the Triton kernels take .*; got float64"),
        (None, "ortho_proj_loss", "triton", "cuda", torch.float32, "need compute capability 8.0; this GPU has 7.5"),
        (None, "cayley", "extension", "cuda", torch.float32, "built without CUDA: no nvcc"),
        ("13.0", "cayley", "extension", "cuda", torch.float32, "for the GPU architectures 80-real and this GPU is 7.5"),
        ("13.0", "cayley", "extension", "xpu", torch.float32, "takes CPU and CUDA tensors; got a tensor on xpu"),
        ("13.0", "cayley", "extension", "cpu", torch.float64, None),
    ],
)
def test_reasons(monkeypatch, cuda, op, implementation, device, dtype, reason):
    built = types.SimpleNamespace(build_info=lambda: {"cuda": cuda, "cuda_architectures": "80-real"})
    monkeypatch.setattr(implementations, "extension", lambda: (built, None))
    monkeypatch.setattr(implementations, "_build_record", lambda: {"reason": "no nvcc"})
    monkeypatch.setattr(implementations, "why_no_triton", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (7, 5))
    monkeypatch.setattr(implementations, "why_not_on_gpu", implementations.why_not_on_gpu.__wrapped__)
    told = implementations.why_not(op, Implementation(implementation), torch.device(device), dtype)
    assert told is None if reason is None else re.search(reason, told)


def test_an_old_triton_is_not_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.2.0"))
    assert implementations.why_no_triton.__wrapped__() == "Triton 3.2.0 is older than 3.4"


@pytest.mark.parametrize(
    ("capability", "hip", "serves"),
    [((7, 5), None, False), ((8, 0), None, True), ((12, 0), None, True), ((9, 0), "6.4", True), ((6, 0), "6.4", True)],
)
def test_gpus_that_are_too_old_for_triton_have_the_loss_in_pytorch(monkeypatch, capability, hip, serves):
    monkeypatch.setattr(implementations, "why_no_triton", lambda: None)
    monkeypatch.setattr(implementations, "why_no_launches", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(implementations, "why_not_on_gpu", implementations.why_not_on_gpu.__wrapped__)
    implementations._warn_once.cache_clear()
    both = (Implementation.TRITON, Implementation.CHUNKED)
    device = torch.device("cuda")
    asked = "ortho_proj_loss", "triton", device, torch.float32, both
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        chosen = [implementations.decide("ortho_proj_loss", None, device, torch.float32, both) for _ in range(2)]
    implementations._warn_once.cache_clear()
    assert chosen == [Implementation.TRITON if serves else Implementation.CHUNKED] * 2
    if serves:
        assert implementations.decide(*asked) is Implementation.TRITON and not seen
        return
    reason = f"because the Triton kernels need compute capability 8.0; this GPU has {'.'.join(map(str, capability))}"
    assert len(seen) == 1 and reason in str(seen[0].message)
    with pytest.raises(RuntimeError, match="requested for ortho_proj_loss, but .* need compute capability 8.0"):
        implementations.decide(*asked)


def test_the_tensors_gpu_is_asked_and_not_the_current_one(monkeypatch):
    built = types.SimpleNamespace(build_info=lambda: {"cuda": "13.0", "cuda_architectures": "80-real"})
    capabilities = {0: (7, 5), 1: (8, 0)}  # a T4, the current one, beside an A100
    monkeypatch.setattr(implementations, "extension", lambda: (built, None))
    monkeypatch.setattr(implementations, "why_no_triton", lambda: None)
    monkeypatch.setattr(implementations, "why_no_launches", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[getattr(device, "index", device) or 0]
    )
    monkeypatch.setattr(implementations, "why_not_on_gpu", implementations.why_not_on_gpu.__wrapped__)
    for op, implementation in (("ortho_proj_loss", Implementation.TRITON), ("cayley", Implementation.EXTENSION)):
        for device, serves in (("cuda:1", True), ("cuda:0", False), ("cuda", False)):
            told = implementations.why_not(op, implementation, torch.device(device), torch.float32)
            assert (told is None) == serves, told


def test_the_least_capability_is_that_of_the_tiles():
    tiles = pytest.importorskip("vkd_kernels.ops.ortho_proj_loss.triton.tiles")
    least = min(capability for table in tiles.TILES.values() for capability in table if isinstance(capability, int))
    assert divmod(least, 10) == implementations.TRITON_CAPABILITY


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler"),
        subprocess.CalledProcessError(1, ["gcc", "driver.c"]),
        AssertionError("libcuda.so cannot found"),
        ImportError("cuda_utils.so: failed to map segment from shared object"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_where_triton_cannot_launch_kernels_it_does_not_serve(monkeypatch, error):
    """A GPU image without a C compiler, without Python's headers, or without the driver's library."""

    class Driver:
        @property
        def active(self):
            raise error

    fake = types.SimpleNamespace(runtime=types.SimpleNamespace(driver=Driver()), __version__="3.4.0")
    monkeypatch.setitem(sys.modules, "triton", fake)
    monkeypatch.setattr(implementations, "triton_interprets", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(implementations, "why_not_on_gpu", implementations.why_not_on_gpu.__wrapped__)
    implementations.why_no_launches.cache_clear()
    reason = implementations.why_not("ortho_proj_loss", Implementation.TRITON, torch.device("cuda"), torch.float32)
    implementations.why_no_launches.cache_clear()
    assert reason.startswith("Triton can't launch kernels, which needs a C compiler") and str(error) in reason


def test_info_tells_versions_and_reasons():
    facts = vk.info()
    json.dumps(facts)
    assert facts["vkd_kernels"] == vk.__version__ and facts["torch"] == torch.__version__
    assert set(facts["ops"]) == {"ortho_proj_loss", "cayley"}
    for devices in facts["ops"].values():
        for row in devices.values():
            assert row["served_by"][-1] == {"implementation": "reference", "when": "otherwise"}
            assert all(row["not"].values())


def test_info_as_a_command(capsys):
    result = processes.run_python("-m", "vkd_kernels.info", "--json", seconds=300)
    assert result.returncode == 0 and not result.stderr
    assert json.loads(result.stdout) == json.loads(json.dumps(vk.info()))
    _info.main([])
    assert torch.__version__ in capsys.readouterr().out


def test_info_stays_the_function_where_its_module_is_imported():
    importlib.import_module("vkd_kernels.info")
    assert vk.info()["vkd_kernels"] == vk.__version__


def test_environment_asks_for_a_backend(monkeypatch):
    weight = torch.randn(5, 3)
    x, y = torch.randn(4, 3), torch.randn(4, 5)
    monkeypatch.setenv(implementations.ENVIRONMENT, "torch")
    both = (Implementation.EXTENSION, Implementation.REFERENCE)
    assert implementations.decide("cayley", None, weight.device, torch.float32, both) is Implementation.REFERENCE
    monkeypatch.setenv(implementations.ENVIRONMENT, "triton")  # binds the loss; cayley has no such backend
    vk.cayley(weight)
    with pytest.raises(RuntimeError, match="VKD_KERNELS_BACKEND='triton' was requested for ortho_proj_loss, but"):
        vk.functional.ortho_proj_loss(x.double(), y.double(), weight.double())
    monkeypatch.setenv(implementations.ENVIRONMENT, "cuda")
    with pytest.raises(ValueError, match="VKD_KERNELS_BACKEND must be one of .*'cuda'"):
        vk.cayley(weight)


def test_triton_serves_cpu_tensors_where_it_interprets_if_asked_for(monkeypatch):
    pytest.importorskip("triton")
    x, y, weight = torch.randn(4, 3), torch.randn(4, 5), torch.randn(5, 3)
    monkeypatch.setattr(implementations, "triton_interprets", lambda: False)
    with pytest.raises(
        RuntimeError, match="take CUDA tensors .CPU tensors with TRITON_INTERPRET=1.; got a tensor on cpu"
    ):
        vk.functional.ortho_proj_loss(x, y, weight, backend="triton")
    monkeypatch.undo()
    if implementations.triton_interprets():
        value = vk.functional.ortho_proj_loss(x, y, weight, backend="triton")
        torch.testing.assert_close(value, vk.functional.ortho_proj_loss(x, y, weight))
        candidates = (Implementation.TRITON, Implementation.REFERENCE)
        assert (
            implementations.decide("ortho_proj_loss", None, x.device, x.dtype, candidates) is Implementation.REFERENCE
        )


def test_an_explicit_request_never_falls_back(monkeypatch):
    monkeypatch.setattr(implementations, "extension", lambda: (None, "the extension is not built: no compiler"))
    with pytest.raises(RuntimeError, match="backend='extension' was requested for cayley, but .*no compiler"):
        vk.cayley(torch.randn(5, 3), backend="extension")


def test_an_automatic_fallback_warns_once(monkeypatch):
    monkeypatch.setattr(implementations, "extension", lambda: (None, "for a test"))
    implementations._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"cayley falls back to PyTorch \(reference\) because for a test"):
        vk.cayley(torch.randn(5, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vk.cayley(torch.randn(5, 3))
    implementations._warn_once.cache_clear()


def test_no_warning_on_the_cpu_where_nothing_is_missing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vk.functional.ortho_proj_loss(torch.randn(4, 3), torch.randn(4, 5), torch.randn(5, 3))


def test_public_names():
    for name in vk.__all__:
        assert getattr(vk, name) is not None


def test_the_architecture_page_has_the_table_of_candidates():
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    rows = [
        f"| {op} | {implementation.value} | {when} |"
        for op, candidates in implementations.CANDIDATES.items()
        for implementation, when in candidates
    ]
    assert "\n".join(rows) in page
