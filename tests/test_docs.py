"""The docs hold: code and commands of README and of every page run, links lead somewhere, every name has its place."""

import ast
import doctest
import importlib.util
import json
import os
import re
import runpy
import shlex
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import vkd_kernels as vk
from tests.helpers import processes
from tools import evidence

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "vkd_kernels").rglob("*.py"))
    if ">>>" in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert failed == 0 and tried > 0


def test_every_public_name_has_an_example():
    for module in (vk, vk.functional, vk.diagnostics):
        for name in set(module.__all__) - {"__version__", "functional", "diagnostics"}:
            assert ">>>" in getattr(module, name).__doc__, name


class Student(torch.nn.Module):
    """In the manner of a ViT: a class token and eight tokens of 192 channels, from a module called norm."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(16, 192), nn.LayerNorm(192), nn.Linear(192, 10)

    def forward(self, images):  # (N, 3, 12, 12)
        return self.head(self.norm(self.embed(images.reshape(len(images), 27, 16)))[:, 0])


class Teacher(torch.nn.Module):
    """In the manner of a ResNet: a map of 256 channels from a module called layer4."""

    def __init__(self):
        super().__init__()
        self.layer4, self.fc = nn.Conv2d(3, 256, 3), nn.Linear(256, 10)

    def forward(self, images):
        return self.fc(self.layer4(images).mean((2, 3)))


def run_readmes_code(rank, folder):
    """README's training code on this rank's images; the student's weights before and after, and the projection's."""
    torch.manual_seed(0)
    student, teacher = Student(), Teacher()
    before = student.embed.weight.detach().clone()
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(8, 3, 12, 12, generator=generator)
    names = {"student": student, "teacher": teacher, "images": images, "loader": [(images, torch.arange(8))] * 3}
    (code,) = snippets(ROOT / "README.md")
    os.chdir(folder)
    exec(code, names)
    after, projection = student.embed.weight.detach().clone(), names["distiller"].projection("norm->layer4").detach()
    torch.save({"before": before, "after": after, "projection": projection}, f"rank{rank}.pt")


def test_readmes_training_code_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_readmes_code(0, tmp_path)
    result = torch.load("rank0.pt")
    assert not torch.equal(result["before"], result["after"])
    assert (tmp_path / "student.pt").exists()


@pytest.mark.slow
def test_readmes_training_code_keeps_two_ranks_together(tmp_path):
    """Ranks with other images end with the same student and the same projection: the gradients of both were reduced."""
    processes.run_ranks(run_readmes_code, tmp_path, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert not torch.equal(ranks[0]["before"], ranks[0]["after"])
    for name in ("after", "projection"):
        torch.testing.assert_close(ranks[0][name], ranks[1][name], rtol=0, atol=0)


def snippets(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


STANDALONE = ["index", "getting_started", "choosing", "distiller", "cayley", "foundation_models"]


@pytest.mark.slow
@pytest.mark.parametrize("page", STANDALONE)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in snippets(ROOT / "docs" / f"{page}.md"):
        exec(compile(code, f"{page}.md", "exec"), names)
    if page == "getting_started":
        losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines() if re.match(r"\d+ ", line)]
        assert len(losses) == 5 and losses[-1] < 0.8 * losses[0], "the page says that the feature loss falls"
        assert (tmp_path / "student.pt").exists()
    if page == "foundation_models":
        assert names["after"] > names["before"] + 0.3, "the page says that the student learns from the teacher alone"
        assert names["hits"] > 0.4 and (tmp_path / "stand_in.pt").exists()


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    pytest.importorskip("sklearn")
    notebook = json.loads((ROOT / "examples" / "first_student.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = {}
    for index, code in enumerate(cells):
        exec(compile(code, f"cell {index}", "exec"), names)
    assert names["accuracy"]["distilled"] > names["accuracy"]["alone"]


def commands():
    """Every line of a block without a language that begins like a command; continued lines are joined."""
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"(PYTHONPATH=\. )?(make|python|pip|vkd|torchrun) ", line):
                    words = shlex.split(line.removeprefix("PYTHONPATH=. "), comments=True)
                    yield pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}")


CHECKED_ELSEWHERE = {"vkd": "tests/recipes", "torchrun": "tests/recipes", "pip": "tests/test_build.py"}


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_of_a_page_is_one(words):
    """make's targets exist, modules run, pip installs what there is; `vkd` commands are tried by their own tests."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[:2] == ["python", "-m"]:
        module = importlib.util.find_spec(words[2])
        assert module is not None and Path(module.origin).exists(), words
        if words[2] == "vkd_kernels.info":
            processes.run_python(*words[1:], seconds=300).check_returncode()
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), words
    elif words[0] == "pip":
        assert "." in words or not [word for word in words if word.startswith("vkd_kernels") and "[" not in word]
    else:
        assert words[0] in CHECKED_ELSEWHERE, words


