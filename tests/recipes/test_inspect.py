"""`vkd inspect`: what it reads, what it writes, what it says of folders without metrics."""

import json
import math
import subprocess
import sys

import pytest
import torch

from tests.helpers.distillers import IMAGES, TOKENS_TO_MAP, make
from vkd_kernels import cli
from vkd_kernels.recipes import inspect
from vkd_kernels.recipes.runs import RunError


def write(folder, records, end=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + end)


def cells(text):
    """The table's rows, by metric and arm."""
    rows = [line.split() for line in text.splitlines()[2:]]
    rows = rows[: rows.index([])]
    return {tuple(row[:-4]): tuple(row[-4:]) for row in rows}


def size_of(png):
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_first_last_and_best_of_a_run_that_goes_on(tmp_path):
    """A half-written last line, a step logged twice, a value that is no number, one that is NaN."""
    records = [
        {"step": 0, "epoch": 0.0, "train/loss": 3.0, "eval/accuracy": 10.0, "note": "start", "done": False},
        {"step": 10, "epoch": 0.5, "train/loss": 9.0},
        {"step": 10, "epoch": 0.5, "train/loss": 1.0, "eval/accuracy": 30.0},
        {"step": 20, "epoch": 1.0, "train/loss": math.nan},
        {"step": 30, "epoch": 1.5, "train/loss": 2.0, "eval/accuracy": 20.0},
    ]
    write(tmp_path, records, end='{"step": 40, "train/l')
    for run in (tmp_path, tmp_path / "metrics.jsonl"):
        figure = inspect.inspect(run)
        assert figure == tmp_path / "inspect.png" and min(size_of(figure)) > 200
        text = figure.with_suffix(".txt").read_text()
        assert cells(text) == {("train/loss",): ("3", "2", "1", "10"), ("eval/accuracy",): ("10", "20", "30", "10")}


def test_arms_and_seeds_of_a_comparison(tmp_path):
    for arm, shift in (("alone", 0), ("vkd", 10)):
        for seed in range(2):
            records = [{"step": s, "eval/accuracy": shift + seed + s, "train/loss": 9.0 - s} for s in (1, 2 + seed)]
            write(tmp_path / arm / f"seed-{seed:02d}", records)
    write(tmp_path / "vkd" / "seed-02", [], end='{"st')  # one that has just begun
    text = inspect.inspect(tmp_path).with_suffix(".txt").read_text()
    found = cells(text)
    assert found["eval/accuracy", "alone"] == ("1.5", "3", "3", "2-3")  # means over the seeds
    assert found["eval/accuracy", "vkd"] == ("11.5", "13", "13", "2-3")
    assert found["train/loss", "vkd"] == ("8", "6.5", "6.5", "2-3") and "means over 2 runs" in text


@pytest.mark.parametrize(
    ("name", "panel", "line"),
    [
        ("train/loss", "train/loss", ""),
        ("train/loss/norm->layer4", "train/loss", "norm->layer4"),
        ("loss/a/b", "loss", "a/b"),
        ("diagnostics/norm->layer4/cka", "diagnostics/cka", "norm->layer4"),
        ("diagnostics/a/b/effective_rank_student", "diagnostics/effective_rank", "a/b student"),
        ("diagnostics/cka", "diagnostics/cka", ""),
        ("eval/accuracy", "eval/accuracy", ""),
        ("gloss/x", "gloss/x", ""),
        ("lr", "lr", ""),
    ],
)
def test_panels(name, panel, line):
    assert inspect.place(name) == (panel, line)


def test_panels_are_ordered_and_hold_every_metric():
    names = ["lr", "eval/fid", "diagnostics/a/cka", "diagnostics/b/cka", "train/loss/a", "train/loss", "seconds"]
    found = inspect.panels({"": [{name: {0: 1.0} for name in names}]})
    assert list(found) == ["train/loss", "eval/fid", "diagnostics/cka", "lr", "seconds"]
    assert sorted(name for lines in found.values() for name in lines.values()) == sorted(names)
    assert found["train/loss"] == {"": "train/loss", "a": "train/loss/a"}


def test_the_loop_of_a_user(tmp_path):
    """What docs/integrations.md says to write: every metric of FeatureDistiller has its place in the figure."""
    distiller = make([{**TOKENS_TO_MAP, "name": "x"}], logit_weight=1.0)
    optimizer = torch.optim.AdamW(distiller.parameter_groups(weight_decay=0.05), lr=1e-2)
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(3):
            _, losses, metrics = distiller(IMAGES, metrics=True)
            optimizer.zero_grad()
            losses["total"].backward()
            optimizer.step()
            file.write(json.dumps({"step": step, **{name: value.item() for name, value in metrics.items()}}) + "\n")
    found = inspect.load(tmp_path)
    assert set(inspect.panels(found)) == {
        "loss",
        "diagnostics/cka",
        "diagnostics/effective_rank",
        "diagnostics/orthogonality_error",
    }
    assert set(found[""][0]) == set(metrics)
    assert len(cells(inspect.inspect(tmp_path).with_suffix(".txt").read_text())) == len(metrics)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no metrics.jsonl in "),
        ("", "no metrics in .*metrics.jsonl; they are lines like {"),
        ('{"step": 1, "note": "x"}\n', "no metrics in "),
        ('{"loss": 1}\n{"step": 1, "loss": 1}\n', 'line 1: must be like .*; got {"loss": 1}'),
        ('[1]\n{"step": 1, "loss": 1}\n', r"line 1: must be like .*; got \[1\]"),
        ('{"step": NaN, "loss": 1}\n{"step": 1, "loss": 1}\n', "line 1: must be like .*NaN"),
        ('x\n{"step": 1, "loss": 1}\n', "line 1: must be like"),
        (b"\xff\xfe\n", "cannot read .*metrics.jsonl: 'utf-8' codec"),
    ],
)
def test_errors(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError, match=message):
        inspect.inspect(tmp_path)
    assert not (tmp_path / "inspect.png").exists()


def test_as_a_command(tmp_path):
    write(tmp_path / "run", [{"step": i, "train/loss": 1.0 / (i + 1)} for i in range(5)])

    def vkd(*arguments):
        command = [sys.executable, "-m", "vkd_kernels.cli", "inspect", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    result = vkd(tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "train/loss" in result.stdout and str(tmp_path / "run" / "inspect.png") in result.stdout
    result = vkd(tmp_path / "nothing")
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("vkd: error: there is no metrics.jsonl in") and "does not exist" in result.stderr


def test_as_a_command_what_is_wrong(tmp_path, monkeypatch, capsys):
    write(tmp_path, [{"step": 1, "train/loss": 1.0}])
    with pytest.raises(SystemExit) as stop:
        cli.main(["inspect", str(tmp_path), "steps=3"])
    assert stop.value.code == 2 and "unrecognized arguments: steps=3" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("vkd: error: matplotlib.figure is missing: pip install")
