"""Teachers that teach as one: what fusion does, and runs that use it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

import faceless
from distill.augment import Degrade
from distill.build import calibrate
from distill.ensembles import Ensemble, FusedRecognizer, Fusion, load_teachers
from distill.losses.embedding import CosineEmbedding
from distill.losses.probabilistic import VonMisesFisher
from distill.objective import Objective
from distill.settings import Run
from distill.sources import OnlineSource, Place
from distill.train import main
from eval.benchmarks import Benchmark, under
from eval.verify import verify
from faceless.errors import InputError, command
from faceless.randomness import Rng
from faceless.recognizer import InputSpec, Recognizer
from faceless.settings import parse
from synth.generators.dcgan import DCGAN
from tests.distill.test_train import TINY, recipe, student_bytes


class Linear(torch.nn.Module):
    """An embedding that is a linear map of the pixels' averages over a grid."""

    def __init__(self, matrix: torch.Tensor, shift: float = 0.0):
        super().__init__()
        self.matrix, self.shift, self.embedding_dim = torch.nn.Parameter(matrix), shift, matrix.shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = round((len(self.matrix) / 3) ** 0.5)
        return F.adaptive_avg_pool2d(x, side).flatten(1) @ self.matrix + self.shift


def linear(matrix: torch.Tensor, shift: float = 0.0, **spec: Any) -> Recognizer:
    return Recognizer(Linear(matrix, shift), InputSpec(**spec)).eval().requires_grad_(False)


def faces(n: int = 200, side: int = 16, seed: int = 0) -> torch.Tensor:
    return Rng.of(seed, "faces", range(n)).integers(256, 3, side, side).byte()


