"""A few hundred steps of training, with the loss by each implementation: do gradients agree, do the students?

    python -m benchmarks.gpu.training --records FOLDER [--steps N] [--rehearse]

Side by side: along one student's training, every implementation computes loss and gradients of the same batch, and its
errors against the reference in float64 are held to 1.5 times those of the reference in the training's own precision.
On its own: each implementation trains a student of its own from the same start on the same batches; the losses at the
end must agree within one per cent. Writes FOLDER/<device>/training.json.
"""

import argparse
import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import vkd_kernels as vk
from benchmarks import harness, records
from vkd_kernels.ops.ortho_proj_loss import chunked, reference, triton
from vkd_kernels.ops.ortho_proj_loss.spec import LossInputs, LossSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# loss, whether its semi-orthogonal form is meant
KINDS = [("smooth_l1", False), ("mse", False), ("mse", True), ("cosine", True)]
MOST_TIMES_REFERENCE = 1.5
LEAST_ERROR = 2e-6  # a float32 sum has some error however it is made: below it no ratio says anything
FINAL_DIFFERENCE = 0.01

LossFunction = Callable[[LossSpec, LossInputs], torch.Tensor]


def implementations(semi_orthogonal: bool) -> dict[str, LossFunction]:
    if semi_orthogonal:
        return {"chunked": chunked.semi_orthogonal_loss, "triton": triton.semi_orthogonal_loss}
    return {"chunked": chunked.loss, "triton": triton.loss}


def by_reference(spec: LossSpec, inputs: LossInputs) -> torch.Tensor:
    return reference.loss(spec, inputs, None)


class Student(nn.Module):
    """A student's features (N, S) of its inputs, and the projection (T, S)."""

    def __init__(self, inputs: int, student_dim: int, teacher_dim: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(inputs, 2 * student_dim), nn.GELU(), nn.Linear(2 * student_dim, student_dim)
        )
        self.projection = vk.OrthogonalLinear(student_dim, teacher_dim)


class Setting:
    """Student, frozen teacher and batches, the same whenever they are made."""

    def __init__(self, rows: int, student_dim: int, teacher_dim: int, dtype: torch.dtype):
        self.rows, self.inputs, self.dtype = rows, 2 * student_dim, dtype
        torch.manual_seed(0)
        self.student = Student(self.inputs, student_dim, teacher_dim).to(DEVICE)
        width = min(teacher_dim, 256)
        teacher = nn.Sequential(nn.Linear(self.inputs, width), nn.GELU(), nn.Linear(width, teacher_dim))
        self.teacher = teacher.to(DEVICE).requires_grad_(False)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs, the teacher's features)."""
        random = torch.Generator(device=DEVICE).manual_seed(step)
        x = torch.randn(self.rows, self.inputs, generator=random, device=DEVICE)
        return x, self.teacher(x).to(self.dtype)

    def features(self, student: Student, x: torch.Tensor) -> torch.Tensor:
        return student.body(x).to(self.dtype)


def inputs_of(student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor) -> LossInputs:
    return LossInputs(student=student, teacher=teacher, weight=weight, denominator=float(teacher.numel()))


def gradients(
    function: LossFunction, spec: LossSpec, inputs: LossInputs, unconstrained: torch.Tensor
) -> list[torch.Tensor]:
    """loss, and its gradients in the student's features and in the parameter behind the projection."""
    loss = function(spec, inputs)
    return [loss.detach(), *torch.autograd.grad(loss, (inputs.student, unconstrained), retain_graph=True)]


