"""The examples of examples/: their classes on other data, and each file as a user starts it."""

import sys

import pytest

from tests.helpers import processes
from tests.helpers.stacks import EXAMPLES, assert_same, example, images, needs

NEEDS = {  # the libraries beyond torch that each imports
    "accelerate_loop": ("transformers", "accelerate"),
    "ddp_loop": ("timm",),
    "huggingface_trainer": ("transformers", "accelerate"),
    "lightning_module": ("lightning", "torchvision"),
    "timm_loop": ("timm",),
}


def test_example_timm_loop():
    timm = needs("timm")
    student = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=10)
    teacher = timm.create_model("regnetx_002", num_classes=0)
    before = [p.clone() for p in teacher.state_dict().values()]
    losses = example("timm_loop").train(student, teacher, [images()] * 8, lr=2e-3)
    assert losses[-1] < 0.9 * losses[0]
    assert_same(teacher.state_dict().values(), before, rtol=0, atol=0)


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_the_example_runs_as_it_is(name, tmp_path):
    for library in NEEDS[name]:
        needs(library)
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    result = processes.run([sys.executable, str(EXAMPLES / f"{name}.py")], seconds=300, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "loss" in result.stdout