def test_the_figures_are_those_of_their_script():
    draw = runpy.run_path(str(ROOT / "tools" / "figures.py"))
    for name, figure in draw["FIGURES"].items():
        assert (ROOT / "docs" / "images" / name).read_text() == figure(), f"run: python tools/figures.py ({name})"


def test_the_claims_are_those_of_the_records():
    text = ""
    for page in evidence.PAGES:
        text += page.read_text()
        assert page.read_text() == evidence.with_tables(page.read_text()), "run: python tools/evidence.py"
    for family in evidence.FAMILIES:
        assert re.search(rf"^##+ {re.escape(family.heading)}$", text, re.MULTILINE), family.heading
        assert f"(images/evidence-{family.name}.svg)" in text
    assert (text.count("<!-- claims -->"), text.count("<!-- arms: ")) == (1, 3)
    for name, drawing in evidence.figures().items():
        assert (ROOT / "docs" / "images" / name).read_text() == drawing, f"run: python tools/evidence.py ({name})"


def test_a_claim_holds_only_if_its_interval_excludes_zero(tmp_path, monkeypatch):
    """Holm's p below 0.05 implies it; the same differences with one more doubtful claim are not settled."""
    gains = {"a": [1.0, 1.2, 0.8, 1.1, 0.9, 1.0, 1.3, 0.7], "b": [0.5, -0.4, 0.2, -0.1, 0.3, 0.6, -0.2, 0.1]}
    runs = [{"arm": "zero", "seed": seed, "accuracy": 80.0, "cpu_seconds": 10.0} for seed in range(8)]
    for arm, values in gains.items():
        runs += [{"arm": arm, "seed": s, "accuracy": 80.0 + v, "cpu_seconds": 12.0} for s, v in enumerate(values)]
    teachers = [{"seed": 0, "accuracy": 90.0}]
    for name, arms in {"record.json": ("zero", "a"), "further.json": ("zero", "b")}.items():
        chosen = [run for run in runs if run["arm"] in arms]
        (tmp_path / name).write_text(json.dumps({"teachers": teachers, "runs": chosen}))
    elsewhere = {"teachers": [{"seed": 0, "accuracy": 90.1}], "runs": [run | {"arm": "c"} for run in runs[:8]]}
    (tmp_path / "other.json").write_text(json.dumps(elsewhere))
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    records = ["record.json", "further.json"]
    claims = [evidence.Claim("", "", "", arm, over, "") for arm, over in [("a", "zero"), ("b", "zero"), ("zero", "a")]]
    holds, doubtful, opposite = evidence.outcomes(evidence.Family("", "", [], "", records, claims))
    for margin, verdict in ((doubtful.high + 0.01, "equal"), (doubtful.high - 0.01, "not settled")):
        assert replace(doubtful, claim=replace(claims[1], margin=margin)).verdict == verdict
    assert (holds.verdict, doubtful.verdict, opposite.verdict) == ("holds", "not settled", "does not hold")
    assert holds.low > 0 > doubtful.low and holds.better == 8
    assert holds.cost == pytest.approx(1.2) and doubtful.cost is None  # two runs may have had unlike machines
    assert holds.p_holm == pytest.approx(3 * holds.p) and doubtful.p_holm == doubtful.p
    lower = evidence.outcomes(evidence.Family("", "", [], "", records, claims, sign=-1))  # is better
    assert [outcome.verdict for outcome in lower] == ["does not hold", "not settled", "holds"]
    assert lower[0].mean == -holds.mean and lower[0].better == 0
    for name, seeds in {"low.json": range(4), "high.json": range(4, 8)}.items():  # of two machines
        chosen = [run for run in runs if run["seed"] in seeds]
        (tmp_path / name).write_text(json.dumps({"teachers": [], "runs": chosen}))
    spread = evidence.outcomes(evidence.Family("", "", [], "", ["low.json", "high.json"], claims))
    assert [(o.mean, o.p, o.seeds) for o in spread] == [(o.mean, o.p, 8) for o in (holds, doubtful, opposite)]
    mixed = evidence.Family(
        "", "", [], "", ["record.json", "other.json"], [evidence.Claim("", "", "", "c", "zero", "")]
    )
    with pytest.raises(AssertionError, match=r"c and zero: other teachers for the seeds \[0\]"):
        evidence.outcomes(mixed)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page):
    """As GitHub follows them: from the page's own folder, symbolic links not."""
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            path = page.parent / target
            assert path.exists() and not path.is_symlink(), f"{page.name} -> {target}"


