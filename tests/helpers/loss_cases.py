"""Cases and comparisons for the tests of the loss's implementations (definition: ortho_proj_loss/reference.py)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from vkd_kernels.ops.ortho_proj_loss import reference
from vkd_kernels.ops.ortho_proj_loss.spec import LossInputs, LossSpec, acc_dtype

# (N, S, T): one of everything, ragged against every tile, several tiles and chunks, more channels than one block.
SHAPES = [(1, 1, 1), (3, 5, 130), (37, 20, 45), (64, 64, 64), (130, 40, 200), (9, 70, 33), (2, 16, 4100)]
OPTIONS = {
    "layer_norm": {},
    "mse": {"loss": "mse"},
    "beta": {"beta": 0.03},
    "none": {"normalization": "none"},
    "channels": {"normalization": "none", "channels": True},
    "channels_mse": {"channels": True, "loss": "mse"},
    "bias": {"bias": True},
    "weights": {"weights": True},
    "tensor_denominator": {"weights": True, "tensor_denominator": True},
    "everything": {"bias": True, "weights": True, "channels": True, "tensor_denominator": True, "beta": 0.5},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative errors against float64 to hold in any case: the roundings of G, of the operands and of the result.
LOSS_ERROR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}
GRADIENT_ERROR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


class Case:
    """Random inputs of an implementation's loss(spec, inputs), made from (N, S, T), a dtype and options."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        loss: str | dict[str, float] = "smooth_l1",
        beta: float = 1.0,
        eps: float = 1e-5,
        normalization: str = "layer_norm",
        bias: bool = False,
        weights: bool = False,
        channels: bool = False,
        tensor_denominator: bool = False,
        teacher_dtype: torch.dtype | None = None,
        weight_dtype: torch.dtype | None = None,
        device: str = "cpu",
        seed: int = 0,
    ):
        n, s, t = shape
        torch.manual_seed(seed)
        acc = acc_dtype(dtype)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, dtype=torch.float64, device=device)

        self.student = random(n, s).to(dtype)
        self.teacher = (2 * random(n, t) + 0.7).to(teacher_dtype or dtype)
        # Representable in the product's dtype: the interpreter's cast truncates where a GPU rounds to nearest.
        self.weight = (random(t, s) / s**0.5).to(dtype).to(weight_dtype or acc)
        self.bias = (0.3 * random(t)).to(acc) if bias else None
        self.row_weight = None
        if weights:
            self.row_weight = torch.rand(n, dtype=torch.float64, device=device).to(acc)
            self.row_weight[::3] = 0
            self.row_weight[:1] = 0.7
        self.channel_shift = random(t).to(acc) if channels else None
        self.channel_scale = (torch.rand(t, dtype=torch.float64, device=device) + 0.5).to(acc) if channels else None
        self.denominator: float | torch.Tensor = float(n * t)
        if tensor_denominator:
            self.denominator = torch.tensor(self.denominator, dtype=acc, device=device)
        self.spec = LossSpec(normalization=normalization, eps=eps, loss=LossSpec.shares(loss), beta=beta)
        self.grad_output = random(()).to(acc) * 64

    @property
    def inputs(self) -> LossInputs:
        return LossInputs(
            student=self.student,
            teacher=self.teacher,
            weight=self.weight,
            denominator=self.denominator,
            row_weight=self.row_weight,
            bias=self.bias,
            channel_shift=self.channel_shift,
            channel_scale=self.channel_scale,
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [x for x in vars(self).values() if isinstance(x, torch.Tensor)]

    def leaves(self) -> list[torch.Tensor]:
        """The case's own student, weight and bias, which require gradients from now on."""
        return [x.requires_grad_() for x in (self.student, self.weight, self.bias) if x is not None]

    def run(
        self,
        function: Callable[..., torch.Tensor],
        needed: Any = (True, True, True),
        grad_output: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(loss, {name: gradient}) of function(spec, inputs), with fresh leaves."""
        leaves = {}
        for name, need in zip(("student", "weight", "bias"), needed, strict=True):
            value = getattr(self, name)
            leaves[name] = None if value is None else value.detach().requires_grad_(need)
        loss = function(self.spec, replace(self.inputs, **leaves), **kwargs)
        wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
        if not wanted:
            return loss, {}
        grad_output = self.grad_output if grad_output is None else grad_output
        return loss, dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()), grad_output), strict=True))

    def truth(
        self, function: Callable[..., torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(loss, gradients) of the reference (or function) in float64 on the same rounded inputs."""
        double = object.__new__(Case)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                value = value.to(self.student.dtype).double() if name == "weight" else value.double()
            setattr(double, name, value)
        return double.run(function or reference.loss)

    def check(self, function: Callable[..., torch.Tensor], slack: float = 1.0, **kwargs: Any) -> torch.Tensor:
        """Three sides: the error against float64 is within the table, or 1.5 times the same-dtype composition's.

        Returns the function's loss.
        """
        truth, composed, got = self.truth(), self.run(reference.loss), self.run(function, **kwargs)
        dtype = self.student.dtype
        assert got[0].dtype == acc_dtype(dtype) and got[0].shape == ()
        limit = max(1.5 * error(composed[0], truth[0]), LOSS_ERROR[dtype])
        assert error(got[0], truth[0]) <= slack * limit
        assert got[1].keys() == truth[1].keys()
        for name, gradient in got[1].items():
            assert gradient.dtype == getattr(self, name).dtype and gradient.shape == getattr(self, name).shape
            limit = max(1.5 * error(composed[1][name], truth[1][name]), GRADIENT_ERROR[dtype])
            assert error(gradient, truth[1][name]) <= slack * limit, name
        return got[0]


def poison_new_tensors(monkeypatch):
    """Fills every torch.empty of the operators with NaN (12345 in integers), so that nothing unwritten can pass."""

    def poison(allocate):
        def allocator(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x if type(x) is not torch.Tensor else x.fill_(torch.nan if x.is_floating_point() else 12345)

        return allocator

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def error(value, truth):
    """Relative Frobenius error."""
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()
