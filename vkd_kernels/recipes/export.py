"""`vkd export RUN`: the student alone, without projection and loss; what was written is loaded again and compared."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import torch

from . import runs
from .config import OptionError
from .evaluate import rebuild, students

SUFFIXES = {"safetensors": ".safetensors", "torch-export": ".pt2"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-h", "--help", action="help", help="show this and exit")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of one training: <run>/<arm>/seed-<k>")
    parser.add_argument("--format", choices=tuple(SUFFIXES), default="safetensors", help="(default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="(default: RUN/export.safetensors or RUN/export.pt2)"
    )


def export(folder: Path, kind: str, path: Path, overrides: list[str]) -> float:
    """Write the student; the largest difference between its outputs and those of what was written, loaded anew."""
    training, _ = rebuild(folder, overrides)
    student = training.student.cpu()
    arguments = training.example()
    with torch.no_grad():
        expected = student(*arguments)
        if kind == "safetensors":
            runs.save_safetensors(path, student.state_dict())
            other, _ = rebuild(folder, overrides)
            fresh = other.student.cpu()
            for tensor in (*fresh.parameters(), *fresh.buffers()):  # so that only what the file holds can agree
                tensor.copy_(torch.full_like(tensor, 1))
            runs.load_state(fresh, runs.load_safetensors(path), str(path))
            found = fresh(*arguments)
        else:
            buffer = io.BytesIO()
            torch.export.save(torch.export.export(student, arguments, strict=False), buffer)
            runs.write_atomically(path, lambda file: file.write(buffer.getvalue()))
            found = torch.export.load(str(path)).module()(*arguments)
    return largest_difference(expected, found)


def largest_difference(a: Any, b: Any) -> float:
    """Over all tensors of two nested outputs."""
    flat_a, flat_b = (torch.utils._pytree.tree_leaves(x) for x in (a, b))
    pairs = [(x, y) for x, y in zip(flat_a, flat_b, strict=True) if isinstance(x, torch.Tensor)]
    return max((x.double() - y.double()).abs().max().item() for x, y in pairs)


def command(arguments: argparse.Namespace) -> int:
    try:
        found = students(arguments.run)
        if len(found) > 1:
            folders = "\n  ".join(map(str, found))
            raise runs.RunError(f"{arguments.run} holds {len(found)} students; choose one:\n  {folders}")
        path = arguments.output or found[0] / f"export{SUFFIXES[arguments.format]}"
        difference = export(found[0], arguments.format, path, arguments.values)
        print(f"written to {path}; loaded again, its outputs differ from the student's by at most {difference:.2g}")
        if not difference <= 1e-4:
            raise runs.RunError(f"{path} does not give the student's outputs")
    except (runs.RunError, OptionError) as error:
        print(f"vkd: error: {error}", file=sys.stderr)
        return 2
    return 0
