"""Cut the faces out of a folder of photographs: ``python -m faceless.align --photos FOLDER --output FOLDER``.

Each photograph gives one aligned crop, under the same name in the same sub-folder, or a line in the report of failures.
Photographs are worked on in blocks of one folder; a block's record is written last, so a command that was stopped goes
on when it is given again and ends with the same bytes, with any number of workers. Given again later, it does only what
is new, and a photograph that is gone takes its crop along.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import faceless
from faceless import align, processes
from faceless.detectors import Detector, Dlib
from faceless.errors import InputError, command
from faceless.files import atomic_path, atomic_write
from faceless.images import natural, read_image
from faceless.settings import Settings, parse

#: Sizes that the framings were published with.
NATIVE_SIZE = {"dlib": 150, "arcface": 112}
FORMATS = {"png": ".png", "jpeg": ".jpg"}
#: Photographs of a block, and pixels of those that are in memory together.
BLOCK, BATCH_PIXELS = 32, 4_000_000
RECORDS = ".blocks"
#: What the crops do not depend on.
INCIDENTAL = ("photos", "output", "workers", "config")
#: Photographs on the contact sheet, and their side in pixels.
SHOWN, TILE, LABEL = 120, 128, 14
COLUMNS = 10


@dataclass
class Photographs:
    """Settings of ``python -m faceless.align``.

    Args:
        photos: a folder with photographs in any sub-folders. Hidden files are left out.
        output: the folder to write: crops, ``report.json``, ``landmarks.jsonl``, ``failures.jpg``.
        detector: who finds the faces; dlib with the landmarks that belong to the framing when null.
        framing: ``arcface`` or ``dlib``.
        size: of the crops in pixels; that of the framing when null (112 or 150).
        image_format: ``png``, or ``jpeg`` of quality 95.
        workers: processes; as many as there are cores when null.
    """

    photos: str
    output: str
    detector: Detector | None = None
    framing: Literal["arcface", "dlib"] = "arcface"
    size: int | None = None
    image_format: Literal["png", "jpeg"] = "png"
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None and not 16 <= self.size <= 1024:
            raise InputError(f"size is {self.size}; crops have 16 to 1024 pixels")
        if self.workers is not None and self.workers < 1:
            raise InputError(f"workers is {self.workers}; it must be 1 or more")


@dataclass(frozen=True)
class Photo:
    """One file: its name relative to the folder of photographs, and that of its crop relative to the output."""

    name: str
    crop: str
    size: int
    modified: int


@dataclass(frozen=True)
class Cutter:
    """What a worker needs to cut photographs."""

    photos: Path
    output: Path
    detector: Detector
    framing: str
    size: int
    image_format: str

    def block(self, photos: Sequence[Photo]) -> None:
        """Cut some photographs and write their record."""
        results = []
        for group, found in self._batches(photos):
            if isinstance(found, str):
                results.append({"photo": group[0].name, "failure": found})
            else:
                results += self._cut(group, found)
        record = {"files": [list(vars(photo).values()) for photo in photos], "results": results}
        atomic_write(self.record(photos), json.dumps(record))

    def record(self, photos: Sequence[Photo]) -> Path:
        """Where a block's record is, by what the block consists of."""
        names = json.dumps([[photo.name, photo.crop, photo.size, photo.modified] for photo in photos])
        return self.output / RECORDS / f"{hashlib.sha256(names.encode()).hexdigest()[:32]}.json"

    def results(self, photos: Sequence[Photo]) -> list[dict[str, Any]] | None:
        """What a finished block's record says; None where there is none, or a crop is missing."""
        try:
            found = json.loads(self.record(photos).read_text())
            results: list[dict[str, Any]] = found["results"]
            whole = all((self.output / result["crop"]).is_file() for result in results if "crop" in result)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return results if whole and len(results) == len(photos) else None

    def _batches(self, photos: Sequence[Photo]) -> Iterator[tuple[list[Photo], Tensor | str]]:
        """Neighbors of equal size together ``[N, 3, H, W]``; what cannot be read by itself, with the reason."""
        group: list[Photo] = []
        images: list[Tensor] = []
        for photo in photos:
            image = self._read(photo)
            fits = isinstance(image, Tensor) and (len(images) + 1) * image[0].numel() <= BATCH_PIXELS
            if images and not (isinstance(image, Tensor) and fits and image.shape == images[0].shape):
                yield group, torch.stack(images)
                group, images = [], []
            if isinstance(image, str):
                yield [photo], image
            else:
                group.append(photo)
                images.append(image)
        if images:
            yield group, torch.stack(images)

    def _read(self, photo: Photo) -> Tensor | str:
        """A photograph, or why it is none."""
        path = self.photos / photo.name
        try:
            return read_image(path)
        except InputError as error:
            return str(error).removeprefix(f"{path}: ")
        except OSError as error:
            return error.strerror or type(error).__name__

    def _cut(self, photos: Sequence[Photo], images: Tensor) -> list[dict[str, Any]]:
        found = self.detector.find(images)
        rows = found.found.nonzero().squeeze(1)
        crops = iter(align.crop(images[rows], found.points[rows], self.framing, self.size, scheme=self.detector.scheme))
        results: list[dict[str, Any]] = []
        for row, photo in enumerate(photos):
            if not found.found[row]:
                results.append({"photo": photo.name, "failure": "no face found"})
                continue
            atomic_write(self.output / photo.crop, encode(next(crops), self.image_format))
            results.append(
                {
                    "photo": photo.name,
                    "crop": photo.crop,
                    "score": round(float(found.score[row]), 4),
                    "attempt": int(found.attempt[row]) + 1,
                    "faces": int(found.faces[row]),
                    "points": [[round(value, 2) for value in point] for point in found.points[row].tolist()],
                }
            )
        return results


