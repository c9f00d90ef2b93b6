"""The Cayley transform: against the closed form on torch.linalg, PyTorch's three orthogonal maps and its own products.

    pytest benchmarks/bench_cayley.py --benchmark-only      a table per case, and records
    python -m benchmarks.bench_cayley [-k NAME]             the records alone, without pytest

orthogonal_maps.py compares the maps at full size on a CPU, where one of them takes half a minute.
"""

import dataclasses
import functools
import importlib.util
import sys

import torch
from torch import nn
from torch.nn.utils import parametrizations

import vkd_kernels as vk
from benchmarks import floors, harness

# Against float64: a float32 result of float64 work, and float32 products in backward. Maps with parameters of their own
# are held to QᵀQ = I instead.
LIMITS = {"output": 1e-6, "gradients": 1e-5, "orthogonality": 1e-4}
OWN_PRODUCTS = "its own float32 matrix products"

# (shape of the weight, whether PyTorch's maps run too: at a size that takes them well under a second)
CPU_SHAPES = [
    ((768, 64), True),
    ((3024, 192), False),
    ((6, 256, 256), False),
    ((12, 768, 384), False),
    ((64, 64, 64), False),
]
GPU_SHAPES = [
    ((3024, 192), False),
    ((6, 256, 256), True),
    ((768, 64), True),
    ((12, 768, 384), False),
    ((1024, 1024), False),
    ((4096, 16, 16), False),
]
SCALING = {
    "cpu": {
        "t": [(t, 64) for t in (64, 256, 1024, 4096)],
        "s": [(1024, s) for s in (32, 64, 128, 256, 512)],
        "batch": [(b, 64, 64) for b in (1, 4, 16, 64, 256)],
    },
    "cuda": {
        "t": [(t, 192) for t in (192, 768, 3072, 12288)],
        "s": [(3072, s) for s in (64, 128, 256, 512, 1024)],
        "batch": [(b, 256, 256) for b in (1, 4, 16, 64)],
    },
}


def weight_and_upstream(shape, device, seed):
    generator = torch.Generator(device=device).manual_seed(seed)
    weight, upstream = torch.randn(2, *shape, generator=generator, device=device)
    return (weight / shape[-1] ** 0.5).requires_grad_(), upstream


def closed_form(weight, inverse):
    """What vkd_kernels.cayley computes, written with PyTorch's own inverse or solver, in float64 as there."""
    s = weight.shape[-1]
    w = weight.double()
    u, v = w[..., :s, :], w[..., s:, :]
    eye = torch.eye(s, dtype=w.dtype, device=w.device)
    r = inverse(eye + (u - u.mT) + v.mT @ v)
    return torch.cat([2 * r - eye, v @ (-2 * r)], dim=-2).to(weight.dtype)


def _one_by_one(inverse):
    """On the CPU a batch goes one matrix at a time: PyTorch's batched LU (seen with 2.14 and MKL) can hang."""

    def each(m):
        if m.device.type != "cpu" or m.dim() == 2:
            return inverse(m)
        return torch.stack([inverse(x) for x in m])

    return each


def _identity(m):
    return torch.eye(m.shape[-1], dtype=m.dtype, device=m.device).expand_as(m)


@_one_by_one
def by_inv_ex(m):
    return torch.linalg.inv_ex(m).inverse


@_one_by_one
def by_solve_ex(m):
    return torch.linalg.solve_ex(m, _identity(m)).result


@_one_by_one
def by_lu(m):
    lu, pivots, _ = torch.linalg.lu_factor_ex(m)
    return torch.linalg.lu_solve(lu, pivots, _identity(m))


def calls(function):
    def build(inputs):
        weight, upstream = inputs
        return harness.autograd_calls(lambda: function(weight), [weight], upstream)

    return build


def check(truth, output, gradients):
    return harness.compare(output, gradients, truth)


def true_cayley(inputs):
    weight, upstream = (x.detach().double().requires_grad_() for x in inputs)
    q = closed_form(weight, by_inv_ex)
    return q.detach(), torch.autograd.grad(q, [weight], upstream.detach())


def orthogonality(truth, output, gradients):
    """max |QᵀQ - I| for a map whose values have no counterpart here; its gradients have to be finite."""
    q = output.detach().double()
    error = (q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)).abs().max().item()
    finite = all(g.isfinite().all() for g in gradients)
    return {"orthogonality": error if finite else float("inf")}


def own_products(inputs):
    """The matrix products of forward and backward in float32 and nothing else: the floor that can be timed."""
    weight, g = (x.detach() for x in inputs)
    s = weight.shape[-1]
    v, g2 = weight[..., s:, :], g[..., s:, :]
    r = weight[..., :s, :].contiguous()

    def backward(_):
        return v.mT @ g2, r.mT @ r @ r.mT, g2 @ r.mT, v @ r

    return harness.Calls(lambda: (v.mT @ v, v @ r), backward)


