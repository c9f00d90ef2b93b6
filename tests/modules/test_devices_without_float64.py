"""Apple's MPS and other devices without float64: what needs it runs on the CPU, everything else stays on the device.

No such device is at hand. The CPU plays both: tensors are on the device unless they come from ``.cpu()``, and to make
float64 of one on the device is an error, as on MPS.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vkd_kernels as vk
from vkd_kernels.logits import logit_loss
from vkd_kernels.ops import checks, float64, library
from vkd_kernels.ops.ortho_proj_loss import api, dispatch
from vkd_kernels.ops.ortho_proj_loss.spec import Execution, LossSpec
from vkd_kernels.pooling import Rows, compared


class NoFloat64(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.on_the_cpu = []  # alive, so that no other tensor has the same identity

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        result = function(*args, **(kwargs or {}))
        returned = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        known = {id(x) for x in self.on_the_cpu}
        if any(id(x) in known or x.dtype == torch.float64 for x in given):
            self.on_the_cpu += returned
        elif given and any(x.dtype == torch.float64 for x in returned):
            raise TypeError(f"Cannot convert a Tensor to float64 as the device doesn't support it ({function})")
        return result


@pytest.fixture
def no_float64(monkeypatch):
    mode = NoFloat64()

    def cpu(tensor):
        copied = tensor.clone()
        mode.on_the_cpu.append(copied.detach())
        mode.on_the_cpu.append(copied)
        return copied

    monkeypatch.setenv("VKD_KERNELS_BACKEND", "torch")
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(float64, "HAVE_FLOAT64", ())
    monkeypatch.setattr(float64, "_accepts_float64", lambda device_type: False)
    with mode:
        with pytest.raises(TypeError, match="Cannot convert a Tensor to float64"):
            torch.ones(2).double()
        yield


def student_and_teacher():
    return torch.randn(6, 4).requires_grad_(), torch.randn(6, 16)


@pytest.mark.usefixtures("no_float64")
def test_orthogonal_projections():
    for shape in ((16, 4), (4, 16), (3, 16, 4)):
        q = vk.cayley(torch.randn(shape))
        assert q.dtype == torch.float32
    for orthogonal_map in ("cayley", "matrix_exp", "householder"):
        layer = vk.OrthogonalLinear(4, 16, orthogonal_map=orthogonal_map)
        layer.weight = torch.randn(16, 4)
        assert layer(torch.randn(5, 4)).dtype == torch.float32
        vk.orthogonal(torch.nn.Linear(4, 16), orthogonal_map=orthogonal_map)


@pytest.mark.usefixtures("no_float64")
@pytest.mark.parametrize("normalization", ["layer_norm", "batch_norm", "whiten", "none"])
@pytest.mark.parametrize("loss", ["smooth_l1", "mse"])
def test_the_loss(loss, normalization):
    student, teacher = student_and_teacher()
    module = vk.OrthoProjLoss(4, 16, loss=loss, normalization=normalization)
    assert module(student, teacher, torch.arange(6) > 2).dtype == torch.float32


@pytest.fixture
def chunks_of_rows(no_float64, monkeypatch):
    """The way of large problems, in whose operators the mode sees every function: they are not called as operators."""
    monkeypatch.delenv("VKD_KERNELS_BACKEND")
    monkeypatch.setattr(dispatch, "CHUNKED_FROM", -1)
    monkeypatch.setattr(library, "_is_watched", lambda: False)
    monkeypatch.setattr(checks, "is_free_to_read", lambda tensor: False)  # as it is on such a device


@pytest.mark.usefixtures("chunks_of_rows")
@pytest.mark.parametrize("normalization", ["layer_norm", "batch_norm", "whiten", "l2", "none"])
@pytest.mark.parametrize("loss", ["smooth_l1", "mse", "cosine", {"cosine": 0.5, "mse": 0.5}], ids=str)
@pytest.mark.parametrize("semi_orthogonal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_loss_by_chunks(loss, normalization, semi_orthogonal, dtype):
    leaves = [torch.randn(6, 4).to(dtype).requires_grad_(), torch.eye(16, 4).requires_grad_(), torch.rand(()) + 0.5]
    leaves[2].requires_grad_(loss != "cosine")
    value = api.projected_loss(
        leaves[0],
        torch.randn(6, 16),
        leaves[1],
        scale=leaves[2] if leaves[2].requires_grad else None,
        mask=torch.rand(6),
        spec=LossSpec(normalization=normalization, loss=LossSpec.shares(loss)),
        execution=Execution(semi_orthogonal=semi_orthogonal),
    )
    gradients = torch.autograd.grad(value, [leaf for leaf in leaves if leaf.requires_grad])
    assert value.dtype == torch.float32 and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.usefixtures("no_float64")
@pytest.mark.parametrize("momentum", [None, 0.1])
def test_normalizations(momentum):
    x = torch.randn(6, 16)
    for module in (vk.Whitening(16, momentum=momentum), vk.Standardization(16, momentum=momentum)):
        module.to("cpu")
        assert module(x, torch.arange(6) > 2).dtype == torch.float32
    assert vk.functional.standardize(x).dtype == vk.functional.whiten(x).dtype == torch.float32


@pytest.mark.usefixtures("no_float64")
def test_diagnostics():
    student, teacher = student_and_teacher()
    weight, mask = torch.randn(16, 4), torch.rand(6)
    assert len(vk.diagnostics.metrics(student, teacher, weight, mask=mask)) == 4


@pytest.mark.usefixtures("no_float64")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_store_of_features(tmp_path, dtype):
    teacher, data = torch.nn.Linear(4, 6), torch.randn(10, 4)
    options = {"dtype": dtype, "shard_samples": 5, "progress": False}
    vk.FeatureStore.build(tmp_path, teacher, data, [""], **options)
    (tmp_path / "shard-00001.safetensors").unlink()
    assert vk.FeatureStore.build(tmp_path, teacher, data, [""], **options)[9][""].dtype == dtype


class NoFloat64OnMeta(TorchDispatchMode):
    """The meta device as one without float64, beside a CPU that has it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.is_meta and x.dtype == torch.float64:
                raise TypeError(f"Cannot convert a Tensor to float64 as the device doesn't support it ({function})")
        return result


