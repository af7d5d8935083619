"""The intrinsic dimension of sets whose dimension is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from faceless.errors import InputError
from mining.intrinsic import main, two_nn
from tests.mining.tiny_corpus import network, pictures, write


@pytest.mark.parametrize("dimension", [1, 2, 5, 10])
def test_a_cube_folded_into_more_axes(dimension: int) -> None:
    numbers = np.random.default_rng(0)
    cube = numbers.random((3000, dimension))
    turn = np.linalg.qr(numbers.standard_normal((24, 24)))[0]
    folded = np.concatenate([np.sin(cube), np.cos(cube)], 1) @ turn[: 2 * dimension] if dimension < 10 else cube
    # The published estimator, too, falls short in high dimensions, where a cube is mostly edge.
    assert two_nn(folded.astype(np.float32)) == pytest.approx(dimension, rel=0.06 if dimension < 10 else 0.2)


def test_a_sphere_and_rows_that_coincide() -> None:
    rows = np.random.default_rng(1).standard_normal((2000, 4))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    assert two_nn(rows) == pytest.approx(3, rel=0.06)
    assert two_nn(np.concatenate([rows, rows, rows[:5]])) == two_nn(rows)
    for wrong, arguments in ((np.ones((9, 2), np.float32), {}), (rows, {"discard": 1.0})):
        with pytest.raises(ValueError, match=r"3|discard"):
            two_nn(wrong, **arguments)


def test_the_command_names_each_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write(tmp_path / "corpus", pictures(np.arange(60) % 6))
    models = [network(tmp_path / str(seed), seed, dim=8) for seed in range(2)]
    main(["--corpus", str(corpus), "--models", str(models), "--cache", str(tmp_path / "cache"), "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == models
    assert all(0 < float(line.split()[-2]) < 60 for line in lines)
    same = write(tmp_path / "same", pictures(np.zeros(6, int), seed=0)[:1].repeat(6, 0))
    with pytest.raises(InputError, match="1 different rows"):
        main(["--corpus", str(same), "--models", str(models), "--cache", str(tmp_path / "cache"), "--device", "cpu"])
