"""The `vkd` commands on a task of seconds: what is typed, what stands above what, what is refused before training."""

import importlib.abc
import json
import os
import sys

import pytest
import torch
import toy_task

from tests.recipes.toy import TOY, distill, start, vkd
from vkd_kernels.recipes import compare, runs, tasks
from vkd_kernels.recipes import config as configs

ONE = ("--arms", "vkd", "--seeds", "1", "optim.steps=2")


def trained(folder):
    values, _ = configs.read_yaml(folder / "vkd/seed-00/config.yaml")
    return values["distill.projection"], values["distill.scale"]


def test_the_command_line_stands_above_an_arms_own_values(tmp_path, capsys):
    folder = tmp_path / "r"
    assert distill(folder, *ONE, "distill.scale=match", "distill.projection=linear") == 0
    assert trained(folder) == ("linear", "match")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["config"]["distill.scale"] == metrics["arms"]["vkd"]["changes"]["distill.scale"] == "match"
    printed = capsys.readouterr().out
    assert "stands above the arm vkd's own value" in printed
    assert "V_kD [distill.scale=match distill.projection=linear]" in (folder / "table.txt").read_text()
    assert distill(folder, "--resume", "--seeds", 2) == 0  # also of what is trained later
    values, _ = configs.read_yaml(folder / "vkd/seed-01/config.yaml")
    assert (values["distill.projection"], values["distill.scale"]) == ("linear", "match")
    assert distill(tmp_path / "again", "--config", folder / "config.yaml", "--seeds", 1) == 0
    assert trained(tmp_path / "again") == ("linear", "match")


def test_a_file_stands_below_an_arms_own_values(tmp_path):
    (tmp_path / "c.yaml").write_text("distill: {projection: linear, scale: match}\n")
    assert distill(tmp_path / "r", *ONE, "--config", tmp_path / "c.yaml") == 0
    assert trained(tmp_path / "r") == ("orthogonal", "1")