def relative_error(values: list[torch.Tensor], truth: list[torch.Tensor]) -> list[float]:
    return [
        ((value.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()
        for value, exact in zip(values, truth, strict=True)
    ]


def side_by_side(setting: Setting, spec: LossSpec, semi_orthogonal: bool, steps: int) -> dict:
    """The largest errors over a training whose steps the reference takes."""
    student = copy.deepcopy(setting.student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    functions = implementations(semi_orthogonal) | {"reference": by_reference}
    worst = {name: [0.0, 0.0, 0.0] for name in functions}
    wrong = []
    for step in range(steps):
        x, teacher = setting.batch(step)
        features = setting.features(student, x)
        rows, weight = features.detach().requires_grad_(), student.projection.weight
        exact_rows = rows.detach().double().requires_grad_()
        rounded = weight.to(setting.dtype).to(weight.dtype) if setting.dtype != torch.float32 else weight
        exact = inputs_of(exact_rows, teacher.double(), rounded.double())
        truth = gradients(by_reference, spec, exact, student.projection.unconstrained)
        for name, function in functions.items():
            values = gradients(function, spec, inputs_of(rows, teacher, rounded), student.projection.unconstrained)
            worst[name] = [
                harness.largest(pair) for pair in zip(worst[name], relative_error(values, truth), strict=True)
            ]
        optimizer.zero_grad()
        by_reference(spec, inputs_of(features, teacher, student.projection.weight)).backward()
        optimizer.step()
    for name in implementations(semi_orthogonal):
        for what, error, allowed in zip(("loss", "student", "weight"), worst[name], worst["reference"], strict=True):
            if not error <= MOST_TIMES_REFERENCE * max(allowed, LEAST_ERROR):
                wrong.append(f"{name}: {what} is off by {error:.1e}, the reference by {allowed:.1e}")
    return {"worst_errors": worst, "wrong": wrong}


def on_its_own(setting: Setting, spec: LossSpec, semi_orthogonal: bool, steps: int) -> dict:
    """Each implementation's mean loss over its last tenth of steps."""
    final, wrong = {}, []
    for name, function in ({"reference": by_reference} | implementations(semi_orthogonal)).items():
        student = copy.deepcopy(setting.student)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
        losses = []
        for step in range(steps):
            x, teacher = setting.batch(step)
            loss = function(spec, inputs_of(setting.features(student, x), teacher, student.projection.weight))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        first, last = losses[0].item(), torch.stack(losses[-max(1, steps // 10) :]).mean().item()
        final[name] = {"first": first, "last": last}
        if not last < first:
            wrong.append(f"{name}: the loss did not fall, from {first:.4g} to {last:.4g}")
        if not abs(last - final["reference"]["last"]) <= FINAL_DIFFERENCE * final["reference"]["last"]:
            wrong.append(f"{name}: ends at {last:.6g}, the reference at {final['reference']['last']:.6g}")
    return {"final_losses": final, "wrong": wrong}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.training", description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=records.RUNS)
    parser.add_argument("--steps", type=int, help="steps of each training (default: 300; 12 in a rehearsal)")
    parser.add_argument("--rehearse", action="store_true", help="small, on whatever device there is")
    options = parser.parse_args(arguments)
    steps = options.steps or (12 if options.rehearse else 300)
    dtype = torch.float32 if options.rehearse else torch.bfloat16
    rows, student_dim, teacher_dim = (24, 6, 20) if options.rehearse else (4096, 192, 3024)
    make = functools.partial(Setting, rows, student_dim, teacher_dim, dtype)
    record = {"benchmark": "training", "environment": records.environment(), "steps": steps, "kinds": {}}
    wrong = []
    for loss, semi_orthogonal in KINDS:
        spec = LossSpec(loss=LossSpec.shares(loss))
        name = loss + (", semi-orthogonal form" if semi_orthogonal else "")
        compared = side_by_side(make(), spec, semi_orthogonal, steps)
        trained = on_its_own(make(), spec, semi_orthogonal, steps)
        record["kinds"][name] = {"side_by_side": compared, "on_its_own": trained}
        records.write(options.records / records.device_folder() / "training.json", record)
        wrong += [f"{name}: {line}" for line in compared["wrong"] + trained["wrong"]]
        print(name, trained["final_losses"], flush=True)
    for line in wrong:
        print("WRONG", line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
