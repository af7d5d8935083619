"""The audit finds what was planted, and says nothing where nothing is."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import faceless
from faceless.errors import InputError
from faceless.files import sha256
from faceless.recognizer import Output, Recognizer
from mining import gallery as galleries
from mining.audit import balance, coverage, differing_bits, groups, main, near_duplicates, perceptual_hashes, vendi
from mining.faces import Faces, digest, unit
from mining.gallery import Gallery
from mining.gallery import main as make_gallery
from mining.leakage import (
    Decision,
    Leakage,
    agreement,
    calibrate,
    chance,
    excess,
    leakage,
    like,
    per_person,
    thresholds_of,
    verdict,
)
from synth.corpus import Corpus
from synth.generate import generate, read_settings
from tests.mining.tiny_corpus import network, pictures, write


def rows(n: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32))


def test_hashes_against_scipy_and_robust_to_what_a_copy_suffers() -> None:
    fft = pytest.importorskip("scipy.fft")
    gray = np.random.default_rng(0).uniform(0, 255, (5, 32, 32)).astype(np.float32)
    images = torch.from_numpy(gray)[:, None].expand(-1, 3, -1, -1)
    for image, found in zip(gray, perceptual_hashes(images)):
        low = fft.dctn(image.astype(np.float64), type=2)[:8, :8].reshape(-1)[1:]
        bits = low > np.sort(low)[(len(low) - 1) // 2]
        assert found == sum(1 << i for i, bit in enumerate(bits) if bit)
    faces = torch.from_numpy(pictures(np.arange(12))).permute(0, 3, 1, 2)
    noise = torch.randn(faces.shape, generator=torch.Generator().manual_seed(0))
    changed = (faces.float() * 0.9 + 8 + 4 * noise).clamp(0, 255).byte()
    original, copy = perceptual_hashes(faces), perceptual_hashes(changed)
    assert differing_bits(original, copy).max() <= 10 < differing_bits(original, np.roll(copy, 1)).min()


def test_differing_bits() -> None:
    a, b = np.array([0, 2**63, 7], np.uint64), np.array([0, 0, 2], np.uint64)
    assert differing_bits(a, b).tolist() == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
def test_groups_are_connected_components(count: int, pairs: list[tuple[int, int]]) -> None:
    pairs = [(a % count, b % count) for a, b in pairs]
    member = [{i} for i in range(count)]
    for a, b in pairs:
        joined = member[a] | member[b]
        for i in joined:
            member[i] = joined
    first, second = (np.array([pair[i] for pair in pairs], np.int64) for i in range(2))
    assert groups(count, first, second).tolist() == [min(m) for m in member]


def test_vendi_has_its_closed_forms() -> None:
    assert vendi(np.tile(rows(1), (50, 1))) == pytest.approx(1)
    assert vendi(np.eye(16, dtype=np.float32).repeat(3, 0)) == pytest.approx(16)
    points = rows(40)
    values = np.linalg.eigvalsh(points.astype(np.float64) @ points.T / 40)  # the kernel itself, not its dual
    values = values[values > 1e-12]
    assert vendi(points) == pytest.approx(math.exp(-(values * np.log(values)).sum()))


def test_coverage_and_balance_against_loops() -> None:
    real, fake = rows(60), rows(40, seed=1)
    distance = np.linalg.norm(real[:, None] - real[None], axis=2)
    radius = np.sort(distance, 1)[:, 3]
    nearest = np.linalg.norm(real[:, None] - fake[None], axis=2).min(1)
    assert coverage(real, fake, 3) == pytest.approx((nearest <= radius).mean())
    assert coverage(real, real[:1], 3) < 0.2 < 0.99 < coverage(real, real, 3)
    even = balance(np.eye(8, dtype=np.float32).repeat(10, 0), 8, seed=0)
    lopsided = balance(np.eye(8, dtype=np.float32).repeat([73, 1, 1, 1, 1, 1, 1, 1], 0), 8, seed=0)
    assert lopsided["effective_cells"] < 0.5 < even["effective_cells"]
    assert balance(real, 5, 0, real)["divergence"] == pytest.approx(0, abs=1e-9)
    assert 0 < balance(fake, 5, 0, real)["divergence"] <= 1


def test_thresholds_of_all_pairs_of_strangers() -> None:
    gallery, people = rows(120), np.arange(120) // 3
    cosines = [gallery[i] @ gallery[j] for i in range(120) for j in range(i + 1, 120) if people[i] != people[j]]
    assert len(cosines) == 120 * 119 // 2 - 120
    found = calibrate(gallery, people, [1e-2, 1e-3, 1e-6])
    for fmr in (1e-2, 1e-3):
        threshold = found[fmr]
        assert threshold is not None
        assert threshold.pairs == len(cosines)
        assert threshold.spread == pytest.approx(np.std(cosines), rel=1e-4)
        above = sum(c >= threshold.value - 1e-6 for c in cosines)
        assert abs(above - int(fmr * len(cosines))) <= 1
    assert found[1e-6] is None, "7,020 pairs say nothing about one in a million"
    with pytest.raises(InputError, match="one person only"):
        calibrate(gallery, np.zeros(120, int), [1e-2])


def test_chance_is_a_permutation_test_over_people() -> None:
    scipy = pytest.importorskip("scipy.stats")
    counts, null = np.array([9, 0, 0, 3, 1, 4]), np.array([0, 0, 1, 0, 0, 2, 0, 0])

    def statistic(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return scipy.mannwhitneyu(a, b, axis=axis, method="asymptotic").statistic

    # All 3,003 ways to deal 14 people.
    exact = scipy.permutation_test(
        (counts, null), statistic, permutation_type="independent", n_resamples=np.inf, alternative="greater"
    ).pvalue
    assert chance(counts, null) == pytest.approx(exact, abs=0.01)
    assert chance(np.ones(20, int), np.zeros(20, int)) == pytest.approx(1 / 10_001)
    assert chance(np.array([50, 0, 0, 0]), np.zeros(4, int)) == pytest.approx(0.5, abs=0.02), "one person is no proof"
    assert chance(np.zeros(4, int), np.zeros(4, int)) == chance(np.zeros(4, int), np.array([1, 0, 0, 0])) == 1


def test_near_duplicates_are_one_match() -> None:
    people, group = np.array([5, 5, 5, 9, 5]), np.array([0, 0, 2, 0, 2])
    assert per_person(np.array([3, 5, 9]), people, group).tolist() == [0, 2, 1]
    hits, everybody = np.array([True, True, True, False, True]), (np.array([5, 9]), np.array([1, 2]))
    found = excess(hits, people, ~hits, np.ones(5, int), everybody, group)
    assert {key: found[key] for key in ("hits", "null_hits", "excess", "people", "null_people")} == {
        "hits": 4, "null_hits": 1, "excess": 3, "people": 1, "null_people": 1,
    }  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_a_null_gallery_is_cut_to_the_reference(sizes: list[int], null_sizes: list[int]) -> None:
    reference, null = (np.repeat(np.arange(len(each)) * 7, each) for each in (sizes, null_sizes))
    wanted, offered = sorted(sizes, reverse=True), sorted(null_sizes, reverse=True)
    if len(offered) < len(wanted) or sum(map(min, wanted, offered)) < 0.9 * sum(wanted):
        with pytest.raises(InputError, match=r"^null: "):
            like(reference, null)
        return
    try:
        rows = like(reference, null)
    except InputError:
        # Drawn people may leave too few for others; the best fit has as many.
        assert max(wanted) > 1
        return
    assert len(np.unique(rows)) == len(rows)
    counts = np.sort(np.unique(null[rows], return_counts=True)[1])[::-1]
    assert len(counts) == len(wanted) and (counts <= wanted).all() and counts.sum() >= 0.9 * sum(wanted)


def two_views(seed: int, people: tuple[int, int], shots: tuple[int, int], faces: int, leaks: int = 0) -> Leakage:
    """Leakage of faces of strangers, seen by two recognizers that mostly agree, and of ``leaks`` copies."""
    numbers = np.random.default_rng(seed)
    scale = np.arange(1, 65) ** -0.5
    turns = [numbers.standard_normal((64, 64)) for _ in range(2)]

    def seen(points: np.ndarray, turn: np.ndarray) -> np.ndarray:
        return ((points + 0.25 * numbers.standard_normal(points.shape) * scale) @ turn).astype(np.float32)

    found, first = [], np.empty(0)
    for count, each in zip(people, shots):
        who = np.repeat(np.arange(count), each)
        points = (numbers.standard_normal((count, 64)) * scale)[who]
        points += 0.35 * numbers.standard_normal(points.shape) * scale
        first = points if not found else first
        found.append(Gallery(who, {key: seen(points, turn) for key, turn in zip("ab", turns)}))
    corpus = numbers.standard_normal((faces, 64)) * scale
    corpus[:leaks] = first[numbers.permutation(len(first))[:leaks]]
    rows = {key: unit(seen(corpus, turn)) for key, turn in zip("ab", turns)}
    names = {"a": "A", "b": "B"}
    null = found[1].of_rows(like(found[0].identities, found[1].identities, seed))
    thresholds = thresholds_of(names, found[0], [1e-3], 1e-3)
    return leakage(rows, np.arange(faces), names, found[0], null, thresholds, 1e-3)


@pytest.mark.parametrize(("people", "shots"), [((20, 20), (10, 10)), ((60, 90), (3, 3)), ((40, 40), (2, 5))])
def test_where_nobody_leaked_leakage_is_rarely_said(people: tuple[int, int], shots: tuple[int, int]) -> None:
    """Of 40 corpora of strangers 0.4 are expected at 1 %; a test over faces instead of people says it of a dozen."""
    said = [two_views(seed, people, shots, 2000).record["verdict"].split(":")[0] for seed in range(40)]
    assert said.count("LEAKAGE") <= 2
    assert sum("Suspicion" in each for each in said) <= 4  # two recognizers may say it


def test_where_somebody_leaked_it_is_said() -> None:
    for seed in range(5):
        found = two_views(seed, (60, 60), (3, 3), 2000, leaks=40).record
        assert found["verdict"].startswith("LEAKAGE")
    few = two_views(0, (60, 60), (3, 3), 2000, leaks=2).record
    assert few["verdict"].startswith(("Inconclusive", "LEAKAGE")) and "closest.png" in few["verdict"]


def said(hits: int, null_hits: int, p: float, closer: int = 0, single: float = 1.0, few: bool = False) -> str:
    counts = {"hits": hits, "null_hits": null_hits, "excess": hits - null_hits, "people": 1, "null_people": 1}
    rates = {"0.0001": counts | {"p_value": single, "few_pairs": few}}
    record = {
        "agreed": counts | {"p_value": p, "closer_than_null": closer},
        "reference": {"people": 20},
        "recognizers": {"net": {"rates": rates}},
    }
    return verdict(record, 1000, 1e-4)


def test_a_verdict_says_no_more_than_was_found() -> None:
    assert said(0, 3, 1.0).startswith("No leakage found: 0 of 1,000 faces")
    assert said(6, 0, 0.5).startswith("Inconclusive: 6 of 1,000") and "Look at closest.png" in said(6, 0, 0.5)
    assert said(5, 9, 0.8).startswith("No leakage beyond chance: ")
    assert said(5, 9, 0.8, closer=1).startswith("Inconclusive: ")
    assert said(50, 1, 0.001).startswith("LEAKAGE: ")
    assert said(5, 1, 0.3, single=0.001).startswith("Suspicion of leakage in net alone: ")
    assert said(0, 0, 1.0, few=True).endswith("fewer than 30 expected errors.")


def people_folder(folder: Path, numbers: range) -> Path:
    from PIL import Image

    for person in numbers:
        (folder / f"p{person:03d}").mkdir(parents=True)
        for face in range(3):
            image = pictures(np.array([person]), seed=100 * person + face)[0]
            Image.fromarray(image).save(folder / f"p{person:03d}" / f"{face}.png")
    return folder


def test_planted_people_are_found_and_others_are_not(tmp_path: Path) -> None:
    """People 0..29 are known to the generator, 30..59 are not; 60..99 are nobody."""
    nets = [network(tmp_path / f"net{i}", i) for i in range(2)]
    reference, null = (people_folder(tmp_path / n, r) for n, r in (("ref", range(30)), ("null", range(30, 60))))
    identities = np.concatenate((np.arange(60, 100).repeat(5), np.arange(12)))
    corpus = write(tmp_path / "corpus", pictures(identities, seed=5))
    files = []
    for name, folder in (("reference", reference), ("null", null)):
        files += [str(tmp_path / f"{name}.safetensors")]
        make_gallery(["--faces", str(folder), "--recognizers", json.dumps(nets), "--output", files[-1]])
        assert Gallery.load(files[-1]).images is None
    given = ["--corpus", str(corpus), "--recognizers", json.dumps(nets), "--cache", str(tmp_path / "cache")]
    given += ["--fmrs", "[0.01,0.005]", "--verdict_fmr", "0.005", "--device", "cpu", "--duplicate_cosine", "0.9999"]
    main([*given, "--reference", files[0], "--null", files[1], "--output", str(tmp_path / "found")])
    found = json.loads((tmp_path / "found" / "audit.json").read_text())
    leaks = set(pq.read_table(tmp_path / "found" / "leaks.parquet")["row"].to_pylist())
    planted = set(range(200, 212))
    assert len(leaks & planted) >= 10
    assert len(leaks - planted) <= 10
    assert found["verdict"].startswith("LEAKAGE")
    assert found["leakage"]["agreed"]["p_value"] < 0.01
    assert "LEAKAGE" in (tmp_path / "found" / "AUDIT.md").read_text()
    assert (tmp_path / "found" / "closest.png").read_bytes().startswith(b"\x89PNG")
    # The other way round: nobody of the null gallery was planted.
    main([*given, "--reference", str(null), "--null", files[0], "--output", str(tmp_path / "none")])
    assert not json.loads((tmp_path / "none" / "audit.json").read_text())["verdict"].startswith("LEAKAGE")


def test_duplicates_are_removed_and_what_is_left_is_a_corpus(tmp_path: Path) -> None:
    recipe = {
        "generator": {"class_path": "synth.generators.dcgan.DCGAN", "init_args": {"weights": None, "channels": 4}},
        "count": 600,
        "shard_rows": 400,
        "block": 64,
        "align": None,
        "workers": 0,
        "output": str(tmp_path / "corpus"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    whole = generate(read_settings(["--config", str(tmp_path / "recipe.yaml")]), progress=False)
    net = network(tmp_path / "net", 0)
    given = ["--corpus", str(whole.folder), "--recognizers", json.dumps([net]), "--device", "cpu"]
    given += [
        "--output",
        str(tmp_path / "audit"),
        "--cache",
        str(tmp_path / "cache"),
        "--remove",
        str(tmp_path / "rest"),
    ]
    # What a killed command left is no part of the result.
    (tmp_path / ".unfinished-rest" / "data").mkdir(parents=True)
    (tmp_path / ".unfinished-rest" / "data" / "part.parquet").write_bytes(b"half")
    # Random generators make faces that are all alike: that is what is to be found here.
    main([*given, "--duplicate_cosine", "0.5", "--duplicate_bits", "24", "--datasheet", "true"])
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    table = pq.read_table(tmp_path / "audit" / "duplicates.parquet").to_pandas()
    dropped = table["row"][~table["keep"]].tolist()
    assert 0 < found["duplicates"]["removable"] == len(dropped) < 600
    assert (table.groupby("group")["keep"].sum() == 1).all()
    rest = Corpus(tmp_path / "rest")
    rest.verify()
    assert not (tmp_path / ".unfinished-rest").exists() and not (rest.folder / "data" / "part.parquet").exists()
    stays = sorted(set(range(600)) - set(dropped))
    assert len(rest) == len(stays)
    assert torch.equal(rest.images(range(len(rest))), whole.images(stays))
    assert torch.equal(rest.latents(range(len(rest))), whole.latents(stays))
    sheet = (whole.folder / "DATASHEET.md").read_text()
    assert sheet.endswith("## Audit\nLeakage was not audited: no reference gallery was given.\n")
    assert "was not audited for that" not in sheet
    (tmp_path / "audit" / "audit.json").unlink()
    with pytest.raises(InputError, match="is there already"):
        main(given)
    assert not (tmp_path / "audit" / "audit.json").exists(), "before anything is embedded"
    sheet = (tmp_path / "rest" / "DATASHEET.md").read_text()
    assert f"- {len(rest):,} generated faces" in sheet and f"{len(dropped):,} of 600 faces were removed" in sheet
    (rest.folder / rest.shards[0]["name"]).unlink()
    with pytest.raises(InputError, match=r"rows of it were removed.*audit"):
        generate(
            read_settings(["--config", str(tmp_path / "recipe.yaml"), "--output", str(rest.folder), "--repair", "true"])
        )


def test_galleries_of_strangers_are_checked(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    net = faceless.load(network(tmp_path / "net", 0))
    key = digest(net)
    gallery = Gallery.of(torch.zeros(4, 3, 32, 32).byte(), np.arange(4), {key: net})
    gallery.save(tmp_path / "g.safetensors")
    again = Gallery.load(tmp_path / "g.safetensors")
    np.testing.assert_array_equal(again.seen_by(key, "net"), gallery.embeddings[key])
    assert again.identities.tolist() == [0, 1, 2, 3]
    with pytest.raises(InputError, match="no embeddings of other"):
        again.seen_by("0" * 64, "other")
    (tmp_path / "bad").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not readable as a gallery"):
        Gallery.load(tmp_path / "bad")
    save_file({"identities": torch.arange(3)}, tmp_path / "plain")
    with pytest.raises(InputError, match="is no gallery"):
        Gallery.load(tmp_path / "plain")
    metadata = {"faceless": '{"format": "gallery"}'}
    save_file({"identities": torch.arange(3), f"embeddings.{key}": torch.zeros(2, 4)}, tmp_path / "short", metadata)
    with pytest.raises(InputError, match="not finite embeddings of 3 faces"):
        Gallery.load(tmp_path / "short")


def test_leakage_needs_two_recognizers_and_a_null(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two recognizers or more"):
        main(["--corpus", "c", "--reference", "r", "--null", "n"])
    with pytest.raises(InputError, match="null gallery"):
        main(["--corpus", "c", "--reference", "r", "--recognizers", '["a", "b"]'])
    (tmp_path / "p").mkdir()
    with pytest.raises(InputError, match="one sub-folder of images for each person"):
        make_gallery(["--faces", str(tmp_path / "p"), "--recognizers", json.dumps([network(tmp_path / "n", 0)])])
    with pytest.raises(InputError, match=r"null: .*name the reference too"):
        main(["--corpus", "c", "--null", "n"])
    with pytest.raises(InputError, match="recognizers is empty"):
        make_gallery(["--faces", str(tmp_path / "p"), "--recognizers", "[]"])


def test_a_photograph_is_not_taken_for_a_crop(tmp_path: Path) -> None:
    """Squeezed into a square, a photograph would match nobody, and a leak would go unnoticed."""
    from PIL import Image

    folder = people_folder(tmp_path / "people", range(2))
    Image.new("RGB", (60, 80)).save(folder / "p001" / "photograph.jpg")
    given = ["--faces", str(folder), "--recognizers", json.dumps([network(tmp_path / "n", 0)])]
    with pytest.raises(InputError, match=r"photograph\.jpg: 60 x 80 pixels are no aligned square crop; use --aligned"):
        make_gallery([*given, "--output", str(tmp_path / "g.safetensors")])
    assert not (tmp_path / "g.safetensors").exists()


def test_the_command_embeds_faces_as_the_class_does_and_holds_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, net = people_folder(tmp_path / "people", range(5)), network(tmp_path / "net", 0)
    monkeypatch.setattr(galleries, "BATCH", 4)
    seen: list[int] = []
    forward = Recognizer.forward

    def counting(self: Recognizer, images: torch.Tensor) -> Output:
        seen.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Recognizer, "forward", counting)
    make_gallery(["--faces", str(folder), "--recognizers", json.dumps([net]), "--output", str(tmp_path / "g")])
    assert seen == [4, 4, 4, 3]
    recognizer = faceless.load(net)
    whole = Gallery.of(*galleries.read_people(folder), {"net": recognizer})
    made = Gallery.load(tmp_path / "g")
    assert made.identities.tolist() == whole.identities.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    np.testing.assert_allclose(made.embeddings[digest(recognizer)], whole.embeddings["net"], atol=1e-5)


def test_a_gallery_that_does_not_fit_on_the_disk(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    net = faceless.load(network(tmp_path / "net", 0))
    gallery = Gallery.of(torch.zeros(4, 3, 32, 32).byte(), np.arange(4), {digest(net): net})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(InputError, match=r"g\.safetensors: no space left on the disk"):
            gallery.save(tmp_path / "g.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("fmrs", "[0.0, 1e-4]", "fmrs needs rates between 0 and 1"),
        ("fmrs", "[]", "fmrs needs rates between 0 and 1"),
        ("cells", "0", "cells is 0"),
        ("sample", "0", "sample is 0"),
        ("neighbors", "0", "neighbors is 0"),
        ("shown", "-1", "shown is -1"),
        ("duplicate_cosine", "95", "duplicate_cosine is 95"),
        ("duplicate_bits", "-3", "duplicate_bits is -3"),
        ("seed", "3000000000", "seed is 3000000000; it must be within 0..2147483646"),
        ("seed", "-1", "seed is -1"),
    ],
)
def test_impossible_settings_are_one_line(option: str, value: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        main(["--corpus", "c", f"--{option}", value])


def test_a_crowd_of_duplicates_needs_no_memory_for_its_pairs(tmp_path: Path) -> None:
    """A generator that collapsed is what an audit is there to find: 3,000 alike faces are 4.5 million pairs."""
    numbers = np.random.default_rng(0)
    images = numbers.integers(200, size=(1, 8, 8, 3), dtype=np.uint8).repeat(3100, 0)
    images[:, 0, 0, 0] += (np.arange(3100) // 256).astype(np.uint8)  # alike without being one file
    images[3000:] = numbers.integers(256, size=(100, 8, 8, 3))
    corpus = write(tmp_path / "corpus", images, shards=1)
    alone = rows(100, 32)
    embedded = np.concatenate((np.tile(rows(1, 32, seed=9), (3000, 1)), alone))
    tracemalloc.start()
    group, stays = near_duplicates(Faces(corpus), embedded, embedded, 0.95, 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (group[:3000] == 0).all() and (stays[:3000] == 0).all()
    assert group[3000:].tolist() == stays[3000:].tolist() == list(range(3000, 3100))
    assert peak < 60e6, f"{peak / 1e6:.0f} MB"


@pytest.mark.parametrize("kind", ["identical", "nearly"])
def test_a_generator_that_makes_one_face_does_not_pass(tmp_path: Path, kind: str) -> None:
    """Without their mean nothing but noise is left of such faces, and noise is diverse."""
    images = pictures(np.zeros(1, int)).repeat(200, 0).astype(int)
    if kind == "nearly":
        images += np.random.default_rng(0).integers(-1, 2, images.shape)
    corpus = write(tmp_path / "corpus", np.clip(images, 0, 255).astype(np.uint8))
    net = network(tmp_path / "net", 0)
    given = ["--corpus", str(corpus), "--recognizers", json.dumps([net]), "--cache", str(tmp_path / "c")]
    main([*given, "--device", "cpu", "--output", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert found["duplicates"] == {"groups": 1, "removable": 199}
    assert found["diversity"]["vendi"] < 1.1 and found["diversity"]["mean_cosine"] > 0.99


def test_files_that_are_one_are_duplicates_whatever_a_network_says(tmp_path: Path) -> None:
    images = pictures(np.arange(40))
    corpus = write(tmp_path / "corpus", np.concatenate((images, images[5:8])))
    points = rows(43, 32)
    group, stays = near_duplicates(Faces(corpus), points, points, 0.95, 0)
    assert group[40:].tolist() == stays[40:].tolist() == [5, 6, 7]
    assert group[:40].tolist() == list(range(40))


def test_a_shard_that_was_exchanged_is_not_judged_by_the_manifest(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", pictures(np.arange(12)), shards=1)
    shards = [{"name": "0.parquet", "rows": 12, "sha256": sha256(corpus / "0.parquet")}]
    (corpus / "manifest.json").write_text(json.dumps({"shards": shards}))
    given = ["--corpus", str(corpus), "--recognizers", json.dumps([network(tmp_path / "net", 0)]), "--device", "cpu"]
    given += ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]
    main(given)
    write(corpus, pictures(np.zeros(12, int)), shards=1)
    with pytest.raises(InputError, match=r"0\.parquet: is not the shard that the manifest names; repair"):
        main(given)


def test_what_would_end_an_audit_is_said_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nets = [network(tmp_path / f"net{i}", i) for i in range(2)]
    reference, few = (people_folder(tmp_path / n, r) for n, r in (("ref", range(8)), ("few", range(8, 12))))
    corpus = write(tmp_path / "corpus", pictures(np.arange(12)))

    def nothing(*_: object) -> None:
        raise AssertionError("faces were embedded first")

    monkeypatch.setattr("mining.audit.embeddings", nothing)
    given = ["--corpus", str(corpus), "--recognizers", json.dumps(nets), "--device", "cpu"]
    with pytest.raises(InputError, match="no column index"):
        main([*given, "--remove", str(tmp_path / "rest")])
    with pytest.raises(InputError, match=r"DATASHEET\.md: there is no datasheet"):
        main([*given, "--datasheet", "true"])
    leaks = [*given, "--fmrs", "[0.1]", "--verdict_fmr", "0.1", "--reference", str(reference)]
    with pytest.raises(InputError, match="null: has 4 people and the reference 8"):
        main([*leaks, "--null", str(few)])
    others = people_folder(tmp_path / "others", range(12, 20))
    with pytest.raises(InputError, match=r"verdict_fmr 1e-06 needs 1,000,000 pairs"):
        main([*leaks, "--null", str(others), "--fmrs", "[1e-6]", "--verdict_fmr", "1e-6"])


def test_leaks_are_shown_beside_the_person_that_two_recognizers_agree_on() -> None:
    def decision(person: int) -> Decision:
        one = np.ones(1, np.float32)
        return Decision(one, np.array([10 * person]), np.array([person]), np.array([True]), one)

    assert agreement([decision(1), decision(2), decision(2)]).tolist() == [1]
    assert agreement([decision(1), decision(2), decision(1)]).tolist() == [0]
    assert agreement([decision(1), decision(2)]).tolist() == [-1]


def test_a_gallery_and_a_corpus_are_cut_alike(tmp_path: Path) -> None:
    net = network(tmp_path / "net", 0)
    options = {"widths": [8, 16], "depths": [1, 1], "head": "flat"}
    other = faceless.create("slimresnet", embedding_dim=16, input_size=32, framing="arcface", seed=1, **options)
    faceless.save(other, tmp_path / "other", {})
    nets = json.dumps([net, str(tmp_path / "other")])
    folder = people_folder(tmp_path / "people", range(8))
    files = {framing: str(tmp_path / f"{framing}.safetensors") for framing in ("dlib", "arcface")}
    with pytest.raises(InputError, match="say which: framing"):
        make_gallery(["--faces", str(folder), "--recognizers", nets, "--output", files["dlib"]])
    for framing, file in files.items():
        make_gallery(["--faces", str(folder), "--recognizers", nets, "--framing", framing, "--output", file])
        assert Gallery.load(file).framing == framing
    corpus = write(tmp_path / "corpus", pictures(np.arange(12)), shards=1)
    shards = [{"name": "0.parquet", "rows": 12, "sha256": sha256(corpus / "0.parquet")}]
    (corpus / "manifest.json").write_text(json.dumps({"shards": shards, "framing": "dlib"}))
    given = ["--corpus", str(corpus), "--recognizers", nets, "--fmrs", "[0.1]", "--verdict_fmr", "0.1"]
    given += ["--cache", str(tmp_path / "cache"), "--device", "cpu", "--output", str(tmp_path / "out")]
    with pytest.raises(InputError, match=r"arcface.safetensors.*arcface crops.*dlib crops"):
        main([*given, "--reference", files["arcface"], "--null", files["dlib"]])
    with pytest.raises(InputError, match=r"null: 24 of its 24 faces are in the reference as well"):
        main([*given, "--reference", files["dlib"], "--null", files["dlib"]])
    others = people_folder(tmp_path / "others", range(8, 16))
    null = str(tmp_path / "null.safetensors")
    make_gallery(["--faces", str(others), "--recognizers", nets, "--framing", "dlib", "--output", null])
    main([*given, "--reference", files["dlib"], "--null", null])
    assert "other` knows arcface crops and sees dlib crops here" in (tmp_path / "out" / "AUDIT.md").read_text()
    wrong = Gallery.load(files["dlib"])
    wrong.embeddings = {key: rows[:, :5].copy() for key, rows in wrong.embeddings.items()}
    wrong.save(tmp_path / "wrong.safetensors")
    with pytest.raises(InputError, match=r"a gallery holds 5 numbers of .*net for each face, not 16"):
        main([*given, "--reference", files["dlib"], "--null", str(tmp_path / "wrong.safetensors")])
    with pytest.raises(InputError, match="knows arcface crops"):
        main(["--corpus", str(corpus), "--recognizers", json.dumps([str(tmp_path / "other")])])
