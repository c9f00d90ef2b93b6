"""`vkd distill TASK`: every arm on every seed, after that seed's teacher; then a table, words and a figure."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import vkd_kernels

from . import config as configs
from . import devices, engine, report, runs, tasks, workers
from .config import OptionError
from .tasks import Arm

NOT_CONFIG = ("task", "recipe", "arms", "seeds", "first_seed", "baseline", "arm", "seed", "versions", "source")


@dataclass(frozen=True)
class Experiment:
    """Everything that a run folder's results depend on, and where its values came from."""

    task: str
    recipe: str  # "" for the bundled one
    config: Any
    arms: Mapping[str, Arm]
    seeds: int
    first_seed: int
    baseline: str
    focus: tuple[str, ...]  # the arms whose differences to the others are said in words
    origins: Mapping[str, str]
    typed: frozenset[str]  # keys that the command line, a file or a recipe gave

    def labels(self) -> dict[str, str]:
        return {name: arm.label for name, arm in self.arms.items()}

    def to_yaml(self) -> str:
        head = {
            "task": self.task, "recipe": self.recipe, "arms": list(self.arms), "seeds": self.seeds,
            "first_seed": self.first_seed, "baseline": self.baseline, "versions": versions(),
        }  # fmt: skip
        return configs.dump(head) + "\n" + configs.to_yaml(self.config)


@dataclass(frozen=True)
class Design:
    """Which arms a command compares, and how it reports them: what tells `vkd distill` from `vkd ablate`."""

    command: str
    arms: Callable[[Any], Mapping[str, Arm]]  # of a task
    choose: Callable[
        [Any, Any, bool], tasks.Defaults
    ]  # of task, configuration and whether a named recipe was asked for
    finish: Callable[[Path, Experiment], str]  # writes the reports of a finished folder; the text to print


def versions() -> dict[str, str]:
    return {"vkd_kernels": vkd_kernels.__version__, "torch": str(torch.__version__)}


# ---- the command line ------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s TASK [section.key=value ...] [options]"
    parser.add_argument("task", metavar="TASK", help=f"{', '.join(tasks.NAMES)}, or an importable module package.task")
    parser.add_argument("-h", "--help", action="store_true", help="this, and every value of the task's configuration")
    parser.add_argument("--recipe", metavar="NAME", help="a named configuration of the task (default: the bundled one)")
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="further values, such as a run's config.yaml")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="which ways to distil (default: the recipe's)")
    parser.add_argument("--seeds", type=int, metavar="N", help="how many seeds (default: the recipe's)")
    parser.add_argument("--first-seed", type=int, metavar="K", help="number of the first seed (default: 0)")
    parser.add_argument(
        "--baseline", metavar="ARM", help="the arm that the table compares with (default: the recipe's)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="run folder (default: runs/TASK, or the next free number)"
    )
    parser.add_argument(
        "--resume", action="store_true",
        help="continue the run in --output, by default the newest one (if there is none, begin one)",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, metavar="N", default=workers.cores(),
        help="worker processes of one thread, on a CPU; 0: in this process, with its threads (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print configuration, model sizes and steps; do nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def resolve(
    design: Design, name: str, recipe: str | None, file: Path | None, overrides: list[str], arms: list[str] | None,
    seeds: int | None, first_seed: int | None, baseline: str | None,
) -> Experiment:  # fmt: skip
    """The dataclasses' defaults, then the recipe, then the file, then `a.b=c`."""
    task = tasks.load(name)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    head: dict[str, Any] = {}
    paths = []
    if recipe is not None:
        known = tasks.recipes(name)
        if recipe not in known:
            raise OptionError(f"--recipe: unknown {recipe!r}; {name} has {', '.join(known) or 'none'}")
        paths.append((f"recipe {recipe}", known[recipe]))
    if file is not None:
        paths.append((str(file), file))
    known_keys = [key.name for key in configs.keys(task.Config)]
    for where, path in paths:
        found, comments = configs.read_yaml(path)
        for key, value in found.items():
            if key.split(".")[0] in NOT_CONFIG:
                head[key] = value
            elif key not in known_keys:
                raise OptionError(f"{path}: unknown key {key!r}{configs.nearest(key, known_keys)}")
            else:
                values[key], origins[key] = value, comments.get(key, where)
    for text in overrides:
        key, value = configs.split_override(text)
        values[key], origins[key] = value, "command line"
    if head.get("task", name) != name:
        raise OptionError(f"--config: {file} is of the task {head['task']}, not {name}")
    config = configs.replace(task.Config(), values)

    defaults, known_arms = design.choose(task, config, recipe is not None), design.arms(task)
    chosen = arms or head.get("arms") or defaults.arms
    seeds = seeds if seeds is not None else head.get("seeds", defaults.seeds)
    first_seed = first_seed if first_seed is not None else head.get("first_seed", 0)
    for arm in chosen:
        if arm not in known_arms:
            raise OptionError(f"--arms: unknown {arm!r}; choose from {', '.join(known_arms)}")
    if len(set(chosen)) < len(chosen):
        raise OptionError(f"--arms: the same arm twice in {' '.join(chosen)}")
    if seeds < 1 or first_seed < 0:
        raise OptionError(f"--seeds must be at least 1 and --first-seed at least 0, got {seeds} and {first_seed}")
    if baseline is not None and baseline not in chosen:
        raise OptionError(f"--baseline: {baseline!r} is not one of this run's arms: {', '.join(chosen)}")
    wish = baseline or head.get("baseline") or defaults.baseline
    return Experiment(
        task=name, recipe=recipe or "", config=config, arms={arm: known_arms[arm] for arm in chosen}, seeds=seeds,
        first_seed=first_seed, baseline=wish if wish in chosen else chosen[0], focus=defaults.focus,
        origins=origins, typed=frozenset(values),
    )  # fmt: skip


