"""The killing of corpora: that it kills, that it sees a byte that differs, and memory that grows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from scripts.bench import interrupt


def test_growth_is_that_of_the_later_part() -> None:
    flat = [1.0, 50, 300, 310, 305, 300, 310, 300, 305, 300, 40]
    assert interrupt.growth(flat)["growth_mib"] == 300 - 310
    rising = [float(10 * k) for k in range(20)]
    assert interrupt.growth(rising) == {"peak_mib": 190, "early_mib": 70, "late_mib": 190, "growth_mib": 120}


def test_a_byte_that_differs_is_seen(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data" / "a.parquet").write_bytes(b"faces")
        (tmp_path / name / "settings.yaml").write_text(name)
    assert interrupt.contents(tmp_path / "one") == interrupt.contents(tmp_path / "two")
    (tmp_path / "two" / "data" / "a.parquet").write_bytes(b"Faces")
    assert interrupt.contents(tmp_path / "one") != interrupt.contents(tmp_path / "two")


@pytest.mark.slow
def test_a_small_corpus_survives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = {"class_path": "synth.generators.dcgan.DCGAN", "init_args": {"weights": None, "channels": 8}}
    recipe = {"generator": generator, "align": None, "shard_rows": 1000, "block": 64, "workers": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    interrupt.main(["--config", str(tmp_path / "recipe.yaml"), "--faces", "6000", "--kills", "3"])
    found = json.loads(capsys.readouterr().out)
    assert found["same_bytes"] and found["killed"] == 3
