"""Whether the people of a reference gallery are in a corpus more often than chance has it.

Every synthetic face is looked up in the reference and in a null gallery of people whom the generator never saw, by
every recognizer; a face matches where two of them agree on a person.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from faceless.errors import InputError
from faceless.randomness import permutation
from mining.disagreement import Threshold, above_all_but
from mining.embedding_index import EmbeddingIndex, Floats, Ids
from mining.faces import unit
from mining.gallery import Gallery

CALIBRATION = 10_000  # faces of the reference whose pairs calibrate the thresholds
ALIKE = 0.9995  # cosine of embeddings as emitted that two pictures have only if they are one picture
PERMUTATIONS = 10_000  # of people between the galleries


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


def like(reference: Ids, null: Ids, seed: int = 0) -> Ids:
    """Rows of a null gallery that stand against a reference: as many people, each with as many faces as one of those.

    Chance finds more, the more people there are and the more faces each has. Who stands for whom is drawn at random.

    Args:
        reference, null: the person on each face.

    Raises:
        InputError: there are fewer people, or they have too few faces.
    """
    wanted = np.sort(np.unique(reference, return_counts=True)[1])[::-1]
    sizes = np.unique(null, return_counts=True)[1]
    if len(sizes) < len(wanted):
        raise InputError(
            f"null: has {len(sizes)} people and the reference {len(wanted)}; chance hits grow with a gallery, so it "
            "needs at least as many"
        )
    by_person = np.split(np.argsort(null, kind="stable"), np.cumsum(sizes)[:-1])
    order = permutation(seed, "null gallery", len(sizes)).numpy()
    left, rows = sizes[order].copy(), []
    for count in wanted:
        enough = left >= count
        place = int(enough.argmax() if enough.any() else left.argmax())
        rows.append(by_person[order[place]][:count])
        left[place] = -1
    found = np.sort(np.concatenate(rows))
    if len(found) < 0.9 * len(reference):
        raise InputError(
            f"null: its people have {len(found)} faces that can stand against the reference's {len(reference)}; chance "
            "hits grow with a gallery, so they need as many faces each"
        )
    return found


def check_strangers(reference: Gallery, null: Gallery, names: dict[str, str]) -> None:
    """Compare the galleries with each other: pictures that are in both would hide every leak.

    Raises:
        InputError: some are.
    """
    views = [(unit(reference.seen_by(*one)), unit(null.seen_by(*one))) for one in names.items()]
    first, others = views[0]
    nearest = EmbeddingIndex.of(first, kind="flat").search(others, 1)[1][:, 0]
    same = np.all([np.einsum("nd,nd->n", other, real[nearest]) >= ALIKE for real, other in views], axis=0)
    if same.any():
        raise InputError(
            f"null: {same.sum():,} of its {len(null):,} faces are in the reference as well; it is to hold people whom "
            "the generator never saw"
        )


def per_person(people: Ids, matched: Ids, group: Ids) -> Ids:
    """``[P]``: how many faces match each of ``people [P]`` (rising); faces that are near-duplicates count once.

    Args:
        matched, group: ``[H]`` of the faces that match, the person and the group of near-duplicates (`groups`).
    """
    pairs = np.unique(np.stack((matched, group)), axis=1)
    return np.bincount(np.searchsorted(people, pairs[0]), minlength=len(people))


def chance(counts: Ids, null_counts: Ids, seed: int = 0) -> float:
    """How likely the reference's people are matched so often if the generator knows nobody of either gallery.

    Mann and Whitney's rank-sum test over people, one-sided, by permutation: they, and not the faces that match them,
    are what was drawn from the world, and one who looks like many is matched by many.

    Args:
        counts, null_counts: matches of each person of the reference ``[P]`` and of the null gallery ``[Q]``.
    """
    values, people = np.unique(np.concatenate((counts, null_counts)), return_counts=True)
    ranks = np.cumsum(people) - (people - 1) / 2  # of equal counts the mean rank
    # People of as many matches need not be told apart. numpy's generator: Rng has no such distribution.
    numbers = np.random.default_rng(seed)
    dealt = numbers.multivariate_hypergeometric(people, len(counts), PERMUTATIONS, method="marginals")
    reached = ranks[np.searchsorted(values, counts)].sum()
    return float((1 + (dealt @ ranks >= reached).sum()) / (1 + PERMUTATIONS))


def excess(
    hits: np.ndarray,
    people: Ids,
    null_hits: np.ndarray,
    null_people: Ids,
    galleries: tuple[Ids, Ids],
    group: Ids,
    seed: int = 0,
) -> dict[str, Any]:
    """Synthetic faces that match the reference beyond those that match the null gallery.

    Args:
        hits, null_hits: ``[N]`` whether a face matches somebody, and ``people``, ``null_people`` ``[N]`` whom.
        galleries: everybody in the reference ``[P]`` and in the null gallery ``[Q]``, rising.
        group: ``[N]`` near-duplicates among the faces.

    Returns:
        Faces that match (``hits``, ``null_hits``, ``excess``), people who are matched, and ``p_value`` of `chance`.
    """
    counts = per_person(galleries[0], people[hits], group[hits])
    null_counts = per_person(galleries[1], null_people[null_hits], group[null_hits])
    return {
        "hits": int(hits.sum()),
        "null_hits": int(null_hits.sum()),
        "excess": int(hits.sum()) - int(null_hits.sum()),
        "people": int((counts > 0).sum()),
        "null_people": int((null_counts > 0).sum()),
        "p_value": chance(counts, null_counts, seed),
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


def thresholds_of(
    names: dict[str, str], reference: Gallery, fmrs: Sequence[float], fmr: float, seed: int = 0
) -> dict[str, dict[float, Threshold | None]]:
    """The thresholds of all recognizers, by their digests.

    Args:
        names: of the recognizers, by their digests.
        fmr: the one of ``fmrs`` that a verdict is spoken at.

    Raises:
        InputError: the reference has too few pairs for the verdict's rate.
    """
    found = {}
    for key, name in names.items():
        real = unit(reference.seen_by(key, name))
        found[key] = calibrate(real, reference.identities, fmrs, seed)
        if found[key][fmr] is None:
            raise InputError(
                f"verdict_fmr {fmr:g} needs {1 / fmr:,.0f} pairs of different people "
                "in the reference; use a larger gallery or a larger rate"
            )
    return found


def leakage(
    rows: dict[str, Floats],
    group: Ids,
    names: dict[str, str],
    reference: Gallery,
    null: Gallery,
    thresholds: dict[str, dict[float, Threshold | None]],
    fmr: float,
    seed: int = 0,
) -> Leakage:
    """Search every face in both galleries with every recognizer.

    Args:
        rows: unit embeddings of the corpus by digest of the recognizer; ``names`` what to call those.
        group: ``[N]`` near-duplicates (`groups`).
        null: as large as the reference (`like`).
        thresholds: by digest (`thresholds_of`).
        fmr: the rate that the verdict is spoken at.
        seed: of the permutations.
    """
    everybody = np.unique(reference.identities), np.unique(null.identities)
    record: dict[str, Any] = {
        "reference": {"faces": len(reference), "people": len(everybody[0])},
        "null": {"faces": len(null), "people": len(everybody[1])},
        "recognizers": {},
    }
    seen: list[Decision] = []
    unseen: list[Decision] = []
    for key, synthetic in rows.items():
        spoken = thresholds[key][fmr]
        assert spoken is not None
        for found, faces in ((seen, reference), (unseen, null)):
            found.append(decide(synthetic, unit(faces.seen_by(key, names[key])), faces.identities, spoken))
        real, other = seen[-1], unseen[-1]
        rates: dict[str, Any] = {}
        for rate, threshold in thresholds[key].items():
            rates[f"{rate:g}"] = None
            if threshold is not None:
                hits, null_hits = (each.cosines >= threshold.value for each in (real, other))
                counts = excess(hits, real.people, null_hits, other.people, everybody, group, seed)
                few = threshold.pairs * rate < 30
                rates[f"{rate:g}"] = {"threshold": threshold.value, "pairs": threshold.pairs, "few_pairs": few} | counts
        record["recognizers"][names[key]] = {"sha256": key, "rates": rates}
    judge, null_judge = agreement(seen), agreement(unseen)
    agreed, everyone = judge >= 0, np.arange(len(judge))
    people, null_people = (
        np.stack([each.people for each in found])[chosen, everyone]
        for found, chosen in ((seen, judge), (unseen, null_judge))
    )
    margins, null_margins = (
        np.sort(np.stack([each.margins for each in found]), axis=0)[-2] for found in (seen, unseen)
    )
    record["agreed"] = (
        excess(agreed, people, null_judge >= 0, null_people, everybody, group, seed)
        | {"fmr": fmr}
        | {"closer_than_null": int((margins[agreed] > null_margins.max()).sum())}
    )
    flagged = np.flatnonzero(agreed)
    flagged = flagged[np.argsort(-margins[flagged], kind="stable")]
    against = np.stack([each.rows for each in seen])[judge[flagged], flagged]
    cosines = np.stack([each.cosines for each in seen])[judge[flagged], flagged]
    record["verdict"] = verdict(record, len(agreed), fmr)
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
    rates = {name: found["rates"][f"{fmr:g}"] for name, found in record["recognizers"].items()}

    single = [name for name, found in rates.items() if found["p_value"] < 0.01]
    counts = (
        f"{agreed['hits']:,} of {faces:,} faces match {agreed['people']:,} of {reference['people']:,} reference people "
        f"in two recognizers or more at FMR {fmr:g}, {agreed['null_hits']:,} match {agreed['null_people']:,} of as "
        f"many people whom the generator never saw (p = {agreed['p_value']:.2g})"
    )
    few = any(found["few_pairs"] for found in rates.values())
    rests = " The thresholds rest on fewer than 30 expected errors." if few else ""
    if agreed["p_value"] < 0.01:
        return f"LEAKAGE: {counts}.{rests}"
    if single:
        return f"Suspicion of leakage in {', '.join(single)} alone: {counts}.{rests}"
    if not agreed["hits"]:
        return f"No leakage found: {counts}.{rests}"
    if agreed["excess"] > 0 or agreed["closer_than_null"]:
        closer = f"{agreed['closer_than_null']:,} of the former are nearer than any of the latter"
        return f"Inconclusive: {counts}; {closer}. Look at closest.png.{rests}"
    return f"No leakage beyond chance: {counts}.{rests}"
