"""`vkd distill` on a task of seconds: what is typed, what stands above what, what is refused before training."""

import json
import sys

import pytest
import torch
import toy_task

from tests.recipes.toy import TOY, distill, vkd
from vkd_kernels.recipes import config as configs

ONE = ("--arms", "vkd", "--seeds", "1", "optim.steps=2")


def trained(folder, seed=0):
    values = configs.read_yaml(folder / f"vkd/seed-{seed:02d}/config.yaml")
    return values["distill.projection"], values["distill.scale"]


def test_the_command_line_stands_above_an_arms_own_values_and_these_above_files(tmp_path):
    folder = tmp_path / "r"
    assert distill(folder, *ONE, "distill.scale=match", "distill.projection=linear") == 0
    assert trained(folder) == ("linear", "match")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["config"]["distill.scale"] == metrics["arms"]["vkd"]["changes"]["distill.scale"] == "match"
    assert (
        "In every arm: optim.steps=2 distill.scale=match distill.projection=linear"
        in (folder / "table.txt").read_text()
    )
    assert distill(folder, "--resume", "--seeds", 2) == 0  # also of what is trained later
    assert trained(folder, seed=1) == ("linear", "match")
    assert distill(tmp_path / "again", "--config", folder / "config.yaml", "--seeds", 1) == 0
    assert trained(tmp_path / "again") == ("linear", "match")
    (tmp_path / "c.yaml").write_text("distill: {projection: linear, scale: match}\n")
    assert distill(tmp_path / "file", *ONE, "--config", tmp_path / "c.yaml") == 0
    assert trained(tmp_path / "file") == ("orthogonal", "1.0")


def test_a_typed_weight_distills_no_student_of_an_arm_without_distillation(tmp_path):
    words = ("--arms", "alone", "linear", "--seeds", "1", "optim.steps=2")
    assert distill(tmp_path, *words, "distill.weight=2") == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for arm, weight in (("alone", 0.0), ("linear", 2.0)):
        values = configs.read_yaml(tmp_path / arm / "seed-00" / "config.yaml")
        assert float(values["distill.weight"]) == float(metrics["arms"][arm]["changes"]["distill.weight"]) == weight
    said = "In every arm (its own weight of 0 stays): optim.steps=2 distill.weight=2"
    assert said in (tmp_path / "table.txt").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "alone", "vdk"], "--arms: unknown 'vdk'; choose from alone"),
        (["--arms", ","], "arms: "),
        (["--seeds", "0"], "seeds: must be greater than or equal to 1"),
        (["--jobs", "-1"], "--jobs: must be at least 0, got -1"),
        (["--baseline", "linear", "--arms", "vkd"], "--baseline: 'linear' is not one of this run's arms: vkd"),
        (["--recipe", "paper"], "--recipe: unknown 'paper'; there is none"),
        (["--config", "nothing.yaml"], "cannot read nothing.yaml"),
        (["optim.step=3"], "unknown key 'optim.step'; did you mean 'optim.steps'?"),
        (["optim.steps=0"], "optim.steps=0 and optim.epochs=0: exactly one must be above 0"),
        (["optim.ema_start=5", "optim.ema=0"], "optim.ema_start: 5, but there is no average: give optim.ema"),
        (["optim.ema_start=30"], "optim.ema_start: 30, but there are only optim.steps=30; lower it"),
        (["optim.warmup=40"], "optim.warmup: 40, but there are only optim.steps=30; lower it"),
        (["optim.betas=0.9,1"], "optim.betas: must be less than 1"),
        (["teacher.width=101"], "teacher.width: at most 100, got 101"),
        (["optim.precision=8-mixed"], "optim.precision: must be '32-true' or 'bf16-mixed'"),
        (["distill.beta=inf"], "distill.beta: must be"),
        *([] if torch.cuda.is_available() else [(["run.accelerator=cuda"], "run.accelerator: cuda, but PyTorch sees")]),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert vkd("distill", TOY, "--jobs", "0", "--quiet", *words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("seeds: 2.5\n", "seeds: must be a valid integer"),
        ("arms: []\n", "arms: "),
        ("task: detection\n", "is of the task detection"),
        ("optim:\n  lr: 1e-3\n  lr: 0.5\n", "line 3: lr is there twice"),
    ],
)
def test_the_head_of_a_file_is_checked_as_the_command_line_is(head, message, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(head)
    assert distill(tmp_path / "r", "--config", tmp_path / "c.yaml") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "os", "../../x", "detectoin", "os:path", "nowhere.at_all:X", ":", "toy_task"])
def test_unknown_tasks(name, capsys):
    before = set(sys.modules)
    assert vkd("distill", name) == 2
    message = capsys.readouterr().err
    assert message.startswith("vkd: error: TASK: ") and "Traceback" not in message
    assert (name != "detectoin") or "did you mean 'detection'?" in message
    assert name != "os" or before == set(sys.modules)


def test_a_task_of_the_folder_where_one_stands(tmp_path, monkeypatch, capsys):
    """The script `vkd` finds it, though it does not search that folder as `python -m` does."""
    (tmp_path / "task_of_this_folder.py").write_text("from toy_task import Toy\n\n\nclass Mine(Toy):\n    pass\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    monkeypatch.chdir(tmp_path)
    assert vkd("distill", "task_of_this_folder:Mine", "--help") == 0
    assert toy_task.Toy.title in capsys.readouterr().out


def test_help_shows_every_value(capsys):
    assert vkd("distill", TOY, "--help", "optim.lr=0.5") == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in configs.flatten(toy_task.Config()):
        assert f" {name}=" in text
    assert "teacher.width=12 channels; >= 1 [as wide as it needs to be]" in text
    assert "optim.lr=0.5 peak learning rate; > 0 [command line]" in text
    assert "--resume" in text and "student alone, equal time" in text


def test_recipes_files_and_overrides_in_that_order(tmp_path, monkeypatch, capsys):
    (tmp_path / "base.yaml").write_text('seeds: "3"\noptim:\n  lr: 5e-4\n  steps: 100\n')
    (tmp_path / "paper.yaml").write_text("like: base\nstudent: {width: 9}\n")
    (tmp_path / "mine.yaml").write_text("optim: {steps: 50}\n")
    monkeypatch.setattr(toy_task.Toy, "recipes", tmp_path)
    words = ["distill", TOY, "--recipe", "paper", "--config", tmp_path / "mine.yaml", "student.width=4"]
    assert vkd(*words, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "optim.lr=0.0005 peak learning rate; > 0 [recipe paper]" in text and "student.width=4 channels; >= 1" in text
    assert "optim.steps=50 optimizer steps" in text
    (tmp_path / "paper.yaml").write_text("optim: {stepps: 3}\n")
    assert vkd("distill", TOY, "--recipe", "paper") == 2
    assert "recipe paper: unknown key 'optim.stepps'; did you mean 'optim.steps'" in capsys.readouterr().err


def test_ablation_is_every_projection_with_every_normalization(tmp_path):
    assert distill(tmp_path / "a", "--arms", "alone", "ablation", "optim.steps=2") == 0
    summary = json.loads((tmp_path / "a" / "metrics.json").read_text())["summary"]
    assert len(summary) == 1 + 3 * 5 and "identity-l2" in summary
    config = configs.read_yaml(tmp_path / "a" / "linear-whiten" / "seed-01" / "config.yaml")
    assert config["distill.projection"] == "linear" and config["distill.normalization"] == "whiten"
    assert config["distill.scale"] == "1.0"  # the arm vkd's own value
