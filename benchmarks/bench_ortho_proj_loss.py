"""The feature loss at the paper's shapes: against its own reference in PyTorch, eager and compiled, and against what a
user would write (layer_norm or batch_norm, smooth_l1; once with PyTorch's orthogonal parametrization).

    pytest benchmarks/bench_ortho_proj_loss.py --benchmark-only        a table per case, and records
    python -m benchmarks.bench_ortho_proj_loss [-k NAME]               the records alone, without pytest
"""

import dataclasses
import functools
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import vkd_kernels as vk
from benchmarks import floors, harness

# Relative errors against float64 above which there is no time: those that rounding Z to 16 bit, as eager PyTorch does,
# can make, and a float32 sum over 100 000 rows. The candidates' own errors are in the record.
LIMITS = {torch.float32: {"output": 1e-5, "gradients": 1e-4}, torch.bfloat16: {"output": 2e-3, "gradients": 2e-2}}

# kind, N, S, T, normalization, projections
CPU_CASES = [
    ("pooled", 256, 192, 3024, "layer_norm", 1),
    ("pooled", 512, 192, 1024, "layer_norm", 1),
    ("token", 4096, 192, 3024, "layer_norm", 1),
    ("token", 8192, 192, 3024, "layer_norm", 1),
    ("token", 16384, 192, 3024, "layer_norm", 1),
    ("detection", 2000, 256, 256, "batch_norm", 6),
]
GPU_CASES = [
    ("token", 100352, 192, 3024, "layer_norm", 1),
    ("pooled", 512, 192, 3024, "layer_norm", 1),
    ("token", 100352, 384, 3024, "layer_norm", 1),
    ("token", 100352, 768, 3024, "layer_norm", 1),
    ("detection", 34000, 256, 256, "batch_norm", 6),
    ("detection", 600, 256, 256, "batch_norm", 6),  # two images' 300 queries in six decoder layers
    ("pooled", 256, 192, 3024, "layer_norm", 1),
    ("pooled", 1024, 384, 1024, "layer_norm", 1),
    ("token", 100352, 192, 1024, "layer_norm", 1),
    ("token", 12544, 192, 3024, "layer_norm", 1),
]


def features(n, s, t, dtype, device, seed):
    """One projection: student (N, S), teacher (N, T), orthonormal weight (T, S), all of them representable in dtype."""
    generator = torch.Generator(device=device).manual_seed(seed)
    random = functools.partial(torch.randn, generator=generator, device=device)
    weight = torch.linalg.qr(random(t, s)).Q.to(dtype).float()
    return random(n, s).to(dtype).requires_grad_(), (2 * random(n, t) + 0.7).to(dtype), weight.requires_grad_()


def true_loss(projections, normalization):
    """(loss, gradients in every student and weight) of the reference in float64."""
    leaves = [
        (x.detach().double().requires_grad_(), y.double(), p.detach().double().requires_grad_())
        for x, y, p in projections
    ]
    loss = total_loss(leaves, normalization, "torch")
    return loss.detach(), torch.autograd.grad(loss, gradient_leaves(leaves))


def total_loss(projections, normalization, backend=None):
    """The sum of the losses, one call each."""
    return sum(
        vk.functional.ortho_proj_loss(x, y, p, normalization=normalization, backend=backend) for x, y, p in projections
    )


def losses_together(projections, normalization):
    """The same in one call."""
    if len(projections) == 1:
        return total_loss(projections, normalization)
    students, teachers, weights = zip(*projections, strict=True)
    weights = torch.stack(weights)
    return vk.functional.ortho_proj_losses(students, teachers, weights, normalization=normalization).sum()


def composed_loss(projections, normalization):
    """What a user would write."""

    def normalized(x):
        if normalization == "layer_norm":
            return F.layer_norm(x, x.shape[-1:])
        return F.batch_norm(x, None, None, training=True)

    def loss(student, teacher, weight):
        z = F.linear(student, weight)
        z = normalized(z) if normalization == "batch_norm" else z
        return F.smooth_l1_loss(z, normalized(teacher))

    x = projections[0][0]
    with torch.autocast(x.device.type, x.dtype, enabled=x.dtype in (torch.bfloat16, torch.float16)):
        return sum(loss(*projection) for projection in projections)


def gradient_leaves(projections):
    return [leaf for x, _, p in projections for leaf in (x, p)]


def calls(function):
    """Candidate.build for function(projections) -> loss."""

    def build(projections):
        upstream = torch.ones((), device=projections[0][0].device)
        return harness.autograd_calls(lambda: function(projections), gradient_leaves(projections), upstream)

    return build


def check(truth, output, gradients):
    return harness.compare(output, gradients, truth)


