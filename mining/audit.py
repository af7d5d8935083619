"""Audit a corpus: near-duplicates, diversity, balance, and whether it leaks people of a reference gallery.

``python mining/audit.py --corpus corpora/quickstart --recognizers '[dlib-resnet29, hse-faceres]'
--reference reference.safetensors --null others.safetensors``
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
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
from faceless.randomness import permutation
from faceless.recognizer import resize
from faceless.settings import Settings, parse
from mining import figures
from mining.disagreement import Threshold, above_all_but
from mining.embedding_index import EmbeddingIndex, Floats, Ids
from mining.faces import Faces, check_framing, digest, embeddings, unit
from mining.gallery import Gallery, read_people
from mining.identities import cluster

HASH = 64  # bits of a perceptual hash
CALIBRATION = 10_000  # faces of the reference whose pairs calibrate the thresholds
LISTED = 16  # nearest faces among which duplicates are looked for first
PAIRS = 1 << 22  # of a crowd of duplicates that are in memory together
ONES = np.array([number.bit_count() for number in range(1 << 16)], np.uint8)


@dataclass
class Audit:
    """What to look for.

    Args:
        corpus: folder of parquet shards.
        recognizers: the teacher, then at least one other that judges leakage with it.
        reference: the people who must not be in the corpus, such as those the generator was trained on: a file of
            `mining/gallery.py`, or a folder with one sub-folder of images for each person; null leaves leakage out.
        null: as many faces of people whom the generator never saw, in the same form: what chance alone finds.
        aligned: whether folders of images hold crops already.
        output: folder of the results.
        fmrs: false match rates of the thresholds, calibrated on pairs of different people in the reference.
        verdict_fmr: the one that the verdict is spoken at.
        duplicate_cosine, duplicate_bits: near-duplicates have a (centered) cosine of the first recognizer of at least
            so much and perceptual hashes that differ in at most so many of 64 bits.
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