def test_arms_that_the_command_line_makes_the_same_are_refused(tmp_path, capsys):
    assert distill(tmp_path / "r", "--arms", "linear,vkd", "distill.projection=linear", "distill.scale=1") == 2
    assert "leaves the arms linear and vkd without a difference" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "alone", "vdk"], "--arms: unknown 'vdk'; choose from alone"),
        (["--arms", "alone,alone"], "--arms: the same arm twice"),
        (["--arms", ","], "arms: "),
        (["--seeds", "0"], "seeds: must be greater than or equal to 1"),
        (["--seeds", "2.5"], "seeds: must be a valid integer"),
        (["--first-seed", "-1"], "first_seed: must be greater than or equal to 0"),
        (["--jobs", "-1"], "--jobs: must be at least 0, got -1"),
        (["--baseline", "linear", "--arms", "vkd"], "--baseline: 'linear' is not one of this run's arms: vkd"),
        (["--recipe", "paper"], "--recipe: unknown 'paper'; there is none"),
        (["--config", "nothing.yaml"], "cannot read nothing.yaml"),
        (["optim.step=3"], "unknown key 'optim.step'; did you mean 'optim.steps'?"),
        (["optim.steps=0"], "optim.steps=0 and optim.epochs=0: exactly one must be above 0"),
        (["optim.betas=0.9"], "optim.betas: "),
        (["optim.betas=0.9,1"], "optim.betas: must be at least 0 and below 1"),
        (["optim.min_lr=1"], "optim.min_lr: must be at most optim.lr=0.01"),
        (["teacher.width=101"], "teacher.width: at most 100, got 101"),
        (["optim.precision=8-mixed"], "optim.precision: must be '32-true', 'bf16-mixed' or '16-mixed'"),
        (["optim.precision=16-mixed"], "16-mixed needs a GPU"),
        (["distill.eps=2", "distill.normalization=whiten"], "distill.eps: must be less than 1"),
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
        ("baseline: alon\n", "--baseline: 'alon' is not one of this run's arms"),
        ("seeds: 2.5\n", "seeds: must be a valid integer"),
        ("seeds: true\n", "seeds: must be a valid integer"),
        ("arms: 3\n", "--arms: unknown '3'"),
        ("arms: []\n", "arms: "),
        ("task: detection\n", "is of the task detection"),
        ("optim:\n  lr: 1e-3\n  lr: 0.5\n", "lr is there twice"),
    ],
)
def test_the_head_of_a_file_is_checked_as_the_command_line_is(head, message, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(head)
    assert vkd("distill", TOY, "--config", tmp_path / "c.yaml", "--dry-run") == 2
    assert message in capsys.readouterr().err


def test_numbers_in_a_file_may_be_text(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text('seeds: "3"\narms: vkd\noptim: {lr: "1e-3"}\n')
    assert vkd("distill", TOY, "--config", tmp_path / "c.yaml", "--dry-run") == 0
    assert "seeds: 3" in (text := capsys.readouterr().out) and "lr: 0.001" in text and "arms: [vkd]" in text


@pytest.mark.parametrize("name", ["", "os", "../../x", "detectoin", "os:path", "nowhere.at_all:X", ":", "toy_task"])
def test_unknown_tasks(name, capsys):
    before = set(sys.modules)
    assert vkd("distill", name) == 2
    message = capsys.readouterr().err
    assert message.startswith("vkd: error: TASK: ") and "Traceback" not in message
    assert (name != "detectoin") or "did you mean 'detection'?" in message
    assert name not in {"os"} or before == set(sys.modules)


def test_missing_packages_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.chdir(tmp_path)
    assert vkd("distill", TOY, "--jobs", 0) == 2
    assert "tqdm is missing: pip install 'vkd_kernels[recipes]'" in capsys.readouterr().err


def test_help_shows_every_value(capsys):
    assert vkd("distill", TOY, "--help", "optim.lr=0.5") == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, _ in configs.keys(toy_task.Config):
        assert f" {name}=" in text
    assert "teacher.width=12 channels; >= 1 [as wide as it needs to be]" in text
    assert "optim.lr=0.5 peak learning rate; > 0 [command line]" in text
    assert "--resume" in text and "student alone, equal time" in text


def test_dry_run_prints_configuration_models_and_steps_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert vkd("distill", TOY, "--dry-run", "student.width=7", "--arms", "longer,vkd") == 0
    text = capsys.readouterr().out
    assert "student: {width: 7, dropout: 0.1}" in text and "features: [7, 12]" in text
    assert "steps: 45" in text and "student: 87 parameters" in text
    assert not list(tmp_path.iterdir())


def test_recipes_files_and_overrides_in_that_order(tmp_path, monkeypatch, capsys):
    (tmp_path / "base.yaml").write_text("seeds: 3\noptim:\n  lr: 5e-4  # the paper\n  steps: 100\n")
    (tmp_path / "paper.yaml").write_text("like: base\nstudent: {width: 9}\n")
    (tmp_path / "mine.yaml").write_text("optim: {steps: 50}\n")
    monkeypatch.setattr(toy_task.Toy, "recipes", tmp_path)
    words = ["distill", TOY, "--recipe", "paper", "--config", tmp_path / "mine.yaml", "student.width=4"]
    assert vkd(*words, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "steps: 50" in text and "lr: 0.0005" in text and "width: 4" in text and "arms: [vkd]" in text
    assert "seeds: 3" in text and "baseline: vkd" in text
    assert vkd(*words, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "optim.lr=0.0005 peak learning rate; > 0 [the paper]" in text and "student.width=4 channels; >= 1" in text
    (tmp_path / "paper.yaml").write_text("optim: {stepps: 3}\n")
    assert vkd("distill", TOY, "--recipe", "paper") == 2
    assert "recipe paper: unknown key 'optim.stepps'; did you mean 'optim.steps'" in capsys.readouterr().err


def test_ablate(tmp_path, capsys):
    assert vkd("ablate", TOY, *("--output", tmp_path / "a", "--jobs", 0, "--quiet", "optim.steps=6")) == 0
    text = (tmp_path / "a" / "table.txt").read_text()
    assert text in capsys.readouterr().out + "\n"
    first = text.split("\n\n")[0].splitlines()
    assert first[0].split() == ["test", "error", *compare.NORMALIZATIONS]
    assert [line.split()[0] for line in first[2:]] == list(compare.PROJECTIONS)
    assert "minus orthogonal, layer_norm" in text and "corrected for the 11 comparisons" in text
    assert len(json.loads((tmp_path / "a" / "metrics.json").read_text())["summary"]) == 12
    config, _ = configs.read_yaml(tmp_path / "a" / "linear-whiten" / "seed-01" / "config.yaml")
    assert config["distill.projection"] == "linear" and config["distill.normalization"] == "whiten"


def test_evaluate_measures_the_stored_student_again(finished, tmp_path, capsys):
    assert vkd("evaluate", finished, "--task", TOY, "--output", tmp_path / "numbers.json") == 0
    assert capsys.readouterr().out.count("seed") == 8
    recorded = {(r["arm"], r["seed"]): r["error"] for r in json.loads((finished / "metrics.json").read_text())["runs"]}
    measured = runs.load_json(tmp_path / "numbers.json")["students"]
    assert {(r["arm"], r["seed"]): r["error"] for r in measured} == recorded
    assert vkd("evaluate", finished / "vkd" / "seed-00", "student.width=6", "--task", TOY) == 2
    assert "student.safetensors is of another architecture" in capsys.readouterr().err
    for folder, message in ((tmp_path / "nowhere", "there is no folder"), (tmp_path, "holds no student")):
        assert vkd("evaluate", folder) == 2
        assert message in capsys.readouterr().err


def test_evaluate_imports_only_what_the_command_line_names(finished, capsys, monkeypatch):
    class Refuse(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            assert name != "toy_task", "imported because a file names it"

    monkeypatch.delitem(sys.modules, "toy_task")
    monkeypatch.setattr(sys, "meta_path", [Refuse(), *sys.meta_path])
    assert vkd("evaluate", finished / "vkd" / "seed-00") == 2
    assert f"say --task {TOY} if that module may be imported" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_unicode_gets_its_table(tmp_path, monkeypatch, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    words = ("--arms", "alone,vkd", "--seeds", 2, "optim.steps=2", "--jobs", 0, "--quiet", "--output", tmp_path / "r")
    process = start(("-m", "vkd_kernels.cli", "distill", TOY), *words)
    process.stdout.reconfigure(encoding=encoding)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    assert "table.txt" in printed and (tmp_path / "r" / "figure.png").exists()


def test_the_built_in_tasks_need_no_docstrings():
    """python -OO strips them."""
    for name in tasks.NAMES:
        task = tasks.load(name)
        assert task.title and task.arms and task.baseline in task.arms and set(task.compared) <= set(task.arms)
    process = start(("-OO", "-m", "vkd_kernels.cli", "distill", TOY), "--help")
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "A toy" in printed, errors


def test_a_read_only_place_is_an_error_that_names_it(tmp_path, capsys):
    if os.geteuid() == 0:
        target = "/proc/vkd"  # where root cannot write either
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        target = tmp_path / "locked" / "run"
    assert distill(target, *ONE) == 2
    assert f"vkd: error: cannot write {target}" in capsys.readouterr().err