def encode(crop: Tensor, image_format: str) -> bytes:
    """``[3, H, W]`` uint8 as the bytes of a file, without metadata."""
    buffer = io.BytesIO()
    options = {"quality": 95} if image_format == "jpeg" else {"compress_level": 6}
    Image.fromarray(crop.permute(1, 2, 0).numpy()).save(buffer, image_format.upper(), **options)
    return buffer.getvalue()


def listing(folder: Path, suffix: str) -> list[list[Photo]]:
    """All files below a folder in blocks, each of one sub-folder.

    Raises:
        InputError: there is no such folder, or no file in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of photographs")
    paths: list[Path] = []
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [Path(where, name) for name in files if not name.startswith(".")]
    blocks: list[list[Photo]] = []
    for parent, group in groupby(sorted(paths, key=lambda p: (p.parent.as_posix(), natural(p), p.name)), _parent):
        files_here = [path for path in group if path.is_file()]
        stems, names = Counter(path.stem for path in files_here), {path.name for path in files_here}
        photos = []
        for path in files_here:
            name = path.relative_to(folder).as_posix()
            # Two files of one name but for the suffix keep theirs.
            alone = stems[path.stem] == 1 and path.stem not in names
            crop = (parent / (path.stem if alone else path.name)).relative_to(folder).as_posix()
            status = path.stat()
            photos.append(Photo(name, crop + suffix, status.st_size, status.st_mtime_ns))
        blocks += [photos[start : start + BLOCK] for start in range(0, len(photos), BLOCK)]
    if not blocks:
        raise InputError(f"{folder}: holds no files")
    return blocks


def _parent(path: Path) -> Path:
    return path.parent


def align_photographs(settings: Settings[Photographs], progress: bool = True) -> dict[str, Any]:
    """Cut all photographs, or those that are not cut yet, and write the report.

    Returns:
        What ``report.json`` holds.

    Raises:
        InputError: no photographs, an output that holds something else, or a detector that does not fit the framing.
    """
    made = settings.build()
    photos, output = Path(made.photos), Path(made.output)
    nested = photos.resolve(), output.resolve()
    if nested[0] == nested[1] or nested[0] in nested[1].parents or nested[1] in nested[0].parents:
        raise InputError(f"{output}: one of photos and output lies in the other; choose another output")
    detector = made.detector or Dlib(points=align.native_points(made.framing))
    if detector.scheme == "dlib5" and made.framing == "arcface":
        raise InputError("detector: an arcface crop needs 68 of dlib's points, not 5; use --detector.points 68")
    size = made.size or NATIVE_SIZE[made.framing]
    cutter = Cutter(photos, output, detector, made.framing, size, made.image_format)
    blocks = listing(photos, FORMATS[made.image_format])
    # Weights are fetched, and what is wrong with them shows, once and before anything is written.
    detector.find(torch.zeros(1, 3, 96, 96, dtype=torch.uint8))
    content = {key: value for key, value in settings.asdict().items() if key not in INCIDENTAL}
    content |= detector.provenance()
    _claim(output, content)

    for left in output.rglob(f".tmp-{'[0-9a-f]' * 12}-*"):  # of a command that was killed
        left.unlink(missing_ok=True)
    before = _crops_before(output)
    # What will be written is on record first: a crop whose block was never finished can then be told from others.
    plan = {"files": [list(vars(photo).values()) for block in blocks for photo in block]}
    atomic_write(output / RECORDS / "plan.json", json.dumps(plan))
    todo = [block for block in blocks if cutter.results(block) is None]
    with tqdm(total=sum(map(len, blocks)), desc="align", unit="photo", disable=not progress) as bar:
        bar.update(sum(map(len, blocks)) - sum(map(len, todo)))
        for done in _all(cutter, todo, made.workers):
            bar.update(done)

    results = [result for block in blocks for result in cutter.results(block) or ()]
    report = _report(results, content)
    for name in sorted(before - {result.get("crop", "") for result in results}):
        (output / name).unlink(missing_ok=True)
    current = {cutter.record(block).name for block in blocks}
    for path in (output / RECORDS).glob("*.json"):
        if path.name not in {*current, "settings.json", "plan.json"}:
            path.unlink()
    atomic_write(
        output / "landmarks.jsonl", "".join(json.dumps(result) + "\n" for result in results if "crop" in result)
    )
    _contact_sheet(output / "failures.jpg", photos, [failure["photo"] for failure in report["failures"]])
    # Last: its presence means that all is done.
    atomic_write(output / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def _claim(output: Path, content: dict[str, Any]) -> None:
    """Take an empty folder, or one in which the same was begun."""
    claim = output / RECORDS / "settings.json"
    if claim.is_file():
        try:
            begun = json.loads(claim.read_text())
        except ValueError as error:
            raise InputError(f"{claim}: not JSON; delete the folder {output}") from error
        if begun != content:
            key = next((k for k in content if not isinstance(begun, dict) or begun.get(k) != content[k]), "settings")
            raise InputError(f"{output}: holds crops of another {key}; choose another output or delete the folder")
        (output / "report.json").unlink(missing_ok=True)
        return
    if output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output}: is not empty and holds no crops of this command; choose another output")
    atomic_write(claim, json.dumps(content))


def _crops_before(output: Path) -> set[str]:
    """Crops of all records and of the last plan; names that lead out of the output are none."""
    names: set[str] = set()
    for path in (output / RECORDS).glob("*.json"):
        try:
            names |= {photo[1] for photo in json.loads(path.read_text())["files"]}
        except (ValueError, KeyError, TypeError, IndexError):
            continue
    return {
        name
        for name in names
        if isinstance(name, str) and name.endswith(tuple(FORMATS.values())) and not PurePosixPath(name).is_absolute()
        if ".." not in PurePosixPath(name).parts
    }


_cutter: Cutter | None = None


def _start_worker(pickled: bytes) -> None:
    global _cutter
    torch.set_num_threads(1)
    _cutter = pickle.loads(pickled)  # of our own making, from the parent process
    processes.end_quietly()


def _work(photos: list[Photo]) -> int:
    assert _cutter is not None
    _cutter.block(photos)
    return len(photos)


def _all(cutter: Cutter, blocks: list[list[Photo]], workers: int | None) -> Iterator[int]:
    """Cut blocks in this process or in several; yields how many photographs each had."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(workers or cores, len(blocks))
    if count <= 1:
        for block in blocks:
            cutter.block(block)
            yield len(block)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _start_worker, (pickle.dumps(cutter),)) as pool:
        with processes.starting_workers():
            waiting = {pool.submit(_work, block) for block in blocks}
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _report(results: Sequence[dict[str, Any]], content: dict[str, Any]) -> dict[str, Any]:
    aligned = [result for result in results if "crop" in result]
    failures = [result for result in results if "crop" not in result]
    return {
        "faceless": faceless.__version__,
        "photographs": len(results),
        "aligned": len(aligned),
        "failure_reasons": dict(Counter(failure["failure"] for failure in failures).most_common()),
        "found_at_attempt": dict(sorted(Counter(str(result["attempt"]) for result in aligned).items())),
        "failures": failures,
        "several_faces": [{"photo": r["photo"], "faces": r["faces"]} for r in aligned if r["faces"] > 1],
        "settings": content,
    }


