"""`vkd distill TASK`: every arm on every seed, after that seed's teacher; then a table and a figure."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import config as configs
from . import engine, jobs, report, runs, tasks
from .config import OptionError, Section, Words, option
from .runs import RunError
from .task import Arm, Context, Monitor, Task

TEACHER, ABLATION = "teacher", "ablation"
PROJECTIONS = ("orthogonal", "linear", "identity")
NORMALIZATIONS = ("layer_norm", "batch_norm", "whiten", "none")


class Head(Section):
    """What config.yaml says beside the task's configuration."""

    task: str = option("", "the task")
    recipe: str = option("", "the named recipe; none: the bundled one")
    arms: Words = option(("-",), "ways to distill that are compared", min_length=1)
    seeds: int = option(1, "how many seeds", ge=1, le=10_000)
    first_seed: int = option(0, "number of the first", ge=0, le=10**6)
    baseline: str = option("", "the arm that the table compares with")
    overrides: Words = option((), "section.key=value of the command line: they stand above the arms' own")


@dataclass(frozen=True)
class Experiment:
    """Everything that a run folder's results depend on, and where its values came from."""

    task: type[Task]
    head: Head
    config: Any
    typed: Mapping[str, Any]  # values of the command line, by key
    origins: Mapping[str, str]  # of every value that the command line, a file or a recipe gave

    @property
    def seeds(self) -> range:
        return range(self.head.first_seed, self.head.first_seed + self.head.seeds)

    @property
    def arms(self) -> dict[str, Arm]:
        return {name: arms_of(self.task)[name] for name in self.head.arms}

    def config_of(self, arm: str) -> Any:
        return self.arms[arm].apply(self.config, self.typed)

    def labels(self) -> dict[str, str]:
        """With the arm's own values that the command line replaces, as they were typed."""
        labels = {}
        for name, arm in self.arms.items():
            own = {key: configs.show(value) for key, value in arm.changes.items()}
            typed = " ".join(f"{key}={value}" for key, value in self.typed.items() if own.get(key, value) != value)
            labels[name] = f"{arm.label} [{typed}]" if typed else arm.label
        return labels

    def check(self) -> None:
        """All that can be known to be wrong before anything is trained."""
        arms, baseline = self.head.arms, self.head.baseline
        if baseline not in arms:
            raise OptionError(f"--baseline: {baseline!r} is not one of this run's arms: {', '.join(arms)}")
        engine.device_of(self.config.run)
        for name in arms:
            self.task.check(self.config_of(name))

    def to_yaml(self) -> str:
        return configs.to_yaml(self.config, configs.flatten(self.head))


def arms_of(task: type[Task]) -> dict[str, Arm]:
    """A task's own arms, and every projection with every normalization: its arm "vkd" but for these two."""
    base = task.arms["vkd"].changes if "vkd" in task.arms else {}
    return {**task.arms} | {
        f"{p}-{n}": Arm(f"{p}, {n}", {**base, "distill.projection": p, "distill.normalization": n})
        for p in PROJECTIONS
        for n in NORMALIZATIONS
    }


