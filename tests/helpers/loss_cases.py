"""Cases and comparisons for the tests of the fused and the chunked loss (definition: ortho_proj_loss/reference.py)."""

import torch
import torch.nn.functional as F

from vkd_kernels.ops.ortho_proj_loss import reference

# (N, S, T): one of everything, ragged against every tile, several tiles and chunks, more channels than one block.
SHAPES = [(1, 1, 1), (3, 5, 130), (37, 20, 45), (64, 64, 64), (130, 40, 200), (9, 70, 33), (2, 16, 4100)]
OPTIONS = {
    "layer_norm": {},
    "mse": {"loss": "mse"},
    "beta": {"beta": 0.03},
    "none": {"layer_norm": False},
    "channels": {"layer_norm": False, "channels": True},
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
    """Random arguments of a loss function, made from (N, S, T), a dtype and options."""

    def __init__(
        self, shape, dtype, *, loss="smooth_l1", beta=1.0, eps=1e-5, layer_norm=True, bias=False, weights=False,
        channels=False, tensor_denominator=False, teacher_dtype=None, weight_dtype=None, device="cpu", seed=0,
    ):  # fmt: skip
        n, s, t = shape
        torch.manual_seed(seed)
        exact = torch.promote_types(dtype, torch.float32)
        random = lambda *size: torch.randn(*size, dtype=torch.float64, device=device)  # noqa: E731
        self.student = random(n, s).to(dtype)
        self.teacher = (2 * random(n, t) + 0.7).to(teacher_dtype or dtype)
        # Representable in the product's dtype: the interpreter's cast truncates where a GPU rounds to nearest.
        self.weight = (random(t, s) / s**0.5).to(dtype).to(weight_dtype or exact)
        self.bias = (0.3 * random(t)).to(exact) if bias else None
        self.row_weight = None
        if weights:
            self.row_weight = torch.rand(n, dtype=torch.float64, device=device).to(exact)
            self.row_weight[::3] = 0
            self.row_weight[0] = 0.7
        self.channel_shift = random(t).to(exact) if channels else None
        self.channel_scale = (torch.rand(t, dtype=torch.float64, device=device) + 0.5).to(exact) if channels else None
        self.denominator = float(n * t)
        if tensor_denominator:
            self.denominator = torch.tensor(self.denominator, dtype=exact, device=device)
        self.options = dict(layer_norm=layer_norm, eps=eps, loss=loss, beta=beta)
        self.grad_output = random(()).to(exact) * 64

    @property
    def tensors(self):
        channels = self.channel_shift, self.channel_scale
        return (self.student, self.teacher, self.weight, self.bias, self.row_weight, *channels)

    def run(self, function, needed=(True, True, True), grad_output=None, **kwargs):
        """(loss, {name: gradient}) of function, with fresh leaves."""
        leaves = {}
        for name, need in zip(("student", "weight", "bias"), needed, strict=True):
            value = getattr(self, name)
            leaves[name] = None if value is None else value.detach().requires_grad_(need)
        loss = function(
            leaves["student"], self.teacher, leaves["weight"], leaves["bias"], self.row_weight, self.channel_shift,
            self.channel_scale, denominator=self.denominator, **self.options, **kwargs,
        )  # fmt: skip
        wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
        if not wanted:
            return loss, {}
        grad_output = self.grad_output if grad_output is None else grad_output
        return loss, dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()), grad_output), strict=True))

    def truth(self, function=None):
        """(loss, gradients) of the reference (or function) in float64 on the same rounded inputs."""
        double = object.__new__(Case)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                value = value.to(self.student.dtype).double() if name == "weight" else value.double()
            setattr(double, name, value)
        return double.run(function or composition)

    def check(self, function, slack=1.0, **kwargs):
        """Three sides: the error against float64 is within the table, or 1.5 times the same-dtype composition's."""
        truth, composed, got = self.truth(), self.run(composition), self.run(function, **kwargs)
        dtype = self.student.dtype
        assert got[0].dtype == torch.promote_types(dtype, torch.float32) and got[0].shape == ()
        limit = max(1.5 * error(composed[0], truth[0]), LOSS_ERROR[dtype])
        assert error(got[0], truth[0]) <= slack * limit
        assert got[1].keys() == truth[1].keys()
        for name, gradient in got[1].items():
            assert gradient.dtype == getattr(self, name).dtype and gradient.shape == getattr(self, name).shape
            limit = max(1.5 * error(composed[1][name], truth[1][name]), GRADIENT_ERROR[dtype])
            assert error(gradient, truth[1][name]) <= slack * limit, name


def poison_new_tensors(monkeypatch):
    """Fills every torch.empty of the operators with NaN (12345 in integers), so that nothing unwritten can pass."""

    def poison(allocate):
        def allocator(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x if type(x) is not torch.Tensor else x.fill_(torch.nan if x.is_floating_point() else 12345)

        return allocator

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def use_triton(monkeypatch):
    """The interface takes the kernels, interpreted, for CPU tensors."""
    from vkd_kernels.ops.ortho_proj_loss import api
    from vkd_kernels.ops.ortho_proj_loss.triton import launch

    core = api.Core(launch.fused_losses, launch.fused_orthonormal_mses, launch)
    monkeypatch.setattr(api, "_core", lambda *args: core)


def error(value, truth):
    """Relative Frobenius error."""
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def composition(student, teacher, weight, bias, row_weight, channel_shift, channel_scale, *,
                layer_norm, eps, loss, beta, denominator):  # fmt: skip
    """The contract of fused_loss and chunked_loss, by the reference, in the inputs' own dtype."""
    normalization = "layer_norm" if layer_norm else "none"
    if channel_shift is not None:
        teacher = teacher.to(channel_shift.dtype)
        teacher = F.layer_norm(teacher, teacher.shape[-1:], eps=eps) if layer_norm else teacher
        teacher, normalization = (teacher - channel_shift) * channel_scale, "none"
    total = reference.loss_sum(
        student, teacher, weight, bias, row_weight, normalization=normalization, loss=loss, beta=beta, eps=eps
    )
    return total / denominator