def show_help(parser: argparse.ArgumentParser, experiment: Experiment, arms: Mapping[str, Arm]) -> None:
    task = tasks.load(experiment.task)
    print(f"{task.TITLE}\n\n{parser.format_help()}")
    print(
        f"recipes of {experiment.task}: {', '.join(tasks.recipes(experiment.task)) or 'only the bundled one'}\n\narms:"
    )
    for name, arm in arms.items():
        print(f"    {name:20}{arm.label}")
    title = f"with --recipe {experiment.recipe}" if experiment.recipe else "of the bundled recipe"
    print(f"\nconfiguration {title}: `section.key=value`, what it means [where the value comes from]")
    print(configs.help_text(experiment.config, experiment.origins))


def show_plan(experiment: Experiment) -> None:
    """What `--dry-run` prints."""
    task = tasks.load(experiment.task)
    print(experiment.to_yaml())
    for name, arm in experiment.arms.items():
        print(f"# {name}: {arm.label}")
        print(configs.dump({"changes": dict(arm.overrides), **task.describe(arm.apply(experiment.config))}))


# ---- one training ----------------------------------------------------------------------------------------------------


def arm_folder(root: Path, arm: str, seed: int) -> Path:
    return root / arm / f"seed-{seed:02d}"


def teacher_folder(root: Path, seed: int) -> Path:
    return root / "teacher" / f"seed-{seed:02d}"


def train_teacher(name: str, config: Any, seed: int, root: Path, fabric: Any, worker: runs.Worker) -> None:
    folder = teacher_folder(root, seed)
    context = engine.Context(
        fabric or devices.make_fabric(config.run, config.optim), folder, seed, worker, f"teacher {seed}", {"seed": seed}
    )
    engine.seed_all(seed)
    found = tasks.load(name).train_teacher(config, seed, folder, context) or {}
    if context.fabric.is_global_zero:
        runs.save_json(folder / "done.json", {"seed": seed, **found})
    context.fabric.barrier()


def train_arm(name: str, config: Any, arm: str, seed: int, root: Path, fabric: Any, worker: runs.Worker) -> None:
    folder = arm_folder(root, arm, seed)
    context = engine.Context(
        fabric or devices.make_fabric(config.run, config.optim), folder, seed, worker, f"{arm} {seed}",
        {"arm": arm, "seed": seed},
    )  # fmt: skip
    if context.fabric.is_global_zero:
        head = {"task": name, "arm": arm, "seed": seed, "versions": versions()}
        text = configs.dump(head) + "\n" + configs.to_yaml(config)
        runs.write_text(folder / "config.yaml", text)
    engine.seed_all(seed)  # the same initial weights in every arm whose student is built first
    training = tasks.load(name).build(config, seed, teacher_folder(root, seed), context)
    engine.fit(training, config.run, context)


