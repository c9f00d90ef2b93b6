"""How this code base is written, where a formatter does not see to it: CONTRIBUTING.md has the rules."""

import ast
import itertools
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_POSITIONAL = 6
MOST_LINES = 500


def files(*suffixes: str) -> list[str]:
    """The tracked and the new files of these suffixes; without git (in an sdist) those of the code's folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        names = listed.stdout.splitlines()
    else:
        folders = ("vkd_kernels", "tests", "benchmarks", "examples", "csrc")
        names = [path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.*")]
    return sorted(name for name in names if name.endswith(suffixes) and (ROOT / name).is_file())


def is_triton(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)


def outside_triton(node: ast.AST) -> itertools.chain[ast.AST]:
    children = (child for child in ast.iter_child_nodes(node) if not is_triton(child))
    return itertools.chain([node], itertools.chain.from_iterable(map(outside_triton, children)))


def is_called_by_name(node: ast.AST) -> bool:
    """Tests, whose arguments are fixtures and parameters, and hypothesis's `given`, which lists them in their order."""
    what = node.func if isinstance(node, ast.Call) else node
    name = getattr(what, "id", getattr(what, "name", ""))
    return name == "given" or (isinstance(node, ast.FunctionDef) and name.startswith("test_"))


def too_many_positional(name: str) -> list[str]:
    faults = []
    for node in outside_triton(ast.parse((ROOT / name).read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            what = getattr(node, "name", "lambda")
        elif isinstance(node, ast.Call):
            count, what = len(node.args), ast.unparse(node.func)[:60] + "(...)"
        else:
            continue
        if is_called_by_name(node):
            continue
        if count > MOST_POSITIONAL:
            faults.append(f"{name}:{node.lineno}: {what} has {count} positional arguments, {MOST_POSITIONAL} at most")
    return faults


def switched_off_formatter(name: str) -> list[str]:
    lines = enumerate((ROOT / name).read_text().splitlines(), start=1)
    return [
        f"{name}:{n}: formatted by hand" for n, line in lines if "# fmt: " + "skip" in line or "# fmt: " + "off" in line
    ]


def too_long(name: str) -> list[str]:
    lines = len((ROOT / name).read_text().splitlines())
    return [f"{name}: {lines} lines, {MOST_LINES} at most"] if lines > MOST_LINES else []


RULES = {
    "at most six positional arguments": (too_many_positional, (".py",)),
    "no formatting by hand": (switched_off_formatter, (".py",)),
    "at most 500 lines": (too_long, (".py", ".cpp", ".h", ".cu")),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_code_keeps_the_house_rule(rule):
    check, suffixes = RULES[rule]
    faults = [fault for name in files(*suffixes) for fault in check(name)]
    assert not faults, "\n".join([rule, *faults])


def test_the_rules_see_what_they_forbid(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_house.ROOT", tmp_path)
    (tmp_path / "bad.py").write_text(
        "def f(a, b, c, d, e, g, h): ...  # fmt: " + "skip\nf(1, 2, 3, 4, 5, 6, 7)\n" + "\n" * 500
    )
    (tmp_path / "good.py").write_text("@triton.jit\ndef f(a, b, c, d, e, g, h):\n    g(1, 2, 3, 4, 5, 6, 7)\n")
    for check, _ in RULES.values():
        assert check("bad.py")
        assert not check("good.py")
    assert len(too_many_positional("bad.py")) == 2
