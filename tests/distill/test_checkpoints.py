"""Checkpoints survive damage, metrics forget what comes after them, and other settings are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill.checkpoints import Checkpoints, Metrics, check_same_record, check_same_settings
from faceless.errors import InputError


def test_only_the_latest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15):
        checkpoints.save(step, {"weight": torch.full((2,), float(step))})
    assert [p.name for p in checkpoints.paths()] == ["step-00000010.pt", "step-00000015.pt"]
    latest = checkpoints.latest()
    assert latest is not None
    assert latest["step"] == 15
    assert latest["weight"].tolist() == [15.0, 15.0]


def test_a_damaged_one_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, {"weight": torch.ones(100)})
    newest = checkpoints.save(10, {"weight": torch.zeros(100)})
    newest.write_bytes(newest.read_bytes()[:300])
    latest = checkpoints.latest()
    assert latest is not None
    assert latest["step"] == 5
    assert str(newest) in capsys.readouterr().err
    checkpoints.paths()[0].write_bytes(b"")
    assert checkpoints.latest() is None


def test_a_checkpoint_that_carries_code_is_never_run(tmp_path: Path) -> None:
    import os
    import pickle

    class Hostile:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "step-00000001.pt").write_bytes(pickle.dumps({"step": 1, "student": Hostile()}))
    assert Checkpoints(tmp_path).latest() is None
    assert not (tmp_path / "executed").exists()


def test_metrics_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    for step in (10, 20, 30):
        metrics.write({"step": step})
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # torn by a kill
    Metrics(path, 20).write({"step": 30, "again": True})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 10}, {"step": 20}, {"step": 30, "again": True}]


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("seed: 1\nsteps: 5\nlog_every: 3\n")
    check_same_settings(path, {"seed": 1, "steps": 5, "log_every": 7})
    with pytest.raises(InputError, match="another steps"):
        check_same_settings(path, {"seed": 1, "steps": 6})
    path.write_text(f"student: {{name: a, options: {{stem: {'x' * 90}, width: 1}}}}\n")
    with pytest.raises(InputError, match=r"another student\.options\.width \(1 there, 2 here\)"):
        check_same_settings(path, {"student": {"name": "a", "options": {"stem": "x" * 90, "width": 2}}})
    for damaged in ("a: [1,\n b: }", "- 1\n", "\x00junk"):
        path.write_text(damaged)
        with pytest.raises(InputError, match=r"settings\.yaml: damaged"):
            check_same_settings(path, {"seed": 1})


def test_a_record_that_is_none_is_refused(tmp_path: Path) -> None:
    for text in ("[]", "{"):
        (tmp_path / "provenance.json").write_text(text)
        with pytest.raises(InputError, match=r"provenance\.json: not a record of a run"):
            check_same_record(tmp_path / "provenance.json", {"teacher": {}})


def test_lines_of_metrics_that_a_disk_has_garbled_are_forgotten(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe{bad\n')
    Metrics(tmp_path / "metrics.jsonl", 20)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path: Path) -> None:
    # A limit on file sizes stands for the full disk: the kernel refuses the same write.
    code = """
import resource, signal, sys, torch
from pathlib import Path
from distill.checkpoints import Checkpoints
from faceless.errors import command
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpoints = Checkpoints(Path(sys.argv[1]))
checkpoints.save(1, {"weight": torch.zeros(10)})
command(lambda: checkpoints.save(2, {"weight": torch.zeros(1_000_000)}))()
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "no space left" in done.stderr and "step-00000002.pt" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_what_a_killed_save_left_goes_with_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".tmp-0123456789ab-step-00000003.pt"
    left.write_bytes(b"half")
    Checkpoints(tmp_path).save(3, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003.pt"]
