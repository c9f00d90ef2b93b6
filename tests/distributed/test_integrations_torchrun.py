"""Training stacks under torchrun, two gloo ranks: the step is that of one process which holds every sample."""

import sys

import pytest
import torch
import torch.distributed as dist

from tests.helpers import processes
from tests.helpers.stacks import EXAMPLES, assert_same, needs
from tests.helpers.torchrun_stacks import STACKS

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)
ROOT = EXAMPLES.parent


def torchrun(*command, cwd=ROOT):
    """Two ranks on the CPU; what they print."""
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = processes.run([*ranks, *map(str, command)], seconds=300, cwd=cwd, env=env)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize("stack", STACKS)
def test_torchrun_takes_the_step_of_one_process(stack, tmp_path):
    """Two ranks, two micro-batches of two on each, sentences of any length: the step of one batch of eight."""
    for library in ("lightning",) if stack == "lightning" else ("transformers", "accelerate"):
        needs(library)
    torchrun("-m", "tests.helpers.torchrun_stacks", stack, tmp_path)
    step = torch.load(tmp_path / "step.pt", weights_only=True)
    alone = STACKS[stack](tmp_path, batch_size=8, micro_batches=1)
    assert step.keys() == alone.keys()
    assert_same(step.values(), alone.values(), rtol=1e-4, atol=1e-6)
    assert max(change.abs().max() for change in alone.values()) > 1e-3


def test_torchrun_of_the_ddp_loop_trains_saves_and_resumes(tmp_path):
    """The second run goes on from the first one's checkpoint, and a third on one device from theirs."""
    needs("timm")
    losses = []
    for _ in range(2):
        lines = torchrun(EXAMPLES / "ddp_loop.py", cwd=tmp_path).splitlines()
        assert len(lines) == 3, lines
        losses += [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert losses[5] < losses[3] < losses[0] and losses[3] < 1.1 * losses[2]
    alone = processes.run(
        [sys.executable, str(EXAMPLES / "ddp_loop.py")], seconds=300, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert alone.returncode == 0 and alone.stdout.count("epoch") == 3, alone.stderr[-3000:]


def test_torchrun_of_the_accelerate_loop(tmp_path):
    needs("transformers"), needs("accelerate")
    lines = torchrun(EXAMPLES / "accelerate_loop.py", cwd=tmp_path).splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("epoch")] == [f"epoch {i}" for i in range(4)]
