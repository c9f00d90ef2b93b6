"""`vkd distill TASK`: every arm on every seed, after that seed's teacher; then a table, words and a figure.

`vkd ablate TASK` is the same with other arms: every projection with every normalization.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import vkd_kernels

from . import config as configs
from . import engine, jobs, report, runs, tasks
from .config import OptionError, Section, Words, option
from .runs import RunError
from .task import Arm, Context, Metric, Monitor, Task

PROJECTIONS = ("orthogonal", "linear", "identity")
NORMALIZATIONS = ("layer_norm", "batch_norm", "whiten", "none")


class Head(Section):
    """What config.yaml says beside the task's configuration."""

    task: str = option("", "the task")
    recipe: str = option("", "the named recipe; none: the bundled one")
    arms: Words = option((), "ways to distill that are compared", min_length=1)
    seeds: int = option(1, "how many seeds", ge=1, le=10_000)
    first_seed: int = option(0, "number of the first", ge=0, le=10**6)
    baseline: str = option("", "the arm that the table compares with")
    overrides: Words = option((), "section.key=value of the command line: they stand above the arms' own")
    versions: str = option("", "what wrote it")


@dataclass(frozen=True)
class Experiment:
    """Everything that a run folder's results depend on, and where its values came from."""

    task: type[Task]
    head: Head
    config: Any
    arms: Mapping[str, Arm]
    typed: Mapping[str, Any]  # overrides by key
    origins: Mapping[str, str]
    known: frozenset[str]  # keys that the command line, a file or a recipe gave
    ablate: bool

    @property
    def seeds(self) -> range:
        return range(self.head.first_seed, self.head.first_seed + self.head.seeds)

    def config_of(self, arm: str) -> Any:
        return self.arms[arm].apply(self.config, self.typed)

    def overridden(self, arm: str) -> str:
        """The arm's own values that the command line replaces, as they were typed."""
        own = {key: configs.show(value) for key, value in self.arms[arm].changes.items()}
        return " ".join(f"{key}={value}" for key, value in self.typed.items() if own.get(key, value) != value)

    def labels(self) -> dict[str, str]:
        typed = {name: self.overridden(name) for name in self.arms}
        return {name: arm.label + (f" [{typed[name]}]" if typed[name] else "") for name, arm in self.arms.items()}

    def check(self) -> None:
        """All that can be known to be wrong before anything is trained; what `--dry-run` prints is in `described`."""
        same: dict[str, str] = {}
        for name in self.arms:
            config = self.config_of(name)
            text = configs.to_yaml(configs.replace(self.config, {**self.arms[name].changes, **self.typed}), {})
            text += str(self.arms[name].longer)
            if text in same:
                raise OptionError(
                    f"{self.overridden(name) or self.overridden(same[text])}: leaves the arms {same[text]} and {name} "
                    "without a difference; choose one of them with --arms"
                )
            same[text] = name
            engine.device_of(config.run, config.optim)
            self.task.check(config)

    def to_yaml(self) -> str:
        return configs.to_yaml(self.config, configs.flatten(self.head))


def versions() -> str:
    return f"vkd_kernels {vkd_kernels.__version__}, torch {torch.__version__}"