def make_tasks(experiment: Experiment, root: Path, fabric: Any = None) -> list[workers.Task]:
    e = experiment
    has_teacher = tasks.load(e.task).train_teacher is not None
    found = []
    for seed in range(e.first_seed, e.first_seed + e.seeds):
        teacher = f"teacher {seed}"
        if has_teacher:
            done = teacher_folder(root, seed) / "done.json"
            found.append(workers.Task(teacher, done, 0, train_teacher, (e.task, e.config, seed, root, fabric)))
        for name, arm in e.arms.items():
            config = arm.apply(e.config)
            result = arm_folder(root, name, seed) / "result.json"
            arguments = (e.task, config, name, seed, root, fabric)
            images = config.optim.steps * config.optim.batch_size
            after = teacher if has_teacher else None
            found.append(workers.Task(f"{name} {seed}", result, images, train_arm, arguments, after))
    return found


# ---- the run ---------------------------------------------------------------------------------------------------------


def ranks() -> int:
    """How many ranks torchrun started, in all."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def choose_folder(arguments: argparse.Namespace, default: Path) -> tuple[Path, bool]:
    """(folder, whether it is one to be continued)."""
    found = arguments.resume and (arguments.output or runs.newest_folder(default))
    return (found, True) if found else (arguments.output or runs.free_folder(default), False)


def saved_experiment(design: Design, folder: Path, typed: Experiment, arguments: argparse.Namespace) -> Experiment:
    """The experiment of a folder. What was typed must say the same; but `run.`, arms and seeds are free."""
    path = folder / "config.yaml"
    if not path.exists():
        raise runs.RunError(f"--resume: {folder} holds no run (there is no {path})")
    given = arguments.arms, arguments.seeds, arguments.first_seed, arguments.baseline
    saved = resolve(design, typed.task, None, path, [], *given)
    here, there = configs.flatten(typed.config), configs.flatten(saved.config)
    if missing := ", ".join(here.keys() - saved.typed):
        raise runs.RunError(f"--resume: {path} lacks {missing}: another version wrote it; leave --resume out")
    begun = configs.read_yaml(path)[0].get("versions.torch")
    if begun != str(torch.__version__):
        print(f"warning: {folder} was begun with torch {begun}, this is {torch.__version__}", file=sys.stderr)
    differences = [
        f"{key} is {configs.show(there[key])} there and {configs.show(here[key])} here"
        for key in here
        if key in typed.typed and there[key] != here[key] and not key.startswith("run.")
    ]
    if differences:
        raise runs.RunError(f"--resume: {folder} has another configuration: {'; '.join(differences)}")
    free = {key: here[key] for key in typed.typed if key.startswith("run.")}
    return dataclasses.replace(saved, config=configs.replace(saved.config, free))


def start_folder(folder: Path, experiment: Experiment, resumed: bool) -> None:
    path = folder / "config.yaml"
    if path.exists() and not resumed:
        raise runs.RunError(f"{folder} holds a run already: add --resume to continue it, or give another --output")
    for partial in folder.rglob("*.partial-*"):  # what a killed process was writing
        partial.unlink()
    runs.write_text(path, experiment.to_yaml())
    runs.save_json(folder / "machine.json", report.machine())


def finish(folder: Path, experiment: Experiment) -> str:
    """metrics.json, results.csv, table.txt and figure.png of a folder whose trainings are all done; the text."""
    e, task = experiment, tasks.load(experiment.task)
    metric, seeds = task.PRIMARY, range(e.first_seed, e.first_seed + e.seeds)
    results = [load_result(arm_folder(folder, name, seed), metric) for seed in seeds for name in e.arms]
    teachers = [runs.load_json(path) for s in seeds if (path := teacher_folder(folder, s) / "done.json").exists()]
    summary = report.summarise(results, tuple(e.arms), metric)
    text = report.table(summary, e.labels(), metric, e.baseline) + "\n\n"
    longer = {name: arm.longer for name, arm in e.arms.items()}
    text += report.in_words(summary, e.labels(), metric, e.baseline, e.focus, longer, teachers)
    runs.save_json(folder / "metrics.json", {
        "task": e.task, "recipe": e.recipe, "config": configs.flatten(e.config),
        "arms": {name: dataclasses.asdict(arm) for name, arm in e.arms.items()}, "baseline": e.baseline,
        "machine": runs.load_json(folder / "machine.json"), "teachers": teachers, "summary": summary, "runs": results,
    })  # fmt: skip
    flat = [{k: v for k, v in r.items() if not isinstance(v, (dict, list))} | r["diagnostics"] for r in results]
    runs.save_csv(folder / "results.csv", flat)
    runs.write_text(folder / "table.txt", text + "\n")
    report.draw(folder / "figure.png", summary, results, e.labels(), metric)
    for cache in folder.glob("teacher/seed-*/cache*"):  # large, and made again when needed
        cache.unlink()
    return text


def load_result(folder: Path, metric: tasks.Metric) -> dict[str, Any]:
    result = runs.load_json(folder / "result.json")
    return result | {"curve": [(e["step"], e[f"eval/{metric.key}"]) for e in result["evaluations"]]}


def run(experiment: Experiment, folder: Path, design: Design, *, jobs: int, quiet: bool, resumed: bool) -> str:
    """Train what the folder lacks and report: in worker processes, on this process's accelerator, or as a rank."""
    config, fabric = experiment.config, None
    if ranks() > 1:
        unused = getattr(tasks.load(experiment.task), "UNUSED_PARAMETERS", False)
        fabric = devices.make_fabric(config.run, config.optim, ranks=ranks(), unused_parameters=unused)
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(runs.locked(folder))
            start_folder(folder, experiment, resumed)

        devices.on_first_rank(fabric, begin)
        if fabric is not None:
            quiet = quiet or not fabric.is_global_zero
            workers.perform_here(make_tasks(experiment, folder, fabric), quiet=quiet, insist=True)
        elif jobs and devices.accelerator(config.run) == "cpu":
            workers.perform(make_tasks(experiment, folder), jobs=jobs, quiet=quiet)
        else:
            workers.perform_here(make_tasks(experiment, folder), quiet=quiet)
        return devices.on_first_rank(fabric, lambda: design.finish(folder, experiment))


