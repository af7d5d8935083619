"""Does a recognizer get its pixels as it was trained to? Its convention against the customary others, on real faces.

python eval/conventions.py --model w600k_r50.onnx

A wrong mean, range or order of channels raises no error; it costs accuracy, and a student learns from a teacher that
sees badly. Two measures, on a few AT&T faces of people 1 to 20:

- mismatch: how far the faces' statistics are from those that batch normalizations remember from training, in standard
  deviations, averaged over channels and layers. Sharp, and needs no identities; networks without BN have none.
- separation: the distance between the scores of genuine and impostor pairs in standard deviations (d').

AT&T is gray, and gray faces look the same as RGB and as BGR. The order is asked of the same faces in the colors of
skin: brightness decides how red, which is a stand-in; for the last word, use color faces of your own. What differs by
a percent, (x - 127.5) / 127.5 and (x - 127.5) / 128, cannot be told apart and need not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

import faceless
from eval import benchmarks, metrics
from eval.benchmarks import Benchmark
from eval.verify import NATIVE_SIZE, crop_size
from faceless import settings
from faceless.devices import chosen_device
from faceless.errors import InputError, command
from faceless.recognizer import InputSpec, Recognizer

#: Mean, standard deviation and what 255 becomes, each for all channels or for red, green and blue.
CUSTOMARY: dict[str, tuple[Any, Any, float]] = {
    "(x - 127.5) / 127.5": (127.5, 127.5, 255.0),
    "x / 255": (0.0, 1.0, 1.0),
    "x": (0.0, 1.0, 255.0),
    "ImageNet's mean and std": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1.0),
    "(x - dlib's mean) / 256": ((122.782, 117.001, 104.298), 256.0, 255.0),
}
PEOPLE, FACES = 10, 4
#: By how much another convention must be better before it is believed, per measure.
MARGINS = {"mismatch": 0.08, "separation": 0.05}
POOR = 1.0  # separation of a network that hardly knows faces


@dataclass(frozen=True)
class Trial:
    """What a recognizer makes of faces that are handed over in one way."""

    convention: str
    spec: InputSpec
    mismatch: float | None
    separation: float
    eer: float


@dataclass(frozen=True)
class Check:
    """The declared convention, others, and what looks wrong."""

    declared: Trial
    others: tuple[Trial, ...]
    warnings: tuple[str, ...]

    def table(self) -> str:
        """For people."""
        rows = [f"{'convention':<44} mismatch  separation   EER %"]
        for trial in (self.declared, *self.others):
            mismatch = "       -" if trial.mismatch is None else f"{trial.mismatch:8.3f}"
            rows.append(f"{trial.convention:<44} {mismatch}  {trial.separation:10.3f}  {100 * trial.eer:6.2f}")
        return "\n".join([*rows, *(f"warning: {line}" for line in self.warnings)])


def tinted(images: Tensor) -> Tensor:
    """Gray faces in the colors of skin, ``[N, 3, H, W]`` float in 0..255: the darker, the redder."""
    gray = images.float().mean(1) / 255
    return 255 * torch.stack([gray**0.75, 0.9 * gray, 0.85 * gray**1.2], 1)


def few(benchmark: Benchmark, people: int = PEOPLE, faces: int = FACES) -> Benchmark:
    """The first faces of the first people."""
    rows = [
        row
        for person in range(min(people, len(benchmark.names)))
        for row in torch.nonzero(benchmark.identities == person).flatten()[:faces].tolist()
    ]
    return replace(benchmark, images=benchmark.images[rows], identities=benchmark.identities[rows])


def check(recognizer: Recognizer, faces: Benchmark, other_framing: Benchmark | None = None) -> Check:
    """Try the declared convention and the customary others.

    Args:
        recognizer: any; its ``spec`` is the declared convention.
        faces: gray ones, cropped to the framing of ``spec``; every person several times.
        other_framing: the same faces in the other framing, if that is to be tried as well.

    Raises:
        InputError: there are no genuine or no impostor pairs among the faces.
    """
    if not faces.genuine_pairs or not faces.impostor_pairs:
        raise InputError(f"{faces.name}: several faces each of several people are needed to judge conventions")
    spec = recognizer.spec
    declared = _try(recognizer, _declared(spec), spec, faces)
    order = "BGR" if spec.channel_order == "RGB" else "RGB"
    # A mean belongs to its color and moves with it.
    swapped = replace(spec, channel_order=order, mean=spec.mean[::-1], std=spec.std[::-1])
    others = [_try(recognizer, f"{order}, else the same", swapped, faces)]
    for name, (mean, std, value_range) in CUSTOMARY.items():
        mean, std = ([value] * 3 if isinstance(value, float) else list(value) for value in (mean, std))
        if spec.channel_order == "BGR":
            mean, std = mean[::-1], std[::-1]
        trial = replace(spec, mean=tuple(mean), std=tuple(std), value_range=value_range)
        if not _alike(trial, spec):
            others.append(_try(recognizer, f"{spec.channel_order}, {name}", trial, faces))
    if other_framing is not None:
        others.append(_try(recognizer, f"{other_framing.record['framing']} framing", spec, other_framing))
    return Check(declared, tuple(others), tuple(_warnings(declared, others)))


def _declared(spec: InputSpec) -> str:
    mean, std = ("/".join(f"{v:g}" for v in dict.fromkeys(values)) for values in (spec.mean, spec.std))
    return f"{spec.channel_order}, mean {mean}, std {std} of {spec.value_range:g} (declared)"


def _alike(one: InputSpec, other: InputSpec) -> bool:
    """Whether black and white arrive as the same numbers, to a few percent of their distance."""
    ends = [
        np.array([[(value * s.value_range - m) / d for value in (0.0, 1.0)] for m, d in zip(s.mean, s.std)])
        for s in (one, other)
    ]
    return bool(np.abs(ends[0] - ends[1]).max() <= 0.03 * np.ptp(ends[1], axis=1).min())


def _try(recognizer: Recognizer, name: str, spec: InputSpec, faces: Benchmark) -> Trial:
    trial = Recognizer(recognizer.backbone, spec).to(recognizer.scale.device).eval()
    norms = [m for m in trial.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    off: list[Tensor] = []

    def note(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        mean = inputs[0].mean([0, *range(2, inputs[0].ndim)])
        off.append(((mean - norm.running_mean) / (norm.running_var + norm.eps).sqrt()).abs().mean())

    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        embeddings = trial.embed(tinted(faces.images), batch_size=len(faces))
    finally:
        for hook in hooks:
            hook.remove()
    scores = (embeddings @ embeddings.T).double().numpy()
    pairs = np.triu_indices(len(faces), 1)
    same = (faces.identities[:, None] == faces.identities[None, :]).numpy()[pairs]
    genuine, impostor = scores[pairs][same], scores[pairs][~same]
    if not np.isfinite(scores).all():
        return Trial(name, spec, None, 0.0, 0.5)
    spread = float(np.sqrt((genuine.var() + impostor.var()) / 2))
    separation = float(genuine.mean() - impostor.mean()) / max(spread, 1e-9)
    mismatch = float(torch.stack(off).mean()) if off else None
    return Trial(name, spec, mismatch, separation, metrics.eer(genuine, impostor))


def _warnings(declared: Trial, others: Sequence[Trial]) -> list[str]:
    lines = []
    if declared.mismatch is not None:
        best = min((t for t in others if t.mismatch is not None), key=lambda t: t.mismatch or 0.0, default=declared)
        if (best.mismatch or 0.0) < (1 - MARGINS["mismatch"]) * declared.mismatch:
            lines.append(
                f"faces as {best.convention} fit the network's statistics better than as declared "
                f"({best.mismatch:.3f} against {declared.mismatch:.3f} standard deviations); {_remedy(best)}"
            )
    else:
        best = max(others, key=lambda t: t.separation)
        if best.separation > (1 + MARGINS["separation"]) * declared.separation:
            lines.append(
                f"faces as {best.convention} are told apart better than as declared (separation {best.separation:.2f} "
                f"against {declared.separation:.2f}); {_remedy(best)}"
            )
    if declared.separation < POOR:
        lines.append(
            f"the faces of different people are hardly told apart (separation {declared.separation:.2f}): the network "
            "is untrained, or no face recognizer, or wants its pixels in a way that is not among these"
        )
    return lines


def _remedy(best: Trial) -> str:
    if best.convention.endswith("framing"):
        return "crop faces in that framing"
    spec = best.spec
    return (
        f"if that is so, load it with spec=InputSpec({spec.height}, {spec.width}, mean={spec.mean}, std={spec.std}, "
        f"channel_order={spec.channel_order!r}, value_range={spec.value_range:g})"
    )


def parser() -> ArgumentParser:
    options = ArgumentParser(
        prog="eval/conventions.py", description="Try how a recognizer wants its pixels.", exit_on_error=False
    )
    options.add_argument(
        "--model", required=True, metavar="SOURCE", help="name, folder or file that faceless.load reads"
    )
    options.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda")
    return options


@command
def main(arguments: Sequence[str] | None = None) -> None:
    options = settings.options(parser(), arguments)
    device = chosen_device(options.device, "--device")
    recognizer = faceless.load(options.model).to(device)
    framing = recognizer.spec.framing
    (other,) = set(NATIVE_SIZE) - {framing}
    # People 21 to 40 are for reporting alone.
    faces = few(benchmarks.load("att-faces", framing, crop_size(recognizer)).subset(range(20)))
    others = few(benchmarks.load("att-faces", other, NATIVE_SIZE[other]).subset(range(20)))
    print(check(recognizer, faces, others).table())


if __name__ == "__main__":
    main()