def near_duplicates(faces: Faces, rows: Floats, cosine: float, bits: int) -> tuple[Ids, Ids]:
    """Group ``[N]`` of each face (`groups`), and which face of its group stays ``[N]``.

    Of a group stays the face of the highest detector score, or else the first.
    """
    index, everybody = EmbeddingIndex.of(rows), np.arange(len(rows))
    cosines, ids = index.neighbors(rows, LISTED)
    above = cosines >= cosine
    first, second = np.repeat(everybody, above.sum(1)), ids[above]
    involved = np.unique(np.concatenate((first, second)))
    hashes = np.zeros(len(rows), np.uint64)
    for start in range(0, len(involved), 1024):
        part = involved[start : start + 1024]
        hashes[part] = perceptual_hashes(faces.images(part.tolist()))

    def joined(group: Ids, first: Ids, second: Ids) -> Ids:
        alike = differing_bits(hashes[first], hashes[second]) <= bits
        return groups(len(rows), np.concatenate((first[alike], everybody)), np.concatenate((second[alike], group)))

    group = joined(everybody, first, second)
    # Whose list is full may have more: a generator that collapsed has crowds, of which memory holds a part at a time.
    crowded = np.flatnonzero(above.all(1)) if above.shape[1] < len(rows) - 1 else everybody[:0]
    step = max(1, min(64, PAIRS // max(1, len(crowded))))
    for start in range(0, len(crowded), step):
        part = crowded[start : start + step]
        limits, _, second = index.within(rows[part], cosine)
        group = joined(group, np.repeat(part, np.diff(limits)), second)
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


def calibrate(gallery: Floats, identities: Ids, fmrs: Sequence[float], seed: int = 0) -> dict[float, Threshold | None]:
    """Thresholds at which so many pairs of different people match; None where there are fewer than 1 / fmr pairs.

    All pairs of at most 10,000 faces count; of a larger gallery, of so many drawn at random.
    """
    if len(gallery) > CALIBRATION:
        chosen = some("calibration", len(gallery), CALIBRATION, seed)
        gallery, identities = gallery[chosen], identities[chosen]
    most, tail, pairs = max(fmrs), np.empty(0, np.float32), 0
    total, squares = 0.0, 0.0
    allowed = int(most * len(gallery) * (len(gallery) - 1) / 2) + 2
    for start in range(0, len(gallery), 1024):
        stop = min(start + 1024, len(gallery))
        scores = gallery[start:stop] @ gallery[start:].T
        later = np.arange(start, stop)[:, None] < np.arange(start, len(gallery))
        found = scores[later & (identities[start:stop, None] != identities[None, start:])]
        pairs, total, squares = pairs + len(found), total + float(found.sum()), squares + float((found**2).sum())
        tail = np.concatenate((tail, found))
        if len(tail) > allowed:  # only the highest can decide about a threshold
            tail = np.partition(tail, len(tail) - allowed)[-allowed:]
    if not pairs:
        raise InputError("the reference gallery holds one person only; thresholds need pairs of different people")
    spread = math.sqrt(max(0.0, squares / pairs - (total / pairs) ** 2))
    thresholds: dict[float, Threshold | None] = {}
    for fmr in fmrs:
        count = int(fmr * pairs + 1e-9)
        if count < 1:
            thresholds[fmr] = None
            continue
        thresholds[fmr] = Threshold(above_all_but(tail, count), fmr, pairs, spread)
    return thresholds


def some(purpose: str, total: int, count: int, seed: int) -> Ids:
    """Up to ``count`` of ``total`` numbers, drawn at random, in order."""
    return np.sort(permutation(seed, purpose, total).numpy()[:count])


@dataclass(frozen=True)
class Decision:
    """The nearest gallery face of every synthetic face to one recognizer, and whether it matches.

    Attributes:
        cosines, rows, people: ``[N]`` of the nearest, its row and its person.
        hits: ``[N]`` whether the cosine reaches the threshold.
        margins: ``[N]`` how far it is above, in standard deviations of impostors.
    """

    cosines: Floats
    rows: Ids
    people: Ids
    hits: np.ndarray
    margins: Floats


def decide(rows: Floats, gallery: Floats, people: Ids, threshold: Threshold) -> Decision:
    """Search unit ``rows [N, D]`` in a gallery ``[G, D]``, exactly."""
    scores, ids = EmbeddingIndex.of(gallery, kind="flat").search(rows, 1)
    cosines, nearest = scores[:, 0], ids[:, 0]
    margins = (cosines - threshold.value) / max(threshold.spread, 1e-12)
    return Decision(cosines, nearest, people[nearest], cosines >= threshold.value, margins)


def excess(hits: np.ndarray, null_hits: np.ndarray) -> dict[str, Any]:
    """Synthetic faces that match the reference beyond those that match the null gallery.

    ``p_value``: of a sign test over the faces that match only one of the two (exact, one-sided): how likely at least
    so many of them match the reference when the generator knows neither gallery. Faces are taken as independent.
    """
    only, null_only = int((hits & ~null_hits).sum()), int((null_hits & ~hits).sum())
    n = only + null_only
    k = torch.arange(only, n + 1, dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1) - n * math.log(2)
    return {
        "hits": int(hits.sum()),
        "null_hits": int(null_hits.sum()),
        "excess": int(hits.sum()) - int(null_hits.sum()),
        "p_value": min(1.0, float(ways.exp().sum())),
    }


@dataclass
class Leakage:
    """What the leakage search found.

    Attributes:
        record: figures for ``audit.json``.
        flagged: ``[F]`` rows that two recognizers or more match to one person at the verdict's rate, closest first.
        against, cosines: ``[F]`` their nearest rows in the reference, and how near, in the first recognizer of those
            that agree.
        nearest, null: the first recognizer's searches.
        margins: ``[N]`` how far above its threshold a face's second-surest recognizer is, in standard deviations of
            impostors.
    """

    record: dict[str, Any]
    flagged: Ids
    against: Ids
    cosines: Floats
    nearest: Decision
    null: Decision
    margins: Floats


def leakage(
    settings: Audit, rows: dict[str, Floats], names: dict[str, str], reference: Gallery, null: Gallery
) -> Leakage:
    """Search every face in both galleries with every recognizer.

    Args:
        rows: unit embeddings of the corpus by digest of the recognizer; ``names`` what to call those.
    """
    if len(null) < len(reference):
        raise InputError(
            f"null: has {len(null)} faces and the reference {len(reference)}; chance hits grow with a gallery, so it "
            "needs at least as many"
        )
    null_rows = some("null gallery", len(null), len(reference), settings.seed)
    record: dict[str, Any] = {
        "reference": {"faces": len(reference), "people": len(np.unique(reference.identities))},
        "null": {"faces": len(null_rows), "people": len(np.unique(null.identities[null_rows]))},
        "recognizers": {},
    }
    seen: list[Decision] = []
    unseen: list[Decision] = []
    for key, synthetic in rows.items():
        real = unit(reference.seen_by(key, names[key]))
        others = unit(null.seen_by(key, names[key])[null_rows])
        thresholds = calibrate(real, reference.identities, settings.fmrs, settings.seed)
        spoken = thresholds[settings.verdict_fmr]
        if spoken is None:
            raise InputError(
                f"verdict_fmr {settings.verdict_fmr:g} needs {1 / settings.verdict_fmr:,.0f} pairs of different people "
                "in the reference; use a larger gallery or a larger rate"
            )
        seen.append(decide(synthetic, real, reference.identities, spoken))
        unseen.append(decide(synthetic, others, null.identities[null_rows], spoken))
        rates: dict[str, Any] = {}
        for fmr, threshold in thresholds.items():
            rates[f"{fmr:g}"] = None
            if threshold is not None:
                counts = excess(seen[-1].cosines >= threshold.value, unseen[-1].cosines >= threshold.value)
                few = threshold.pairs * fmr < 30
                rates[f"{fmr:g}"] = {"threshold": threshold.value, "pairs": threshold.pairs, "few_pairs": few} | counts
        record["recognizers"][names[key]] = {"sha256": key, "rates": rates}
    judge = agreement(seen)
    agreed, null_agreed = judge >= 0, agreement(unseen) >= 0
    record["agreed"] = excess(agreed, null_agreed) | {"fmr": settings.verdict_fmr}
    margins = np.sort(np.stack([each.margins for each in seen]), axis=0)[-2]
    flagged = np.flatnonzero(agreed)
    flagged = flagged[np.argsort(-margins[flagged], kind="stable")]
    against = np.stack([each.rows for each in seen])[judge[flagged], flagged]
    cosines = np.stack([each.cosines for each in seen])[judge[flagged], flagged]
    record["verdict"] = verdict(record, len(agreed), settings.verdict_fmr)
    return Leakage(record, flagged, against, cosines, seen[0], unseen[0], margins)


def agreement(seen: list[Decision]) -> Ids:
    """``[N]`` the first recognizer of two or more that match a face to the same person; -1 where none do."""
    judge = np.full(len(seen[0].hits), -1)
    for (number, first), (_, second) in combinations(enumerate(seen), 2):
        agreed = first.hits & second.hits & (first.people == second.people)
        judge[agreed & (judge < 0)] = number
    return judge


def verdict(record: dict[str, Any], faces: int, fmr: float) -> str:
    """One line for the datasheet."""
    agreed, reference = record["agreed"], record["reference"]
    significant = agreed["p_value"] < 0.01 and agreed["excess"] > 0
    single = [
        name
        for name, found in record["recognizers"].items()
        if (rate := found["rates"][f"{fmr:g}"]) and rate["excess"] > 0 and rate["p_value"] < 0.01
    ]
    counts = (
        f"{agreed['hits']:,} of {faces:,} faces match one of {reference['people']:,} reference people in two "
        f"recognizers or more at FMR {fmr:g}, {agreed['null_hits']:,} match as many faces of people whom the "
        f"generator never saw (excess {agreed['excess']:,}, p = {agreed['p_value']:.2g})"
    )
    if significant:
        return f"LEAKAGE: {counts}."
    if single:
        return f"Suspicion of leakage in {', '.join(single)} alone: {counts}."
    return f"No leakage found: {counts}."


def without(faces: Faces, keep: np.ndarray, output: str | Path) -> None:
    """Write the corpus again without some rows: same shards, same columns, a manifest that says so.

    Raises:
        InputError: the folder is there already, or the faces have no manifest.
    """
    output = Path(output)
    if output.exists():
        raise InputError(f"remove: {output} is there already; name a new folder")
    if not faces.manifest:
        raise InputError(f"{faces.folder}: has no manifest.json; only a corpus can be copied without rows")
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
        text = sheet.read_text("utf-8").replace(f"- {len(keep):,} generated", f"- {manifest['rows']:,} generated", 1)
        told = f"{removed:,} of {len(keep):,} faces were removed as near-duplicates of others, or as leaks."
        atomic_write(output / "DATASHEET.md", f"{text.rstrip()}\n\n## Removed\n{told}\n")
    atomic_write(output / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def audit(settings: Audit, progress: bool = True) -> dict[str, Any]:
    """Look for all of it; write ``audit.json``, ``AUDIT.md``, tables and pictures, and return the figures."""
    faces, output = Faces(settings.corpus), Path(settings.output)
    check_folder(output)
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
    raw = {key: embeddings(net, faces, settings.cache, settings.device, progress) for key, net in zip(keys, networks)}
    centered = unit(raw[keys[0]], center=True)
    group, stays = near_duplicates(faces, centered, settings.duplicate_cosine, settings.duplicate_bits)
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
        "diversity": {"vendi": vendi(centered[sample]), "faces": len(sample), "at_most": min(centered[sample].shape)},
        "balance": balance(centered, settings.cells, settings.seed),
    }
    write_duplicates(output, faces, group, stays, centered, settings.shown)
    if settings.reference is not None:
        reference, null = galleries
        found = leakage(settings, {key: unit(rows) for key, rows in raw.items()}, names, reference, null)
        mean = raw[keys[0]].mean(0)
        real = unit(reference.seen_by(keys[0], names[keys[0]]) - mean)
        figures_found["diversity"]["coverage"] = coverage(real, centered, min(settings.neighbors, len(real) - 1))
        figures_found["balance_to_reference"] = balance(centered, min(settings.cells, len(real)), settings.seed, real)
        figures_found["leakage"] = found.record
        write_leaks(output, faces, found, reference, settings.shown)
        kept[found.flagged] = False
        line = found.record["verdict"]
    else:
        line = "Leakage was not audited: no reference gallery was given."
    figures_found["verdict"] = line
    if settings.remove is not None:
        without(faces, kept, settings.remove)
    atomic_write(output / "audit.json", json.dumps(figures_found, indent=1) + "\n")
    atomic_write(output / "AUDIT.md", page(figures_found))
    if settings.datasheet:
        write_verdict(faces.folder / "DATASHEET.md", figures_found)
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
        f"- Vendi score {diversity['vendi']:.1f} on {diversity['faces']:,} faces (at most {diversity['at_most']}).",
        f"- Balance: {even['effective_cells']:.0%} of {even['cells']:.0f} cells in effect; the fullest holds "
        f"{even['largest']:.1%}, the emptiest {even['smallest']:.1%}.",
    ]
    lines += [
        f"- `{name}` knows {framing} crops and sees {found['corpus']['framing'] or 'other'} crops here: it may "
        "miss more."
        for name, framing in found["used to other crops"].items()
    ]
    if "coverage" in diversity:
        lines.append(f"- Coverage of the reference: {diversity['coverage']:.1%}.")
    if "leakage" in found:
        lines += [
            "",
            "| recognizer | FMR | threshold | hits | null hits | excess | p |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, recognizer in found["leakage"]["recognizers"].items():
            for fmr, rate in recognizer["rates"].items():
                if rate is None:
                    lines.append(f"| {name} | {fmr} | too few reference pairs | | | | |")
                    continue
                few = " (few pairs)" if rate["few_pairs"] else ""
                lines.append(
                    f"| {name} | {fmr}{few} | {rate['threshold']:.4f} | {rate['hits']:,} | {rate['null_hits']:,} "
                    f"| {rate['excess']:,} | {rate['p_value']:.2g} |"
                )
        lines += [
            "",
            "Hits are synthetic faces whose nearest reference face is above the threshold. A large gallery is hit by",
            "chance; the null search says how often. Look at `closest.png` before believing either.",
        ]
    return "\n".join(lines) + "\n"


def write_verdict(path: Path, found: dict[str, Any]) -> None:
    """Put the verdict at the end of a datasheet, in place of an earlier one."""
    if not path.is_file():
        raise InputError(f"{path}: there is no datasheet to write the verdict into")
    text = re.sub(r"\n## Audit\n.*?(?=\n## |\Z)", "", path.read_text("utf-8"), flags=re.DOTALL)
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
