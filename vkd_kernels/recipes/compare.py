"""`vkd distill TASK`: every arm on every seed, after that seed's teacher; then a table and a figure."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from . import config as configs
from . import engine, jobs, report, runs, tasks
from .config import OptionError, Section, Words, option
from .runs import RunError
from .task import Arm, Context, Normalization, Projection, Task, check_ranks, rank, ranks

TEACHER, ABLATION = "teacher", "ablation"
MACHINES = "machines.json"  # of a training, beside its config.yaml
FILES = "files.json"  # of a run: what its files of weights held
EXTENDED = ("arms", "seeds", "baseline", "overrides")  # what --resume may change, beside the section run


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
        return self.config if arm == TEACHER else self.arms[arm].apply(self.config, self.typed)

    def files(self, known: Mapping[str, str]) -> dict[str, str]:
        """{path: SHA-256} of the files of weights that options name; of `known` ones it is not computed again."""
        named = {
            value
            for config in (self.config, *map(self.config_of, self.arms))
            for key, value in configs.flatten(config).items()
            if key.endswith("weights") and isinstance(value, str) and Path(value).is_file()
        }
        return {path: known.get(path) or runs.sha256(Path(path)) for path in sorted(named)}

    def check(self) -> None:
        """All that can be known to be wrong before anything is trained."""
        arms, baseline = self.head.arms, self.head.baseline
        if baseline not in arms:
            raise OptionError(f"--baseline: {baseline!r} is not one of this run's arms: {', '.join(arms)}")
        engine.device_of(self.config.run)
        for name in ("scipy", "matplotlib"):  # the table and the figure need them
            importlib.import_module(name)
        for name in arms:
            self.task.check(self.config_of(name))


def arms_of(task: type[Task]) -> dict[str, Arm]:
    """A task's own arms, and every projection with every normalization: its arm "vkd" but for these two."""
    base = task.arms["vkd"].changes if "vkd" in task.arms else {}
    return {**task.arms} | {
        f"{p}-{n}": Arm(f"{p}, {n}", {**base, "distill.projection": p, "distill.normalization": n})
        for p in get_args(Projection)
        for n in get_args(Normalization)
    }


