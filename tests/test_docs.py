"""What the pages name is there: links and their anchors, files, commands and their options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Where the settings of commands are that do not have them in their own file.
SETTINGS = {
    "distill/train.py": "distill/settings.py",
    "synth/generate.py": "synth/settings.py",
    "faceless/align.py": "faceless/photographs.py",
}


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    text = re.sub(r"\\\n\s*", " ", page.read_text("utf-8"))
    for module, rest in re.findall(r"python -m (faceless[.\w]*)([^`\n#]*)", text):
        check(module.replace(".", "/") + ".py", rest)
    for file, rest in re.findall(r"((?:distill|synth|mining|eval|scripts)/[\w/]+\.py)([^`\n#]*)", text):
        check(file, rest)
    for recipe in re.findall(r"\b(?:distill|synth|scripts)/(?:recipes|grids)/\w+\.yaml", text):
        assert (ROOT / recipe).is_file(), recipe


def check(file: str, rest: str) -> None:
    assert (ROOT / file).is_file(), file
    source = "".join((ROOT / name).read_text("utf-8") for name in {file, SETTINGS.get(file, file)})
    for option in re.findall(r"(?<!\S)--([\w-]+)", rest):
        known = option in ("config", "print_config", "help") or f'"--{option}"' in source
        assert known or re.search(rf"^    {option}: ", source, re.M), f"{file} --{option}"
