"""Benchmarks under worse conditions, comparisons with a gallery of clean faces, and rejection by quality."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import faceless
from eval import metrics
from eval.benchmarks import Benchmark, under
from eval.verify import main, verify
from faceless.errors import InputError
from faceless.randomness import Rng
from tests.distill.test_sources import folder


def people(count: int = 6, each: int = 3, side: int = 32) -> Benchmark:
    images = Rng.of(0, "faces", range(count * each)).integers(256, 3, side, side).byte()
    return Benchmark("noise", images, torch.arange(count).repeat_interleave(each), [str(i) for i in range(count)])


def net() -> faceless.Recognizer:
    return faceless.create("slimresnet", embedding_dim=8, input_size=32, widths=(8, 16), depths=(1, 1)).eval()


def test_conditions_change_the_faces_and_say_so() -> None:
    for condition in ("8px", "masked", "occluded", "mixed", "8px/clean"):
        worse = under(people(), condition)
        assert worse.name == f"noise {condition}" and worse.record["condition"] == condition
        assert (
            worse.images.dtype == torch.uint8 and (worse.images != people().images).any((1, 2, 3)).float().mean() > 0.5
        )
        assert (worse.gallery is not None) == condition.endswith("/clean")
    assert torch.equal(under(people(), "32px").images, people().images)
    some = under(people(), "masked/clean").subset([4, 1])
    rows = torch.tensor([3, 4, 5, 12, 13, 14])
    assert torch.equal(some.images, under(people(), "masked").images[rows])
    assert some.gallery is not None and torch.equal(some.gallery, people().images[rows])


@pytest.mark.parametrize("wrong", ["mask", "28", "0px", "2px", "px", "28px/dirty", ""])
def test_other_conditions_are_refused(wrong: str) -> None:
    with pytest.raises(InputError, match="use masked, occluded"):
        under(people(), wrong)


def test_probes_are_compared_with_the_gallery() -> None:
    network, worse = net(), under(people(), "8px/clean")
    probes, gallery = network.embed(worse.images).double(), network.embed(people().images).double()
    found = verify(network, worse, bootstrap=0)
    scores = [float(probes[i] @ gallery[j]) for i in range(18) for j in range(i + 1, 18) if i // 3 == j // 3]
    np.testing.assert_allclose(found.genuine, scores, atol=1e-6)
    assert found.summary()["condition"] == "8px/clean"


def test_rejecting_by_quality_is_sorting_and_dropping() -> None:
    random = np.random.default_rng(0)
    genuine, quality = random.normal(size=40), random.integers(0, 9, 40).astype(float)
    found = metrics.error_versus_discard(genuine, quality, 0.2, (0.0, 0.25, 0.5))
    order = sorted(range(40), key=lambda i: (quality[i], i))
    for share, drop in ((0.0, 0), (0.25, 10), (0.5, 20)):
        rest = [genuine[i] for i in order[drop:]]
        assert found[share] == pytest.approx(sum(score < 0.2 for score in rest) / len(rest))
    with pytest.raises(ValueError, match="qualities"):
        metrics.error_versus_discard(genuine, quality[:5], 0.2)


def test_the_command_takes_a_condition_and_judges_by_quality(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faceless.save(net(), tmp_path / "net", {})
    faces = folder(tmp_path / "faces")
    common = ["--model", str(tmp_path / "net"), "--benchmark", str(faces), "--bootstrap", "0"]
    main([*common, "--condition", "masked", "--quality", "true", "--json", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["condition"] == "masked" and list(written["fnmr_by_discarded"]) == [
        "0.0",
        "0.05",
        "0.1",
        "0.2",
        "0.3",
    ]
    assert "20 % rejected" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*common, "--condition", "blurred"])
    assert "blurred" in capsys.readouterr().err
    for wrong in ("9000px", ""):
        with pytest.raises(SystemExit):
            main([*common, "--condition", wrong])
        assert f"condition {wrong or repr('')}" in capsys.readouterr().err
    unit = net()
    unit.backbone.register_forward_hook(lambda module, given, found: torch.nn.functional.normalize(found))
    with pytest.raises(InputError, match="gives all faces one norm"):
        verify(unit, people(), bootstrap=0, quality=True)
