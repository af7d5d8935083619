"""Settings: recipes, overrides, what is printed, and the one line for each mistake."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from faceless.errors import InputError
from faceless.settings import parse, recipe


class Shape:
    """A component with a base class."""


class Square(Shape):
    """One of two."""

    def __init__(self, *, side: float, color: str = "red"):
        if side <= 0:
            raise ValueError(f"side is {side}; it must be positive")
        self.side, self.color = side, color


@dataclass
class Pen:
    """A nested group."""

    width: int = 1
    range: tuple[float, float] = (0.0, 1.0)


@dataclass
class Drawing:
    """Settings of the tests."""

    shape: Shape
    title: str = "none"
    pen: Pen = field(default_factory=Pen)
    extras: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Pen] = field(default_factory=dict)
    names: list[str] | None = None
    other: Shape | None = None


class Trusting(Shape):
    """One that would run code."""

    def __init__(self, *, trust_remote_code: bool = False):
        self.trust_remote_code = trust_remote_code


SQUARE = {"class_path": f"{__name__}.Square", "init_args": {"side": 2}}


def write(folder: Path, **keys: Any) -> list[str]:
    path = folder / "drawing.yaml"
    path.write_text(yaml.safe_dump({"shape": SQUARE} | keys))
    return ["--config", str(path)]


def test_recipe_then_overrides(tmp_path: Path) -> None:
    settings = parse(Drawing, [*write(tmp_path, pen={"width": 3}), "--pen.width", "5", "--shape.side", "4"])
    drawing = settings.build()
    assert isinstance(drawing.shape, Square)
    assert (drawing.shape.side, drawing.pen.width, drawing.title) == (4.0, 5, "none")
    assert isinstance(drawing.pen, Pen)


def test_what_is_written_is_complete_and_reads_back_the_same(tmp_path: Path) -> None:
    first = parse(Drawing, [*write(tmp_path, extras={"a": [1, 2]}), "--title", "x"])
    again = tmp_path / "again.yaml"
    again.write_text(first.yaml())
    second = parse(Drawing, ["--config", str(again)])
    assert second.asdict() == first.asdict()
    assert first.asdict()["pen"] == {"width": 1, "range": [0.0, 1.0]}
    assert first.asdict()["shape"]["init_args"] == {"side": 2.0, "color": "red"}


@pytest.mark.parametrize(
    ("keys", "arguments", "words"),
    [
        ({"titel": "x"}, [], ["drawing.yaml", "titel", "did you mean title"]),
        ({"pen": {"widht": 1}}, [], ["drawing.yaml", "pen.widht", "width"]),
        ({"pen": {"width": "thick"}}, [], ["drawing.yaml", "pen.width", "int", "thick"]),
        ({"shape": {"class_path": SQUARE["class_path"], "init_args": {"seid": 1}}}, [], ["seid", "side"]),
        ({"shape": {"class_path": "os.system"}}, [], ["drawing.yaml", "shape", "os.system"]),
        ({}, ["--pen.widht", "2"], ["pen.widht", "pen.width"]),
        ({}, ["--config", "no/such.yaml"], ["no/such.yaml", "distill/recipes"]),
        ({"shape": f"{__name__}.Sqare"}, [], ["drawing.yaml", "shape.class_path", "Sqare", "did you mean Square"]),
        ({"shape": {"class_path": "faceless.seetings.Shape"}}, [], ["shape.class_path", "did you mean settings"]),
        ({"shape": "square"}, [], ["drawing.yaml: shape: 'square' is no class"]),
        ({"shape": [1, 2]}, [], ["drawing.yaml: shape: no class; write class_path with ", f"{__name__}.Square or "]),
        ({"pen": "thick"}, [], ["drawing.yaml: pen: 'thick' is no group of keys; its keys are width, range"]),
        ({"parts": {"left": {"widht": 3}}}, [], ["unknown key 'parts.left.widht'", "width"]),
        ({"parts": {"left": {"width": "x"}}}, [], ["drawing.yaml: parts.left.width: Expected a int. Got value: x"]),
        ({"parts": {"left": {}}}, ["--parts.left.widht", "3"], ["unknown key 'parts.left.widht'"]),
        ({"names": "21-40"}, [], ["drawing.yaml: names: Expected list or null. Got value: 21-40"]),
        ({"other": {"class_path": f"{__name__}.Circle"}}, [], ["other.class_path", "has no Circle; known are"]),
        ({"pen": None}, [], ["drawing.yaml: pen is null; leave it out, or give Pen"]),
        ({"title": None}, [], ["drawing.yaml: title is null", "give str"]),
        ({"pen": {"range": None}}, [], ["drawing.yaml: pen.range is null"]),
        ({"pen": {"range": [1.0, None]}}, [], ["pen.range"]),
        (
            {"parts": {"left": {"width": None}}},
            [],
            ["drawing.yaml: parts.left.width is null; leave it out, or give int"],
        ),
        ({"shape": SQUARE | {"init_args": {"side": 1, "color": None}}}, [], ["shape.init_args.color is null", "str"]),
        ({"other": {"class_path": SQUARE["class_path"]}}, [], ["other.init_args", "required: side"]),
        ({"other": SQUARE | {"init_args": {"side": 1, "sied": 1}}}, [], ["other.init_args.sied", "mean side"]),
    ],
)
def test_mistakes_name_file_key_and_cure(tmp_path: Path, keys: dict, arguments: list[str], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        parse(Drawing, [*write(tmp_path, **keys), *arguments])
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert len(message) < 300 and not {"Subtypes", "Namespace", "NoneType"} & set(re.split(r"\W", message)), message


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "just words"])
def test_a_recipe_without_keys(tmp_path: Path, text: str) -> None:
    (tmp_path / "empty.yaml").write_text(text)
    with pytest.raises(InputError, match=r"empty\.yaml: holds no settings; write lines of `key: value`$"):
        parse(Drawing, ["--config", str(tmp_path / "empty.yaml")])


FOREIGN = "{name}.Shape"


@pytest.mark.parametrize(
    "given",
    [
        {"shape": FOREIGN},
        {"shape": {"class_path": FOREIGN}},
        {"shape": "{{class_path: " + FOREIGN + "}}"},
        {"shape": {"class_path": FOREIGN, "init_args": {"side": 1}}},
        {"shape.class_path": FOREIGN},
    ],
)
def test_a_file_cannot_have_a_module_of_another_package_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict
) -> None:
    module = f"foreign_{tmp_path.name}"
    mark = tmp_path / "executed"
    (tmp_path / f"{module}.py").write_text(
        f"from {__name__} import Shape as Base\n"
        f"open({str(mark)!r}, 'w').close()\n"
        "class Shape(Base):\n    def __init__(self, *, side: float = 0): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    text = yaml.safe_dump(given).replace("{{", "{").replace("}}", "}").replace("{name}", module)
    (tmp_path / "drawing.yaml").write_text(text)
    arguments = ["--config", str(tmp_path / "drawing.yaml")]
    with pytest.raises(InputError, match=rf"drawing\.yaml: .*{module}.*set FACELESS_ALLOW={module}"):
        parse(Drawing, arguments)
    assert not mark.exists() and module not in sys.modules
    monkeypatch.setenv("FACELESS_ALLOW", f"another, {module}")
    assert type(parse(Drawing, arguments).build().shape).__module__ == module
    assert mark.exists()


def test_what_is_allowed_are_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACELESS_ALLOW", "*")
    with pytest.raises(InputError, match=r"FACELESS_ALLOW: '\*' is no name"):
        parse(Drawing, write(tmp_path))


TRUSTING = {"class_path": f"{__name__}.Trusting", "init_args": {"trust_remote_code": True}}


@pytest.mark.parametrize(
    "given",
    [
        {"shape": TRUSTING},
        {"shape": TRUSTING | {"init_args": {"trust_remote_code": "true"}}},
        {"shape": yaml.safe_dump(TRUSTING, default_flow_style=True)},
        {"shape.class_path": TRUSTING["class_path"], "shape.init_args.trust_remote_code": True},
        {"extras": {"trust_remote_code": True}},
    ],
)
def test_foreign_code_is_trusted_on_the_command_line_only(tmp_path: Path, given: dict) -> None:
    arguments = write(tmp_path, **given)
    if "shape.class_path" in given:
        (tmp_path / "drawing.yaml").write_text(yaml.safe_dump(given))
    key = "extras.trust_remote_code" if "extras" in given else "shape.init_args.trust_remote_code"
    with pytest.raises(InputError, match=rf"{key}: .*a file cannot ask for that.*add --{key} true"):
        parse(Drawing, arguments)
    for option in [f"--{key}=true"] + ([] if "extras" in given else ["--shape.trust_remote_code=true"]):
        assert parse(Drawing, [*arguments, option]).build()
    assert parse(Drawing, [*arguments, f"--{key}", "false"]).build()


def test_text_that_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "torn.yaml").write_text("pen: [1\n")
    with pytest.raises(InputError, match=r"torn\.yaml: not readable as YAML"):
        parse(Drawing, ["--config", str(tmp_path / "torn.yaml")])


def test_a_constructor_that_refuses_is_one_line(tmp_path: Path) -> None:
    settings = parse(Drawing, [*write(tmp_path), "--shape.side", "-1"])
    with pytest.raises(InputError, match=r"^shape: side is -1"):
        settings.build()


def test_a_component_that_may_be_null_refuses_in_its_own_words(tmp_path: Path) -> None:
    settings = parse(Drawing, write(tmp_path, other=SQUARE | {"init_args": {"side": -1}}))
    with pytest.raises(InputError, match=r"^settings: side is -1.0; it must be positive$"):
        settings.build()
    # Of two such components nobody can say which.
    settings = parse(Drawing, write(tmp_path, shape=SQUARE | {"init_args": {"side": -1}}, other=SQUARE))
    with pytest.raises(InputError, match=r"^Square: side is -1.0; it must be positive$"):
        settings.build()


def test_what_may_be_null_stays_null_and_a_null_group_can_be_filled(tmp_path: Path) -> None:
    settings = parse(Drawing, write(tmp_path, names=None, other=None, extras={"anything": None}))
    assert settings.asdict()["names"] is None and settings.asdict()["extras"] == {"anything": None}
    filled = settings.changed({"other.class_path": SQUARE["class_path"], "other.init_args.side": 3})
    assert filled.asdict()["other"]["init_args"]["side"] == 3.0
    with pytest.raises(InputError, match=r"pen\.width is null"):
        settings.changed({"pen.width": None})


def test_recipes_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe("distill/recipes/quickstart.yaml").is_file()
    with pytest.raises(InputError, match=r"quickstart\.yaml"):
        recipe("distill/recipes/quickstar.yaml")