def loss_case(kind, n, s, t, normalization, projections, *, dtype, device, tiny=False) -> harness.Case:
    """`tiny`: the same case on a CPU, by its name, with small shapes and without what only a GPU has."""
    full = n, s, t
    if tiny:
        n, s, t = min(n, 20), min(s, 6), min(t, 10)
    fused = functools.partial(losses_together, normalization=normalization)
    composed = functools.partial(composed_loss, normalization=normalization)
    eager = functools.partial(total_loss, normalization=normalization, backend="torch")

    @functools.cache
    def compiled():
        torch._dynamo.reset()  # each case compiles for its own shapes, whatever came before
        return torch.compile(eager, dynamic=False)

    candidates = [
        harness.Candidate("vkd_kernels", calls(fused), check),
        harness.Candidate("eager", calls(eager), check),
        harness.Candidate("torch.compile", lambda inputs: calls(compiled())(inputs), check),
        harness.Candidate("composition", calls(composed), check),
    ]
    if projections > 1:
        separate = functools.partial(total_loss, normalization=normalization)
        candidates.append(harness.Candidate("vkd_kernels, one call a projection", calls(separate), check))
    if device == "cuda":  # what remains when the host costs nothing
        candidates += [
            harness.Candidate(f"{name}, CUDA graph", calls(function), check, graph=True, passes=("both",))
            for name, function in (("vkd_kernels", fused), ("eager", eager))
        ]
    count = f"{projections} x " if projections > 1 else ""
    short = str(dtype).removeprefix("torch.")
    if tiny:
        candidates = [candidate for candidate in candidates if candidate.name != "torch.compile"]
    return harness.Case(
        name=f"{kind} {count}{full[0]} x {full[1]} -> {full[2]} {short}",
        parameters={"kind": kind, "n": n, "s": s, "t": t, "normalization": normalization, "projections": projections},
        dtype=short,
        cost=floors.loss_cost(n, s, t, dtype.itemsize).times(projections),
        inputs=lambda seed: [features(n, s, t, dtype, device, 100 * seed + i) for i in range(projections)],
        input_bytes=projections * n * (s + t) * dtype.itemsize,
        candidates=candidates,
        limits=LIMITS[dtype],
        truth=lambda inputs: true_loss(inputs, normalization),
    )


class Composition(nn.Module):
    """What a user would write."""

    def __init__(self, s, t):
        super().__init__()
        self.projection = parametrizations.orthogonal(nn.Linear(s, t, bias=False))

    def forward(self, student, teacher):
        return F.smooth_l1_loss(self.projection(student), F.layer_norm(teacher, teacher.shape[-1:]))


def module_case(n, s, t, device) -> harness.Case:
    """One training step's feature loss, the orthogonal map included, under autocast on a GPU."""

    def candidate(name, make):
        modules = []  # one for all sets of inputs, with the first set's matrix, the one that the truth is about

        def module_with(weight):
            if not modules:
                modules.append(make().to(device))
                with torch.no_grad():
                    modules[0].projection.weight = weight.detach()
            return modules[0]

        def build(projections):
            student, teacher, weight = projections[0]
            module = module_with(weight)

            def forward():
                with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                    return module(student, teacher)

            return harness.autograd_calls(forward, [student, *module.parameters()], torch.ones((), device=device))

        return harness.Candidate(name, build, check)

    def truth(projections):
        loss, gradients = true_loss(projections, "layer_norm")
        return loss, gradients[:1]  # the maps have parameters of their own

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    short = str(dtype).removeprefix("torch.")
    cost, map_cost = floors.loss_cost(n, s, t, dtype.itemsize), floors.cayley_cost(t, s)
    return harness.Case(
        name=f"module {n} x {s} -> {t} {short}",
        parameters={"kind": "module", "n": n, "s": s, "t": t, "normalization": "layer_norm", "projections": 1},
        dtype=short,
        cost=floors.Cost(cost.flops + map_cost.flops, cost.bytes + map_cost.bytes),
        inputs=lambda seed: [features(n, s, t, dtype, device, seed)],
        input_bytes=n * (s + t) * dtype.itemsize,
        candidates=[
            candidate("OrthoProjLoss", lambda: vk.OrthoProjLoss(s, t)),
            candidate("composition", lambda: Composition(s, t)),
        ],
        limits=LIMITS[dtype],
        truth=truth,
    )


def dtypes(device):
    return (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)


def cases(device, rehearse=False) -> list[harness.Case]:
    """`rehearse`: the GPU's cases by name, tiny, on a CPU and in float32."""
    if rehearse:
        names = [loss_case(*row, dtype=torch.bfloat16, device="cpu", tiny=True).name for row in GPU_CASES]
        tiny = [loss_case(*row, dtype=torch.float32, device="cpu", tiny=True) for row in GPU_CASES]
        return [dataclasses.replace(case, name=name) for case, name in zip(tiny, names, strict=True)]
    if device != "cuda":
        return [
            *(loss_case(*row, dtype=torch.float32, device=device) for row in CPU_CASES),
            module_case(256, 64, 256, device),
        ]
    listed = [loss_case(*row, dtype=torch.bfloat16, device=device) for row in GPU_CASES]
    return [
        *listed[:5],
        module_case(512, 192, 3024, device),
        *listed[5:],
        loss_case("pooled", 512, 192, 3024, "layer_norm", 1, dtype=torch.float32, device=device),
    ]


def test_ortho_proj_loss(measured, case, candidate, which):
    measured(case, candidate, which)


if __name__ == "__main__":
    sys.exit(harness.main("ortho_proj_loss", cases, dtypes))