# ---- the command line ------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s TASK [section.key=value ...] [options]"
    parser.add_argument("-h", "--help", action="store_true", help="this, and every value of the task's configuration")
    parser.add_argument("task", metavar="TASK", help=f"{', '.join(tasks.NAMES)}, or your own: package.module:Class")
    parser.add_argument("--recipe", metavar="NAME", help="a named configuration of the task (default: the bundled one)")
    parser.add_argument(
        "--config", type=Path, metavar="FILE.yaml", help="values from a file, such as a run's config.yaml"
    )
    about = (
        f"arms to train, as a b or a,b; {ABLATION}: every projection with every normalization (default: the recipe's)"
    )
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=about)
    parser.add_argument("--seeds", type=int, metavar="N", help="how many seeds (default: the recipe's)")
    parser.add_argument("--first-seed", type=int, metavar="K", help="number of the first seed (default: 0)")
    parser.add_argument("--baseline", metavar="ARM", help="arm that the table compares with (default: the recipe's)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="run folder (default: runs/TASK)")
    parser.add_argument("--resume", action="store_true", help="continue, or extend, the run in --output")
    about = "on a CPU, worker processes of one thread each; 0: train in this process (default: %(default)s)"
    parser.add_argument("--jobs", type=int, metavar="N", default=report.cores(), help=about)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def asked(a: argparse.Namespace, folder: Path) -> Experiment:
    """The experiment of a command line: a recipe, or with --resume that of the folder; then --config; then the rest."""
    task = tasks.load(a.task)
    typed = dict(text.split("=", 1) for text in a.values)
    head = {name: value for name, value in vars(a).items() if name in Head.model_fields and value is not None}
    if a.arms is not None:
        ablation = [name for name in arms_of(task) if name not in task.arms]
        words = [word for text in a.arms for word in text.split(",") if word]
        head["arms"] = [name for word in words for name in (ablation if word == ABLATION else [word])]
    files = [(str(a.config), configs.read_yaml(a.config))] if a.config else []
    if not a.resume:
        if a.recipe:
            files.insert(0, (f"recipe {a.recipe}", {"arms": "vkd", "seeds": 1, **tasks.read_recipe(task, a.recipe)}))
        return resolve(a.task, files, head, typed)

    path = folder / "config.yaml"
    if not runs.is_run(folder):
        raise RunError(f"--resume: {folder} holds no run (there is no {path}, or no {runs.MACHINE} beside it)")
    files.insert(0, (str(path), configs.read_yaml(path)))
    saved = resolve(a.task, files[:1], {}, {})
    head["arms"] = [*saved.head.arms, *head.get("arms", ())]
    new = resolve(a.task, files, head, typed)
    if new.head.seeds < saved.head.seeds:
        given = "--seeds" if a.seeds is not None else f"seeds of {a.config}"
        raise OptionError(
            f"{given}: {folder} has {saved.head.seeds} seeds already, got {new.head.seeds}; leave it out, or "
            "choose another --output"
        )
    before, now = ({**configs.flatten(e.head), **configs.flatten(e.config)} for e in (saved, new))
    if listed := differences(before, now):
        raise RunError(
            f"--resume: {folder} has another configuration: {listed}. Leave these out, or choose another --output"
        )
    for arm in new.arms:
        for path in sorted((folder / arm).glob("seed-*/config.yaml")):
            trained = configs.replace(new.task.Config(), configs.read_yaml(path))
            if listed := differences(configs.flatten(trained), configs.flatten(new.config_of(arm))):
                raise RunError(
                    f"--resume: the arm {arm} is another one than in {path}: {listed}. Give it its former values or "
                    "another name, or choose another --output"
                )
    known = files_of(folder)
    for name, digest in new.files({}).items():
        if known.get(name, digest) != digest:
            raise RunError(
                f"--resume: {name} is no longer the file with which {folder} was begun: its SHA-256 begins with "
                f"{digest[:16]}, not {known[name][:16]}. Put that file back, or choose another --output"
            )
    extended = resolve(a.task, files, head, {key: value for key, value in typed.items() if key.startswith("run.")})
    for arm in new.arms:
        if listed := differences(configs.flatten(extended.config_of(arm)), configs.flatten(new.config_of(arm))):
            raise RunError(f"--resume: in the arm {arm} {listed}. Leave it out, or choose another --output")
    return extended


def files_of(folder: Path) -> dict[str, str]:
    """What the files of weights held when they were first used; none: the run is of an earlier version."""
    return runs.load(folder / FILES) if (folder / FILES).exists() else {}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Those that change what is trained."""
    return "; ".join(
        f"{key} is {configs.show(before[key])} there and {configs.show(value)} here"
        for key, value in now.items()
        if value != before[key] and key not in EXTENDED and not key.startswith("run.")
    )


def resolve(
    name: str, files: Sequence[tuple[str, Mapping[str, Any]]], head: Mapping[str, Any], typed: Mapping[str, Any]
) -> Experiment:
    """The options' defaults, then files, then the arms' own values, then the command line's: `head` and `typed`."""
    task = tasks.load(name)
    known = configs.flatten(task.Config())
    values: dict[str, Any] = {"task": name, "arms": task.compared, "seeds": task.seeds}
    origins: dict[str, str] = {}
    for where, written in files:
        for key in written:
            if key not in known and key not in Head.model_fields:
                raise OptionError(f"{where}: unknown key {key!r}{configs.nearest(key, known)}")
        if written.get("task", name) != name:
            raise OptionError(f"{where} is of the task {written['task']}, not {name}")
        values |= written
        origins |= dict.fromkeys(written, where)
    overrides = configs.replace(Head(), {"overrides": values.pop("overrides", ())}).overrides
    typed = {**dict(text.split("=", 1) for text in overrides if "=" in text), **typed}
    values |= {**typed, **head, "overrides": [f"{key}={value}" for key, value in typed.items()]}
    checked = configs.replace(Head(), {key: values.pop(key) for key in Head.model_fields if key in values})
    for arm in checked.arms:
        if arm not in arms_of(task):
            raise OptionError(f"--arms: unknown {arm!r}; choose from {', '.join([*task.arms, ABLATION])}")
    arms = tuple(dict.fromkeys(checked.arms))
    baseline = checked.baseline or (task.baseline if task.baseline in arms else arms[0])
    return Experiment(
        task=task,
        head=configs.replace(checked, {"arms": arms, "baseline": baseline}),
        config=configs.replace(task.Config(), values),
        typed=typed,
        origins=origins | dict.fromkeys(typed, "command line"),
    )


def command(a: argparse.Namespace) -> int:
    """What `vkd distill` does with its parsed options; the exit code."""
    first, training = True, False
    folder = a.output or Path("runs") / a.task.replace(":", ".")
    try:
        check_ranks()
        first = rank() == 0
        if a.jobs < 0:
            raise OptionError(f"--jobs: must be at least 0, got {a.jobs}")
        experiment = asked(a, folder)
        if a.help:
            a.parser.print_help()
            print(help_text(experiment))
            return 0
        if first and not a.resume and runs.is_run(folder):
            raise RunError(f"{folder} holds a run already: add --resume to continue it, or give another --output")
        experiment.check()
        if first:
            print(f"{'resuming' if a.resume else 'running'} in {folder}", flush=True)
        training = True
        text = run(experiment, folder, processes=a.jobs, quiet=a.quiet or not first)
        if first:
            print(f"{text}\n\nwritten to {folder}: table.txt, metrics.json, figure.png")
    except RunError as error:
        if training and ranks() > 1:  # of this rank's images, or losses: the others may know nothing of it
            print(f"vkd: error: rank {rank()}: {error}", file=sys.stderr, flush=True)
        elif first:
            print(f"vkd: error: {error}", file=sys.stderr)
        return 2
    except jobs.Interrupted as interrupted:
        if first:
            command = shlex.join(["vkd", "distill", a.task, "--resume", "--output", str(folder)])
            print(f"stopped; to continue: {command}", file=sys.stderr)
        return interrupted.exit_code
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def help_text(e: Experiment) -> str:
    """What `--help` says of a task: its recipes, its arms and every value of its configuration."""
    lines = [f"\n{e.task.title}\n\nrecipes: {', '.join(tasks.recipes(e.task)) or 'only the bundled one'}\n\narms:"]
    lines += [f"    {name:20}{arm.label}" for name, arm in e.task.arms.items()]
    lines += [f"\nconfiguration of {e.head.task} (of another task: `vkd distill TASK --help`):"]
    lines += ["`section.key=value`, what it means [where the value comes from]"]
    return "\n".join([*lines, configs.help_text(e.config, e.origins)])


# ---- trainings -------------------------------------------------------------------------------------------------------


def train(
    *, task: str, config: Any, arm: str, seed: int, root: Path, machine: dict[str, Any], quiet: bool = True
) -> None:
    """One arm's training of a seed; or, for the arm "teacher", that of the seed's teacher."""
    kind, (folder, teacher) = tasks.load(task), (root / name / f"seed-{seed:02d}" for name in (arm, TEACHER))
    fabric = engine.make_fabric(config.run, config.optim, unused_parameters=kind.unused_parameters)
    engine.seed_all(seed)
    training = kind(config, Context(fabric=fabric, folder=folder, seed=seed, teacher=teacher, quiet=quiet))
    if fabric.is_global_zero and machine not in (before := machines_of(folder)):
        runs.save_json(folder / MACHINES, {"machines": [*before, machine]})
    if arm == TEACHER:
        numbers = training.train_teacher()
        if fabric.is_global_zero:
            runs.save_json(folder / "done.json", {"seed": seed, **numbers})
        fabric.barrier()
        return
    if fabric.is_global_zero:
        runs.write_text(folder / "config.yaml", configs.to_yaml(config))
    engine.train(training)


def machines_of(folder: Path) -> list[dict[str, Any]]:
    """Those on which a training was begun and went on; none: it has not been begun, or by an earlier version."""
    return runs.load(folder / MACHINES)["machines"] if (folder / MACHINES).exists() else []


def stages(e: Experiment, root: Path, machine: dict[str, Any]) -> tuple[list[jobs.Job], list[jobs.Job]]:
    """The trainings that the folder lacks: those of teachers, where an arm needs one, then those of students."""
    teachers, students = list[jobs.Job](), list[jobs.Job]()
    needed = any(e.task.needs_teacher(e.config_of(arm)) for arm in e.arms)
    for seed in e.seeds:
        for arm in (*[TEACHER] * needed, *e.arms):
            stage, result = (teachers, "done.json") if arm == TEACHER else (students, "result.json")
            if not (root / arm / f"seed-{seed:02d}" / result).exists():
                options = {"task": e.head.task, "config": e.config_of(arm), "arm": arm, "seed": seed}
                stage.append(partial(train, **options, root=root, machine=machine))
    return teachers, students


def run(e: Experiment, folder: Path, *, processes: int, quiet: bool) -> str:
    """Train what the folder lacks and report: in worker processes, on this process's accelerator, or as a rank."""
    first = rank() == 0
    machine = report.machine() if first else {}
    with runs.own_folder(folder) if first else contextlib.nullcontext():
        if first:
            if not (folder / runs.MACHINE).exists():
                runs.save_json(folder / runs.MACHINE, machine)
            runs.write_text(folder / "config.yaml", configs.to_yaml(e.head, e.config))
            if used := files_of(folder) | e.files(files_of(folder)):
                runs.save_json(folder / FILES, used)
        if ranks() > 1 or engine.device_of(e.config.run) != "cpu":
            processes = 0
        jobs.perform(stages(e, folder, machine), processes=processes, quiet=quiet)
        return finish(folder, e) if first else ""


def finish(folder: Path, e: Experiment) -> str:
    """metrics.json, table.txt and figure.png of a folder whose trainings are all done; the text."""
    metric, baseline = e.task.metric, e.head.baseline
    seeds = [f"seed-{seed:02d}" for seed in e.seeds]
    results = [runs.load(folder / name / seed / "result.json") for seed in seeds for name in e.arms]
    taught = [path.parent for seed in seeds if (path := folder / TEACHER / seed / "done.json").exists()]
    trained = [*taught, *(folder / name / seed for seed in seeds for name in e.arms)]
    begun, machines = runs.load(folder / runs.MACHINE), list[dict[str, Any]]()
    for machine in (m for path in trained for m in machines_of(path) or [begun]):
        machines += [machine] if machine not in machines else []
    summary = report.summarize(results, {name: arm.label for name, arm in e.arms.items()}, metric, baseline)
    text = report.table(summary, metric, baseline)
    if e.typed:
        own_weights = any(arm.values(e.typed)[key] != e.typed[key] for arm in e.arms.values() for key in e.typed)
        text += f"\nIn every arm{' (its own weight of 0 stays)' * own_weights}: {' '.join(e.head.overrides)}"
    if len(machines) > 1:
        text += f"\nTrained on {len(machines)} machines, versions of the code or numbers of ranks: see metrics.json."
    metrics = {
        **e.head.model_dump(),
        "config": configs.flatten(e.config),
        "arms": {n: dataclasses.asdict(arm) | {"changes": arm.values(e.typed)} for n, arm in e.arms.items()},
        "machine": machines[0],
        **({"machines": machines} if len(machines) > 1 else {}),
        **({"files": used} if (used := files_of(folder)) else {}),
        "teachers": [runs.load(path / "done.json") for path in taught],
        "summary": summary,
        "runs": results,
    }
    runs.save_json(folder / "metrics.json", metrics)
    runs.write_text(folder / "table.txt", text + "\n")
    report.draw(folder / "figure.png", summary, metric)
    for cache in folder.glob("teacher/seed-*/answers*"):  # large, and made again when needed
        shutil.rmtree(cache) if cache.is_dir() else cache.unlink()
    return text
