"""MegaFace, TinyFace, large folders and parquet files, by brute force on small ones."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from eval import benchmarks, metrics
from eval.benchmarks import Benchmark, folder, people, protocol
from eval.verify import verify
from faceless.errors import InputError
from tests.eval.run_folder import faces, recognizer


def put(image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def encoded(image) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, "PNG")
    return stream.getvalue()


@given(st.lists(st.integers(0, 4), min_size=2, max_size=14), st.integers(0, 1000), st.integers(1, 60))
def test_streamed_pairs_are_all_pairs_once(identities, seed, block):
    identities = np.sort(identities)
    rows = protocol.unit(np.random.default_rng(seed).normal(size=(len(identities), 3)))
    first, second = np.triu_indices(len(rows), 1)
    scores, same = (rows[first] * rows[second]).sum(1), identities[first] == identities[second]
    found = [part.ravel() for part in people.impostor_scores(rows, identities, block)]
    found = np.concatenate([*found, np.float32([])])
    np.testing.assert_allclose(np.sort(found), np.sort(scores[~same]), atol=1e-6)
    genuine = people.genuine_scores(rows, identities)
    np.testing.assert_allclose(np.sort(genuine), np.sort(scores[same]), atol=1e-6)


def test_leave_one_out_search_is_mate_ranks():
    rng = np.random.default_rng(0)
    identities, rows = rng.integers(0, 6, 30), rng.normal(size=(30, 3))
    found = metrics.search(rows, identities, rows, identities, block=100, leave_one_out=True)
    np.testing.assert_array_equal(found.ranks, metrics.mate_ranks((rows @ rows.T).astype(np.float32), identities))
    with pytest.raises(ValueError, match="probes that are the gallery"):
        metrics.search(rows[:3], identities[:3], rows, identities, leave_one_out=True)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    """Seven people with five faces each in two files, as datasets writes them."""
    root = tmp_path_factory.mktemp("parquet") / "mine"
    (root / "data").mkdir(parents=True)
    stack = faces(7, 5)
    order = np.random.default_rng(0).permutation(35)
    for number, rows in enumerate(np.array_split(order, 2)):
        table = pa.table(
            {
                "image": [{"bytes": encoded(stack.images[row]), "path": None} for row in rows],
                "label": [f"person {int(stack.identities[row])}" for row in rows],
            }
        )
        pq.write_table(table, root / "data" / f"part-{number}.parquet", row_group_size=4)
    return root


@given(st.lists(st.integers(1, 4), min_size=2, max_size=6), st.floats(-1, 1, width=32), st.integers(0, 1000))
def test_tar_is_resampled_by_person(counts, threshold, seed):
    identities = np.repeat(np.arange(len(counts)), counts)
    rows = protocol.unit(np.random.default_rng(seed).normal(size=(len(identities), 3)))
    genuine = people.genuine_scores(rows, identities)
    reached, pairs = [], []
    for mine in (rows[identities == person] for person in range(len(counts))):
        scores = (mine @ mine.T).astype(np.float32)[np.triu_indices(len(mine), 1)]
        if len(scores):
            reached.append((scores >= threshold).sum())
            pairs.append(len(scores))
    if pairs:
        expected = metrics.share_interval(reached, pairs)
        assert people.tar_interval(genuine, identities, threshold) == (expected and list(expected))


def check_against_memory(report: protocol.Report, stack: Benchmark) -> None:
    expected = verify(recognizer(24), stack, bootstrap=0)
    figures = report.figures
    assert (figures["genuine"], figures["impostor"]) == (len(expected.genuine), len(expected.impostor))
    assert figures["rank1"] == expected.rank1
    assert figures["eer"] == pytest.approx(expected.eer, abs=1e-12)
    assert figures["auc"] == pytest.approx(expected.auc, abs=1e-9)
    assert figures["tar_at_far"]["1e-2"] == expected.points["1e-2"].tar
    assert "1e-6" not in figures["tar_at_far"]  # not one impostor may pass
    assert figures["intervals"]["rank1"] == pytest.approx(
        list(
            metrics.interval(metrics.bootstrap_share(expected.ranks == 1, stack.identities, metrics.resamples(7, 1000)))
        )
    )
    low, high = figures["intervals"]["tar_at_far"]["1e-2"]
    assert 0 <= low <= figures["tar_at_far"]["1e-2"] <= high <= 1
    assert "1e-6" not in figures["intervals"]["tar_at_far"]


def test_parquet_gives_the_figures_of_the_faces_in_memory(parquet):
    found = benchmarks.find(parquet, "arcface", 32)
    assert isinstance(found, people.People)
    check_against_memory(protocol.evaluate(recognizer(24), found, cache=False), faces(7, 5))
    alone = benchmarks.find(parquet / "data" / "part-0.parquet", "arcface", 32)
    assert len(alone) == 18
    assert alone.digest != found.digest


def test_large_folders_are_streamed(tmp_path, monkeypatch):
    stack = faces(7, 5)
    for row, image in enumerate(stack.images):
        put(image, tmp_path / f"p{row // 5}" / f"{row}.png")
    assert isinstance(benchmarks.find(tmp_path, "arcface", 32), Benchmark)
    monkeypatch.setattr(folder, "MAX_FACES", 34)
    found = benchmarks.find(tmp_path, "arcface", 32)
    check_against_memory(protocol.evaluate(recognizer(24), found, cache=False), stack)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [1, 2]}, "no column of images"),
        ({"image": [b"x", b"y"]}, "no column of identities"),
        ({"image": [b"x", b"y"], "label": [1.5, 2.5]}, "identities are whole numbers or text"),
        ({"image": [b"x", b"y"], "label": [1, None]}, "none missing"),
        ({"image": [b"x", b"y"], "label": [1, 2]}, "two faces of at least one"),
        ({"image": [b"x", b"y", b"z"], "label": [1, 1, 2]}, "row 0: cannot be read as an image"),
        ({"image": [1, 2, 3], "label": [1, 1, 2]}, "row 0 of image holds no bytes"),
    ],
)
def test_other_parquet_is_one_line(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=message):
        list(benchmarks.find(tmp_path / "x.parquet", "arcface", 32).faces())


def test_damaged_parquet_is_named(tmp_path, parquet):
    whole = (parquet / "data" / "part-0.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut\.parquet: not readable as parquet"):
        benchmarks.find(tmp_path / "cut.parquet", "arcface", 32)
    (tmp_path / "cut.parquet").unlink()
    (tmp_path / "hole.parquet").write_bytes(whole[:200] + bytes(3000) + whole[3200:])
    with pytest.raises(InputError, match=r"hole\.parquet"):
        list(benchmarks.find(tmp_path / "hole.parquet", "arcface", 32).faces())


@pytest.fixture(scope="module")
def megaface(tmp_path_factory) -> Path:
    """Four people with three faces and ten distractors; the noise lists name a face and a distractor."""
    root = tmp_path_factory.mktemp("megaface")
    probes, others = faces(4, 3).images, faces(14, 1).images[4:]
    names = [f"P_{row // 3}/P_{row // 3}_{row}.png" for row in range(12)]
    for name, image in zip(names, probes):
        put(image, root / "facescrub_images" / name)
    distant = [f"{row % 2}/{row}@N/{row}_0.png" for row in range(10)]
    for name, image in zip(distant, others):
        put(image, root / "megaface_images" / name)
    (root / "facescrub_lst").write_text("\n".join(reversed(names)) + "\n")
    (root / "megaface_lst").write_text("\n".join(distant) + "\n")
    (root / "facescrub_noises.txt").write_text("# wrong people\nP_1_4.png\n")
    (root / "megaface_noises.txt").write_text(f"1\t{distant[3]}\n")
    return root


def test_megaface_by_brute_force(megaface):
    found = benchmarks.find(f"megaface:{megaface}", "arcface", 32)
    net = recognizer(6)
    report = protocol.evaluate(net, found, cache=False)
    probes = [(row // 3, image) for row, image in enumerate(faces(4, 3).images) if row != 4]
    others = [image for row, image in enumerate(faces(14, 1).images[4:]) if row != 3]

    def embedded(image):
        both = net(image[None]).embedding + net(image[None].flip(-1)).embedding
        return protocol.unit(both.detach().numpy())[0]

    P, D = [(person, embedded(image)) for person, image in probes], [embedded(image) for image in others]
    hits, searches, genuine = 0, 0, []
    for i, (person, probe) in enumerate(P):
        for j, (other, mate) in enumerate(P):
            if i != j and person == other:
                searches += 1
                hits += all(probe @ mate > probe @ d for d in D)
                genuine.append(probe @ mate)
    figures = report.figures
    assert (figures["probes"], figures["distractors"], figures["searches"]) == (11, 9, searches)
    assert 0 < figures["rank1"] == hits / searches < 1
    assert (figures["genuine"], figures["impostor"]) == (searches // 2, 99)
    low, high = figures["intervals"]["rank1"]
    assert low <= figures["rank1"] <= high
    assert low < high
    assert report.summary()["noise lists"] == {"probes left out": 1, "distractors left out": 1}
    assert "noise lists applied" in report.heading


def test_megaface_lists_are_checked(megaface, tmp_path):
    with pytest.raises(InputError, match="facescrub_lst: cannot be read"):
        benchmarks.find(f"megaface:{tmp_path}", "arcface", 32)
    (tmp_path / "facescrub_lst").write_text("../../secret/x.png\n")
    with pytest.raises(InputError, match="outside of the benchmark's folder"):
        benchmarks.find(f"megaface:{tmp_path}", "arcface", 32)
    (tmp_path / "facescrub_lst").write_text("A/A_1.png\nA/A_2.png\n")
    (tmp_path / "megaface_lst").write_text("0/1/2.png\n")
    with pytest.raises(InputError, match=r"A_1\.png: cannot be read"):
        benchmarks.find(f"megaface:{tmp_path}", "arcface", 32)


@pytest.fixture
def tinyface(tmp_path) -> Path:
    root = tmp_path / "Testing_Set"
    stack = faces(8, 2).images
    lists = {"Probe": ("probe", range(0, 8, 2)), "Gallery_Match": ("gallery", range(1, 8, 2))}
    for name, (kind, rows) in lists.items():
        for row in rows:
            put(stack[row], root / name / f"{row}.png")
        cells = np.array([[f"{row}.png"] for row in rows], dtype=object)
        stem = "gallery_match" if kind == "gallery" else kind
        ids = np.array([[row // 2 + 1] for row in rows])
        savemat(root / f"{stem}_img_ID_pairs.mat", {f"{kind}_set": cells, f"{kind}_ids": ids})
    for row in range(8, 16):
        put(stack[row], root / "Gallery_Distractor" / f"d{row}.png")
    return root.parent


def test_tinyface_ranks(tinyface):
    found = benchmarks.find(f"tinyface:{tinyface}", "arcface", 32)
    net = recognizer(6)
    report = protocol.evaluate(net, found, flip=False, cache=False)
    rows = net.embed(faces(8, 2).images).double().numpy()
    gallery = np.r_[np.arange(1, 8, 2), np.arange(8, 16)]
    ranks = []
    for probe in range(0, 8, 2):
        scores = rows[gallery] @ rows[probe]
        ranks.append(1 + (scores > scores[probe // 2]).sum())
    assert (report.figures["probes"], report.figures["gallery"]) == (4, 12)
    assert report.figures["rank1"] == np.mean(np.array(ranks) <= 1)
    assert report.figures["rank5"] == np.mean(np.array(ranks) <= 5)
    by_person = metrics.bootstrap_share(np.array(ranks) <= 1, np.arange(4), metrics.resamples(4, 1000))
    assert report.figures["intervals"]["rank1"] == pytest.approx(list(metrics.interval(by_person)))


def test_tinyface_lists_are_checked(tinyface):
    path = tinyface / "Testing_Set" / "probe_img_ID_pairs.mat"
    whole = path.read_bytes()
    for content in (whole[:100], b"", b"MATLAB" * 50):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"probe_img_ID_pairs\.mat"):
            benchmarks.find(f"tinyface:{tinyface}", "arcface", 32)
    savemat(path, {"probe_set": np.array([["../x.png"]], dtype=object), "probe_ids": np.array([[1]])})
    with pytest.raises(InputError, match="do not belong together"):
        benchmarks.find(f"tinyface:{tinyface}", "arcface", 32)