# ---- the command line ------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s TASK [section.key=value ...] [options]"
    parser.add_argument("-h", "--help", action="store_true", help="this, and every value of the task's configuration")
    parser.add_argument("task", metavar="TASK", help=f"{', '.join(tasks.NAMES)}, or your own: package.module:Class")
    parser.add_argument("--recipe", metavar="NAME", help="a named configuration of the task (default: the bundled one)")
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="further values, such as a run's config.yaml")
    about = f"ways to distill, as a b or a,b; {ABLATION}: every projection with every normalization (default: recipe's)"
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=about)
    parser.add_argument("--seeds", metavar="N", help="how many seeds (default: the recipe's)")
    parser.add_argument("--first-seed", metavar="K", help="number of the first seed (default: 0)")
    parser.add_argument("--baseline", metavar="ARM", help="arm that the table compares with (default: the recipe's)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="run folder (default: runs/TASK)")
    parser.add_argument("--resume", action="store_true", help="continue, or extend, the run in --output")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    about = "worker processes of one thread, on a CPU; 0: in this process, with its threads (default: %(default)s)"
    parser.add_argument("--jobs", type=int, metavar="N", default=cores, help=about)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def resolve(a: argparse.Namespace, saved: Path | None = None) -> Experiment:
    """The options' defaults, then the recipe, then the file, then the arms' own values, then `a.b=c`. Or all that
    `saved` says, a run's config.yaml."""
    task = tasks.load(a.task)
    known = configs.flatten(task.Config())
    head, values, origins = dict[str, Any](), dict[str, Any](), dict[str, str]()
    layers = [(f"recipe {a.recipe}", *tasks.read_recipe(task, a.recipe))] if a.recipe and not saved else []
    layers += [(str(path), *configs.read_yaml(path)) for path in [saved or a.config] if path]
    for where, written, comments in layers:
        for key, value in written.items():
            if key in Head.model_fields:
                head[key] = value
            elif key in known:
                values[key], origins[key] = value, comments.get(key, where)
            elif key not in ("arm", "seed"):
                raise OptionError(f"{where}: unknown key {key!r}{configs.nearest(key, known)}")
    if head.get("task", a.task) != a.task:
        raise OptionError(f"{saved or a.config} is of the task {head['task']}, not {a.task}")
    before = configs.replace(Head(), {"overrides": head.get("overrides", ())}).overrides
    typed = dict(text.split("=", 1) for text in [*before, *([] if saved else a.values)] if "=" in text)
    origins |= dict.fromkeys(typed, "command line")

    defaults = {"arms": ("vkd",), "seeds": 1} if a.recipe else {"arms": task.compared, "seeds": task.seeds}
    given = {name: getattr(a, name) for name in ("seeds", "first_seed", "baseline")}
    if a.arms is not None:
        ablation = [name for name in arms_of(task) if name not in task.arms]
        words = [word for text in a.arms for word in text.split(",") if word]
        given["arms"] = [name for word in words for name in (ablation if word == ABLATION else [word])]
    given = {} if saved else {name: value for name, value in given.items() if value is not None}
    last = {"task": a.task, "overrides": [f"{key}={value}" for key, value in typed.items()]}
    checked = configs.replace(Head(recipe=a.recipe or ""), {**defaults, **head, **given, **last})
    for arm in checked.arms:
        if arm not in arms_of(task):
            raise OptionError(f"--arms: unknown {arm!r}; choose from {', '.join([*task.arms, ABLATION])}")
    if len({*checked.arms}) < len(checked.arms):
        raise OptionError(f"--arms: the same arm twice in {' '.join(checked.arms)}")
    baseline = task.baseline if task.baseline in checked.arms else checked.arms[0]
    return Experiment(
        task=task,
        head=configs.replace(checked, {"baseline": checked.baseline or baseline}),
        config=configs.replace(task.Config(), values | typed),
        typed=typed,
        origins=origins,
    )


def continued(folder: Path, asked: Experiment, a: argparse.Namespace) -> Experiment:
    """The experiment of a folder, with the arms and seeds that were typed beside its own. Everything else that was
    typed must say what the folder says, but for `run.`, which is free."""
    path = folder / "config.yaml"
    if not path.exists():
        raise RunError(f"--resume: {folder} holds no run (there is no {path})")
    saved = resolve(a, path)
    old, new = configs.flatten(saved.config), configs.flatten(asked.config)
    if a.first_seed is not None and asked.head.first_seed != saved.head.first_seed:
        raise RunError(f"--resume: --first-seed is {saved.head.first_seed} in {folder}")
    free = {key: new[key] for key in asked.origins if key.startswith("run.")}
    differences = [
        f"{key} is {configs.show(old[key])} there and {configs.show(new[key])} here"
        for key in sorted(asked.origins.keys() - free.keys())
        if old[key] != new[key]
    ]
    if differences:
        raise RunError(f"--resume: {folder} has another configuration: {'; '.join(differences)}")
    typed = {**saved.typed, **asked.typed}
    head = {
        "arms": tuple(dict.fromkeys([*saved.head.arms, *(asked.head.arms if a.arms else ())])),
        "seeds": max(saved.head.seeds, asked.head.seeds if a.seeds else 0),
        "overrides": tuple(f"{key}={value}" for key, value in typed.items()),
        **({"baseline": a.baseline} if a.baseline else {}),
    }
    config, head_ = configs.replace(saved.config, free), configs.replace(saved.head, head)
    return dataclasses.replace(saved, head=head_, config=config, typed=typed)


def command(a: argparse.Namespace) -> int:
    """What `vkd distill` does with its parsed options; the exit code."""
    first = int(os.environ.get("RANK", "0")) == 0
    folder = a.output or Path("runs") / a.task.replace(":", ".")
    try:
        if a.jobs < 0:
            raise OptionError(f"--jobs: must be at least 0, got {a.jobs}")
        experiment = resolve(a)
        if a.help:
            show_help(experiment, a)
            return 0
        if a.resume:
            experiment = continued(folder, experiment, a)
        elif first and (folder / "config.yaml").exists():
            raise RunError(f"{folder} holds a run already: add --resume to continue it, or give another --output")
        experiment.check()
        if first:
            print(f"{'resuming' if a.resume else 'running'} in {folder}", flush=True)
        text = run(experiment, folder, processes=a.jobs, quiet=a.quiet or not first)
        if first:
            print(f"{text}\n\nwritten to {folder}: table.txt, metrics.json, figure.png")
    except RunError:
        if first:
            raise
        return 2
    except engine.Interrupted as interrupted:
        if first:
            print(f"stopped; to continue: vkd distill {a.task} --resume --output {folder}", file=sys.stderr)
        return interrupted.exit_code
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def show_help(experiment: Experiment, a: argparse.Namespace) -> None:
    """What `--help` says after a task's name: every value of its configuration."""
    task = experiment.task
    a.parser.print_help()
    print(f"\n{task.title}\n\nrecipes: {', '.join(tasks.recipes(task)) or 'only the bundled one'}\n\narms:")
    for name, arm in task.arms.items():
        print(f"    {name:20}{arm.label}")
    print("\nconfiguration: `section.key=value`, what it means [where the value comes from]")
    print(configs.help_text(experiment.config, experiment.origins))


# ---- trainings -------------------------------------------------------------------------------------------------------


def train(*, task: str, config: Any, arm: str, seed: int, root: Path, fabric: Any = None, monitor: Monitor) -> None:
    """One arm's training of a seed; or, for the arm "teacher", that of the seed's teacher."""
    folder, teacher = (root / name / f"seed-{seed:02d}" for name in (arm, TEACHER))
    about = {"seed": seed} if arm == TEACHER else {"arm": arm, "seed": seed}
    fabric = fabric or engine.make_fabric(config.run, config.optim)
    context = Context(
        fabric=fabric, folder=folder, seed=seed, teacher=teacher, monitor=monitor, name=f"{arm} {seed}", about=about
    )
    engine.seed_all(seed)
    training = tasks.load(task)(config, context)
    if arm != TEACHER:
        if fabric.is_global_zero:
            runs.write_text(folder / "config.yaml", configs.to_yaml(config, {"task": task, **about}))
        engine.train(training)
        return
    numbers = training.train_teacher()
    if fabric.is_global_zero:
        runs.save_json(folder / "done.json", {"seed": seed, **numbers})
    fabric.barrier()


def make_jobs(e: Experiment, root: Path, fabric: Any) -> list[jobs.Job]:
    todo = list[jobs.Job]()
    for seed in e.seeds:
        for arm in (TEACHER, *e.arms):
            config = configs.replace(e.config, e.typed) if arm == TEACHER else e.config_of(arm)
            result = root / arm / f"seed-{seed:02d}" / ("done.json" if arm == TEACHER else "result.json")
            work = partial(train, task=e.head.task, config=config, arm=arm, seed=seed, root=root, fabric=fabric)
            after = None if arm == TEACHER else f"{TEACHER} {seed}"
            todo.append(jobs.Job(f"{arm} {seed}", result, work, after))
    return todo


def run(e: Experiment, folder: Path, *, processes: int, quiet: bool) -> str:
    """Train what the folder lacks and report: in worker processes, on this process's accelerator, or as a rank."""
    ranks, first, fabric = engine.ranks() > 1, int(os.environ.get("RANK", "0")) == 0, None
    with runs.own_folder(folder) if first else contextlib.nullcontext():
        if first:
            runs.write_text(folder / "config.yaml", e.to_yaml())
            runs.save_json(folder / "machine.json", report.machine())
        if ranks:  # the others wait for the first one in this
            fabric = engine.make_fabric(
                e.config.run, e.config.optim, alone=False, unused_parameters=e.task.unused_parameters
            )
        if ranks or engine.device_of(e.config.run) != "cpu":
            processes = 0
        jobs.perform(make_jobs(e, folder, fabric), processes=processes, quiet=quiet)
        return finish(folder, e) if first else ""


def finish(folder: Path, e: Experiment) -> str:
    """metrics.json, table.txt and figure.png of a folder whose trainings are all done; the text."""
    labels, metric, results = e.labels(), e.task.metric, list[dict[str, Any]]()
    for seed in e.seeds:
        for name in e.arms:
            result = runs.load_json(folder / name / f"seed-{seed:02d}" / "result.json")
            curve = [(line["step"], line[f"eval/{metric.key}"]) for line in result["evaluations"]]
            results.append(result | {"curve": curve})
    summary = report.summarize(results, tuple(e.arms), metric)
    text = report.table(summary, labels, metric, e.head.baseline)
    metrics = {
        "task": e.head.task,
        "recipe": e.head.recipe,
        "config": configs.flatten(e.config),
        "arms": {n: {**dataclasses.asdict(arm), "changes": {**arm.changes, **e.typed}} for n, arm in e.arms.items()},
        "baseline": e.head.baseline,
        "machine": runs.load_json(folder / "machine.json"),
        "teachers": [runs.load_json(folder / TEACHER / f"seed-{seed:02d}" / "done.json") for seed in e.seeds],
        "summary": summary,
        "runs": results,
    }
    runs.save_json(folder / "metrics.json", metrics)
    runs.write_text(folder / "table.txt", text + "\n")
    report.draw(folder / "figure.png", summary, results, labels, metric)
    for cache in folder.glob("teacher/seed-*/answers*"):  # large, and made again when needed
        shutil.rmtree(cache) if cache.is_dir() else cache.unlink()
    return text
