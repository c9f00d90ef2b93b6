"""A few calls of every kernel, for ncu and compute-sanitizer: `python -m benchmarks.gpu.once 192|384|768|small|tiny`.

A number is S of the token-level loss (N = 100352, T = 3024). `small` launches every kernel at shapes that are ragged
against every tile; `tiny` is the same on whatever device there is, smaller still.
"""

import functools
import itertools
import sys
from collections.abc import Callable

import torch

import vkd_kernels as vk

SMALL = [(33, 20, 45), (200, 64, 136), (1500, 100, 1001), (1500, 64, 136)]
TINY = [(5, 3, 7)]
CAYLEY_SMALL = [(3, 20, 9), (3, 40, 30), (2, 70, 50), (400, 30), (2, 66, 66), (110, 70)]


def call_loss(shape: tuple[int, int, int], everything: bool, normalization: str, loss: str, device: str) -> None:
    n, s, t = shape
    student = torch.randn(n, s, device=device).bfloat16().requires_grad_()
    teacher = torch.randn(n, t, device=device).bfloat16()
    weight = torch.randn(t, s, device=device, requires_grad=True)
    mask = torch.rand(n, device=device) if everything else None
    bias = torch.randn(t, device=device, requires_grad=True) if everything else None
    vk.functional.ortho_proj_loss(
        student, teacher, weight, bias=bias, mask=mask, normalization=normalization, loss=loss, backend="triton"
    ).backward()


def call_module(shape: tuple[int, int, int], loss: str, device: str) -> None:
    """The forms that need a semi-orthogonal projection."""
    n, s, t = shape
    student = torch.randn(n, s, device=device).bfloat16().requires_grad_()
    module = vk.OrthoProjLoss(s, t, loss=loss, backend="triton", device=device)
    module(student, torch.randn(n, t, device=device).bfloat16()).backward()


def losses(shapes: list[tuple[int, int, int]], device: str) -> list[Callable[[], None]]:
    listed = []
    for shape, normalization, loss in itertools.product(shapes, ("layer_norm", "batch_norm"), ("smooth_l1", "mse")):
        options = {"normalization": normalization, "loss": loss, "device": device}
        listed.append(functools.partial(call_loss, shape, everything=True, **options))
    return listed + [functools.partial(call_module, shape, "mse", device) for shape in shapes if shape[1] <= shape[2]]


def main(word: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if word.isdigit():
        for _ in range(3):
            call_loss(
                (100352, int(word), 3024), everything=False, normalization="layer_norm", loss="smooth_l1", device=device
            )
    else:
        for loss in losses(TINY if word == "tiny" else SMALL, device):
            loss()
        for shape in CAYLEY_SMALL[: 1 if word == "tiny" else None]:
            vk.cayley(torch.randn(shape, device=device, requires_grad=True)).sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