def matrix(rows: int = 48, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def fused(how: str, *members: Recognizer, **options: Any) -> FusedRecognizer:
    made = FusedRecognizer(Fusion(members, how, **options), 200).eval().requires_grad_(False)
    made.fusion.calibrate(faces())
    return made


SMALL = {"height": 16, "width": 16}


@pytest.mark.parametrize("how", ["mean", "von-mises-fisher"])
def test_rotated_copies_are_turned_back_and_agree(how: str) -> None:
    base, turn = matrix(), torch.linalg.qr(matrix(8, 8, 1))[0]
    both = fused(how, linear(base, 3.0, **SMALL), linear(base @ turn, -7.0, **SMALL), by_norm=False)
    new = faces(50, seed=1)
    truth = linear(base, **SMALL)(new).embedding
    found = both(new).embedding
    mean = linear(base, **SMALL)(faces()).embedding.mean(0)
    torch.testing.assert_close(F.normalize(found), F.normalize(truth - mean), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(50), atol=1e-4, rtol=0)


def test_a_smaller_embedding_is_embedded_isometrically_in_the_larger() -> None:
    base = matrix()
    both = fused("mean", linear(base[:, :5], **SMALL), linear(base, **SMALL))
    assert both.embedding_dim == 8
    turn = both.fusion.fits[0].turn
    torch.testing.assert_close(turn @ turn.T, torch.eye(5), atol=1e-5, rtol=0)


def test_a_reduced_concatenation_keeps_its_principal_directions() -> None:
    nets = [linear(matrix(seed=i, dim=d), 2.0, **SMALL) for i, d in enumerate((8, 5, 6))]
    whole, less = fused("concatenate", *nets), fused("concatenate", *nets, embedding_dim=7)
    assert (whole.embedding_dim, less.embedding_dim) == (19, 7)
    # Members are centered but for their normalization, and no mean is taken away here.
    rows, new = (whole(x).embedding.double().numpy() for x in (faces(), faces(40, seed=1)))
    expected = new @ np.linalg.eigh(rows.T @ rows)[1][:, -7:]
    found = less(faces(40, seed=1)).embedding.double().numpy()
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-5)
    # Each direction's sign is settled, so that another machine shows the student the same target.
    basis = less.fusion.basis
    assert basis is not None and (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()
    with pytest.raises(InputError, match="the members have 19"):
        Fusion(nets, "concatenate", embedding_dim=20)
    with pytest.raises(InputError, match="for fusion concatenate"):
        Ensemble(members=["a", "b"], fusion="mean", embedding_dim=4)


@pytest.mark.parametrize("sees", ["view", "face"])
def test_an_ensemble_is_calibrated_on_faces_as_its_run_shows_them(
    tmp_path: Path, sees: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[torch.Tensor] = []
    calibrate = Fusion.calibrate

    def kept(self: Fusion, faces: torch.Tensor) -> None:
        shown.append(faces)
        calibrate(self, faces)

    monkeypatch.setattr(Fusion, "calibrate", kept)
    path = ensemble_recipe(tmp_path, teacher_sees=sees, augment={"size": 32, "blur": 1.0, "blur_sigma": 3.0}, steps=1)
    main(["--config", str(path)])
    (given,) = shown
    assert len(given) == 64
    steps = (given.float()[:, :, :, 1:] - given.float()[:, :, :, :-1]).abs().mean()
    plain = ensemble_sample(path).float()
    sharp = (plain[:, :, :, 1:] - plain[:, :, :, :-1]).abs().mean()
    assert (steps < 0.7 * sharp) == (sees == "view")


def test_the_digest_of_an_ensemble_follows_its_members_and_what_they_are_shown() -> None:
    def digest(shown: Any = None, **options: Any) -> str:
        net = FusedRecognizer(Fusion([linear(matrix()), linear(matrix(seed=1))], "mean", **options), 20)
        net.know(shown)
        return str(net.source["sha256"])

    assert digest() == digest() and digest({"blur": 0.1}) == digest({"blur": 0.1})
    others = [digest(), digest({"blur": 0.1}), digest({"blur": 0.2}), digest(center=False)]
    assert len(set(others)) == len(others)


def test_a_runs_ensemble_goes_by_which_faces_it_saw_and_not_by_their_pixels(tmp_path: Path) -> None:
    """Networks that make faces, and augmentations, have other last bits elsewhere; the run is to go on there."""
    path = ensemble_recipe(tmp_path)

    def digest(slip: float = 0.0, **changes: Any) -> str:
        run = parse(Run, ["--config", str(path)]).changed(changes).build()
        run.source.prepare(Place(run.seed, 8, 0, 1, torch.device("cpu"), 16, steps=run.steps))
        (net,) = load_teachers(run.teacher)
        assert isinstance(net, FusedRecognizer) and isinstance(run.source, OnlineSource)
        with torch.no_grad():
            next(run.source.generator.parameters()).mul_(1 + slip)  # as another device's arithmetic
        seen.append(run.source.sample(64))
        calibrate(run, net, learn=False)
        return str(net.source["sha256"])

    seen: list[torch.Tensor] = []
    assert digest() == digest(slip=1e-3) and not torch.equal(*seen)
    found = [digest(), digest(seed=1), digest(teacher_sees="face"), digest(seed=1, teacher_sees="face")]
    torch.save(DCGAN(None, latent_dim=8, channels=4, seed=2).state_dict(), tmp_path / "generator.pt")
    found.append(digest())
    assert len(set(found)) == len(found)


def ensemble_sample(path: Path) -> torch.Tensor:
    """The faces that a run's source gives for a calibration."""
    run = parse(Run, ["--config", str(path)]).build()
    run.source.prepare(
        Place(run.seed, run.batch_size, 0, 1, torch.device("cpu"), run.validation.faces, steps=run.steps)
    )
    return run.source.sample(64)


def test_cosines_of_a_concatenation_are_the_mean_of_the_members() -> None:
    nets = [linear(matrix(seed=i, dim=d), **SMALL) for i, d in enumerate((8, 5, 6))]
    all_three = fused("concatenate", *nets, center=False)
    new = faces(20, seed=2)
    rows = F.normalize(all_three(new).embedding)
    expected = torch.stack([(u := F.normalize(net(new).embedding)) @ u.T for net in nets]).mean(0)
    torch.testing.assert_close(rows @ rows.T, expected, atol=1e-5, rtol=0)
    assert all_three.embedding_dim == 19


def test_members_that_disagree_are_less_concentrated_and_weights_count() -> None:
    base = matrix()
    # The second member answers to half of the faces as the first does, and at random to the others.
    dark = faces(100, seed=3).float() / 2
    bright = dark + 127
    strange = base.clone()

    class Moody(Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            plain = super().forward(x)
            turned = plain.view(-1, 4, 2).flip(2) * torch.tensor([-1.0, 1.0])  # by a right angle
            return torch.where(x.mean((1, 2, 3))[:, None] > 0, turned.flatten(1), plain)

    pair = Fusion([linear(base, **SMALL), Recognizer(Moody(strange), InputSpec(**SMALL))], "von-mises-fisher", False)
    pair.by_norm = False
    agreed, argued = pair(dark).norm(dim=1), pair(bright).norm(dim=1)
    torch.testing.assert_close(agreed, torch.ones(100), atol=1e-5, rtol=0)
    torch.testing.assert_close(argued, torch.full((100,), 0.5**0.5), atol=1e-5, rtol=0)
    # A member of three times the weight has three times the say.
    pair = Fusion(list(pair.members), "von-mises-fisher", False, False, [3.0, 1.0])
    torch.testing.assert_close(pair(bright).norm(dim=1), torch.full((100,), 10**0.5 / 4), atol=1e-5, rtol=0)


def test_a_member_of_another_framing_sees_its_own_crop() -> None:
    """The eyes of a dlib chip come to lie where ArcFace's crops have them."""
    from faceless.align import template

    side = 150
    points = template("dlib", "arcface5", side)[:2]
    yx = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).flip(-1).float()
    chip = sum(255 * torch.exp(-((yx - p).square().sum(-1)) / 18) for p in points).expand(1, 3, -1, -1)
    seen = []

    class Spy(torch.nn.Module):
        embedding_dim = 4

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.new_ones(len(x), 4)

    spec = InputSpec(112, 112, mean=(0, 0, 0), std=(1, 1, 1))
    fusion = Fusion([linear(matrix(), **SMALL, framing="dlib"), Recognizer(Spy(), spec)], "concatenate")
    fusion(chip)
    eye = template("arcface", "arcface5", 112)[0].round().int()
    peak = seen[0][0, 0, :, :56].flatten().argmax()
    assert abs(int(peak % 56) - int(eye[0])) <= 1 and abs(int(peak // 56) - int(eye[1])) <= 1


def test_too_few_faces_or_members_are_named() -> None:
    with pytest.raises(InputError, match="two members"):
        Ensemble(members=["a"])
    pair = FusedRecognizer(Fusion([linear(matrix(), **SMALL), linear(matrix(), **SMALL)], "mean"), 4)
    with pytest.raises(InputError, match="4 faces cannot align"):
        pair.fusion.calibrate(faces(4))
    with pytest.raises(InputError, match="by_norm is for fusion von-mises-fisher"):
        Ensemble(members=["a", "b"], fusion="mean", by_norm=False)
    with pytest.raises(InputError, match=r"teacher\.weights are"):
        Ensemble(members=["a", "b"], weights=[1.0, float("nan")])


def members(folder: Path) -> list[str]:
    torch.manual_seed(0)
    net = faceless.create("slimresnet", embedding_dim=16, input_size=32, framing="dlib", **TINY)
    faceless.save(net, folder / "first", {})
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * p.std() * torch.randn_like(p)) if p.ndim > 1 else None
    faceless.save(net, folder / "second", {})
    wide = faceless.create("slimresnet", embedding_dim=12, input_size=48, framing="arcface", seed=3, **TINY)
    faceless.save(wide, folder / "third", {})
    return [str(folder / name) for name in ("first", "second", "third")]


def ensemble_recipe(folder: Path, **changes: Any) -> Path:
    teacher = {
        "class_path": "distill.ensembles.Ensemble",
        "init_args": {"members": members(folder), "faces": 64},
    }
    sure = {"loss": {"class_path": "distill.losses.probabilistic.VonMisesFisher"}}
    settings: dict[str, Any] = {"teacher": teacher, "center": False, "losses": {"sure": sure}}
    return recipe(folder, folder / "first", **settings | changes)


def test_a_run_with_an_ensemble_leaves_its_record_and_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    path = ensemble_recipe(tmp_path)
    main(["--config", str(path), "--output", str(tmp_path / "whole")])
    record = json.loads((tmp_path / "whole" / "provenance.json").read_text())["teacher"]
    assert record["fusion"] == "von-mises-fisher" and len(record["members"]) == 3
    assert all(len(member["sha256"]) == 64 for member in record["members"])
    for newer in sorted((tmp_path / "whole" / "checkpoints").glob("*.pt"))[1:]:
        newer.unlink()
    before = student_bytes(tmp_path / "whole")
    main(["--config", str(path), "--output", str(tmp_path / "whole")])
    assert student_bytes(tmp_path / "whole") == before


def test_neither_probing_nor_calibration_moves_batch_statistics(tmp_path: Path) -> None:
    (ensemble,) = Ensemble(members=members(tmp_path), faces=64).load()
    assert isinstance(ensemble, FusedRecognizer) and not any(module.training for module in ensemble.modules())
    before = {key: value.clone() for key, value in ensemble.state_dict().items()}
    assert any("running" in key for key in before)
    student = faceless.create("slimresnet", embedding_dim=ensemble.embedding_dim, input_size=32, **TINY).train()
    student.backbone.fc.eval()
    modes = [module.training for module in student.modules()]
    objective = Objective(
        {"a": CosineEmbedding()}, {"a": 1.0}, student_dim=student.embedding_dim, teacher_dim=ensemble.embedding_dim
    )
    objective.probe(student, ensemble)
    assert [module.training for module in student.modules()] == modes
    ensemble.fusion.train().calibrate(faces(64, 32))
    assert all(torch.equal(value, before[key]) for key, value in ensemble.state_dict().items())


def test_a_wrong_ensemble_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ensemble_recipe(tmp_path)
    settings = yaml.safe_load(path.read_text())
    for arguments, named in (
        ({"members": ["only"]}, "two members"),
        ({"members": ["a", "b"], "weights": [1.0]}, "teacher.weights"),
        ({"members": ["a", "b"], "weights": [2.0, 1.0], "fusion": "mean"}, "are for fusion von-mises-fisher"),
        ({"members": ["a", "b"], "fuson": "mean"}, "fusion"),
        ({"members": [str(tmp_path / "first"), "nobody-knows"]}, "nobody-knows"),
    ):
        settings["teacher"]["init_args"] = arguments
        path.write_text(yaml.safe_dump(settings))
        with pytest.raises(SystemExit):
            command(main)(["--config", str(path)])
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("error: ") and named in message, message


def pictures(people: int, each: int, seed: int) -> Benchmark:
    """Random patterns of "people", each seen with a little of another pattern, 64 pixels."""
    base = Rng.of(seed, "people", range(people)).normal(3, 16, 16).repeat_interleave(each, 0)
    shots = base + 0.5 * Rng.of(seed, "shots", range(people * each)).normal(3, 16, 16)
    images = (F.interpolate(shots, (64, 64), mode="bilinear") * 45 + 127).clamp(0, 255).byte()
    return Benchmark("patterns", images, torch.arange(people).repeat_interleave(each), [str(i) for i in range(people)])


def test_a_student_knows_which_faces_are_bad() -> None:
    """Trained on faces good and bad, it has a smaller norm for bad ones, and rejecting by it lowers FNMR."""
    base, turn = matrix(768, 32), torch.linalg.qr(matrix(32, 32, 1))[0]
    spec: dict[str, Any] = {"height": 64, "width": 64}
    members = [linear(base, **spec), linear(base @ turn + 0.3 * matrix(768, 32, 2), **spec)]
    teacher = FusedRecognizer(Fusion(members, "von-mises-fisher"), 200).eval()
    teacher.fusion.calibrate(pictures(200, 1, 0).images)
    student = Recognizer(Linear(0.03 * matrix(768, 32, 3)), InputSpec(**spec))
    degrade = Degrade(resolutions=[64, 28, 20, 14, 10, 7])
    loss, optimizer = VonMisesFisher(), torch.optim.Adam(student.parameters(), 0.01)
    for step in range(150):
        shown = degrade(pictures(64, 1, step).images.float(), "dlib", Rng.of(step, "worse", range(64)))
        optimizer.zero_grad()
        loss(student(shown), teacher(shown)).backward()
        optimizer.step()
    unseen = pictures(60, 4, 999)
    good, bad = (student.embed(x.images, unit=False).norm(dim=1) for x in (unseen, under(unseen, "14px")))
    assert (bad < good).float().mean() > 0.95
    worse = degrade(unseen.images.float(), "dlib", Rng.of(0, "worse", range(240))).byte()
    found = verify(student, replace(unseen, images=worse), bootstrap=0, quality=True).record["fnmr_by_discarded"]
    assert found["0.3"] < found["0.1"] < found["0.0"]
    assert found["0.3"] < 0.8 * found["0.0"]
