"""The report of a run, also in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from eval import report
from faceless.errors import InputError
from tests.eval.run_folder import make_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FIGURES = 6  # cost, ROC, DET, scores, loss, validation

# Writes down what the browser made of the page.
PROBE = """<script>
addEventListener("load", () => {
  const drawn = (svg) => {
    const box = svg.getBoundingClientRect(), ink = svg.getBBox();
    return box.width > 100 && box.height > 60 && ink.width > 50 && svg.querySelectorAll("path").length > 3;
  };
  const figures = [...document.querySelectorAll("figure svg")], images = [...document.images];
  const wide = [...document.querySelectorAll("main > header, main > section")]
    .filter((part) => part.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
  document.title = "probe " + JSON.stringify({
    figures: figures.length, drawn: figures.filter(drawn).length,
    images: images.length, decoded: images.filter((i) => i.complete && i.naturalWidth > 0 && i.width > 20).length,
    unnamed: figures.filter((f) => !f.getAttribute("aria-label")).length + images.filter((i) => !i.alt).length,
    overflow: wide.length + (document.documentElement.scrollWidth > innerWidth + 1),
    requests: performance.getEntriesByType("resource").filter((r) => !r.name.startsWith("data:")).length,
    ids: document.querySelectorAll("[id]").length - new Set([...document.querySelectorAll("[id]")].map((e) => e.id))
      .size,
  });
});
</script>"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def page(run) -> str:
    assert report.write(run) == run / "report.html"
    return (run / "report.html").read_text()


def browse(page: Path, profile: Path, *options: str) -> tuple[str, str]:
    """The document after loading, and what the browser logged."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0"]
    command = [CHROMIUM, "--headless", "--no-sandbox", *quiet, f"--user-data-dir={profile}", *options]
    done = subprocess.run(
        [*command, "--virtual-time-budget=10000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def console(log: str) -> list[str]:
    return [line for line in log.splitlines() if "CONSOLE" in line]


def probe(page: Path, tmp_path: Path, *options: str) -> dict[str, int]:
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    copy = tmp_path / "probed.html"
    copy.write_text(text.replace("</body>", PROBE + "</body>"))
    document, log = browse(copy, tmp_path / "profile", *options)
    assert not console(log)
    found = re.search(r"<title>probe (\{.*?\})</title>", document)
    assert found, document[:500]
    return json.loads(found[1])


def test_the_browser_has_nothing_to_complain_of(run, page, tmp_path):
    document, log = browse(run / "report.html", tmp_path / "profile")
    assert "No real face was used in training" in document
    assert not console(log)


def test_a_complaint_would_be_seen(tmp_path):
    """What the browser refuses must show in the log, or the test above could not fail."""
    broken = tmp_path / "broken.html"
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    broken.write_text(f"<!doctype html>{policy}<img src='x.png'>")
    assert console(browse(broken, tmp_path / "profile")[1])


@pytest.mark.parametrize("width", [1200, 500])
def test_every_figure_is_drawn(run, page, tmp_path, width):
    seen = probe(run / "report.html", tmp_path, f"--window-size={width},2000")
    assert seen["figures"] == seen["drawn"] == FIGURES
    assert seen["images"] == seen["decoded"] == 48
    assert (seen["unnamed"], seen["overflow"], seen["requests"], seen["ids"]) == (0, 0, 0, 0)


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [
            value for key, value in attributes if key in ("src", "href", "xlink:href", "action", "data") and value
        ]


def test_the_page_is_complete_in_itself(page):
    parser = Links()
    parser.feed(page)
    assert "script" not in parser.tags
    assert all(link.startswith(("data:", "#")) for link in parser.links)
    assert not re.search(r"url\((?!#)|@import", page)


def test_the_figures_on_the_page_are_those_of_the_run(run, page):
    verification = json.loads((run / "verification.json").read_text())
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    for subset in verification["subsets"].values():
        for row in subset:
            rates = [row["eer"], row["tar_at_far"]["1e-2"], row["tar_at_far"]["1e-3"], row["rank1"]]
            bounds = [row["intervals"]["eer"], *(row["intervals"]["tar_at_far"][f] for f in ("1e-2", "1e-3"))]
            bounds.append(row["intervals"]["rank1"])
            cells = (f"{100 * r:.2f} {100 * a:.2f} – {100 * b:.2f}" for r, (a, b) in zip(rates, bounds, strict=True))
            assert f"{row['label']} {' '.join(cells)}" in text
    assert text.index("People 7–12") < text.index("All 12 people")  # people kept for reporting come first
    assert "400 steps" in text
    assert "Median speed 420" in text


def test_the_same_run_gives_the_same_page(run, page):
    report.write(run)
    assert (run / "report.html").read_text() == page


def test_real_faces_are_announced_loudly(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "real")
    provenance = json.loads((copy / "provenance.json").read_text())
    for value, expected in (
        (True, 'class="banner loud"'),
        ("no", 'class="banner unknown"'),
        (False, 'class="banner calm"'),
    ):
        (copy / "provenance.json").write_text(json.dumps(provenance | {"real_faces_in_training": value}))
        page = report.write(copy).read_text()
        assert expected in page
        assert page.count('class="banner ') == 1
        assert ("No real face was used" in page) == (value is False)
    (copy / "provenance.json").unlink()
    assert 'class="banner unknown"' in report.write(copy).read_text()


@pytest.mark.parametrize("name", report.FILES)
def test_a_missing_file_is_named_on_the_page(run, tmp_path, name):
    copy = shutil.copytree(run, tmp_path / "partial")
    (copy / name).unlink()
    assert f"holds no <code>{name}</code>" in report.write(copy).read_text()


def test_a_single_file_makes_a_page(run, tmp_path):
    shutil.copy(run / "settings.yaml", tmp_path)
    page = report.write(tmp_path).read_text()
    for name in set(report.FILES) - {"settings.yaml", "provenance.json"}:
        assert f"holds no <code>{name}</code>" in page


def test_text_out_of_the_files_is_escaped(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "hostile")
    evil = "\"><script>alert(1)</script><img src=http://x.invalid onerror=alert(1)> $\\frac$ ' url(http://y.invalid)"
    provenance = json.loads((copy / "provenance.json").read_text())
    provenance["sources"][0]["generator"] = {"name": evil, evil: evil}
    provenance["teacher"]["name"] = provenance["assets"][0]["name"] = provenance["assets"][0]["source"] = evil
    (copy / "provenance.json").write_text(json.dumps(provenance))
    verification = json.loads((copy / "verification.json").read_text())
    verification["subsets"][evil] = verification["subsets"].pop("7-12")
    for rows in verification["subsets"].values():
        rows[2]["label"] = evil
    verification["benchmark"] = evil
    (copy / "verification.json").write_text(json.dumps(verification))
    with np.load(copy / "scores.npz") as stored:
        arrays = {name.replace("untrained student", "evil'\"><script>$\\x$"): stored[name] for name in stored.files}
    np.savez(copy / "scores.npz", **arrays)
    (copy / "settings.yaml").write_text(evil)
    parser = Links()
    parser.feed(report.write(copy).read_text())
    assert "script" not in parser.tags
    assert all(link.startswith(("data:", "#")) for link in parser.links)


def test_unusable_folders_and_files_are_one_line(run, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        report.write(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not the folder of a run"):
        report.write(tmp_path)
    copy = shutil.copytree(run, tmp_path / "broken")
    for name in ("provenance.json", "verification.json", "scores.npz", "faces.npz"):
        whole = (copy / name).read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"[1, 2]"):
            (copy / name).write_bytes(content)
            with pytest.raises(InputError, match=name) as caught:
                report.write(copy)
            assert "\n" not in str(caught.value)
        (copy / name).write_bytes(whole)
    np.savez(copy / "faces.npz", images=np.array([{"a": 1}]), disagreement=np.zeros(1))
    with pytest.raises(InputError, match=r"faces\.npz"):  # a pickle, which is not opened
        report.write(copy)