def ablation(task: type[Task]) -> dict[str, Arm]:
    """Every projection with every normalization: what the task's arm "vkd" is, but for these two."""
    base = task.arms["vkd"].changes
    return {
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
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="ways to distill, as a b or a,b (default: recipe's)")
    parser.add_argument("--seeds", metavar="N", help="how many seeds (default: the recipe's)")
    parser.add_argument("--first-seed", metavar="K", help="number of the first seed (default: 0)")
    parser.add_argument("--baseline", metavar="ARM", help="arm that the table compares with (default: the recipe's)")
    parser.add_argument("--output", metavar="DIR", help="run folder (default: runs/TASK, or the next free number)")
    parser.add_argument(
        "--resume", action="store_true", help="continue, or extend, the run in --output (default: the newest one)"
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    about = "worker processes of one thread, on a CPU; 0: in this process, with its threads (default: %(default)s)"
    parser.add_argument("--jobs", type=int, metavar="N", default=cores, help=about)
    parser.add_argument("--dry-run", action="store_true", help="print configuration, model sizes and steps; do nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def resolve(arguments: Any, file: Path | None = None) -> Experiment:
    """The dataclasses' defaults, then the recipe, then the file, then the arms' own values, then `a.b=c`."""
    a, task = arguments, tasks.load(arguments.task)
    head: dict[str, Any] = {}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    sources = [(f"recipe {a.recipe}", *tasks.read_recipe(task, a.recipe))] if a.recipe else []
    if path := file or a.config:
        sources.append((str(path), *configs.read_yaml(path)))
    known = configs.flatten(task.Config())
    for where, written, comments in sources:
        for key, value in written.items():
            if key in Head.model_fields:
                head[key] = value
            elif key not in ("arm", "seed") and key not in known:
                raise OptionError(f"{where}: unknown key {key!r}{configs.nearest(key, known)}")
            elif key in known:
                values[key], origins[key] = value, comments.get(key, where)
    if head.get("task", a.task) != a.task:
        raise OptionError(f"--config: {path} is of the task {head['task']}, not {a.task}")
    before = configs.replace(Head(arms=("-",)), {"overrides": head.get("overrides", ())}).overrides
    typed = dict(text.split("=", 1) for text in [*before, *([] if file else a.values)] if "=" in text)
    origins |= dict.fromkeys(typed, "command line")
    config = configs.replace(task.Config(), values | typed)

    ablate = a.command_name == "ablate"
    arms = ablation(task) if ablate else dict(task.arms)
    own = configs.flatten(task.arms["vkd"].apply(config, {}))["distill.normalization"] if ablate else ""
    baseline = f"orthogonal-{own}" if ablate else task.baseline
    defaults = {"arms": tuple(arms) if ablate else ("vkd",) if a.recipe else task.compared, "seeds": task.seeds}
    if a.recipe:
        defaults["seeds"] = 1
    named = None if a.arms is None else [x for word in a.arms for x in word.split(",") if x]
    given = {"arms": named, "seeds": a.seeds}
    given |= {"first_seed": a.first_seed, "baseline": a.baseline}
    merged = {**defaults, **head, **{k: v for k, v in given.items() if v is not None}, "task": a.task}
    merged |= {"overrides": [f"{k}={v}" for k, v in typed.items()], "versions": versions(), "recipe": a.recipe or ""}
    checked = configs.replace(Head(arms=("-",)), merged)
    for arm in checked.arms:
        if arm not in arms:
            raise OptionError(f"--arms: unknown {arm!r}; choose from {', '.join(arms)}")
    if len({*checked.arms}) < len(checked.arms):
        raise OptionError(f"--arms: the same arm twice in {' '.join(checked.arms)}")
    if checked.baseline and checked.baseline not in checked.arms:
        raise OptionError(f"--baseline: {checked.baseline!r} is not one of this run's arms: {', '.join(checked.arms)}")
    wish = checked.baseline or (baseline if baseline in checked.arms else checked.arms[0])
    return Experiment(
        task=task,
        head=configs.replace(checked, {"baseline": wish}),
        config=config,
        arms={arm: arms[arm] for arm in checked.arms},
        typed=typed,
        origins=origins,
        known=frozenset(values) | frozenset(typed),
        ablate=ablate,
    )


def extended(folder: Path, typed: Experiment, arguments: Any) -> Experiment:
    """The experiment of a folder, with the arms and seeds that were typed beside its own. Everything else that was
    typed must say what the folder says, but for `run.`, which is free."""
    path = folder / "config.yaml"
    if not path.exists():
        raise RunError(f"--resume: {folder} holds no run (there is no {path})")
    saved = resolve(argparse.Namespace(**{**vars(arguments), "arms": None, "seeds": None, "baseline": None}), path)
    own, saved_values = configs.flatten(typed.config), configs.flatten(saved.config)
    if missing := ", ".join(own.keys() - saved.known):
        raise RunError(f"--resume: {path} lacks {missing}: another version wrote it; leave --resume out")
    if saved.head.first_seed != int(arguments.first_seed or saved.head.first_seed):
        raise RunError(f"--resume: --first-seed is {saved.head.first_seed} in {folder}")
    if begun := [word for word in configs.read_yaml(path)[0].get("versions", "").split(", ") if word not in versions()]:
        print(f"warning: {folder} was begun with {', '.join(begun)}, this is {versions()}", file=sys.stderr)
    differences = [
        f"{key} is {configs.show(saved_values[key])} there and {configs.show(own[key])} here"
        for key in typed.known
        if saved_values[key] != own[key] and not key.startswith("run.")
    ]
    if differences:
        raise RunError(f"--resume: {folder} has another configuration: {'; '.join(sorted(differences))}")
    free = {key: own[key] for key in typed.known if key.startswith("run.")}
    new = typed.arms if arguments.arms else {}
    arms = {**saved.arms, **new}
    seeds = max(saved.head.seeds, typed.head.seeds if arguments.seeds else 0)
    overrides = {**saved.typed, **typed.typed}
    head = {"arms": tuple(arms), "seeds": seeds, "overrides": tuple(f"{k}={v}" for k, v in overrides.items())}
    if arguments.baseline:
        head["baseline"] = arguments.baseline
    return dataclasses.replace(
        saved,
        arms=arms,
        head=configs.replace(saved.head, head),
        config=configs.replace(saved.config, free),
        typed=overrides,
    )


def command(arguments: argparse.Namespace) -> int:
    """What `vkd distill` or `vkd ablate` does with its parsed options; the exit code."""
    a, folder = arguments, None
    if a.help:
        show_help(a)
        return 0
    first = int(os.environ.get("RANK", "0")) == 0
    default = Path("runs") / "-".join([*(["ablate"] if a.command_name == "ablate" else []), a.task.replace(":", ".")])
    try:
        if a.output == "":
            raise OptionError("--output: is empty")
        if a.jobs < 0:
            raise OptionError(f"--jobs: must be at least 0, got {a.jobs}")
        experiment = resolve(a)
        if a.dry_run:
            show_plan(experiment)
            return 0
        newest = newest_folder(default) if a.resume else None
        folder = Path(a.output) if a.output else newest or free_folder(default)
        resumed = a.resume and bool(a.output or newest)
        if resumed:
            experiment = extended(folder, experiment, a)
        elif (folder / "config.yaml").exists():
            raise RunError(f"{folder} holds a run already: add --resume to continue it, or give another --output")
        experiment.check()
        if first:
            print(f"{'resuming' if resumed else 'running'} in {folder}", flush=True)
            for name in experiment.arms:
                if typed := experiment.overridden(name):
                    print(f"{typed} on the command line stands above the arm {name}'s own value", flush=True)
        text = run(experiment, folder, processes=a.jobs, quiet=a.quiet)
        if first:
            print(f"{text}\n\nwritten to {folder}: table.txt, results.csv, metrics.json, figure.png")
    except RunError:
        if first:
            raise
        return 2
    except engine.Interrupted as interrupted:
        if first:
            print(f"stopped; to continue: vkd {a.command_name} {a.task} --resume --output {folder}", file=sys.stderr)
        return interrupted.exit_code
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def free_folder(default: Path) -> Path:
    """`default`, or default-2, default-3, ...: the first that does not exist."""
    number, folder = 1, default
    while folder.exists():
        number += 1
        folder = default.with_name(f"{default.name}-{number}")
    return folder


def newest_folder(default: Path) -> Path | None:
    """The newest of the runs in `default`, default-2, default-3, ..."""
    heads = [*default.parent.glob(f"{default.name}/config.yaml"), *default.parent.glob(f"{default.name}-*/config.yaml")]
    return max(heads, key=lambda path: path.stat().st_mtime_ns).parent if heads else None


def show_help(arguments: Any) -> None:
    """What `--help` says after a task's name: every value of its configuration."""
    experiment = resolve(arguments)
    task, recipe = experiment.task, arguments.recipe
    arguments.parser.print_help()
    print(f"\n{task.title}\n\nrecipes: {', '.join(tasks.recipes(task)) or 'only the bundled one'}\n\narms:")
    for name, arm in (ablation(task) if arguments.command_name == "ablate" else task.arms).items():
        print(f"    {name:20}{arm.label}")
    title = f"with --recipe {recipe}" if recipe else "of the bundled recipe"
    print(f"\nconfiguration {title}: `section.key=value`, what it means [where the value comes from]")
    print(configs.help_text(experiment.config, experiment.origins))


def show_plan(experiment: Experiment) -> None:
    """What `--dry-run` prints."""
    print(experiment.to_yaml())
    for name, label in experiment.labels().items():
        config = experiment.config_of(name)
        print(f"# {name}: {label}")
        changes = {**experiment.arms[name].changes, **experiment.typed}
        print(configs.dump({"changes": changes, **experiment.task.describe(config)}))


# ---- one training ----------------------------------------------------------------------------------------------------


def train_teacher(*, task: str, config: Any, seed: int, root: Path, fabric: Any, monitor: Monitor) -> None:
    folder, fabric = root / "teacher" / f"seed-{seed:02d}", fabric or engine.make_fabric(config.run, config.optim)
    about, name = {"seed": seed}, f"teacher {seed}"
    context = Context(fabric, folder, seed, teacher=folder, monitor=monitor, name=name, about=about)
    engine.seed_all(seed)
    numbers = tasks.load(task)(config, context).train_teacher()
    if fabric.is_global_zero:
        runs.save_json(folder / "done.json", {"seed": seed, **numbers})
    fabric.barrier()


def train_arm(*, task: str, config: Any, arm: str, seed: int, root: Path, fabric: Any, monitor: Monitor) -> None:
    folder, teacher = root / arm / f"seed-{seed:02d}", root / "teacher" / f"seed-{seed:02d}"
    fabric = fabric or engine.make_fabric(config.run, config.optim)
    about, name = {"arm": arm, "seed": seed}, f"{arm} {seed}"
    context = Context(fabric, folder, seed, teacher=teacher, monitor=monitor, name=name, about=about)
    if fabric.is_global_zero:
        runs.write_text(
            folder / "config.yaml", configs.to_yaml(config, {"task": task, **about, "versions": versions()})
        )
    engine.train(tasks.load(task)(config, context))


def make_jobs(experiment: Experiment, root: Path, fabric: Any) -> list[jobs.Job]:
    e, todo = experiment, list[jobs.Job]()
    for seed in e.seeds:
        shared = {"task": e.head.task, "seed": seed, "root": root, "fabric": fabric}
        teacher = f"teacher {seed}" if e.task.has_teacher else None
        if teacher:
            done, config = root / "teacher" / f"seed-{seed:02d}" / "done.json", configs.replace(e.config, e.typed)
            todo.append(jobs.Job(teacher, done, 0, work=train_teacher, arguments={"config": config, **shared}))
        for arm in e.arms:
            config, result = e.config_of(arm), root / arm / f"seed-{seed:02d}" / "result.json"
            images, arguments = config.optim.steps * config.optim.batch_size, {"config": config, "arm": arm, **shared}
            job = jobs.Job(f"{arm} {seed}", result, images, work=train_arm, arguments=arguments, after=teacher)
            todo.append(job)
    return todo


def run(experiment: Experiment, folder: Path, *, processes: int, quiet: bool) -> str:
    """Train what the folder lacks and report: in worker processes, on this process's accelerator, or as a rank."""
    config, fabric, ranks = experiment.config, None, engine.ranks() > 1
    if ranks:
        unused = experiment.task.unused_parameters
        fabric = engine.make_fabric(config.run, config.optim, alone=False, unused_parameters=unused)
    if fabric is not None and not fabric.is_global_zero:
        if message := fabric.broadcast(None):
            raise RunError(message)
        jobs.perform(make_jobs(experiment, folder, fabric), processes=0, quiet=True, insist=True)
        return ""
    tell: Any = fabric.broadcast if fabric is not None else lambda message: None
    try:
        with runs.own_folder(folder):
            runs.write_text(folder / "config.yaml", experiment.to_yaml())
            runs.save_json(folder / "machine.json", report.machine())
            tell(None)
            tell = lambda message: None  # noqa: E731
            in_this_process = ranks or not processes or engine.device_of(config.run, config.optim) != "cpu"
            todo = make_jobs(experiment, folder, fabric)
            jobs.perform(todo, processes=0 if in_this_process else processes, quiet=quiet, insist=ranks)
            return finish(folder, experiment)
    except RunError as error:
        tell(str(error))
        raise


def finish(folder: Path, experiment: Experiment) -> str:
    """metrics.json, results.csv, table.txt and figure.png of a folder whose trainings are all done; the text."""
    e, labels, metric = experiment, experiment.labels(), experiment.task.metric
    results = [load_result(folder / name / f"seed-{seed:02d}", metric) for seed in e.seeds for name in e.arms]
    done = [folder / "teacher" / f"seed-{seed:02d}" / "done.json" for seed in e.seeds]
    teachers = [runs.load_json(path) for path in done if path.exists()]
    summary = report.summarize(results, tuple(e.arms), metric)
    longer = [name for name, arm in e.arms.items() if arm.longer > 1]
    text = "\n\n".join(
        [
            *([grid(summary, metric)] if e.ablate else []),
            report.table(summary, labels, metric, e.head.baseline),
            report.in_words(
                summary,
                labels,
                metric,
                e.head.baseline,
                longer=longer,
                teachers=teachers,
                focus=(e.head.baseline,) if e.ablate else e.task.focus,
            ),
        ]
    )
    runs.save_json(
        folder / "metrics.json",
        {
            "task": e.head.task,
            "recipe": e.head.recipe,
            "config": configs.flatten(e.config),
            "arms": {
                name: {**dataclasses.asdict(arm), "changes": {**arm.changes, **e.typed}} for name, arm in e.arms.items()
            },
            "baseline": e.head.baseline,
            "machine": runs.load_json(folder / "machine.json"),
            "teachers": teachers,
            "summary": summary,
            "runs": results,
        },
    )
    flat = [{k: v for k, v in r.items() if not isinstance(v, (dict, list))} | r["diagnostics"] for r in results]
    lines = io.StringIO()
    writer = csv.DictWriter(lines, dict.fromkeys(name for row in flat for name in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    runs.write_text(folder / "results.csv", lines.getvalue())
    runs.write_text(folder / "table.txt", text + "\n")
    report.draw(folder / "figure.png", summary, results, labels, metric)
    for cache in folder.glob("teacher/seed-*/answers*"):  # large, and made again when needed
        cache.unlink()
    return text


def load_result(folder: Path, metric: Metric) -> dict[str, Any]:
    path = folder / "result.json"
    result = runs.load_json(path)
    try:
        numbers = [result[metric.key], result["seconds"], result["cpu_seconds"], result["images_per_second"]]
        curve = [(int(e["step"]), float(e[f"eval/{metric.key}"])) for e in result["evaluations"]]
        if not all(map(math.isfinite, numbers)) or not isinstance(result["diagnostics"], dict):
            raise ValueError(json.dumps(numbers))
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error!r}): delete it to have that part done again") from error
    return result | {"curve": curve}


def grid(summary: Mapping[str, Any], metric: Metric) -> str:
    """An ablation's means and deviations: a row per projection, a column per normalization."""
    rows = [[metric.label, *NORMALIZATIONS]]
    for p in PROJECTIONS:
        cells = [summary.get(f"{p}-{n}") for n in NORMALIZATIONS]
        rows.append([p, *(report.spread(c["mean"], c["std"], metric.digits) if c else "" for c in cells)])
    return report.align(rows)
