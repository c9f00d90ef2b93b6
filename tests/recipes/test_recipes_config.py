"""Configurations: types, limits, unknown keys, YAML with sources, help."""

import dataclasses
from dataclasses import dataclass

import pytest

pytest.importorskip("yaml", reason="needs the extra [recipes]: pyyaml")

from vkd_kernels.recipes import config as configs
from vkd_kernels.recipes.config import OptionError, option, section


@dataclass(frozen=True)
class Inner:
    rate: float = option(1e-3, "how fast", above=0, below=1)
    steps: int = option(10, "how often", minimum=1, source="a paper")


@dataclass(frozen=True)
class Outer:
    scale: float | str = option(1.0, "of something", minimum=0, choices=("match", "learned"))
    widths: tuple[int, ...] = option((8, 16), "channels", minimum=1, maximum=64)
    name: str = option("", "whose")
    kind: str = option("a", "which", choices=("a", "b"))
    flag: bool = option(False, "whether")
    weights: str | None = option(None, "file")
    inner: Inner = section(Inner, rate=0.5, sources={"rate": "found by trying"})

    def __post_init__(self):
        if self.kind == "b" and self.scale == "match":
            raise OptionError("outer.kind: b excludes outer.scale=match")


@dataclass(frozen=True)
class Config:
    outer: Outer = section(Outer)
    other: Inner = section(Inner, steps=3)


def value(name, text):
    return configs.flatten(configs.replace(Config(), {name: text}))[name]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("outer.inner.rate", "3e-4", 3e-4),
        ("outer.inner.rate", ".5", 0.5),
        ("outer.inner.steps", "7", 7),
        ("outer.inner.steps", 7.0, 7),
        ("outer.scale", "2", 2.0),
        ("outer.scale", "match", "match"),
        ("outer.widths", "1,2,3", (1, 2, 3)),
        ("outer.widths", "[4, 5]", (4, 5)),
        ("outer.widths", [6], (6,)),
        ("outer.widths", "6", (6,)),
        ("outer.name", "a=b, c", "a=b, c"),
        ("outer.name", "1e3", "1e3"),
        ("outer.name", "none", "none"),
        ("outer.flag", "true", True),
        ("outer.flag", "False", False),
        ("outer.weights", "none", None),
        ("outer.weights", "x.pt", "x.pt"),
    ],
)
def test_values_are_parsed_by_type(name, text, expected):
    found = value(name, text)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("outer.inner.rate", "fast", "outer.inner.rate: must be a number, got 'fast'"),
        ("outer.inner.rate", "nan", "outer.inner.rate: must be a number, got nan"),
        ("outer.inner.rate", "0", "outer.inner.rate: must be above 0, got 0.0"),
        ("outer.inner.rate", "1", "outer.inner.rate: must be below 1, got 1.0"),
        ("outer.inner.rate", True, "outer.inner.rate: must be a number, got True"),
        ("outer.inner.steps", "2.5", "outer.inner.steps: must be a whole number, got '2.5'"),
        ("outer.inner.steps", "0", "outer.inner.steps: must be at least 1, got 0"),
        ("outer.inner.steps", None, "outer.inner.steps: must be a whole number, got None"),
        ("outer.widths", "1,65", "outer.widths: must be at most 64, got 65"),
        ("outer.widths", "1,x", "outer.widths: must be a list of a whole number, got '1,x'"),
        ("outer.flag", "yes", "outer.flag: must be true or false, got 'yes'"),
        ("outer.kind", "c", "outer.kind: must be one of a, b; got c"),
        ("outer.scale", "mach", "outer.scale: must be one of match, learned; got mach"),
        ("outer.scale", "-1", "outer.scale: must be at least 0, got -1.0"),
        ("outer.inner.step", "1", "unknown key 'outer.inner.step'; did you mean 'outer.inner.steps'?"),
        ("inner.rate", "1", "unknown key 'inner.rate'; did you mean 'outer.inner.rate'?"),
        ("widths", "1", "unknown key 'widths'; did you mean 'outer.widths'?"),
        ("zzzz", "1", "unknown key 'zzzz'; known are outer.scale, outer.widths"),
    ],
)
def test_bad_values_are_refused_by_name(name, text, message):
    with pytest.raises(OptionError) as error:
        value(name, text)
    assert message in str(error.value)


def test_checks_across_fields_see_the_final_values():
    with pytest.raises(OptionError, match=r"b excludes outer\.scale=match"):
        configs.replace(Config(), {"outer.kind": "b", "outer.scale": "match"})
    assert configs.replace(Config(), {"outer.kind": "b"}).outer.kind == "b"


def test_replacing_leaves_the_rest_alone():
    before = configs.replace(Config(), {"outer.widths": "3"})
    after = configs.replace(before, {"other.steps": 9})
    assert after.outer == before.outer and after.other.steps == 9 and before.other.steps == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        after.other.steps = 1


def test_yaml_gives_every_value_back(tmp_path):
    config = configs.replace(
        Config(), {"outer.scale": "match", "outer.widths": (1, 2), "outer.flag": True, "outer.inner.rate": 1e-8}
    )
    (tmp_path / "c.yaml").write_text(configs.to_yaml(config))
    values, _ = configs.read_yaml(tmp_path / "c.yaml")
    assert set(values) == set(configs.flatten(config))
    assert configs.replace(Config(), values) == config


def test_a_comment_behind_a_value_is_its_source(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "# a recipe\nouter:\n  widths: [1, 2]  # the paper, table 3\n  name: 'a # b'\n"
        "  inner: {rate: 1e-4}  # a guess\n"
        "  # not behind a value\n  kind: b\n"
    )
    values, sources = configs.read_yaml(tmp_path / "c.yaml")
    assert values == {"outer.widths": [1, 2], "outer.name": "a # b", "outer.inner.rate": "1e-4", "outer.kind": "b"}
    assert sources == {"outer.widths": "the paper, table 3"}
    assert configs.replace(Config(), values).outer.inner.rate == 1e-4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("a: [1", "is not YAML"),
        ("- 1", "must hold `section"),
        ("!!python/none x", "is not YAML"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(OptionError, match=r"c\.yaml") as error:
        configs.read_yaml(tmp_path / "c.yaml")
    assert message in str(error.value)
    (tmp_path / "empty.yaml").write_text("\n")
    assert configs.read_yaml(tmp_path / "empty.yaml") == ({}, {})


def test_help_shows_every_value_with_its_limits_and_source():
    config = configs.replace(Config(), {"outer.widths": "7"})
    text = configs.help_text(config, {"outer.widths": "command line"})
    for name, found in configs.flatten(config).items():
        assert f"    {name}={configs.show(found)}" in text
    lines = " ".join(text.split())
    assert "outer.inner.rate=0.5 how fast; > 0; < 1 [found by trying]" in lines
    assert "outer.inner.steps=10 how often; >= 1 [a paper]" in lines
    assert "other.steps=3 how often; >= 1 [chosen for this task]" in lines
    assert "outer.widths=7 channels; >= 1; <= 64 [command line]" in lines
    assert "outer.kind=a which; a | b [chosen here]" in lines
    assert max(map(len, text.splitlines())) <= 100


def test_shown_values_are_what_one_types():
    for name, typed in [("outer.widths", "1,2"), ("outer.flag", "true"), ("outer.inner.rate", "1e-08"),
                        ("outer.inner.rate", "0.30000000000000004")]:  # fmt: skip
        assert configs.show(value(name, typed)) == typed
    assert configs.show(None) == "none"
