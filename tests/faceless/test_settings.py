"""Settings: recipes, overrides, what is printed, and the one line for each mistake."""

from __future__ import annotations

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
        ({}, ["--config", "no/such.yaml"], ["no/such.yaml"]),
    ],
)
def test_mistakes_name_file_key_and_cure(tmp_path: Path, keys: dict, arguments: list[str], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        parse(Drawing, [*write(tmp_path, **keys), *arguments])
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_text_that_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "torn.yaml").write_text("pen: [1\n")
    with pytest.raises(InputError, match=r"torn\.yaml: not readable as YAML"):
        parse(Drawing, ["--config", str(tmp_path / "torn.yaml")])


def test_a_constructor_that_refuses_is_one_line(tmp_path: Path) -> None:
    settings = parse(Drawing, [*write(tmp_path), "--shape.side", "-1"])
    with pytest.raises(InputError, match="side is -1"):
        settings.build()


def test_recipes_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe("distill/recipes/quickstart.yaml").is_file()
    with pytest.raises(InputError, match=r"quickstart\.yaml"):
        recipe("distill/recipes/quickstar.yaml")
