"""Floors: the operations and bytes that a result needs at least, and the rates that this device reaches for both.

    floor = max(flops / matmul rate, bytes / copy bandwidth)

Both rates are measured in the run that reports a share of the floor.
"""

import time
from typing import NamedTuple

import torch


class Cost(NamedTuple):
    flops: int
    bytes: int

    def times(self, count: int) -> "Cost":
        return Cost(count * self.flops, count * self.bytes)

    def floor_seconds(self, rates: dict, dtype: str) -> float:
        return max(self.flops / rates["matmul_flops_per_s"][dtype], self.bytes / rates["copy_bytes_per_s"])


def loss_cost(n: int, s: int, t: int, itemsize: int) -> Cost:
    """The loss with its gradients in student and weight: Z = X Pᵀ, dX = G P, dP = Gᵀ X.

    Read X, Y and P once, write dX in the features' dtype and dP in float32.
    """
    return Cost(3 * 2 * n * s * t, itemsize * (2 * n * s + n * t + t * s) + 4 * t * s)


def cayley_cost(t: int, s: int, batch: int = 1, itemsize: int = 4) -> Cost:
    """The Cayley transform and its gradient: its matrix products alone, the inverse not counted.

    Forward VᵀV and V R; backward VᵀG2, Rᵀ dR Rᵀ (two), G2 Rᵀ and V (dM + dMᵀ). Read W and G, write Q and dW.
    """
    below = t - s
    return Cost(batch * (5 * 2 * below * s * s + 2 * 2 * s**3), batch * 4 * t * s * itemsize)


def ceilings(device: str, dtypes: tuple[torch.dtype, ...]) -> dict:
    """The best copy bandwidth (bytes read plus written) and matmul rates that a few tries reach on this device."""
    on_gpu = device == "cuda"
    source = torch.ones((1 << 30 if on_gpu else 1 << 28) // 4, device=device)
    seconds = _best_seconds(torch.empty_like(source).copy_, device, source)
    rates = {"copy_bytes_per_s": 2 * source.nbytes / seconds}
    del source
    size = 8192 if on_gpu else 1536
    rates["matmul_flops_per_s"] = {}
    for dtype in dtypes:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        seconds = _best_seconds(torch.mm, device, a, b)
        rates["matmul_flops_per_s"][str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
    return rates


def _best_seconds(function, device: str, *arguments, tries: int = 10) -> float:
    """The shortest of a few calls. A ceiling is what the device can do at its best, so no median here."""
    function(*arguments)
    if device != "cuda":
        return min(_seconds(function, arguments) for _ in range(tries))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(tries)]
    for start, end in events:
        start.record()
        function(*arguments)
        end.record()
    torch.cuda.synchronize()
    return min(start.elapsed_time(end) for start, end in events) / 1e3


def _seconds(function, arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start
