"""The rules of the house: imports go one way, no module shadows another package, every package imports."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("synth", "mining", "eval", "distill")
MAY_IMPORT = {
    "faceless": set(),
    "synth": {"faceless"},
    "mining": {"faceless"},
    "eval": {"faceless"},
    "distill": {"faceless", "synth", "mining", "eval"},
}
MODULES = [path for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py"))]


def imported(path):
    """Top-level names of everything a file imports, at whatever depth of the code."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports break when a file is run by its path"
            yield (node.module or "").split(".")[0]


def test_there_is_something_to_look_at():
    assert len(MODULES) > 10


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    wrong = set(imported(path)) & ({*MAY_IMPORT, "scripts", "tests"} - MAY_IMPORT[room] - {room})
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def dependency_modules():
    """Top-level modules of what setup.cfg asks for, and of what those ask for in turn."""
    config = (ROOT / "setup.cfg").read_text("utf-8")
    asked = {re.split(r"[<>=\[; ]", line.split(" = ")[-1].strip())[0] for line in config.splitlines() if ">=" in line}
    known = importlib.metadata.packages_distributions()
    distributions = {name.lower().replace("_", "-") for names in known.values() for name in names}
    todo, done = {name.lower() for name in asked} & distributions, set()
    while todo:
        name = todo.pop()
        done.add(name)
        needs = importlib.metadata.requires(name) or []
        bare = {
            re.split(r"[<>=!~\[;( ]", need)[0].lower().replace("_", "-") for need in needs if "extra ==" not in need
        }
        todo |= bare & distributions - done
    return {module for module, names in known.items() if any(name.lower().replace("_", "-") in done for name in names)}


def test_nothing_in_a_stage_is_named_like_another_module():
    """A file run by its path puts its own folder first on sys.path: its neighbours shadow their namesakes."""
    taken = (set(sys.stdlib_module_names) | dependency_modules()) - {*MAY_IMPORT}
    assert {"queue", "statistics", "torch", "datasets", "numpy"} <= taken
    for stage in STAGES:
        names = {p.stem for p in (ROOT / stage).glob("*.py")} | {
            p.name for p in (ROOT / stage).glob("*/") if p.is_dir()
        }
        assert not (names - {"__init__", "__pycache__"}) & taken, stage


def test_seam_packages_import():
    code = "import faceless, synth, mining, distill, eval; import faceless.weights, synth.generators.dcgan"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_import_faceless_is_light():
    code = "import sys, faceless; faceless.__version__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_version_is_a_literal_that_packaging_can_read():
    tree = ast.parse((ROOT / "faceless" / "__init__.py").read_text("utf-8"))
    (value,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__version__"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", ast.literal_eval(value))