def _contact_sheet(path: Path, photos: Path, names: Sequence[str]) -> None:
    """The first photographs that gave no crop; none when all did."""
    if not names:
        path.unlink(missing_ok=True)
        return
    shown = names[:SHOWN]
    rows = -(-len(shown) // COLUMNS)
    columns = min(COLUMNS, len(shown))
    sheet = Image.new("RGB", (columns * (TILE + 6) + 6, rows * (TILE + LABEL + 8) + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for number, name in enumerate(shown):
        left, top = 6 + number % columns * (TILE + 6), 6 + number // columns * (TILE + LABEL + 8)
        try:
            image = Image.fromarray(read_image(photos / name).permute(1, 2, 0).numpy())
            image.thumbnail((TILE, TILE))
            sheet.paste(image, (left + (TILE - image.width) // 2, top + (TILE - image.height) // 2))
        except (InputError, OSError):
            draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), outline="#8b939d", fill="#f6f7f9")
            draw.text((left + 8, top + TILE // 2 - 6), "not an image", fill="#5d6672")
        text = "".join(c if 32 <= ord(c) < 127 else "?" for c in name)
        draw.text((left, top + TILE + 1), text if len(text) <= 21 else "~" + text[-20:], fill="#22262b")
    with atomic_path(path) as temporary:
        sheet.save(temporary, "JPEG", quality=90)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse(
        Photographs, arguments, program="python -m faceless.align", description=(__doc__ or "").split("\n\n")[0]
    )
    report = align_photographs(settings)
    print(f"{report['aligned']:,} of {report['photographs']:,} photographs aligned")
    for reason, count in report["failure_reasons"].items():
        print(f"{count:,}: {reason}")
    if report["several_faces"]:
        print(f"{len(report['several_faces']):,} show several faces, of which one was cut out")
