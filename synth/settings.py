"""The typed settings of a corpus."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from faceless.devices import chosen_device
from faceless.errors import InputError
from synth.generators.base import FaceMaker


@dataclass
class Alignment:
    """How candidates are cut to the framing of a recognizer, and which are rejected.

    Args:
        framing: ``dlib`` or ``arcface`` (which needs 68 points).
        size: side of the crops in pixels.
        padding: around dlib's chip.
        points: landmarks to predict, 5 or 68.
        detect_size: the candidate is scaled to this side for the detector, whose windows are 80 pixels wide.
        landmark_size: the same for the landmarks, which are whole pixels there.
        threshold: of the detector; lower accepts more.
        max_roll: largest rotation in the plane, degrees.
        max_misfit: largest root mean square distance of landmarks from the template, in parts of the crop's side.
    """

    framing: Literal["dlib", "arcface"] = "dlib"
    size: int = 96
    padding: float = 0.25
    points: Literal[5, 68] = 5
    detect_size: int = 100
    landmark_size: int = 192
    threshold: float = 0.0
    max_roll: float = 30.0
    max_misfit: float = 0.06

    def __post_init__(self) -> None:
        if self.framing == "arcface" and self.points != 68:
            raise InputError(f"align.points is {self.points}; the arcface framing needs 68")
        for name in ("size", "detect_size", "landmark_size"):
            if not 16 <= getattr(self, name) <= 4096:
                raise InputError(f"align.{name} is {getattr(self, name)}; it must be from 16 to 4096")


@dataclass
class Gate:
    """Floors under the quality of a face, measured on the image that is stored; 0 rejects none.

    Args:
        min_contrast: standard deviation of the luma, which is 0..255.
        min_sharpness: variance of the Laplacian of the luma (Pech-Pacheco et al., ICPR 2000); grows with sharpness, and
            with smaller images of the same face.
        min_norm: norm of the teacher's embedding before it is normalized; needs ``teacher``.
    """

    min_contrast: float = 0.0
    min_sharpness: float = 0.0
    min_norm: float = 0.0


@dataclass
class Generation:
    """A corpus to be written.

    Args:
        generator: class and constructor arguments of a `Generator`, or of an `Inverter` (`synth.inversion`).
        output: folder of the corpus; one that was begun with the same settings is finished.
        count: faces wanted.
        seed: of the latents.
        align: how candidates are cropped and rejected; null keeps them whole and rejects none.
        image_format: ``webp`` and ``png`` are lossless; ``jpeg`` takes a third of the space.
        quality: of jpeg.
        latent_dtype: latents are rounded to this type before faces are made from them, then stored; ``none`` stores
            none, which saves most of the space where the latent is noise of the size of the image.
        shard_rows: faces per parquet file.
        block: candidates per block, the unit of work; changes no face but, with the counts, the manifest.
        batch: latents per pass of the generator; faces that an inverter makes together.
        device: ``cpu``, ``cuda`` (``cuda:1`` is the second), or ``auto``, a GPU where there is one.
        workers: processes of this machine; null takes one per core; 0 works inside this process. With a GPU, this
            process draws the faces and the workers cut and encode them.
        min_acceptance: give up when fewer than this part of 4096 or more candidates are accepted.
        repair: write missing and damaged shards of a finished corpus again.
        around: draw near the latents of this parquet file (column ``latent``, as ``mining/mine.py`` writes it) instead
            of fresh ones; in proportion to its column ``score`` if it has one.
        around_scale: how near, the scale of the generator's `perturb`.
        teacher: source of a recognizer (see `faceless.load`) whose embedding of each face is stored, and the norm of
            that as its ``quality``.
        gate: floors under the quality of faces; null measures and rejects nothing.
    """

    generator: FaceMaker
    output: str = "corpora/corpus"
    count: int = 10_000
    seed: int = 0
    align: Alignment | None = field(default_factory=Alignment)
    image_format: Literal["png", "jpeg", "webp"] = "webp"
    quality: int = 95
    latent_dtype: Literal["float32", "float16", "none"] = "float32"
    shard_rows: int = 10_000
    block: int = 256
    batch: int = 32
    device: str = "cpu"
    workers: int | None = None
    min_acceptance: float = 0.01
    repair: bool = False
    around: str | None = None
    around_scale: float = 0.5
    teacher: str | None = None
    gate: Gate | None = None

    def __post_init__(self) -> None:
        for name in ("count", "shard_rows", "block", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 1 <= self.quality <= 100:
            raise InputError(f"quality is {self.quality}; it must be from 1 to 100")
        if self.workers is not None and self.workers < 0:
            raise InputError(f"workers is {self.workers}; it cannot be negative")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"seed is {self.seed}; it must be from 0 to 2^63 - 1")
        if not 0 <= self.around_scale < float("inf"):
            raise InputError(f"around_scale is {self.around_scale}; it must be 0 or more")
        if self.around is not None and not self.generator.latent_shape:
            raise InputError(f"around: {type(self.generator).__name__} has no latents to draw near")
        if self.gate is not None and self.gate.min_norm and self.teacher is None:
            raise InputError("gate.min_norm needs a teacher; name one")
        if self.latent_dtype == "float16" and self.generator.identities > 2048:
            raise InputError("latent_dtype float16 cannot number more than 2048 identities; use float32 or none")
        self.device = str(chosen_device(self.device))
