"""The examples of examples/: their classes on other data, and each file as a user starts it."""

import copy
import sys

import pytest
import torch

from tests.helpers import processes
from tests.helpers.stacks import EXAMPLES, assert_same, example, images, needs, orthogonality_error
from tests.modules.test_integrations_huggingface import gradients_of_a_step, trainer_of

NEEDS = {  # the libraries beyond torch that each imports
    "accelerate_loop": ("transformers", "accelerate"),
    "causal_lm": ("transformers", "accelerate"),
    "ddp_loop": ("timm",),
    "huggingface_trainer": ("transformers", "accelerate"),
    "lightning_module": ("lightning", "torchvision"),
    "timm_loop": ("timm",),
}
ARGUMENTS = {"causal_lm": ["--random"]}  # instead of weights that are downloaded


def test_example_timm_loop():
    timm = needs("timm")
    student = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=10)
    teacher = timm.create_model("regnetx_002", num_classes=0)
    before = [p.clone() for p in teacher.state_dict().values()]
    losses = example("timm_loop").train(student, teacher, [images()] * 8, lr=2e-3)
    assert losses[-1] < 0.9 * losses[0]
    assert_same(teacher.state_dict().values(), before, rtol=0, atol=0)


def test_example_causal_lm(tmp_path):
    """Accumulation is one large batch, tied weights are saved, the projections do not decay, and the loss falls."""
    needs("transformers")
    causal_lm = example("causal_lm")
    torch.manual_seed(0)
    student, teacher, data = causal_lm.load(random=True)
    assert causal_lm.layer_map(2, 4) == [(0, 1), (1, 3)] and causal_lm.layer_map(3, 28)[-1] == (2, 27)
    model = causal_lm.Distilled(student, teacher)
    options = {"cls": causal_lm.CausalTrainer, "weight_decay": 0.5, "max_steps": 8}
    whole, parts = (
        gradients_of_a_step(
            tmp_path,
            copy.deepcopy(model),
            data[:8],
            cls=causal_lm.CausalTrainer,
            per_device_train_batch_size=8 // micro_batches,
            gradient_accumulation_steps=micro_batches,
        )[0]
        for micro_batches in (1, 4)
    )
    assert whole.keys() == parts.keys() and sum(name.endswith("unconstrained") for name in whole) >= 1
    assert_same(parts.values(), whole.values(), rtol=1e-3, atol=1e-5)
    saving = {"save_strategy": "steps", "save_steps": 8, "eval_strategy": "steps", "eval_steps": 8}
    trainer = trainer_of(tmp_path, model, data, **options, **saving)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    spared = model.distiller.no_weight_decay()
    assert spared and all(decays[id(p)] == 0 for name, p in model.distiller.named_parameters() if name in spared)
    assert max(orthogonality_error(model.distiller.projection(name)) for name in ("layer0", "layer1")) <= 1e-5
    student.save_pretrained(tmp_path / "student")
    again = type(student).from_pretrained(tmp_path / "student")
    assert_same(again.state_dict().values(), student.state_dict().values(), rtol=0, atol=0)


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_the_example_runs_as_it_is(name, tmp_path):
    for library in NEEDS[name]:
        needs(library)
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    result = processes.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *ARGUMENTS.get(name, [])], seconds=300, cwd=tmp_path, env=env
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "loss" in result.stdout
