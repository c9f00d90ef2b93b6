"""Configurations: types, limits, unknown keys, YAML with sources, help."""

from typing import Literal

import pytest
from pydantic import ValidationError, model_validator

from vkd_kernels.recipes import config as configs
from vkd_kernels.recipes.config import Ints, OptionError, Section, option, section


class Inner(Section):
    rate: float = option(1e-3, "how fast", gt=0, lt=1)
    steps: int = option(10, "how often", ge=1, source="a paper")


class Outer(Section):
    scale: float | Literal["match", "learned"] = option(1.0, "of something")
    widths: Ints = option((8, 16), "channels")
    name: str = option("", "whose")
    kind: Literal["a", "b"] = option("a", "which")
    flag: bool = option(False, "whether")
    inner: Inner = section(Inner, rate=0.5, source="found by trying")

    @model_validator(mode="after")
    def _checked(self) -> "Outer":
        if self.kind == "b" and self.scale == "match":
            raise OptionError("outer.kind: b excludes outer.scale=match")
        return self


class Config(Section):
    outer: Outer = section(Outer)
    other: Inner = section(Inner, steps=3)


def value(name, text):
    return configs.flatten(configs.replace(Config(), {name: text}))[name]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("outer.inner.rate", "3e-4", 3e-4),
        ("outer.inner.steps", "7", 7),
        ("outer.scale", "2", 2.0),
        ("outer.scale", "match", "match"),
        ("outer.widths", "1,2,3", (1, 2, 3)),
        ("outer.widths", "[4, 5]", (4, 5)),
        ("outer.name", "a=b, c", "a=b, c"),
        ("outer.flag", "False", False),
    ],
)
def test_values_are_parsed_by_type(name, text, expected):
    parsed = value(name, text)
    assert parsed == expected and type(parsed) is type(expected)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("outer.inner.rate", "fast", "outer.inner.rate: must be a valid number.*got 'fast'"),
        ("outer.inner.rate", "nan", "outer.inner.rate: must be .*finite.*"),
        ("outer.inner.rate", "0", "outer.inner.rate: must be greater than 0, got '0'"),
        ("outer.inner.steps", "9" * 5000, "outer.inner.steps: "),
        ("outer.widths", "1,x", "outer.widths: must be a valid integer.*got 'x'"),
        ("outer.flag", "maybe", "outer.flag: must be a valid boolean.*got 'maybe'"),
        ("outer.kind", "c", "outer.kind: must be 'a' or 'b', got 'c'"),
        ("outer.scale", "mach", "outer.scale: must be .*'match' or 'learned', got 'mach'"),
        ("outer.inner.step", "1", "unknown key 'outer.inner.step'; did you mean 'outer.inner.steps'?"),
        ("widths", "1", "unknown key 'widths'; did you mean 'outer.widths'?"),
        ("zzzz", "1", "unknown key 'zzzz'; known are outer.scale, outer.widths"),
    ],
)
def test_bad_values_are_refused_by_name(name, text, message):
    with pytest.raises(OptionError, match=message):
        value(name, text)


def test_checks_across_fields_see_the_final_values():
    with pytest.raises(OptionError, match=r"^outer\.kind: b excludes outer\.scale=match$"):
        configs.replace(Config(), {"outer.kind": "b", "outer.scale": "match"})
    before = configs.replace(Config(), {"outer.kind": "b", "outer.widths": "3"})
    after = configs.replace(before, {"other.steps": 9})
    assert after.outer == before.outer and after.other.steps == 9 and before.other.steps == 3
    with pytest.raises(ValidationError):
        after.other.steps = 1


def test_yaml_gives_every_value_back(tmp_path):
    config = configs.replace(
        Config(), {"outer.scale": "match", "outer.widths": (1, 2), "outer.flag": True, "outer.inner.rate": 1e-8}
    )
    (tmp_path / "c.yaml").write_text(configs.to_yaml(Inner(steps=3), config))
    values = configs.read_yaml(tmp_path / "c.yaml")
    assert (values.pop("rate"), values.pop("steps")) == ("0.001", "3")
    assert set(values) == set(configs.flatten(config)) and configs.replace(Config(), values) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("a: [1", "is not a configuration in YAML"),
        ("!!python/none x", "must hold `section"),
        ("outer:\n  kind: a\n  kind: b\n", "line 3: kind is there twice"),
        ("outer: &a {x: *a}\n", "is not a configuration in YAML"),
        ("a: " + "[" * 5000, "is not a configuration in YAML"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(OptionError, match=r"c\.yaml") as error:
        configs.read_yaml(tmp_path / "c.yaml")
    assert message in str(error.value)
    (tmp_path / "empty.yaml").write_text("\n")
    assert configs.read_yaml(tmp_path / "empty.yaml") == {}


def test_help_shows_every_value_with_its_limits_and_source():
    config = configs.replace(Config(), {"outer.widths": "7"})
    text = configs.help_text(config, {"outer.widths": "command line"})
    for name, shown in configs.flatten(config).items():
        assert f"    {name}={configs.show(shown)} " in text
    lines = " ".join(text.split())
    assert "outer.inner.rate=0.5 how fast; > 0; < 1 [found by trying]" in lines
    assert "outer.inner.steps=10 how often; >= 1 [a paper]" in lines
    assert "other.steps=3 how often; >= 1 [chosen for this task]" in lines
    assert "outer.widths=7 channels [command line]" in lines
    assert "outer.kind=a which; a | b [chosen here]" in lines
    assert max(map(len, text.splitlines())) <= 110
