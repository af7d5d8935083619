"""The comparison with the customary scripts, on few pairs: its results agree before any time is printed."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_figures_agree_with_the_customary_route():
    options = ["--templates", "600", "--pairs", "40000", "--dim", "32", "--threads", "1"]
    printed = subprocess.run(
        [sys.executable, "scripts/bench/eval.py", *options], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    difference = re.search(r"largest difference of a score: (\S+)", printed)
    assert difference is not None and float(difference[1]) < 1e-6
    rows = [line.split() for line in printed.splitlines() if re.match(r" +1e-\d ", line)]
    assert [row[0] for row in rows] == ["1e-6", "1e-5", "1e-4", "1e-3", "1e-2", "1e-1"]
    for far, ours, fmr, theirs, _ in rows:
        assert float(fmr) <= float(far)
        if float(far) >= 1e-3:  # 39 impostors and more: the nearest point is ours or its neighbor
            assert abs(float(ours) - float(theirs)) <= 0.02
    assert "ROC: equal" in printed
    assert float(re.search(r"AUC: differs by (\S+),", printed)[1]) < 1e-9
