"""Audit a corpus: near-duplicates, diversity, balance, and whether it leaks people of a reference gallery.

``python mining/audit.py --corpus corpora/quickstart --recognizers '[dlib-resnet29, hse-faceres]'
--reference reference.safetensors --null others.safetensors``
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

import faceless
from faceless.devices import chosen_device
from faceless.errors import InputError, command
from faceless.files import atomic_path, atomic_write, check_folder, sha256
from faceless.recognizer import resize
from faceless.settings import Settings, parse
from mining import figures
from mining.embedding_index import EmbeddingIndex, Floats, Ids
from mining.faces import Faces, check_framing, digest, embeddings, unit
from mining.gallery import Gallery, read_people
from mining.identities import SEEDS, cluster
from mining.leakage import ALIKE, Leakage, check_strangers, leakage, like, some, thresholds_of

HASH = 64  # bits of a perceptual hash
LISTED = 16  # nearest faces among which duplicates are looked for first
PAIRS = 1 << 22  # of a crowd of duplicates that are in memory together
AUDIT_SECTION = re.compile(r"\n## Audit\n.*?(?=\n## |\Z)", re.DOTALL)
ONES = np.array([number.bit_count() for number in range(1 << 16)], np.uint8)


@dataclass
class Audit:
    """What to look for.

    Args:
        corpus: folder of parquet shards.
        recognizers: the teacher, then at least one other that judges leakage with it.
        reference: the people who must not be in the corpus, such as those the generator was trained on: a file of
            `mining/gallery.py`, or a folder with one sub-folder of images for each person; null leaves leakage out.
        null: at least as many people whom the generator never saw, with as many faces, in the same form: what chance
            alone finds.
        aligned: whether folders of images hold crops already.
        output: folder of the results.
        fmrs: false match rates of the thresholds, calibrated on pairs of different people in the reference.
        verdict_fmr: the one that the verdict is spoken at.
        duplicate_cosine, duplicate_bits: near-duplicates have a (centered) cosine of the first recognizer of at least
            so much and perceptual hashes that differ in at most so many of 64 bits; identical files always are.
        sample: faces of the Vendi score, which can only be compared between samples of one size.
        cells: clusters over which balance is measured.
        neighbors: k of coverage.
        shown: closest pairs that are shown.
        remove: a new folder for the corpus without near-duplicates and leaks; null writes none.
        datasheet: also write the verdict into the corpus's ``DATASHEET.md``.
        cache, device: see ``mining/mine.py``.
        seed: of samples and clusters.
    """

    corpus: str
    recognizers: list[str] = field(default_factory=lambda: ["dlib-resnet29"])
    reference: str | None = None
    null: str | None = None
    aligned: bool = True
    output: str = "audits/audit"
    fmrs: list[float] = field(default_factory=lambda: [1e-3, 1e-4, 1e-5, 1e-6])
    verdict_fmr: float = 1e-4
    duplicate_cosine: float = 0.95
    duplicate_bits: int = 10
    sample: int = 5000
    cells: int = 64
    neighbors: int = 5
    shown: int = 48
    remove: str | None = None
    datasheet: bool = False
    cache: str = "mined/cache"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.reference is not None and (len(self.recognizers) < 2 or self.null is None):
            raise InputError(
                "reference: leakage needs two recognizers or more, of which one is not the teacher, and a null gallery "
                "of people whom the generator never saw"
            )
        if self.null is not None and self.reference is None:
            raise InputError("null: tells what chance finds in a reference; name the reference too")
        if not self.recognizers:
            raise InputError("recognizers is empty; name at least one")
        for name, least in (("sample", 1), ("cells", 1), ("neighbors", 1), ("shown", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.fmrs or not all(0 < fmr < 1 for fmr in self.fmrs):
            raise InputError("fmrs needs rates between 0 and 1")
        if self.reference is not None and self.verdict_fmr not in self.fmrs:
            raise InputError(f"verdict_fmr {self.verdict_fmr} is not among fmrs")
        if not -1 <= self.duplicate_cosine <= 1:
            raise InputError(f"duplicate_cosine is {self.duplicate_cosine}; it must be within -1..1")
        if not 0 <= self.duplicate_bits <= HASH:
            raise InputError(f"duplicate_bits is {self.duplicate_bits}; it must be within 0..{HASH}")
        if self.seed not in SEEDS:
            raise InputError(f"seed is {self.seed}; it must be within 0..{SEEDS[-1]}")


def perceptual_hashes(images: Tensor) -> np.ndarray:
    """``[N]`` uint64: which of the 63 lowest frequencies of a face are above their median.

    Type-II cosine transform of the 32 x 32 gray image; the constant term stays out (its bit is 0).
    """
    gray = (images.float() * images.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32).view(1, 3, 1, 1)).sum(1)
    small = resize(gray[:, None].expand(-1, 3, -1, -1), 32, 32)[:, 0].double()
    place = torch.arange(32, dtype=torch.float64)
    basis = torch.cos(math.pi / 32 * (place + 0.5) * torch.arange(8, dtype=torch.float64)[:, None])
    low = torch.einsum("kh,nhw,lw->nkl", basis, small, basis).flatten(1)[:, 1:]
    bits = (low > low.median(1, keepdim=True).values).numpy().astype(np.uint64)
    found: np.ndarray = (bits << np.arange(HASH - 1, dtype=np.uint64)).sum(1, dtype=np.uint64)
    return found


def differing_bits(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """``[P]`` number of bits in which two hashes differ."""
    found: np.ndarray = ONES[(first ^ second).view(np.uint16).reshape(-1, 4)].sum(1)
    return found


def groups(count: int, first: Ids, second: Ids) -> Ids:
    """``[count]``: the smallest number that each number is connected with by pairs.

    >>> groups(5, np.array([0, 3]), np.array([3, 4])).tolist()
    [0, 1, 2, 0, 0]
    """
    root = np.arange(count)
    while True:
        a, b = root[first], root[second]
        if (a == b).all():
            return root
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while (root[root] != root).any():
            root = root[root]


def near_duplicates(faces: Faces, rows: Floats, raw: Floats, cosine: float, bits: int) -> tuple[Ids, Ids]:
    """Group ``[N]`` of each face (`groups`), and which face of its group stays ``[N]``.

    Of a group stays the face of the highest detector score, or else the first.

    Args:
        rows: centered embeddings ``[N, D]``, in which near-duplicates are at least as near as ``cosine``.
        raw: unit embeddings not centered. Where nearly all faces are one, nothing but noise is left when their mean is
            taken away, so that faces also count that are `ALIKE` here.
        bits: in which the perceptual hashes of either may differ; identical files need not be compared.
    """
    everybody = np.arange(len(rows))
    files = np.empty(len(rows), "V16")
    for start in range(0, len(rows), 1024):
        part = range(start, min(start + 1024, len(rows)))
        files[start : part.stop] = [hashlib.blake2b(data, digest_size=16).digest() for data in faces.encoded(part)]
    _, first_of, number = np.unique(files, return_index=True, return_inverse=True)
    group = groups(len(rows), first_of[number], everybody)
    hashes, hashed = np.zeros(len(rows), np.uint64), np.zeros(len(rows), bool)

    def joined(group: Ids, first: Ids, second: Ids) -> Ids:
        missing = np.unique(np.concatenate((first, second)))
        missing = missing[~hashed[missing]]
        for start in range(0, len(missing), 1024):
            part = missing[start : start + 1024]
            hashes[part] = perceptual_hashes(faces.images(part.tolist()))
        hashed[missing] = True
        alike = differing_bits(hashes[first], hashes[second]) <= bits
        return groups(len(rows), np.concatenate((first[alike], everybody)), np.concatenate((second[alike], group)))

    for points, least in ((rows, cosine), (raw, ALIKE)):
        index = EmbeddingIndex.of(points)
        cosines, ids = index.neighbors(points, LISTED)
        above = cosines >= least
        group = joined(group, np.repeat(everybody, above.sum(1)), ids[above])
        # Whose list is full may have more: a generator that collapsed has crowds, of which memory holds a part.
        crowded = np.flatnonzero(above.all(1)) if above.shape[1] < len(rows) - 1 else everybody[:0]
        step = max(1, min(64, PAIRS // len(rows)))
        # Identical files find the same: one of them asks.
        asking = np.unique(first_of[number[crowded]])
        for start in range(0, len(asking), step):
            asked = asking[start : start + step]
            limits, _, second = index.within(points[asked], least)
            group = joined(group, np.repeat(asked, np.diff(limits)), second)
    quality = faces.column("score") if "score" in faces.columns else np.zeros(len(rows))
    order = np.lexsort((np.arange(len(rows)), -quality, group))
    stays = np.empty(len(rows), np.int64)
    _, starts, inverse = np.unique(group[order], return_index=True, return_inverse=True)
    stays[order] = order[starts][inverse]
    return group, stays


def vendi(rows: Floats) -> float:
    """Effective number of different faces, exp of the entropy of the eigenvalues of K / n, for cosine kernel K.

    Friedman, Dieng: The Vendi score, TMLR 2023. At most min(n, D) for unit ``rows [n, D]``; compare at equal n.

    >>> round(vendi(np.eye(4, dtype=np.float32)), 6)
    4.0
    """
    values = np.linalg.eigvalsh(rows.astype(np.float64).T @ rows / len(rows))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def coverage(reference: Floats, rows: Floats, k: int = 5) -> float:
    """Share of reference faces with a face of ``rows`` within the distance of their k-th reference neighbor.

    Naeem et al.: Reliable fidelity and diversity metrics for generative models, ICML 2020, equation 6.
    """
    radius = EmbeddingIndex.of(reference, metric="l2").neighbors(reference, k)[0][:, -1]
    nearest = EmbeddingIndex.of(rows, metric="l2").search(reference, 1)[0][:, 0]
    return float((nearest <= radius).mean())


def balance(rows: Floats, cells: int, seed: int, reference: Floats | None = None) -> dict[str, float]:
    """How evenly faces fill the embedding space; no attribute of anybody is estimated.

    The space is cut into the cells of a spherical k-means on ``rows``, or on the reference where there is one.

    Returns:
        ``effective_cells``: exp of the entropy of the cells' shares, over their number; ``largest``, ``smallest``
        shares; with a reference ``divergence``, of Jensen and Shannon, in bits, from the reference's shares.
    """
    ground = rows if reference is None else reference
    cells = min(cells, len(ground))
    centers, _ = cluster(ground, cells, seed=seed)
    index = EmbeddingIndex.of(centers)

    def shares(points: Floats) -> np.ndarray:
        return np.bincount(index.search(points, 1)[1][:, 0], minlength=cells) / len(points)

    p = shares(rows)
    found = {"cells": float(cells), "effective_cells": float(np.exp(entropy(p)) / cells)}
    found |= {"largest": float(p.max()), "smallest": float(p.min())}
    if reference is not None:
        q = shares(reference)
        found["divergence"] = (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2) / math.log(2)
    return found


def entropy(shares: np.ndarray) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())


def check_removal(faces: Faces, output: Path) -> None:
    """Whether `without` can do it.

    Raises:
        InputError: the folder is there already, or the faces have no manifest or no numbers.
    """
    if output.exists():
        raise InputError(f"remove: {output} is there already; name a new folder")
    check_folder(output)
    if not faces.manifest or "index" not in faces.columns:
        raise InputError(
            f"{faces.folder}: has no manifest.json, or no column index; only a corpus of synth/generate.py can be "
            "copied without rows"
        )


def without(faces: Faces, keep: np.ndarray, output: str | Path) -> None:
    """Write the corpus again without some rows: same shards, same columns, a manifest that says so.

    The folder is there when all of it is; what a killed command left beside it is written anew.

    Raises:
        InputError: as `check_removal`.
    """
    finished = Path(output)
    check_removal(faces, finished)
    output = finished.with_name(f".unfinished-{finished.name}")
    shutil.rmtree(output, ignore_errors=True)
    shards = []
    for number, (path, file) in enumerate(zip(faces.paths, faces.files)):
        chosen = keep[faces.starts[number] : faces.starts[number + 1]]
        if not chosen.any():
            continue
        name = path.relative_to(faces.folder)
        waiting: list[pa.Table] = []
        with atomic_path(output / name) as temporary, temporary.open("wb") as target:
            # As synth/generate.py lays shards out: faces can be read from them one by one.
            layout: dict[str, Any] = {"compression": "NONE", "use_dictionary": False, "write_statistics": False}
            with pq.ParquetWriter(target, file.schema_arrow, data_page_size=1 << 30, **layout) as writer:
                at = 0
                for group in range(file.num_row_groups):
                    rows = file.read_row_group(group)
                    waiting.append(rows.filter(pa.array(chosen[at : at + rows.num_rows])))
                    at += rows.num_rows
                    table = pa.concat_tables(waiting)
                    whole = table.num_rows // 256 * 256 if group < file.num_row_groups - 1 else table.num_rows
                    if whole:
                        writer.write_table(table.slice(0, whole).combine_chunks(), row_group_size=256)
                    waiting = [table.slice(whole)]
        index = file.read(columns=["index"])["index"].filter(pa.array(chosen))
        shards.append(
            {
                "name": str(name),
                "rows": int(chosen.sum()),
                "first": index[0].as_py(),
                "last": index[-1].as_py(),
                "bytes": (output / name).stat().st_size,
                "sha256": sha256(output / name),
            }
        )
    removed = int((~keep).sum())
    manifest = faces.manifest | {"rows": int(keep.sum()), "shards": shards, "removed_by_audit": removed}
    if (faces.folder / "settings.yaml").is_file():
        shutil.copyfile(faces.folder / "settings.yaml", output / "settings.yaml")
    if (sheet := faces.folder / "DATASHEET.md").is_file():
        text = AUDIT_SECTION.sub("", sheet.read_text("utf-8"))  # it was said of other rows
        text = text.replace(f"- {len(keep):,} generated", f"- {manifest['rows']:,} generated", 1)
        told = f"{removed:,} of {len(keep):,} faces were removed as near-duplicates of others, or as leaks."
        atomic_write(output / "DATASHEET.md", f"{text.rstrip()}\n\n## Removed\n{told}\n")
    atomic_write(output / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    output.replace(finished)


def audit(settings: Audit, progress: bool = True) -> dict[str, Any]:
    """Look for all of it; write ``audit.json``, ``AUDIT.md``, tables and pictures, and return the figures."""
    faces, output = Faces(settings.corpus), Path(settings.output)
    check_folder(output)
    if settings.remove is not None:
        check_removal(faces, Path(settings.remove))
    sheet = faces.folder / "DATASHEET.md"
    if settings.datasheet and not sheet.is_file():
        raise InputError(f"{sheet}: there is no datasheet to write the verdict into")
    networks = [faceless.load(source).to(chosen_device(settings.device)) for source in settings.recognizers]
    keys = [digest(net) for net in networks]
    if len(set(keys)) < len(keys):
        raise InputError("recognizers: two of them are the same network")
    names = dict(zip(keys, settings.recognizers))
    check_framing(faces, networks[0], settings.recognizers[0])
    framing = faces.manifest.get("framing")
    galleries = [
        gallery(source, dict(zip(keys, networks)), settings.aligned, framing)
        for source in (settings.reference, settings.null)
        if source is not None
    ]
    for found_people in galleries:
        for key, net in zip(keys, networks):
            if (width := found_people.seen_by(key, names[key]).shape[1]) != net.embedding_dim:
                raise InputError(
                    f"a gallery holds {width} numbers of {names[key]} for each face, not {net.embedding_dim}"
                )
    if settings.reference is not None:
        # Whatever is wrong with them shows before hours are spent on the corpus.
        reference, null = galleries
        check_strangers(reference, null, names)
        null = null.of_rows(like(reference.identities, null.identities, settings.seed))
        thresholds = thresholds_of(names, reference, settings.fmrs, settings.verdict_fmr, settings.seed)
    raw = {key: embeddings(net, faces, settings.cache, settings.device, progress) for key, net in zip(keys, networks)}
    centered, rows = unit(raw[keys[0]], center=True), {key: unit(found) for key, found in raw.items()}
    del raw
    plain = rows[keys[0]]
    group, stays = near_duplicates(faces, centered, plain, settings.duplicate_cosine, settings.duplicate_bits)
    kept = stays == np.arange(len(faces))
    sample = some("diversity", len(faces), settings.sample, settings.seed)
    figures_found: dict[str, Any] = {
        "settings": asdict(settings),
        "corpus": {"faces": len(faces), "fingerprint": faces.fingerprint, "framing": framing},
        "used to other crops": {
            name: net.spec.framing
            for name, net in zip(settings.recognizers, networks)
            if net.spec.framing != (framing or networks[0].spec.framing)
        },
        "duplicates": {"groups": int((np.bincount(group) > 1).sum()), "removable": int((~kept).sum())},
        "diversity": {
            "vendi": vendi(plain[sample]),
            "faces": len(sample),
            "at_most": min(plain[sample].shape),
            "mean_cosine": float(np.square(plain.mean(0, dtype=np.float64)).sum()),
        },
        "balance": balance(plain, settings.cells, settings.seed),
    }
    write_duplicates(output, faces, group, stays, centered, settings.shown)
    if settings.reference is not None:
        found = leakage(rows, group, names, reference, null, thresholds, settings.verdict_fmr, settings.seed)
        real = unit(reference.seen_by(keys[0], names[keys[0]]))
        figures_found["diversity"]["coverage"] = coverage(real, plain, min(settings.neighbors, len(real) - 1))
        figures_found["balance_to_reference"] = balance(plain, min(settings.cells, len(real)), settings.seed, real)
        figures_found["leakage"] = found.record
        write_leaks(output, faces, found, reference, settings.shown)
        kept[found.flagged] = False
        line = found.record["verdict"]
    else:
        line = "Leakage was not audited: no reference gallery was given."
    figures_found["verdict"] = line
    atomic_write(output / "audit.json", json.dumps(figures_found, indent=1) + "\n")
    atomic_write(output / "AUDIT.md", page(figures_found))
    if settings.datasheet:
        write_verdict(sheet, figures_found)
    if settings.remove is not None:
        without(faces, kept, settings.remove)
    return figures_found


def gallery(source: str, recognizers: dict[str, Any], aligned: bool, framing: str | None) -> Gallery:
    """A gallery from its file, or from a folder of people, cut as the corpus is (None: not known).

    Raises:
        InputError: it is cut otherwise.
    """
    if not Path(source).is_file():
        wanted = framing or next(iter(recognizers.values())).spec.framing
        return Gallery.of(*read_people(source, wanted, aligned), recognizers)
    found = Gallery.load(source)
    if framing is not None and found.framing not in (None, framing):
        raise InputError(
            f"{source}: made from {found.framing} crops, and the corpus holds {framing} crops; make it again with "
            f"mining/gallery.py --framing {framing}"
        )
    return found


def write_duplicates(output: Path, faces: Faces, group: Ids, stays: Ids, rows: Floats, shown: int) -> None:
    """``duplicates.parquet`` (row, group, keep) of faces that have any, and pictures of some."""
    twins = np.bincount(group, minlength=len(group))[group] > 1
    table = {"row": np.flatnonzero(twins), "group": group[twins], "keep": (stays == np.arange(len(stays)))[twins]}
    with atomic_path(output / "duplicates.parquet") as temporary, temporary.open("wb") as file:
        pq.write_table(pa.table(table), file)
    dropped = np.flatnonzero(twins & (stays != np.arange(len(stays))))[:shown]
    columns = {name: faces.images(which.tolist()) for name, which in (("dropped", dropped), ("kept", stays[dropped]))}
    captions = [(str(a), f"{b}, cos {rows[a] @ rows[b]:.3f}") for a, b in zip(dropped, stays[dropped])]
    atomic_write(output / "duplicates.png", figures.sheet(columns, captions))


def write_leaks(output: Path, faces: Faces, found: Leakage, reference: Gallery, shown: int) -> None:
    """``leaks.parquet`` (row, nearest reference row, margin), the closest pairs, and cosines of both searches."""
    table = {"row": found.flagged, "reference_row": found.against, "margin": found.margins[found.flagged]}
    with atomic_path(output / "leaks.parquet") as temporary, temporary.open("wb") as file:
        pq.write_table(pa.table(table), file)
    rows, against, cosines = found.flagged[:shown], found.against[:shown], found.cosines[:shown]
    if not len(rows):  # nothing is flagged: show what comes nearest
        rows = np.argsort(-found.nearest.cosines, kind="stable")[:shown]
        against, cosines = found.nearest.rows[rows], found.nearest.cosines[rows]
    columns = {"corpus": faces.images(rows.tolist())}
    captions: list[tuple[str, ...]] = [(f"{row}: {cosine:.3f}",) for row, cosine in zip(rows, cosines)]
    if reference.images is not None:
        columns["reference"] = reference.images[torch.from_numpy(against)]
        captions = [(*text, f"person {reference.identities[row]}") for text, row in zip(captions, against)]
    atomic_write(output / "closest.png", figures.sheet(columns, captions))
    marks = {
        f"FMR {fmr}": rate["threshold"]
        for fmr, rate in next(iter(found.record["recognizers"].values()))["rates"].items()
        if rate
    }
    searches = {"reference": found.nearest.cosines, "never seen": found.null.cosines}
    atomic_write(
        output / "nearest.svg", figures.histograms(searches, "cosine of the nearest gallery face", marks, log=True)
    )


def page(found: dict[str, Any]) -> str:
    """The audit for people, in Markdown."""
    duplicates, diversity, even = found["duplicates"], found["diversity"], found["balance"]
    lines = [
        "# Audit",
        "",
        f"**{found['verdict']}**",
        "",
        f"- {found['corpus']['faces']:,} faces.",
        f"- Near-duplicates: {duplicates['removable']:,} in {duplicates['groups']:,} groups.",
        f"- Vendi score {diversity['vendi']:.1f} on {diversity['faces']:,} faces (at most {diversity['at_most']}); "
        f"mean cosine of two faces {diversity['mean_cosine']:.3f}.",
        f"- Balance: {even['effective_cells']:.0%} of {even['cells']:.0f} cells in effect; the fullest holds "
        f"{even['largest']:.1%}, the emptiest {even['smallest']:.1%}.",
    ]
    lines += [
        f"- `{name}` knows {framing} crops and sees {found['corpus']['framing'] or 'other'} crops here: it may "
        "miss more."
        for name, framing in found["used to other crops"].items()
    ]
    if "coverage" in diversity:
        divergence = found["balance_to_reference"]["divergence"]
        lines.append(
            f"- Coverage of the reference: {diversity['coverage']:.1%}; divergence from it {divergence:.3f} bits."
        )
    if "leakage" in found:
        lines += [
            "",
            "| recognizer | FMR | threshold | hits (people) | null hits (people) | excess | p |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, recognizer in found["leakage"]["recognizers"].items():
            for fmr, rate in recognizer["rates"].items():
                if rate is None:
                    lines.append(f"| {name} | {fmr} | too few reference pairs | | | | |")
                    continue
                few = " (few pairs)" if rate["few_pairs"] else ""
                lines.append(
                    f"| {name} | {fmr}{few} | {rate['threshold']:.4f} | {rate['hits']:,} ({rate['people']:,}) "
                    f"| {rate['null_hits']:,} ({rate['null_people']:,}) | {rate['excess']:,} | {rate['p_value']:.2g} |"
                )
        lines += [
            "",
            "Hits are synthetic faces whose nearest reference face is above the threshold. A large gallery is hit by",
            "chance; the null search says how often, and p how likely so many matches are if the generator knows",
            "nobody of either gallery. Look at `closest.png` before believing either.",
        ]
    return "\n".join(lines) + "\n"


def write_verdict(path: Path, found: dict[str, Any]) -> None:
    """Put the verdict at the end of a datasheet, in place of an earlier one."""
    text = AUDIT_SECTION.sub("", path.read_text("utf-8"))
    text = text.replace("this corpus was not audited for that", "see Audit below")
    atomic_write(path, f"{text.rstrip()}\n\n## Audit\n{found['verdict']}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the arguments of this process."""
    settings: Settings[Audit] = parse(Audit, arguments, program="mining/audit.py", description=__doc__ or "")
    made = settings.build()
    found = audit(made)
    print(f"{made.output}/AUDIT.md: {found['verdict']}")


if __name__ == "__main__":
    command(main)()