def of_recipe(task: Any, config: Any, named: bool) -> tasks.Defaults:
    """The bundled recipe compares; a named one is one long training unless it says otherwise."""
    return dataclasses.replace(task.DEFAULTS, arms=("vkd",), seeds=1) if named else task.DEFAULTS


DISTILL = Design("distill", lambda task: task.ARMS, of_recipe, finish)


def command(arguments: argparse.Namespace, design: Design = DISTILL) -> int:
    """What `vkd distill` or another design does with its parsed options; the exit code."""
    a, folder = arguments, None
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        experiment = resolve(design, a.task, a.recipe, a.config, a.values, a.arms, a.seeds, a.first_seed, a.baseline)
        if a.help:
            show_help(a.parser, experiment, design.arms(tasks.load(a.task)))
            return 0
        if a.jobs < 0:
            raise OptionError(f"--jobs: must be at least 0, got {a.jobs}")
        folder, resumed = choose_folder(
            a, Path("runs") / (a.task if design is DISTILL else f"{design.command}-{a.task}")
        )
        if resumed:
            experiment = saved_experiment(design, folder, experiment, a)
        if a.dry_run:
            show_plan(experiment)
            return 0
        if first:
            print(f"{'resuming' if resumed else 'running'} in {folder}", flush=True)
        text = run(experiment, folder, design, jobs=a.jobs, quiet=a.quiet, resumed=resumed)
        if first:
            print(f"{text}\n\nwritten to {folder}: table.txt, results.csv, metrics.json, figure.png")
    except (runs.RunError, OptionError) as error:
        if first:
            print(f"vkd: error: {error}", file=sys.stderr)
        return 2
    except runs.Interrupted as interrupted:
        if first:
            print(f"stopped; to continue: vkd {design.command} {a.task} --resume --output {folder}", file=sys.stderr)
        return interrupted.exit_code
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0
