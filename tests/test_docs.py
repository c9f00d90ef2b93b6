"""The docs hold: docstring examples run, README's training code runs, every public name has its page."""

import ast
import doctest
import importlib
import json
import re
from pathlib import Path

import pytest
import torch

import vkd_kernels as vk

ROOT = Path(__file__).parents[1]
MODULES = [
    "loss", "projection", "pairs", "distiller", "diagnostics", "ops.cayley.api", "ops.normalization.api",
    "ops.ortho_proj_loss.api", "_info", "images", "store.reader", "store.samples",
]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    failed, tried = doctest.testmod(importlib.import_module(f"vkd_kernels.{name}"))
    assert failed == 0 and tried > 0


def test_every_public_name_has_an_example():
    for module in (vk, vk.functional, vk.diagnostics):
        for name in set(module.__all__) - {"__version__", "functional", "diagnostics"}:
            assert ">>>" in getattr(module, name).__doc__, name


def test_readmes_training_code():
    class Student(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Linear(8, 192), torch.nn.Linear(192, 10)

        def forward_features(self, images):
            return self.embed(images.flatten(2)[:, :, :8])

        def forward_head(self, tokens):
            return self.head(tokens.mean(1))

    class Teacher(torch.nn.Module):
        def forward_features(self, images):
            return images.mean(1, keepdim=True).repeat(1, 3024, 1, 1)

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    student = Student()
    before = student.embed.weight.detach().clone()
    loader = [(torch.randn(2, 3, 4, 4), torch.tensor([1, 2]))] * 2
    names = {"student": student, "teacher": Teacher(), "loader": loader}
    exec(code, {**names, "cross_entropy": torch.nn.functional.cross_entropy})
    assert not torch.equal(student.embed.weight, before)


def test_code_of_the_integrations_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    stored, metrics = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "integrations.md").read_text(), re.DOTALL)
    student = torch.nn.Sequential()
    student.add_module("norm", torch.nn.LayerNorm(192))
    names = {**vars(vk), "nn": torch.nn, "json": json, "student": student, "step": 200}
    names |= {"images": torch.randn(4, 7, 192), "stored_features": torch.randn(4, 3024)}
    exec(stored, names)
    assert names["losses"]["total"] > 0
    teacher = torch.nn.Linear(192, 3024)
    pair = {"student": "norm", "student_pool": "class_token", "teacher": "", "teacher_pool": "class_token"}
    names["distiller"] = vk.FeatureDistiller(student, teacher, [pair], example_input=names["images"])
    for step in (200, 201):
        exec(metrics, {**names, "step": step})
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["diagnostics/norm->/orthogonality_error"] <= 1e-5


def test_every_public_name_is_in_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text()
    names = [*vk.__all__, *(f"functional.{n}" for n in vk.functional.__all__)]
    names += [f"diagnostics.{n}" for n in vk.diagnostics.__all__]
    for name in set(names) - {"__version__", "functional", "diagnostics", "cayley"}:
        assert f"::: vkd_kernels.{name}\n" in page, name


@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_every_test_and_file_that_a_page_names_exists(page):
    """A cell of the table in integrations.md is a test: one that was renamed or removed shows here."""
    defined = {
        node.name
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    text = (ROOT / "docs" / page).read_text()
    named = set(re.findall(r"`((?:test|ddp|fsdp)_\w+)`", text))
    assert named <= defined, f"no test of the name: {sorted(named - defined)}"
    files = re.findall(r"`((?:tests|examples|csrc|benchmarks|vkd_kernels)/[\w/]+\.\w+)`", text)
    assert not [name for name in files if not (ROOT / name).exists()]
    if page == "integrations.md":
        assert len(named) > 50


def test_every_row_of_the_integrations_page_names_a_test():
    tables = (ROOT / "docs" / "integrations.md").read_text().split("## Where to tap")[0]
    header = ""
    for line in tables.splitlines():
        if not line.startswith("|"):
            header = ""
        elif not header:
            header = line
        elif not line.startswith("|--") and "it divides by" not in header:
            cell = line.split("|")[2].strip()
            assert re.search(r"`(test|ddp|fsdp)_\w+`|`tests/[\w/]+\.py`|^in the |^above", cell), f"no test: {line}"
