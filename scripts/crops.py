"""Which crop of a StyleGAN's faces does a teacher tell apart best?

``python scripts/crops.py --weights weights/stylegan2 --teacher w600k_r50.pth`` draws faces once, cuts them by
SynthDistill's box, by the boxes of the ArcFace and dlib templates, and by the landmarks of each face, and prints how
the teacher's embeddings are spread for each (see `synth.survey.spread`). Effective rank and variance should be high,
cosines of two faces low; the crop that the teacher was trained with usually wins.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import faceless
from faceless import align
from faceless.devices import chosen_device
from faceless.errors import InputError, command
from faceless.files import atomic_write
from faceless.randomness import Rng
from synth.generators.stylegan import StyleGAN
from synth.survey import spread

BOXES = ("synthdistill", "arcface", "dlib")


def by_landmarks(images: Tensor, framing: str, size: int) -> Tensor:
    """Crops ``[k, 3, size, size]`` of the faces that were found among ``images [n, 3, H, W]``."""
    marks = align.detect(
        images.round().clamp(0, 255).byte().cpu(), points=68, detect_size=192, landmark_size=max(256, images.shape[-1])
    )
    return align.crop(images[marks.found].cpu(), marks.points[marks.found], framing, size)


@torch.inference_mode()
def spreads(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The teacher's spread by crop; None where fewer than two faces were found."""
    device = chosen_device(given.device)
    teacher = faceless.load(given.teacher).to(device)
    whole = StyleGAN(given.weights, truncation=given.truncation).to(device)
    boxes = {crop: StyleGAN(given.weights, crop=crop).to(device) for crop in given.crops if crop in BOXES}
    framing = teacher.spec.framing or "arcface"
    seen: dict[str, list[Tensor]] = {crop: [] for crop in given.crops}
    for rows in torch.arange(given.faces).split(given.batch):
        rng = Rng.of(given.seed, "latents", rows)
        images = whole.synthesize(whole.sample_latents(len(rows), rng))
        for crop, found in seen.items():
            faces = boxes[crop].cropped(images) if crop in boxes else by_landmarks(images, framing, 112)
            if len(faces):
                found.append(teacher(faces.to(device)).embedding.float().cpu())
    raw = {crop: torch.cat(found) if found else torch.empty(0, 1) for crop, found in seen.items()}
    return {
        crop: spread(rows, given.threshold) if len(rows) > 1 else {"faces": len(rows)} for crop, rows in raw.items()
    }


def table(found: dict[str, dict[str, Any]], asked: int) -> str:
    """Markdown, a line for each crop."""
    head = ["crop", "faces found", "mean cosine", "99.9 % of cosines below", "variance", "effective rank", "one person"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for crop, one in found.items():
        numbers = ["", "", "", "", ""]
        if "cosine" in one:
            numbers = [str(one["cosine"]["mean"]), str(one["cosine"]["p99.9"]), str(one["variance"])]
            numbers += [f"{one['effective_rank']} of {one['dimensions']}"]
            numbers += [f"{one['one_person']:.2e}" if "one_person" in one else ""]
        lines.append([crop, f"{one['faces']} of {asked}", *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="anything that StyleGAN takes; faces framed as FFHQ's")
    parser.add_argument("--teacher", default="dlib-resnet29")
    parser.add_argument("--crops", nargs="+", default=[*BOXES, "landmarks"], choices=[*BOXES, "landmarks"])
    parser.add_argument("--faces", type=int, default=2000)
    parser.add_argument("--truncation", type=float, default=1.0)
    parser.add_argument("--threshold", type=float, help="cosine from which the teacher calls two faces one person")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", help="file for the table")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    given = options().parse_args(arguments)
    if given.faces < 2 or given.batch < 1:
        raise InputError("faces must be at least 2, and batch at least 1")
    text = table(spreads(given), given.faces)
    print(text)
    if given.output is not None:
        atomic_write(Path(given.output), text + "\n")


if __name__ == "__main__":
    command(main)()
