"""Running the toy task (tests/helpers/toy_task.py): as a command, as a process, or one arm of it here."""

import json
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import toy_task

from tests.helpers import processes
from vkd_kernels import cli
from vkd_kernels.recipes import compare, engine, jobs, runs
from vkd_kernels.recipes import config as configs

TESTS = Path(__file__).parents[1]
ARMS = ["alone", "longer", "linear", "vkd"]
TOY = "toy_task:Toy"
VKD = ("-m", "vkd_kernels.cli", "distill", TOY)


def vkd(*words):
    return cli.main([str(word) for word in words])


def distill(folder, *words):
    return vkd(*("distill", TOY, "--output", folder, "--jobs", 0, "--quiet"), *words)


def start(command, *words):
    """The command in a process group of its own, as a terminal without Unicode starts it; it ends with its test."""
    environment = {"PYTHONPATH": f"{TESTS}/helpers:{TESTS.parent}", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    return processes.popen([sys.executable, *command, *map(str, words)], env=environment)


def wait_for(process, condition):
    deadline = time.monotonic() + 300
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def outcome(folder):
    """What must come out the same, bit for bit: everything but clocks and the machine."""
    clocks = {"seconds", "cpu_seconds"}
    rows = json.loads((folder / "metrics.json").read_text())["runs"]
    lines = {
        str(path.relative_to(folder)): [
            {k: v for k, v in json.loads(line).items() if k not in clocks} for line in path.read_text().splitlines()
        ]
        for path in folder.rglob("metrics.jsonl")
    }
    weights = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    return [{k: v for k, v in r.items() if k not in clocks} for r in rows], lines, weights


def stopped_before(step):
    """A training that is asked to stop before a step."""
    plain = engine.seed_all

    def seed_all(*numbers):
        if len(numbers) == 3 and numbers[1] == step:  # seed, step, rank
            jobs.interrupt(signal.SIGTERM, None)
        plain(*numbers)

    return mock.patch.object(engine, "seed_all", seed_all)


def train(folder, **values):
    """One arm of the toy task, here; values are keys with __ for the dot."""
    config = configs.replace(toy_task.Config(), {k.replace("__", "."): v for k, v in values.items()})
    for arm in ("teacher", "vkd"):
        if arm != "teacher" or not (folder / "teacher").exists():
            compare.train(task=TOY, config=config, arm=arm, seed=0, root=folder, machine={})
    return runs.load(folder / "vkd" / "seed-00" / "result.json")
