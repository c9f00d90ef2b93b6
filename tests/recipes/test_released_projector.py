"""`examples/released_projector.py` and `projector_study.py`: tasks of one's own, with the released code's projector."""

import json
import math

import pytest
import torch

import vkd_kernels as vk
from examples.projector_study import ProjectorStudy
from examples.released_projector import ReleasedLoss
from tests.recipes import setups
from vkd_kernels.cli import main
from vkd_kernels.recipes.task import DistillConfig


def test_the_released_projector_collapses_under_weight_decay_and_the_librarys_does_not(tmp_path, capsys):
    command = ["distill", "examples.released_projector:ReleasedProjector", "--arms", "vkd,released", "--seeds", "1"]
    command += ["--jobs", "0", "--quiet", "--output", str(tmp_path / "run"), "optim.steps=3", "teacher.steps=2"]
    assert main(command) == 0
    assert "V_kD, the released projector" in capsys.readouterr().out
    errors = {}
    for arm in ("vkd", "released"):
        result = json.loads((tmp_path / "run" / arm / "seed-00" / "result.json").read_text())
        errors[arm] = result["diagnostics"]["max |PᵀP - I|"]
    assert errors["vkd"] < 1e-5
    assert errors["released"] == 1.0  # a matrix of zeros


@pytest.mark.parametrize(("scale", "number"), [(0.7, 0.7), ("match", 1.5**0.5), ("learned", 1.5**0.5)])
def test_the_released_projector_has_the_options_of_the_librarys_loss(scale, number):
    loss = DistillConfig(scale=scale, beta=0.3, eps=0.1, normalization="batch_norm").feature_loss(4, 6)
    released = ReleasedLoss(loss)
    student, teacher = torch.randn(8, 4), torch.randn(8, 6)
    options = {"scale": number, "beta": 0.3, "eps": 0.1, "normalization": "batch_norm"}
    expected = vk.functional.ortho_proj_loss(student, teacher, released.projection.weight, **options)
    torch.testing.assert_close(released(student, teacher), expected)


def test_arms_that_are_compared_at_equal_pull_differ_in_weight_by_the_scale_of_match():
    config = setups.recipe("examples.projector_study:ProjectorStudy", "fashion-mnist")
    weights = {name: arm.apply(config, {}).distill.weight for name, arm in ProjectorStudy.arms.items()}
    pairs = [
        ("vkd-strong", "vkd-match"),
        ("linear-strong", "vkd-match"),
        ("linear-30", "match-17"),
        ("linear-52", "match-30"),
    ]
    for plain, match in pairs:
        assert math.isclose(weights[plain] / weights[match], math.sqrt(192 / 64))
