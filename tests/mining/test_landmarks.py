"""Landmarks of a corpus: dlib's own in real faces, none where there is no face, and work that goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.sources import CorpusSource, faces_of, read_landmarks
from faceless import align, assets
from mining import landmarks
from mining.faces import Faces
from mining.landmarks import Marking, main, mark
from tests.mining.tiny_corpus import pictures, write

pytest.importorskip("dlib")


class StoppedError(Exception):
    pass


def stopping(monkeypatch: pytest.MonkeyPatch, *times: int) -> list[int]:
    """Stops in the middle of these parts, counted from 1; the list becomes the sizes of all that are begun."""
    asked: list[int] = []
    look = landmarks.landmarks

    def counting(images: torch.Tensor, size: int) -> torch.Tensor:
        asked.append(len(images))
        if len(asked) in times:
            raise StoppedError
        return look(images, size)

    monkeypatch.setattr(landmarks, "landmarks", counting)
    return asked


def test_eyes_nose_and_mouth_of_real_faces_and_of_a_larger_copy(tmp_path: Path) -> None:
    folder = assets.fetch("att-faces")
    pixels = np.stack([np.array(Image.open(folder / f"s{s}" / "1.pgm").convert("RGB")) for s in (1, 2)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    found = landmarks.landmarks(images, 224)
    height, width = images.shape[2:]
    points = align.detect(images, points=68, detect_size=224).points
    # dlib's 68: the eyes are 36-41 and 42-47, 30 is the tip of the nose, 48 and 54 are the corners of the mouth.
    eyes = points[:, 36:42].mean(1), points[:, 42:48].mean(1)
    expected = torch.stack((*eyes, points[:, 30], points[:, 48], points[:, 54]), 1)
    torch.testing.assert_close(found, (expected + 0.5) / torch.tensor([width, height]))
    left, right, nose, *mouth = found[0]
    assert 0 < left[0] < nose[0] < right[0] < 1 and left[1] < nose[1] < mouth[0][1] < 1
    doubled = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(landmarks.landmarks(doubled, 224), found, atol=0.02, rtol=0)


def test_a_stopped_search_goes_on_and_faces_without_landmarks_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write(tmp_path / "corpus", pictures(np.arange(10) % 3))  # patterns, no faces
    monkeypatch.setattr(landmarks, "PART", 4)
    asked = stopping(monkeypatch, 2)
    settings = Marking(corpus=str(corpus), output=str(tmp_path / "out"), detect_size=80)
    with pytest.raises(StoppedError):
        mark(settings, progress=False)
    main(["--corpus", str(corpus), "--output", str(tmp_path / "out"), "--detect_size", "80"])
    assert asked == [4, 4, 4, 2], "the first part was kept"
    assert "0 of 10 faces" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["landmarks.json", "landmarks.npy"]
    found = read_landmarks(tmp_path / "out" / "landmarks.npy", 10)
    assert found.shape == (10, 5, 2) and found.isnan().all()


def test_what_is_left_of_another_corpus_or_size_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landmarks, "PART", 4)
    first, second = (write(tmp_path / name, pictures(np.arange(6) % 3, seed)) for seed, name in enumerate("ab"))
    asked = stopping(monkeypatch, 2, 4)
    out = str(tmp_path / "out")
    for corpus, size in ((first, 80), (first, 96)):
        with pytest.raises(StoppedError):
            mark(Marking(corpus=str(corpus), output=out, detect_size=size), progress=False)
    mark(Marking(corpus=str(second), output=out, detect_size=96), progress=False)
    found = CorpusSource(path=str(second), landmarks=f"{out}/landmarks.npy")
    assert faces_of(Path(found.landmark_file or "")) == Faces(second).fingerprint
    assert asked == [4, 2] * 3, "every face of the other corpus, and of the other size, was looked at"