def test_stored_features_in_float64_reach_a_student_on_such_a_device():
    student, teacher = torch.randn(6, 4, device="meta"), torch.randn(6, 4, dtype=torch.float64)
    pair = vk.Pair("", "")
    with NoFloat64OnMeta():
        rows = compared(pair, Rows(student), Rows(teacher), one_mask=True)
        loss, _ = logit_loss(
            student, teacher, None, name="logits", temperature=1.0, reduction="mean", process_group=None
        )
    assert rows.teacher.is_meta and rows.teacher.dtype == loss.dtype == torch.float32


def test_running_statistics_stay_on_the_cpu_when_the_module_moves(monkeypatch):
    monkeypatch.setattr(float64, "_accepts_float64", lambda device_type: False)
    monkeypatch.setattr(float64, "HAVE_FLOAT64", ("cpu",))
    for module in (vk.Whitening(16, momentum=0.1), vk.Standardization(16, momentum=0.1)):
        module.to("meta")  # the other device
        assert all(buffer.device.type == "cpu" for buffer in module.buffers())
    monkeypatch.setattr(float64, "HAVE_FLOAT64", ())
    with torch.device("meta"):
        module = vk.Standardization(16, momentum=0.1)
    module.to_empty(device="cpu")  # in the place of a device without float64
    assert not any(buffer.is_meta for buffer in module.buffers()) and module.batches_seen == 0


def test_values_and_gradients_are_those_of_a_device_with_float64(monkeypatch):
    weight, x = torch.randn(16, 4, requires_grad=True), torch.randn(20, 16)
    upstream, student = torch.randn(16, 4), torch.randn(20, 4)

    def chunked_loss(loss):
        value = vk.functional.ortho_proj_loss(student, x, weight, loss=loss)
        return [value, *torch.autograd.grad(value, weight)]

    monkeypatch.setattr(dispatch, "CHUNKED_FROM", -1)
    functions = [
        lambda: chunked_loss("cosine"),
        lambda: chunked_loss("mse"),
        lambda: torch.autograd.grad(vk.functional.cayley(weight, backend="torch"), weight, upstream)[0],
        lambda: vk.functional.cayley(weight, backend="torch"),
        lambda: vk.functional.whiten(x),
        lambda: vk.Whitening(16, momentum=0.1)(x),
        lambda: vk.Standardization(16, momentum=0.1)(x),
        lambda: vk.Standardization(16)(x),
        lambda: vk.diagnostics.cka(x, x[:, :4]),
    ]
    expected = [function() for function in functions]
    monkeypatch.setattr(float64, "HAVE_FLOAT64", ())
    monkeypatch.setattr(float64, "_accepts_float64", lambda device_type: False)
    for function, value in zip(functions, expected, strict=True):
        torch.testing.assert_close(function(), value)
