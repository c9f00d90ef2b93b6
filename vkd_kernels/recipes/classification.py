"""V_kD on a classification task small enough to watch: handwritten digits, a CNN teacher, tiny transformer students.

    vkd distill classification            (or: python -m vkd_kernels.recipes.classification)

For every seed: a new split, a teacher trained on it, and one student per arm, all from the same initial weights and on
the same batches. Only a hundred training images have labels a student may use; the others reach it through the teacher.

    L = CE(student, labels) + KL(teacher || student) + feature_weight * smooth_l1(scale * X P^T, layer_norm(Y))

`train_student` is the part to copy; data.py and models.py are the task, runs.py makes it resumable, report.py shows it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import vkd_kernels as vk

from . import classification_report as report
from . import data, models, runs
from .options import OptionError, add_options, check_options, option, typed_options

DEFAULT_OUTPUT = Path("runs/classification-digits")


@dataclass(frozen=True)
class Arm:
    """One way to train the student. Every arm has the cross-entropy on the labelled images."""

    label: str
    logits: bool = False  # + KL to the teacher's logits, on all images
    projection: str | None = None  # + feature loss on all images, through an "orthogonal" or a "linear" projection
    scale: float | str = 1.0
    longer: bool = False  # steps * equal_time, to take at least as long as V_kD does


ARMS = {
    "alone": Arm("student alone"),
    "logits": Arm("logit distillation", logits=True),
    "logits-longer": Arm("logit distillation, equal time", logits=True, longer=True),
    "linear": Arm("logits + linear projection", logits=True, projection="linear"),
    "vkd": Arm("V_kD as published (scale 1)", logits=True, projection="orthogonal"),
    "vkd-match": Arm('V_kD, scale="match"', logits=True, projection="orthogonal", scale="match"),
}


@dataclass(frozen=True)
class Config:
    seeds: int = option(4, "how many seeds: each has its own split, teacher and initial weights", minimum=1)
    first_seed: int = option(0, "number of the first seed", minimum=0)
    arms: tuple[str, ...] = option(tuple(ARMS), f"which students to train, of {', '.join(ARMS)}", choices=tuple(ARMS))

    pool: int = option(1000, "training images of the 1797; the others are the test set", minimum=100)
    labels_per_class: int = option(10, "labelled training images per digit, for the students", minimum=1)
    views: int = option(8, "augmented views of each image, with the teacher's outputs for each", minimum=1)
    rotation: float = option(15.0, "largest rotation of a view, in degrees", minimum=0)
    scaling: float = option(0.15, "largest change of size of a view", minimum=0)
    shift: float = option(0.2, "largest shift of a view, in half widths", minimum=0)
    shear: float = option(0.15, "largest shear of a view", minimum=0)

    teacher_widths: tuple[int, ...] = option((24, 48, 96, 192), "channels of the teacher's convolutions", minimum=1)
    teacher_steps: int = option(250, "training steps of the teacher", minimum=1)
    teacher_batch: int = option(64, "images per step of the teacher", minimum=2)
    teacher_lr: float = option(2e-3, "peak learning rate of the teacher", above=0)

    width: int = option(48, "channels of the student", minimum=1)
    depth: int = option(2, "blocks of the student", minimum=1)
    heads: int = option(4, "attention heads of the student", minimum=1)
    mlp_ratio: int = option(2, "hidden channels of the student's MLPs, in widths", minimum=1)
    patch: int = option(2, "patch size of the student", choices=(1, 2, 4, 8))

    steps: int = option(400, "training steps of a student", minimum=2)
    equal_time: float = option(1.25, "steps of the logits-longer arm, as a multiple of --steps", minimum=1)
    labelled_batch: int = option(32, "labelled images per step", minimum=1)
    unlabelled_batch: int = option(32, "unlabelled images per step", minimum=1)
    lr: float = option(3e-3, "peak learning rate of the students", above=0)
    warmup: float = option(0.1, "share of the steps in which the learning rate rises", above=0)
    weight_decay: float = option(0.05, "weight decay, except 1-D parameters, positions, projection", minimum=0)
    label_smoothing: float = option(0.1, "label smoothing of the cross-entropy", minimum=0)
    logit_weight: float = option(1.0, "weight of the logit loss", minimum=0)
    temperature: float = option(1.0, "temperature of the logit loss", above=0)
    feature_weight: float = option(10.0, "weight of the feature loss", minimum=0)

    curve_every: int = option(20, "steps between two points of a training curve", minimum=1)
    save_every: int = option(100, "steps between two checkpoints", minimum=1)

    def __post_init__(self) -> None:
        check_options(self)
        if self.width % self.heads:
            raise OptionError(f"--heads: {self.heads} does not divide --width {self.width}")
        if self.pool > 1700:
            raise OptionError(f"--pool: {self.pool} of 1797 images leave too few to test on; at most 1700")
        if self.labels_per_class * data.CLASSES >= self.pool:
            raise OptionError(f"--labels-per-class: {self.labels_per_class} leave nothing unlabelled of {self.pool}")
        if len(set(self.arms)) < len(self.arms):
            raise OptionError(f"--arms: the same arm twice in {' '.join(self.arms)}")
        for name in ("warmup", "label_smoothing"):
            if getattr(self, name) >= 1:
                raise OptionError(f"--{name.replace('_', '-')}: must be below 1, got {getattr(self, name)}")


# ---- training --------------------------------------------------------------------------------------------------------


class LinearProjLoss(nn.Module):
    """The same loss through any matrix: what the orthogonal projection is compared with."""

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(student_dim, teacher_dim, bias=False)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return vk.functional.ortho_proj_loss(student, teacher, self.projection.weight, normalization="layer_norm")


def make_feature_loss(arm: Arm, student_dim: int, teacher_dim: int) -> vk.OrthoProjLoss | LinearProjLoss | None:
    if arm.projection == "orthogonal":
        return vk.OrthoProjLoss(student_dim, teacher_dim, normalization="layer_norm", scale=arm.scale)
    return LinearProjLoss(student_dim, teacher_dim) if arm.projection == "linear" else None


def train_student(config: Config, name: str, seed: int, folder: Path, worker: runs.Worker) -> None:
    arm, steps = ARMS[name], student_steps(config, name)
    digits, views = load_split(config, seed), load_views(config, seed, folder)
    torch.manual_seed(seed)  # the student first: the same initial weights in every arm
    student = models.TinyViT(
        width=config.width, depth=config.depth, heads=config.heads, mlp_ratio=config.mlp_ratio, patch=config.patch,
        classes=data.CLASSES,
    )  # fmt: skip
    feature_loss = make_feature_loss(arm, config.width, config.teacher_widths[-1])
    optimizer, schedule = make_optimizer(config, student, feature_loss, steps)
    batches = torch.Generator().manual_seed(seed)  # its own, so that every arm draws the same batches

    state = {"student": student, "optimizer": optimizer, "schedule": schedule, "batches": batches}
    if feature_loss is not None:
        state["feature_loss"] = feature_loss
    loop = runs.Loop(
        run_file(folder, seed, name, ".ckpt"), task=f"{name} {seed}", steps=steps,
        images_per_step=images_per_step(config, name), save_every=config.save_every, state=state, worker=worker,
    )  # fmt: skip
    labelled, unlabelled = config.labelled_batch, config.unlabelled_batch

    for step in loop:
        rows = torch.cat([
            torch.randint(digits.labelled, (labelled,), generator=batches),
            torch.randint(digits.labelled, config.pool, (unlabelled,), generator=batches),
        ])  # fmt: skip
        images, teacher_features, teacher_logits = views.sample(rows, batches)
        if not arm.logits and feature_loss is None:
            images = images[:labelled]  # alone: the others would teach it nothing

        features, logits = student(images)
        loss = F.cross_entropy(
            logits[:labelled], digits.pool_labels[rows[:labelled]], label_smoothing=config.label_smoothing
        )
        if arm.logits:
            loss = loss + config.logit_weight * distillation(logits, teacher_logits, config.temperature)
        if feature_loss is not None:
            loss = loss + config.feature_weight * feature_loss(features, teacher_features)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

        if (step + 1) % config.curve_every == 0 or step + 1 == steps:
            with loop.clock_stopped():  # on pool images whose labels no student sees: the test set waits for the end
                hidden = slice(digits.labelled, None)
                loop.curve.append((step + 1, accuracy(student, digits.pool[hidden], digits.pool_labels[hidden])))

    result = {
        "arm": name, "seed": seed, "steps": steps,
        "accuracy": accuracy(student, digits.test, digits.test_labels),
        "orthogonality_error": orthogonality_error(feature_loss),
        "curve": loop.curve,
        "seconds": loop.seconds, "cpu_seconds": loop.cpu_seconds,
        "images_per_second": steps * loop.images_per_step / loop.seconds,
    }  # fmt: skip
    runs.save_json(run_file(folder, seed, name), result)
    loop.path.unlink(missing_ok=True)


def distillation(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || student) of the softened classes, times temperature^2, mean over the rows."""
    student, teacher = (student / temperature).log_softmax(dim=1), (teacher / temperature).log_softmax(dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def make_optimizer(
    config: Config, student: models.TinyViT, feature_loss: nn.Module | None, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW on one cycle; no weight decay on 1-D parameters, on what the student excludes, or on the projection."""
    decayed: list[nn.Parameter] = []
    kept = list(feature_loss.parameters()) if feature_loss is not None else []
    for name, parameter in student.named_parameters():
        excluded = parameter.ndim < 2 or name in student.no_weight_decay()
        (kept if excluded else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
    return optimizer, one_cycle(optimizer, steps, config.warmup)


def one_cycle(optimizer: torch.optim.Optimizer, steps: int, warmup: float) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate rises in a line over the first `warmup` of the steps, then falls in half a cosine to 0."""
    rise = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, steps - rise))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_teacher(config: Config, seed: int, folder: Path, worker: runs.Worker) -> None:
    digits = load_split(config, seed)
    torch.manual_seed(seed)
    teacher, batches = models.ConvTeacher(config.teacher_widths, data.CLASSES), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        teacher.parameters(), lr=config.teacher_lr, weight_decay=config.weight_decay, fused=True
    )
    schedule = one_cycle(optimizer, config.teacher_steps, config.warmup)
    loop = runs.Loop(
        run_file(folder, seed, "teacher", ".ckpt"), task=f"teacher {seed}", steps=config.teacher_steps,
        images_per_step=config.teacher_batch, save_every=config.save_every, worker=worker,
        state={"teacher": teacher, "optimizer": optimizer, "schedule": schedule, "batches": batches},
    )  # fmt: skip
    for _ in loop:
        rows = torch.randint(config.pool, (config.teacher_batch,), generator=batches)
        images = augment(config, digits.pool[rows], batches)
        loss = F.cross_entropy(teacher(images).logits, digits.pool_labels[rows], label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    runs.save_tensors(run_file(folder, seed, "teacher", ".pt"), teacher.state_dict())
    load_views(config, seed, folder)
    result = {
        "seed": seed, "accuracy": accuracy(teacher, digits.test, digits.test_labels), "seconds": loop.seconds,
        "cpu_seconds": loop.cpu_seconds,
    }  # fmt: skip
    runs.save_json(run_file(folder, seed, "teacher"), result)
    loop.path.unlink(missing_ok=True)


@torch.no_grad()
def load_views(config: Config, seed: int, folder: Path) -> data.Views:
    """The pool's augmented views and the trained teacher's outputs for them: computed once per seed, then read."""
    path = run_file(folder, seed, "views", ".pt")
    if not path.exists():
        teacher = models.ConvTeacher(config.teacher_widths, data.CLASSES).eval()
        teacher.load_state_dict(runs.load_tensors(run_file(folder, seed, "teacher", ".pt")))
        pool, generator = load_split(config, seed).pool, torch.Generator().manual_seed(seed)
        images = torch.stack([augment(config, pool, generator) for _ in range(config.views)])
        outputs = [teacher(batch) for batch in images.flatten(0, 1).split(250)]  # as much as a cache holds
        shape = (config.views, config.pool, -1)
        features, logits = (torch.cat(parts).view(shape) for parts in zip(*outputs, strict=True))
        views = data.Views(images, features, logits)
        runs.save_tensors(path, dataclasses.asdict(views))
        return views
    return data.Views(**runs.load_tensors(path))


def augment(config: Config, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    limits = {"rotation": config.rotation, "scale": config.scaling, "shift": config.shift, "shear": config.shear}
    return data.random_affine(images, generator, **limits)


def load_split(config: Config, seed: int) -> data.Digits:
    return data.load_digits(seed, pool=config.pool, labels_per_class=config.labels_per_class)


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    correct = (model(images).logits.argmax(dim=1) == labels).double().mean().item()
    model.train()
    return 100 * correct


@torch.no_grad()
def orthogonality_error(feature_loss: vk.OrthoProjLoss | LinearProjLoss | None) -> float | None:
    """max |PᵀP − I| of the trained projection (of P Pᵀ where the student is wider), in float64; None without one."""
    if feature_loss is None:
        return None
    weight = feature_loss.projection.weight.double()  # (T, S)
    gram = weight.T @ weight if weight.shape[0] >= weight.shape[1] else weight @ weight.T
    return (gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max().item()


# ---- the run ---------------------------------------------------------------------------------------------------------


def student_steps(config: Config, name: str) -> int:
    return round(config.steps * config.equal_time) if ARMS[name].longer else config.steps


def images_per_step(config: Config, name: str) -> int:
    return config.labelled_batch + (config.unlabelled_batch if ARMS[name].logits or ARMS[name].projection else 0)


def run_file(folder: Path, seed: int, name: str, suffix: str = ".json") -> Path:
    return folder / f"seed-{seed:02d}" / (name + suffix)


def make_tasks(config: Config, folder: Path) -> list[runs.Task]:
    tasks = []
    for seed in range(config.first_seed, config.first_seed + config.seeds):
        teacher = f"teacher {seed}"
        images = config.teacher_steps * config.teacher_batch
        tasks.append(
            runs.Task(teacher, run_file(folder, seed, "teacher"), images, train_teacher, (config, seed, folder))
        )
        for name in config.arms:
            images = student_steps(config, name) * images_per_step(config, name)
            task = partial(runs.Task, f"{name} {seed}", run_file(folder, seed, name), images, train_student)
            tasks.append(task((config, name, seed, folder), after=teacher))
    return tasks


def run(config: Config, folder: Path, *, jobs: int, baseline: str = "logits", quiet: bool = False) -> dict[str, Any]:
    """Train what `folder` lacks, then write metrics.json, metrics.csv, table.txt and figure.png into it."""
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    runs.perform(make_tasks(config, folder), jobs=jobs, quiet=quiet)
    results = [runs.load_json(run_file(folder, seed, name)) for seed in seeds for name in config.arms]
    teachers = [runs.load_json(run_file(folder, seed, "teacher")) for seed in seeds]
    metrics = {
        "config": dataclasses.asdict(config),
        "machine": report.machine(),
        "teachers": teachers,
        "summary": report.summarise(results, config.arms),
        "runs": results,
    }
    labels = {name: ARMS[name].label for name in config.arms}
    text = report.table(metrics, labels, baseline) + "\n\n" + report.in_words(metrics, labels)
    runs.save_json(folder / "metrics.json", metrics)
    report.save_csv(folder / "metrics.csv", results)
    runs.write_atomically(folder / "table.txt", lambda file: file.write((text + "\n").encode()))
    report.save_figure(folder / "figure.png", metrics, labels)
    for seed in seeds:
        run_file(folder, seed, "views", ".pt").unlink(missing_ok=True)  # large, and made again when needed
    print(text)
    return metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    execution = parser.add_argument_group("running")
    execution.add_argument(
        "--output", type=Path, metavar="DIR", help=f"run folder (default: {DEFAULT_OUTPUT}, or the next free number)"
    )
    execution.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --output, by default the newest (if there is none, begin one)",
    )
    execution.add_argument(
        "--jobs", type=int, metavar="N", default=cores(), help="worker processes of one thread (default: %(default)s)"
    )
    execution.add_argument("--baseline", metavar="ARM", help="the arm the table compares with (default: logits)")
    execution.add_argument("--quiet", action="store_true", help="no progress bar")
    add_options(parser, Config, "the experiment")


def read_config(folder: Path, typed: dict[str, Any]) -> Config:
    saved = runs.saved_config(folder, typed)
    names = {field.name for field in dataclasses.fields(Config)}
    if saved.keys() != names:
        changed = ", ".join(sorted(names ^ saved.keys()))
        raise runs.RunError(f"--resume: {folder} was made by another version ({changed}); leave --resume out")
    return Config(**saved)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def command(arguments: argparse.Namespace) -> int:
    """What `vkd distill classification` does with its parsed options; the exit code."""
    typed = typed_options(arguments, Config)
    packages = {"scikit-learn": "sklearn", "matplotlib": "matplotlib", "tqdm": "tqdm"}
    try:
        missing = [package for package, module in packages.items() if find_spec(module) is None]
        if missing:
            raise runs.RunError(f"{' and '.join(missing)} missing: pip install 'vkd_kernels[recipes]'")
        if arguments.jobs < 1:
            raise OptionError(f"--jobs: must be at least 1, got {arguments.jobs}")
        resumed = arguments.resume and (arguments.output or runs.newest_folder(DEFAULT_OUTPUT))
        folder = resumed or arguments.output or runs.free_folder(DEFAULT_OUTPUT)
        config = read_config(folder, typed) if resumed else Config(**typed)
        baseline = arguments.baseline or ("logits" if "logits" in config.arms else config.arms[0])
        if baseline not in config.arms:
            raise OptionError(f"--baseline: {baseline!r} is not one of this run's arms: {', '.join(config.arms)}")
        with runs.locked(folder):
            if not resumed:
                runs.start_folder(folder, dataclasses.asdict(config))
            print(f"{'resuming' if resumed else 'running'} in {folder}, {arguments.jobs} worker processes")
            run(config, folder, jobs=arguments.jobs, baseline=baseline, quiet=arguments.quiet)
            print(f"\nwritten to {folder}: figure.png, metrics.json, metrics.csv, table.txt")
    except (runs.RunError, OptionError) as error:
        print(f"vkd: error: {error}", file=sys.stderr)
        return 2
    except runs.Interrupted as interrupted:
        print(f"stopped; to continue: vkd distill classification --resume --output {folder}", file=sys.stderr)
        return interrupted.exit_code
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m vkd_kernels.recipes.classification", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_arguments(parser)
    return command(parser.parse_args(argv))


if __name__ == "__main__":
    from vkd_kernels.recipes.classification import main as importable  # worker processes look functions up by this name

    sys.exit(importable())
