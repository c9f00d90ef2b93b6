"""Training stacks and examples under torchrun, two gloo ranks: the step is that of one process with every sample."""

import importlib.util
import sys

import pytest
import torch
import torch.distributed as dist

from tests.helpers import processes
from tests.helpers.stacks import EXAMPLES, assert_same, example, needs
from tests.helpers.torchrun_stacks import STACKS

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)
LIBRARIES = {  # which a part of tests/helpers/torchrun_stacks.py needs
    "ddp_loop": ["timm"],
    "accelerate_loop": ["transformers", "accelerate"],
    "trainer": ["transformers", "accelerate"],
    "accelerate": ["transformers", "accelerate"],
    "lightning": ["lightning"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two ranks of torchrun wrote, of all parts whose libraries are there."""
    folder = tmp_path_factory.mktemp("torchrun")
    names = [name for name, libraries in LIBRARIES.items() if all(map(importlib.util.find_spec, libraries))]
    if not names:
        pytest.skip("needs timm, or transformers and accelerate, or lightning (the extra integrations)")
    env = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(EXAMPLES.parent),
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*ranks, "-m", "tests.helpers.torchrun_stacks", str(folder), *names]
    result = processes.run(command, seconds=600, env=env)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


def written(folder, name):
    for library in LIBRARIES[name]:
        needs(library)
    return folder / (f"{name}.pt" if name in STACKS else f"{name}.txt")


@pytest.mark.parametrize("stack", STACKS)
def test_torchrun_takes_the_step_of_one_process(folder, stack, tmp_path):
    """Two ranks, two micro-batches of two on each, sentences of any length: the step of one batch of eight."""
    step = torch.load(written(folder, stack), weights_only=True)
    alone = STACKS[stack](tmp_path, batch_size=8, micro_batches=1)
    assert step.keys() == alone.keys()
    assert_same(step.values(), alone.values(), rtol=1e-4, atol=1e-6)
    assert max(change.abs().max() for change in alone.values()) > 1e-3


def losses_of(lines):
    assert len(lines) == 3, lines
    return [float(line.split("loss ")[1].split(",")[0]) for line in lines]


def test_torchrun_of_the_ddp_loop_trains_saves_and_resumes(folder, capsys, monkeypatch):
    """The second run goes on from the first one's checkpoint, and a third on one device from theirs."""
    lines = written(folder, "ddp_loop").read_text().splitlines()
    losses = losses_of(lines[:3]) + losses_of(lines[3:])
    assert losses[5] < losses[3] < losses[0] and losses[3] < 1.1 * losses[2]
    monkeypatch.chdir(folder)
    example("ddp_loop").main()
    losses_of(capsys.readouterr().out.splitlines())


def test_torchrun_of_the_accelerate_loop(folder):
    lines = written(folder, "accelerate_loop").read_text().splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("epoch")] == [f"epoch {i}" for i in range(4)]
