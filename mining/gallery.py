"""A reference gallery without pictures: embeddings and numbers of people, made where the pictures are.

``python mining/gallery.py --faces my/people --recognizers '[dlib-resnet29, runs/quickstart/student]'``
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

import faceless
from faceless import align
from faceless.errors import InputError, command
from faceless.files import atomic_write, check_folder
from faceless.recognizer import Recognizer, resize
from faceless.settings import Settings, parse
from mining.embedding_index import Ids
from mining.faces import Floats, digest

FORMATS = ("PNG", "JPEG", "PPM", "BMP", "WEBP")
MAX_PIXELS = 40_000_000
SIDE = 150  # pixels of the crops
BATCH = 32  # of them that are embedded together


@dataclass
class Gallery:
    """Faces of known people as some recognizers see them.

    Attributes:
        identities: ``[G]`` numbers of people.
        embeddings: ``[G, D]`` as emitted, by the SHA-256 of the recognizer (`mining.faces.digest`).
        images: ``[G, 3, H, W]`` uint8, or None where only embeddings are known.
        framing: how the faces were cut, ``dlib`` or ``arcface``; None where that is not known.
    """

    identities: Ids
    embeddings: dict[str, Floats]
    images: Tensor | None = None
    framing: str | None = None

    def __len__(self) -> int:
        return len(self.identities)

    @classmethod
    def of(cls, images: Tensor, identities: Ids, recognizers: Mapping[str, Recognizer]) -> Gallery:
        """Embed pictures with recognizers, given by their digests."""
        found = _embedded(images.split(BATCH), recognizers)
        return cls(np.asarray(identities, np.int64), found, images)

    def of_rows(self, rows: Ids) -> Gallery:
        """Some of the faces."""
        found = {key: every[rows] for key, every in self.embeddings.items()}
        images = None if self.images is None else self.images[torch.from_numpy(rows)]
        return Gallery(self.identities[rows], found, images, self.framing)

    def save(self, path: str | Path) -> None:
        """Write embeddings and identities, and no picture."""
        tensors = {f"embeddings.{key}": torch.from_numpy(rows) for key, rows in self.embeddings.items()}
        tensors["identities"] = torch.from_numpy(self.identities)
        about = json.dumps({"format": "gallery", "version": 1, "framing": self.framing})
        atomic_write(path, save(tensors, {"faceless": about}))

    @classmethod
    def load(cls, path: str | Path) -> Gallery:
        """Read what `save` wrote; nothing in such a file is executed.

        Raises:
            InputError: no gallery, or embeddings of another number of faces than identities.
        """
        try:
            with safe_open(str(path), "pt") as file:
                about = json.loads((file.metadata() or {}).get("faceless", "{}"))
                if about.get("format") != "gallery" or about.get("framing") not in (None, *align.FRAMINGS):
                    raise InputError(f"{path}: is no gallery; write one with mining/gallery.py")
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: not readable as a gallery ({error})") from error
        identities = found.pop("identities", torch.empty(0, dtype=torch.int64))
        if identities.ndim != 1 or identities.is_floating_point() or identities.is_complex():
            raise InputError(f"{path}: identities are not one whole number for each face")
        for name, rows in found.items():
            if (
                rows.ndim != 2
                or len(rows) != len(identities)
                or rows.dtype != torch.float32
                or not rows.isfinite().all()
            ):
                raise InputError(f"{path}: {name} are not finite embeddings of {len(identities)} faces")
        rows = {name.removeprefix("embeddings."): tensor.numpy() for name, tensor in found.items()}
        return cls(identities.numpy().astype(np.int64), rows, framing=about.get("framing"))

    def seen_by(self, key: str, name: str) -> Floats:
        """The embeddings of a recognizer.

        Raises:
            InputError: the gallery was made with others.
        """
        if key not in self.embeddings:
            raise InputError(f"the gallery holds no embeddings of {name}; make it again with mining/gallery.py")
        return self.embeddings[key]


def _embedded(parts: Iterable[Tensor], recognizers: Mapping[str, Recognizer]) -> dict[str, Floats]:
    """Embeddings of pictures that come in parts, of which one is held at a time."""
    found: dict[str, list[Tensor]] = {key: [] for key in recognizers}
    with torch.inference_mode():
        for images in parts:
            for key, net in recognizers.items():
                found[key].append(net.eval()(images.to(net.scale.device)).embedding.float().cpu())
    return {key: torch.cat(rows).numpy() for key, rows in found.items()}


def read_people(folder: str | Path, framing: str = "dlib", aligned: bool = True) -> tuple[Tensor, Ids]:
    """Crops ``[G, 3, 150, 150]`` uint8 and people ``[G]`` of ``folder/<person>/<image>``, in order of their names.

    Args:
        aligned: whether the images are crops already; otherwise the face is found and cut to ``framing``.

    Raises:
        InputError: no folder of that form, an image that cannot be read, or one that is said to be a crop and is none.
    """
    paths, people = _people(folder)
    return torch.cat([_cut(path, framing, aligned) for path in paths]), people


def _people(folder: str | Path) -> tuple[list[Path], Ids]:
    """The images of ``folder/<person>/<image>``, and the number of the person on each."""
    paths = sorted(path for path in Path(folder).glob("*/*") if not path.name.startswith("."))
    if not paths:
        raise InputError(f"{folder}: needs one sub-folder of images for each person")
    people = sorted({path.parent for path in paths})
    number = {person: i for i, person in enumerate(people)}
    return paths, np.array([number[path.parent] for path in paths])


def _cut(path: Path, framing: str, aligned: bool) -> Tensor:
    """The crop ``[1, 3, 150, 150]`` of a photograph, or what is one already."""
    image = _read(path)
    if not aligned:
        marks = align.detect(image, points=align.native_points(framing), attempts=align.THOROUGH, whole_image=True)
        return align.crop(image, marks.points, framing, SIDE)
    if image.shape[2] != image.shape[3]:
        raise InputError(
            f"{path}: {image.shape[3]} x {image.shape[2]} pixels are no aligned square crop; "
            "use --aligned false to cut faces out of photographs"
        )
    return resize(image.float(), SIDE, SIDE).round().clamp(0, 255).to(torch.uint8)


def _read(path: Path) -> Tensor:
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.size[0] * image.size[1] > MAX_PIXELS:
                raise InputError(f"{path}: more than {MAX_PIXELS // 10**6} million pixels")
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except InputError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise InputError(f"{path}: cannot be read as an image; remove it or replace it") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


@dataclass
class Making:
    """A gallery to be made.

    Args:
        faces: folder with one sub-folder of images for each person.
        recognizers: anything `faceless.load` takes.
        output: the file.
        aligned: whether the images are crops already; otherwise faces are found and cut out (dlib).
        framing: how they are cut: as the corpus is that they will be compared with. Null takes what the recognizers
            know, if that is one framing.
    """

    faces: str
    recognizers: list[str]
    output: str = "gallery.safetensors"
    aligned: bool = True
    framing: Literal["dlib", "arcface"] | None = None

    def __post_init__(self) -> None:
        if not self.recognizers:
            raise InputError("recognizers is empty; name at least one")


def make(settings: Making, progress: bool = True) -> Gallery:
    """Embed the pictures, a few at a time, and write the gallery."""
    check_folder(Path(settings.output).parent)
    networks = [faceless.load(source) for source in settings.recognizers]
    framings = {net.spec.framing for net in networks} if settings.framing is None else {str(settings.framing)}
    if len(framings) != 1:
        raise InputError(
            f"recognizers: know crops of different framings ({', '.join(sorted(framings))}); say which: framing, as "
            "the corpus has them"
        )
    framing = framings.pop()
    paths, people = _people(settings.faces)
    starts = tqdm(range(0, len(paths), BATCH), desc="gallery", unit=f"{BATCH} faces", disable=not progress)
    parts = (torch.cat([_cut(path, framing, settings.aligned) for path in paths[i : i + BATCH]]) for i in starts)
    gallery = Gallery(people.astype(np.int64), _embedded(parts, {digest(net): net for net in networks}))
    gallery.framing = framing
    gallery.save(settings.output)
    return gallery


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the arguments of this process."""
    settings: Settings[Making] = parse(Making, arguments, program="mining/gallery.py", description=__doc__ or "")
    made = settings.build()
    gallery = make(made)
    print(f"{made.output}: {len(gallery)} faces of {len(np.unique(gallery.identities))} people, no picture")


if __name__ == "__main__":
    command(main)()