def headings_of(page):
    """The anchors by which GitHub and mkdocs know a page's headings."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.+)$", prose, re.MULTILINE)]
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_links_of_a_page_lead_to_headings(page):
    for target, heading in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", page.read_text()):
        other = page.parent / target if target else page
        assert heading in headings_of(other), f"{page.name} -> {target}#{heading}"


BRITISH = re.compile(
    r"\w*(?:normalis|standardis|synchronis|optimis|initialis|regularis|orthogonalis|parametris|generalis|serialis|"
    r"summaris|visualis|factoris|minimis|maximis)\w*|\b(?:colour|neighbour|behaviour|favour|licence|centre|centred)s?\b",
    re.IGNORECASE,
)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_a_page_is_in_american_spelling(page):
    assert not BRITISH.findall(page.read_text())


def test_code_of_the_integrations_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codes = snippets(ROOT / "docs" / "integrations.md")
    (stored,) = (code for code in codes if "FeatureStore.build" in code)
    (metrics,) = (code for code in codes if "metrics=True" in code)
    (folding,) = (code for code in codes if "to_linear" in code)
    (initializing,) = (code for code in codes if "_init_weights" in code)
    student = nn.Sequential(nn.Linear(5, 6), vk.OrthogonalLinear(6, 7))
    expected = student(torch.ones(2, 5))
    exec(folding, {**vars(vk), "torch": torch, "student": student})
    assert type(student[1]) is nn.Linear
    torch.testing.assert_close(student(torch.ones(2, 5)), expected)
    bert = pytest.importorskip("transformers").BertPreTrainedModel
    exec(initializing, {**vars(vk), "BertPreTrainedModel": bert})
    student = torch.nn.Sequential()
    student.add_module("norm", torch.nn.LayerNorm(192))
    names = {**vars(vk), "nn": torch.nn, "json": json, "student": student, "step": 200}
    images = torch.randn(4, 7, 192)
    dataset = torch.utils.data.TensorDataset(images)
    teacher = torch.nn.Sequential(OrderedDict(norm=torch.nn.Linear(192, 3024)))
    names |= {"images": images, "dataset": dataset, "teacher": teacher, "indices": range(4)}
    exec(stored, names)
    live = vk.FeatureDistiller(student, teacher, [names["pair"]], example_input=images)
    live.load_state_dict(names["distiller"].state_dict())
    torch.testing.assert_close(names["losses"]["total"], live(images)[1]["total"])
    teacher = teacher.norm
    pair = {"student": "norm", "student_pool": "class_token", "teacher": "", "teacher_pool": "class_token"}
    names["distiller"] = vk.FeatureDistiller(student, teacher, [pair], example_input=names["images"])
    for step in (200, 201):
        exec(metrics, {**names, "step": step})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["diagnostics/norm->/orthogonality_error"] <= 1e-5


def test_code_of_the_migration_page():
    one_line, one_module = snippets(ROOT / "docs" / "migration.md")
    names = {"torch": torch, "nn": nn, "vkd_kernels": vk}
    exec(one_line, names)
    assert vk.diagnostics.orthogonality_error(names["layer"].weight) < 1e-6
    features = {"student_features": torch.randn(4, 3), "teacher_features": torch.randn(4, 7)}
    wrapped = nn.Module()
    names = {**vars(vk), **features, "self": wrapped, "student_dim": 3, "teacher_dim": 7, "loss": 0.0}
    exec(one_module, names)
    assert names["loss"] > 0 and any(True for _ in wrapped.parameters())


def test_every_page_with_code_has_a_test_that_runs_it():
    """Pages of recipes: code for a file of a user's own, run by the tests of tests/recipes."""
    run = {*STANDALONE, "integrations", "migration", "README"}
    of_recipes = {
        "recipes",
        "classification",
        "detection",
        "generation",
        "foundation_models",
        "teachers",
        "architecture",
    }
    assert {page.stem for page in PAGES if snippets(page)} <= run | of_recipes


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
