"""The vkd command itself: what it says when something is missing, interrupted or no longer read."""

import importlib
import json
import sys

import pytest
import torch

from tests.helpers import processes
from vkd_kernels import cli


def raising(error):
    def command(*arguments):
        raise error

    return command


def test_values_may_stand_anywhere_but_in_the_place_of_an_options_value(monkeypatch):
    from vkd_kernels.recipes import compare

    seen = []
    monkeypatch.setattr(compare, "command", lambda arguments: seen.append(arguments) or 0)
    words = ["optim.lr=1", "classification", "--output", "lr=3", "--resume", "a.b=c", "--arms", "vkd", "lr=3"]
    assert cli.main(["distill", *words, "--quiet", "student.width=4"]) == 0
    assert seen[0].values == ["optim.lr=1", "a.b=c", "lr=3", "student.width=4"]
    assert str(seen[0].output) == "lr=3" and seen[0].arms == ["vkd"] and seen[0].task == "classification"


def test_info(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib, "import_module", raising(ModuleNotFoundError(name="timm")))
    assert cli.main(["distill", "classification"]) == 2
    assert capsys.readouterr().err == "vkd: error: timm is missing: pip install 'vkd_kernels[recipes]'\n"


def test_a_package_that_is_missed_later_is_named(monkeypatch, capsys):
    monkeypatch.setattr(cli, "show_info", raising(ModuleNotFoundError(name="pycocotools.coco")))
    assert cli.main(["info"]) == 2
    assert "pycocotools.coco is missing: pip install 'vkd_kernels[detection]'" in capsys.readouterr().err
    monkeypatch.setattr(cli, "show_info", raising(ModuleNotFoundError(name="vkd_kernels.renamed")))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["info"])


def test_ctrl_c(monkeypatch, capsys):
    monkeypatch.setattr(cli, "show_info", raising(KeyboardInterrupt()))
    assert cli.main(["info"]) == 130
    assert "--resume continues" in capsys.readouterr().err


def test_output_that_nobody_reads():
    process = processes.popen([sys.executable, "-u", "-m", "vkd_kernels.cli", "info"])
    process.stdout.close()  # as `| head` does
    assert process.wait(timeout=300) == 1
    assert process.stderr.read() == ""