def torch_map(name, shape, register=parametrizations.orthogonal):
    """Candidate.build for one of PyTorch's maps, on a module with a weight of this shape."""

    def build(inputs):
        weight, upstream = inputs
        module = nn.Module()
        module.weight = nn.Parameter(weight.detach().clone())
        register(module, "weight", orthogonal_map=name)
        return harness.autograd_calls(lambda: module.weight, list(module.parameters()), upstream)

    return build


def torch_maps(shape):
    return [
        harness.Candidate(f"torch {name}", torch_map(name, shape), orthogonality)
        for name in ("householder", "cayley", "matrix_exp")
    ]


def geotorch_map():
    name, reason = "geotorch", None
    if importlib.util.find_spec("geotorch") is None:
        reason = "geotorch is not installed"

    def build(inputs):
        import geotorch

        weight, upstream = inputs
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
        geotorch.orthogonal(layer, "weight")
        return harness.autograd_calls(lambda: layer.weight, list(layer.parameters()), upstream)

    return harness.Candidate(name, build, orthogonality, unavailable=reason)


def dimensions(shape):
    t, s = shape[-2:]
    batch = 1
    for size in shape[:-2]:
        batch *= size
    return batch, t, s


def map_case(shape, device, *, maps=False, scaling=None) -> harness.Case:
    batch, t, s = dimensions(shape)
    candidates = [
        harness.Candidate("vkd_kernels", calls(vk.cayley), check),
        harness.Candidate("closed form, inv_ex", calls(functools.partial(closed_form, inverse=by_inv_ex)), check),
        harness.Candidate(OWN_PRODUCTS, own_products),
    ]
    if scaling is None:
        candidates += [
            harness.Candidate(
                "closed form, solve_ex", calls(functools.partial(closed_form, inverse=by_solve_ex)), check
            ),
            harness.Candidate("closed form, lu", calls(functools.partial(closed_form, inverse=by_lu)), check),
        ]
        if batch > 1:
            separate = calls(lambda weight: torch.stack([vk.cayley(w) for w in weight]))
            candidates.append(harness.Candidate("vkd_kernels, one call a matrix", separate, check))
        if device == "cuda":
            graph = harness.Candidate("vkd_kernels, CUDA graph", calls(vk.cayley), check, graph=True, passes=("both",))
            candidates.append(graph)
    if maps:
        candidates += torch_maps(shape)
        if batch == 1:
            candidates.append(geotorch_map())
    size = " x ".join(map(str, shape))
    return harness.Case(
        name=f"scaling with {scaling}: {size}" if scaling else size,
        parameters={"batch": batch, "t": t, "s": s},
        dtype="float32",
        cost=floors.cayley_cost(t, s, batch),
        inputs=lambda seed: weight_and_upstream(shape, device, seed),
        input_bytes=2 * batch * t * s * 4,
        candidates=candidates,
        limits=LIMITS,
        passes=("both",) if scaling else harness.PASSES,
        truth=true_cayley,
        plot={"scaling": scaling} if scaling else {},
    )


def dtypes(device):
    return (torch.float32,)


def maps_case(shape, device) -> harness.Case:
    """PyTorch's maps at full size, by themselves: should one of them take long, no other row waits for it."""
    case = map_case(shape, device)
    ours = [candidate for candidate in case.candidates if candidate.name == "vkd_kernels"]
    candidates = [dataclasses.replace(candidate, passes=("both",)) for candidate in (*ours, *torch_maps(shape))]
    return dataclasses.replace(case, name=f"maps {case.name}", candidates=candidates, passes=("both",))


def cases(device, rehearse=False) -> list[harness.Case]:
    """`rehearse`: the GPU's cases by name, tiny, on a CPU."""
    if rehearse:
        tiny = [map_case((*shape[:-2], 5, 3), "cpu", maps=maps) for shape, maps in GPU_SHAPES]
        names = [" x ".join(map(str, shape)) for shape, _ in GPU_SHAPES]
        tiny = [dataclasses.replace(case, name=name) for case, name in zip(tiny, names, strict=True)]
        return [*tiny, dataclasses.replace(maps_case((5, 3), "cpu"), name="maps 3024 x 192")]
    listed = [map_case(shape, device, maps=maps) for shape, maps in (GPU_SHAPES if device == "cuda" else CPU_SHAPES)]
    if device == "cuda":
        listed.append(maps_case((3024, 192), device))
    return listed + [
        map_case(shape, device, scaling=variable) for variable, shapes in SCALING[device].items() for shape in shapes
    ]


def test_cayley(measured, case, candidate, which):
    measured(case, candidate, which)


if __name__ == "__main__":
    sys.exit(harness.main("cayley", cases, dtypes))
