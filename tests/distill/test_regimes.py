"""Runs of other regimes: teachers that mature, chains of students, students that learn together, worse faces."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import faceless
from distill.build import make_objective
from distill.chain import links
from distill.checks import mirrored
from distill.ensembles import Nobody, Snapshots
from distill.settings import Run
from distill.sources import Batch
from distill.teachers import FrozenTeacher, StagedTeacher
from distill.train import main
from faceless.errors import InputError, command
from faceless.files import sha256
from faceless.randomness import Rng
from faceless.settings import parse
from tests.distill.test_sources import folder
from tests.distill.test_train import TINY, corpus_recipe, lines, recipe, student_bytes

LOSSES = "distill.losses"
COSINE: dict[str, Any] = {"class_path": f"{LOSSES}.embedding.CosineEmbedding"}
PEER = {"name": "slimresnet", "input_size": 32, "options": TINY}
QUIET = {"validation": {"faces": 0}, "steps": 6, "checkpoint_every": 2}


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    net = faceless.create("slimresnet", embedding_dim=16, input_size=32, framing="dlib", **TINY)
    return faceless.save(net, tmp_path / "teacher", {})


def mutual(peers: int = 2) -> dict[str, Any]:
    queue = {"class_path": f"{LOSSES}.contrastive.QUD", "init_args": {"embedding_dim": 16, "queue_size": 32}}
    return {
        "peers": [PEER] * peers,
        "losses": {
            "cosine": {"loss": COSINE},
            "peers": {
                "loss": {"class_path": f"{LOSSES}.mutual.EachPeer", "init_args": {"loss": queue, "peers": peers}}
            },
            "mutual": {
                "loss": {"class_path": f"{LOSSES}.mutual.Mutual", "init_args": {"loss": COSINE, "peers": peers}}
            },
        },
    }


def snapshots(at: Path, count: int = 3) -> dict[str, Any]:
    """A teacher of so many stages, as settings."""
    for step in range(1, count + 1):
        net = faceless.create("slimresnet", embedding_dim=16, input_size=32, framing="dlib", seed=step, **TINY)
        faceless.save(net, at / f"step-{step:08d}", {})
    return {"teacher": {"class_path": "distill.ensembles.Snapshots", "init_args": {"stages": str(at)}}, "center": False}


def resumed(run: Path, path: Path, *more: str) -> None:
    """Forget all but the first checkpoint and the student, and give the command again."""
    for newer in sorted((run / "checkpoints").glob("*.pt"))[1:]:
        newer.unlink()
    shutil.rmtree(run / "student")
    main(["--config", str(path), *more])


def test_a_stage_teaches_as_long_as_an_epoch_of_multi_step_distillation() -> None:
    """PocketNet's loop: epoch e of E, of n steps each, asks snapshot e."""
    nets = [faceless.create("slimresnet", embedding_dim=4, input_size=32, seed=i, **TINY) for i in range(3)]
    staged = StagedTeacher([FrozenTeacher(net) for net in nets])
    images = Rng.of(0, "faces", range(2)).integers(256, 3, 32, 32).byte()
    batch = Batch(images, Rng.of(0, "view", range(2)))
    for step in range(12):
        staged.at(step / 12)
        assert torch.equal(staged(images, batch).embedding, FrozenTeacher(nets[step // 4]).see(images).embedding)
    assert torch.equal(staged.see(images).embedding, FrozenTeacher(nets[2]).see(images).embedding)


def test_snapshots_are_kept_and_teach(tmp_path: Path, teacher: Path) -> None:
    first = recipe(tmp_path, teacher, snapshot_every=2, **QUIET)
    main(["--config", str(first), "--output", str(tmp_path / "mature")])
    kept = sorted((tmp_path / "mature" / "snapshots").iterdir())
    assert [path.name for path in kept] == ["step-00000002", "step-00000004", "step-00000006"]
    last, final = (faceless.load(path) for path in (kept[-1], tmp_path / "mature" / "student"))
    assert all(torch.equal(a, b) for a, b in zip(last.state_dict().values(), final.state_dict().values()))
    settings: dict[str, Any] = {
        "teacher": {"class_path": "distill.ensembles.Snapshots", "init_args": {"stages": str(kept[0].parent)}},
        "center": False,
    }
    path = recipe(tmp_path, teacher, **QUIET | settings)
    aside = kept[1].rename(tmp_path / "aside")
    with pytest.raises(InputError, match="lacks 1 of 3 snapshots, the first of step 4"):
        main(["--config", str(path)])
    aside.rename(kept[1])
    main(["--config", str(path)])
    run = tmp_path / "run"
    stages = json.loads((run / "provenance.json").read_text())["teacher"]["stages"]
    assert [stage["sha256"] for stage in stages] == [sha256(path / "model.safetensors") for path in kept]
    before = student_bytes(run)
    resumed(run, path)
    assert student_bytes(run) == before
    # The last stage alone teaches otherwise.
    main(
        ["--config", str(recipe(tmp_path, kept[-1], **QUIET | {"center": False})), "--output", str(tmp_path / "other")]
    )
    alone, staged = ([e["loss"] for e in lines(tmp_path / name) if "loss" in e] for name in ("other", "run"))
    assert alone[:4] != staged[:4]


def test_each_stage_is_centered_by_its_own_mean(tmp_path: Path, teacher: Path) -> None:
    """What a stage adds to all faces alike, a run that centers does not see."""
    net = faceless.load(teacher)
    with torch.no_grad():
        net.backbone.fc.bias.add_(torch.linspace(-3, 3, 16))
    moved = faceless.save(net, tmp_path / "moved", {})
    path = corpus_recipe(tmp_path, teacher)
    losses: dict[str, list[float]] = {}
    for first, center in ((teacher, True), (moved, True), (moved, False)):
        stages = {"class_path": "distill.ensembles.Snapshots", "init_args": {"stages": [str(first), str(teacher)]}}
        settings = yaml.safe_load(path.read_text()) | {"teacher": stages, "center": center, "steps": 6}
        name = f"{first.name}-{center}"
        settings |= {"teacher_cache": str(tmp_path / "cache"), "output": str(tmp_path / name)}
        (tmp_path / "staged.yaml").write_text(yaml.safe_dump(settings))
        main(["--config", str(tmp_path / "staged.yaml")])
        losses[name] = [entry["loss"] for entry in lines(tmp_path / name) if "loss" in entry]
    assert losses["moved-True"] == pytest.approx(losses["teacher-True"], rel=1e-4)
    assert abs(losses["moved-False"][0] - losses["teacher-True"][0]) > 0.01


@pytest.mark.parametrize(
    ("widths", "named"), [([8], "teacher of stage 1 has no layer 'stages.1'"), ([8, 24], "losses.hint: the teacher of")]
)
def test_a_stage_whose_layers_are_others_is_named_before_the_run(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str], widths: list[int], named: str
) -> None:
    shape = {"widths": widths, "depths": [1] * len(widths)}
    early = faceless.create("slimresnet", embedding_dim=16, input_size=32, framing="dlib", **shape)
    faceless.save(early, tmp_path / "early", {})
    stages = {
        "class_path": "distill.ensembles.Snapshots",
        "init_args": {"stages": [str(tmp_path / "early"), str(teacher)]},
    }
    hint = {
        "class_path": f"{LOSSES}.features.Hint",
        "init_args": dict.fromkeys(("student_layer", "teacher_layer"), "stages.1"),
    }
    path = recipe(tmp_path, teacher, **QUIET | {"teacher": stages, "center": False, "losses": {"hint": {"loss": hint}}})
    with pytest.raises(SystemExit):
        command(main)(["--config", str(path)])
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run" / "settings.yaml").exists()


def test_stages_that_do_not_fit_are_named(tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(InputError, match="found 0 snapshots"):
        Snapshots(stages=str(tmp_path)).load()
    with pytest.raises(InputError, match="no such folder; a run with snapshot_every makes one"):
        Snapshots(stages=str(tmp_path / "none")).load()
    (tmp_path / "a" / "snapshots").mkdir(parents=True)
    with pytest.raises(InputError, match=r"a is a run: name its folder .*snapshots"):
        Snapshots(stages=str(tmp_path / "a")).load()
    other = faceless.create("slimresnet", embedding_dim=8, input_size=32, framing="dlib", **TINY)
    faceless.save(other, tmp_path / "other", {})
    with pytest.raises(InputError, match="differ in embedding dimension"):
        Snapshots(stages=[str(tmp_path / "other"), str(teacher)]).load()
    settings = snapshots(tmp_path / "stages") | {"center": True}
    with pytest.raises(InputError, match="each snapshot has its own mean"):
        parse(Run, ["--config", str(recipe(tmp_path, teacher, **settings))]).build()


def test_a_chain_of_assistants_and_generations(tmp_path: Path, teacher: Path) -> None:
    begun = {"student.start": str(tmp_path / "run" / "link-2" / "student")}  # which is not there yet
    chain = [{"student.options": {"widths": [16, 32], "depths": [1, 1]}}, {"steps": 4}, begun]
    path = recipe(tmp_path, teacher, chain=chain, **QUIET)
    main(["--config", str(path)])
    runs = [tmp_path / "run" / "link-1", tmp_path / "run" / "link-2", tmp_path / "run"]
    taught = [json.loads((run / "provenance.json").read_text())["teacher"]["sha256"] for run in runs]
    assert taught[0] == sha256(teacher / "model.safetensors")
    assert taught[1:] == [sha256(run / "student" / "model.safetensors") for run in runs[:2]]
    assert [lines(run)[-1]["step"] for run in runs] == [6, 4, 6]
    sizes = [sum(p.numel() for p in faceless.load(run / "student").parameters()) for run in runs]
    assert sizes[0] > 2 * sizes[1] == 2 * sizes[2]
    before = [student_bytes(run) for run in runs]
    # Stopped in its second link, a chain goes on there, and has done with the first one's teacher.
    link = runs[1]
    shutil.rmtree(teacher)
    shutil.rmtree(runs[2] / "student")
    shutil.rmtree(runs[2] / "checkpoints")
    (runs[2] / "report.html").unlink()
    (link / "report.html").unlink()
    touched = (runs[0] / "report.html").stat().st_mtime_ns
    resumed(link, path)
    assert [student_bytes(run) for run in runs] == before
    assert (runs[0] / "report.html").stat().st_mtime_ns == touched
    # The same place with another teacher in it is no place to go on from.
    other = faceless.create("slimresnet", embedding_dim=16, input_size=32, framing="dlib", seed=9, **TINY)
    faceless.save(other, teacher, {})
    with pytest.raises(InputError, match=r"link-1/provenance\.json names another teacher than there is now"):
        main(["--config", str(path)])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"studnet.name": "x"}, "stud"),
        ({"teacher": "x"}, "link 2 sets teacher"),
        ({"teacher.init_args.stages": "x"}, "link 2 sets teacher"),
        ({"precision": "bf16"}, "link 2 sets precision, which is one for the whole chain"),
        ({2: "x"}, "link 2 has the key 2"),
        ({"steps": "many"}, "steps"),
        ({"steps": 0}, "link 2: steps is 0"),
        ({"student.name": "slimresnt"}, "link 2: there is no architecture"),
        ({"losses.contrast.loss.init_args.embedding_dim": 8}, "link 2: losses.contrast"),
        ({"degrade.mask": 1.5}, "link 2: settings: degrade.mask is 1.5"),
        ({"verification.benchmark": "nowhere"}, "link 2: nowhere: no such benchmark"),
        ({"losses.head": {"loss": {"class_path": f"{LOSSES}.ranking.EKD"}}}, "link 2: losses.head needs labels"),
    ],
)
def test_a_wrong_link_is_named_before_the_first_is_trained(
    tmp_path: Path,
    teacher: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    named: str,
) -> None:
    path = recipe(tmp_path, teacher, chain=[{}, changes], **QUIET)
    with pytest.raises(SystemExit) as stop:
        command(main)(["--config", str(path)])
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and named in message, message
    assert not (tmp_path / "run").exists()


def test_a_chain_over_another_run_is_refused_before_its_first_link(tmp_path: Path, teacher: Path) -> None:
    main(["--config", str(recipe(tmp_path, teacher, **QUIET))])
    (tmp_path / "run" / "report.html").unlink()
    path = recipe(tmp_path, teacher, chain=[{}, {}], **QUIET)
    with pytest.raises(InputError, match=r"chain: link 2: .* holds a run with another teacher"):
        main(["--config", str(path)])
    assert not (tmp_path / "run" / "link-1").exists()


def test_what_nothing_would_look_at_is_refused(tmp_path: Path, teacher: Path) -> None:
    path = corpus_recipe(tmp_path, teacher)
    np.save(tmp_path / "identities.npy", np.arange(64) % 8)
    np.save(tmp_path / "nobody.npy", np.full(64, -1))
    np.save(tmp_path / "marks.npy", np.zeros((64, 5, 2), np.float32))
    plain = yaml.safe_load(path.read_text()) | QUIET | {"teacher_cache": str(tmp_path / "cache"), "losses": {}}
    head = {"class_path": f"{LOSSES}.margin.ArcFace", "init_args": {"embedding_dim": 16, "classes": 8}}
    for source, changes, named in (
        ({"landmarks": "marks.npy"}, {}, "landmarks: no loss asks where"),
        ({}, {"pseudo_identities": 4}, "pseudo_identities: no loss looks at labels"),
        ({}, {"classifier": {}}, "classifier: no loss compares scores"),
        ({}, {"degrade": {}}, "degrade changes no face"),
        ({"labels": "identities.npy"}, {"pseudo_identities": 4}, "pseudo_identities would take the place of"),
        ({"labels": "nobody.npy"}, {"losses": {"head": {"loss": head}}}, "needs labels, and no face of"),
        ({"together": 4}, {}, "source.init_args.together is 4, and .* has no labels to go by"),
    ):
        settings = plain | {"losses": {"cosine": {"loss": COSINE}}} | changes
        files = {key: str(tmp_path / name) if isinstance(name, str) else name for key, name in source.items()}
        settings["source"] = {**plain["source"], "init_args": plain["source"]["init_args"] | files}
        path.write_text(yaml.safe_dump(settings))
        with pytest.raises(InputError, match=named):
            main(["--config", str(path)])
        assert not (tmp_path / "run" / "settings.yaml").exists()


def test_links_are_the_recipe_with_their_changes(tmp_path: Path, teacher: Path) -> None:
    path = recipe(tmp_path, teacher, chain=[{"optimizer.lr": 0.5}, {}])
    first, last = (link.asdict() for link in links(parse(Run, ["--config", str(path)])))
    (plain,) = (link.asdict() for link in links(parse(Run, ["--config", str(recipe(tmp_path, teacher))])))
    assert {key for key in plain if first[key] != plain[key]} == {"optimizer", "output", "seed", "losses"}
    assert first["optimizer"] == plain["optimizer"] | {"lr": 0.5}
    assert {key for key in plain if last[key] != plain[key]} == {"teacher"}
    assert (first["seed"], last["seed"]) == (1000, 0)
    assert {link["losses"]["contrast"]["loss"]["init_args"]["seed"] for link in (last, plain)} == {0}
    assert first["losses"]["contrast"]["loss"]["init_args"]["seed"] == 1000


def test_peers_train_along_resume_and_stay_out_of_the_student(tmp_path: Path, teacher: Path) -> None:
    path = recipe(tmp_path, teacher, **QUIET | mutual())
    main(["--config", str(path)])
    run = tmp_path / "run"
    student = faceless.load(run / "student")
    others = [faceless.load(run / "peers" / number) for number in ("1", "2")]
    faces = Rng.of(0, "faces", range(4)).integers(256, 3, 32, 32).byte()
    embedded = [net.embed(faces) for net in (student, *others)]
    assert all((embedded[i] - embedded[j]).abs().max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))
    assert {len(net.state_dict()) for net in others} == {len(student.state_dict())}
    before = [(run / name / "model.safetensors").read_bytes() for name in ("student", "peers/1", "peers/2")]
    resumed(run, path)
    assert [(run / name / "model.safetensors").read_bytes() for name in ("student", "peers/1", "peers/2")] == before


def test_a_peer_that_no_loss_reaches_is_named(
    tmp_path: Path,
    teacher: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = recipe(tmp_path, teacher, **QUIET | mutual(1) | {"peers": [PEER, PEER]})
    with pytest.raises(SystemExit):
        command(main)(["--config", str(path)])
    assert "no loss reaches peer 2" in capsys.readouterr().err
    path = recipe(tmp_path, teacher, **QUIET | mutual(2) | {"peers": [PEER]})
    with pytest.raises(SystemExit):
        command(main)(["--config", str(path)])
    assert "peers.1" in capsys.readouterr().err


def test_students_of_other_dimensions_meet_in_that_of_the_teacher(tmp_path: Path, teacher: Path) -> None:
    peers = [PEER | {"embedding_dim": 8}, PEER]
    student = {"name": "slimresnet", "input_size": 32, "embedding_dim": 12, "options": TINY}
    path = recipe(tmp_path, teacher, **QUIET | mutual() | {"peers": peers, "student": student})
    main(["--config", str(path)])
    run = tmp_path / "run"
    dims = [faceless.load(run / name).embedding_dim for name in ("student", "peers/1", "peers/2")]
    assert dims == [12, 8, 16]
    saved = torch.load(sorted((run / "checkpoints").iterdir())[-1], weights_only=True)["objective"]
    assert saved["projection.weight"].shape == (16, 12) and saved["of_peers.0.weight"].shape == (16, 8)
    before = student_bytes(run)
    resumed(run, path)
    assert student_bytes(run) == before
    with pytest.raises(InputError, match="embeddings have 8 numbers and the teacher's 16"):
        main(["--config", str(path), "--projection", "none", "--output", str(tmp_path / "refused")])
    with pytest.raises(InputError, match=r"adaptive.rule matched follows .*, and losses.peers has none"):
        main(["--config", str(path), "--adaptive.rule", "matched", "--output", str(tmp_path / "refused")])
    path = recipe(tmp_path, teacher, **QUIET | mutual())
    with pytest.raises(InputError, match=r"no 'peers\.0': the losses of distill\.losses\.mutual are for students with"):
        main(["--config", str(path), "--peers", "null", "--output", str(tmp_path / "refused")])


def test_without_a_teacher_students_learn_from_labels_and_each_other(tmp_path: Path, teacher: Path) -> None:
    faces = folder(tmp_path / "faces", people=4, images=8)
    source = {
        "class_path": "distill.sources.FolderSource",
        "init_args": {"path": str(faces), "people": "1-2", "size": 32, "aligned": True},
    }
    deep = {"class_path": f"{LOSSES}.mutual.DeepMutual", "init_args": {"embedding_dim": 16, "classes": 2}}
    settings: dict[str, Any] = {
        # Nobody's dimension is for students that name none.
        "teacher": {"class_path": "distill.ensembles.Nobody", "init_args": {"embedding_dim": 24}},
        "source": source,
        "losses": {"deep": {"loss": deep}},
        "peers": [PEER | {"embedding_dim": 16}],
        "center": False,
        "verification": {"benchmark": str(faces), "people": ["3-4"], "bootstrap": 0},
        "student": {"name": "slimresnet", "input_size": 32, "embedding_dim": 16, "options": TINY},
    }
    path = recipe(tmp_path, teacher, **QUIET | {"steps": 16} | settings)
    main(["--config", str(path), "--optimizer.lr", "0.01"])
    losses = [e["loss"] for e in lines(tmp_path / "run") if "loss" in e]
    assert losses[-1] < 0.8 * losses[0]
    subsets = json.loads((tmp_path / "run" / "verification.json").read_text())["subsets"]
    assert [row["label"] for row in subsets["3-4"]] == ["student", "untrained student"]
    plain = yaml.safe_load(path.read_text()) | {"validation": {"faces": 4}}
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(InputError, match="no teacher: set validation"):
        parse(Run, ["--config", str(path)]).build()
    with pytest.raises(InputError, match="no teacher: set center to false"):
        parse(Run, ["--config", str(path), "--validation.faces", "0", "--center", "true"]).build()
    assert (Nobody(embedding_dim=4).load()[0](torch.zeros(2, 3, 8, 8)).embedding == 0).all()


def test_without_a_teacher_generated_faces_serve_and_losses_of_a_teacher_do_not(tmp_path: Path, teacher: Path) -> None:
    path = corpus_recipe(tmp_path, teacher)
    np.save(tmp_path / "identities.npy", np.arange(64) % 8)
    deep = {"class_path": f"{LOSSES}.mutual.DeepMutual", "init_args": {"embedding_dim": 16, "classes": 8}}
    settings = yaml.safe_load(path.read_text()) | QUIET
    settings["source"]["init_args"]["labels"] = str(tmp_path / "identities.npy")
    settings |= {"teacher": {"class_path": "distill.ensembles.Nobody", "init_args": {"embedding_dim": 16}}}
    settings |= {"losses": {"deep": {"loss": deep}}, "peers": [PEER], "center": False, "steps": 2}
    path.write_text(yaml.safe_dump(settings))
    main(["--config", str(path)])
    assert (tmp_path / "run" / "report.html").is_file()
    np.save(tmp_path / "identities.npy", np.arange(64) // 8)
    with pytest.raises(InputError, match="names another source than there is now"):
        main(["--config", str(path)])
    settings["losses"]["cosine"] = {"loss": COSINE}
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError, match=r"losses\.cosine: CosineEmbedding learns from a teacher, and there is none"):
        main(["--config", str(path), "--output", str(tmp_path / "never")])


@pytest.mark.parametrize("classes", [None, 8])
def test_exits_of_shallow_stages_learn_resume_and_stay_out_of_the_student(
    tmp_path: Path, teacher: Path, classes: int | None
) -> None:
    path = corpus_recipe(tmp_path, teacher)
    np.save(tmp_path / "identities.npy", np.arange(64) % 8)
    settings = yaml.safe_load(path.read_text()) | QUIET
    settings["source"]["init_args"]["labels"] = str(tmp_path / "identities.npy")
    exits = {
        "class_path": f"{LOSSES}.self_distillation.DeepToShallow",
        "init_args": {"layers": ["stages.0"], "classes": classes},
    }
    settings["losses"] = {"cosine": {"loss": COSINE}, "shallow": {"loss": exits}}
    path.write_text(yaml.safe_dump(settings | {"steps": 30, "log_every": 1, "checkpoint_every": 10}))
    main(["--config", str(path), "--optimizer.lr", "0.01"])
    terms = [entry["terms"]["shallow"] for entry in lines(tmp_path / "run") if "terms" in entry]
    assert sum(terms[-5:]) < 0.8 * sum(terms[:5])
    assert not [name for name in faceless.load(tmp_path / "run" / "student").state_dict() if "exits" in name]
    before = student_bytes(tmp_path / "run")
    resumed(tmp_path / "run", path, "--optimizer.lr", "0.01")
    assert student_bytes(tmp_path / "run") == before
    with pytest.raises(InputError, match=r"the student has no layer 'stages.7'"):
        main(["--config", str(path), "--losses.shallow.loss.init_args.layers", "[stages.7]", "--output", "x"])


def test_classes_are_learned_from_the_faces_that_come_by_themselves(tmp_path: Path, teacher: Path) -> None:
    path = corpus_recipe(tmp_path, teacher)
    np.save(tmp_path / "identities.npy", np.arange(64) % 8)
    settings = yaml.safe_load(path.read_text()) | QUIET
    settings["source"]["init_args"] |= {"labels": str(tmp_path / "identities.npy"), "together": 4, "scattered": 0.5}
    arcface = {"class_path": f"{LOSSES}.margin.ArcFace", "init_args": {"embedding_dim": 16, "classes": 8}}
    ekd = {"class_path": f"{LOSSES}.ranking.EKD"}
    settings["losses"] = {"arcface": {"loss": arcface, "scattered": True}, "ekd": {"loss": ekd}}
    path.write_text(yaml.safe_dump(settings))
    main(["--config", str(path)])
    before = student_bytes(tmp_path / "run")
    resumed(tmp_path / "run", path)
    assert student_bytes(tmp_path / "run") == before
    main(["--config", str(path), "--losses.arcface.scattered", "null", "--output", str(tmp_path / "all")])
    assert student_bytes(tmp_path / "all") != before
    unlabelled = ["--losses.ekd.loss.init_args.same_person", "0.5", "--losses.ekd.scattered", "true"]
    with pytest.raises(InputError, match=r"losses.ekd.scattered: it is for a loss of labels"):
        main(["--config", str(path), *unlabelled, "--output", str(tmp_path / "refused")])
    with pytest.raises(InputError, match=r"losses.arcface.scattered: .* set together and scattered of the source"):
        main(["--config", str(path), "--source.init_args.scattered", "null", "--output", str(tmp_path / "refused")])


def test_the_teacher_does_not_see_worse_faces(tmp_path: Path, teacher: Path) -> None:
    """What it says of faces as they are, kept beforehand, is what it says beside a student of worse ones."""
    path = corpus_recipe(tmp_path, teacher)
    settings = (
        yaml.safe_load(path.read_text()) | QUIET | {"center": False, "steps": 3, "losses": {"c": {"loss": COSINE}}}
    )
    settings["degrade"] = {"resolutions": [8], "mask": 1.0, "occlude": 1.0}
    path.write_text(yaml.safe_dump(settings))
    main(["--config", str(path), "--output", str(tmp_path / "asked")])
    main(["--config", str(path), "--output", str(tmp_path / "kept"), "--teacher_cache", str(tmp_path / "cache")])
    asked, kept = ([entry["loss"] for entry in lines(tmp_path / name) if "loss" in entry] for name in ("asked", "kept"))
    assert len(asked) == 3 and asked == pytest.approx(kept, rel=1e-4)


def test_only_the_student_sees_worse_faces_and_both_are_verified_on_such(tmp_path: Path, teacher: Path) -> None:
    faces = folder(tmp_path / "faces", people=4, images=3)
    verification = {"benchmark": str(faces), "people": ["2-4"], "conditions": ["8px", "masked/clean"], "bootstrap": 0}
    shared = QUIET | {"verification": verification, "augment": {"size": 32, "flip": 0.0}}
    path = recipe(tmp_path, teacher, **shared | {"degrade": {"resolutions": [8, 16], "mask": 0.5, "occlude": 0.5}})
    main(["--config", str(path)])
    main(["--config", str(recipe(tmp_path, teacher, **shared)), "--output", str(tmp_path / "plain")])
    worse, plain = (lines(tmp_path / name) for name in ("run", "plain"))
    assert [e["loss"] for e in worse] != [e["loss"] for e in plain]
    subsets = json.loads((tmp_path / "run" / "verification.json").read_text())["subsets"]
    assert list(subsets) == ["all", "2-4", "all 8px", "2-4 8px", "all masked/clean", "2-4 masked/clean"]
    assert subsets["2-4 8px"][0]["people"] == 3 and subsets["2-4 8px"][0]["condition"] == "8px"
    assert subsets["2-4 8px"][0]["eer"] != subsets["2-4"][0]["eer"] or subsets["2-4"][0]["eer"] == 0
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert record["degrade"]["resolutions"] == [8, 16]
    assert "People 2–4, 8px" in (tmp_path / "run" / "report.html").read_text()
    settings = yaml.safe_load(path.read_text()) | {"verification": {"conditions": ["blurry"]}}
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError, match="blurry"):
        main(["--config", str(path), "--output", str(tmp_path / "never")])


def test_a_cbam_teacher_and_the_student_that_follows_its_attention(tmp_path: Path, teacher: Path) -> None:
    """The two recipes of A-SKD, one after the other; every block of the two networks is compared."""
    made = yaml.safe_load(corpus_recipe(tmp_path, teacher).read_text())["source"]["init_args"]
    np.save(tmp_path / "identities.npy", np.arange(64) % 8)
    shared = {
        "source.init_args.path": made["path"],
        "source.init_args.recipe": made["recipe"],
        "student.input_size": 32,
        "student.embedding_dim": 16,
        "augment.size": 32,
        "steps": 4,
        "batch_size": 8,
        "log_every": 1,
        "validation.faces": 0,
        "optimizer.name": "adam",
        "optimizer.lr": 0.001,
        "optimizer.warmup": 0,
        "verification.benchmark": "null",
        "tensorboard": "false",
        "threads": 1,
        "precision": "fp32",
    }

    def run(name: str, **changes: object) -> Path:
        given = {"config": f"distill/recipes/{name}.yaml", "output": tmp_path / name} | shared | changes
        main([text for key, value in given.items() for text in (f"--{key}", str(value))])
        return tmp_path / name

    first = run("cbam_teacher", teacher=teacher, teacher_cache=tmp_path / "cache", steps=1)
    labels = {"source.init_args.labels": tmp_path / "identities.npy"}
    head = {"losses.arcface.loss.init_args.classes": 8, "losses.arcface.loss.init_args.embedding_dim": 16}
    second = run("low_resolution_cbam", teacher=first / "student", **labels, **head)
    net = faceless.load(first / "student")
    record = json.loads((second / "provenance.json").read_text())
    assert record["teacher"]["sha256"] == sha256(first / "student" / "model.safetensors")
    blocks = {name for name, _ in net.backbone.named_modules() if name.endswith(("channel_layer", "spatial_layer"))}
    loss = yaml.safe_load((second / "settings.yaml").read_text())["losses"]["attention"]
    assert set(loss["loss"]["init_args"]["teacher_layers"]) == blocks and len(blocks) == 16
    assert loss["loss"]["init_args"]["student_layers"] == loss["loss"]["init_args"]["teacher_layers"]
    terms = [entry["terms"] for entry in lines(second) if "terms" in entry]
    assert [entry["loss"] for entry in lines(second) if "loss" in entry] == pytest.approx(
        [term["arcface"] + 5 * term["attention"] for term in terms]
    )
    assert terms[-1]["attention"] < 0.9 * terms[0]["attention"]


def test_maps_of_mirrored_faces_are_not_compared_in_silence(tmp_path: Path, teacher: Path) -> None:
    layers = {"student_layer": "stages.1", "teacher_layer": "stages.1"}
    hint = {"class_path": f"{LOSSES}.features.Hint", "init_args": layers}
    path = recipe(tmp_path, teacher, losses={"cosine": {"loss": COSINE}, "hint": {"loss": hint}})
    net = faceless.load(teacher)
    for sees, flip, expected in (("face", 0.5, ["hint"]), ("face", 0.0, []), ("view", 0.5, [])):
        given = ["--config", str(path), "--teacher_sees", sees, "--augment.flip", str(flip)]
        run = links(parse(Run, given))[0].build()
        assert mirrored(run, make_objective(run, net, [net])) == expected


def test_a_chain_cannot_ask_for_a_strangers_code(tmp_path: Path, teacher: Path) -> None:
    path = recipe(tmp_path, teacher)
    settings = yaml.safe_load(path.read_text())
    init = settings["source"]["init_args"]["generator"]
    init |= {"class_path": "synth.generators.diffusion.Diffusion", "init_args": {"source": "x"}}
    key = "source.init_args.generator.init_args.trust_remote_code"
    path.write_text(yaml.safe_dump(settings | {"chain": [{}, {key: True}]}))
    with pytest.raises(InputError, match="only the command line can ask"):
        links(parse(Run, ["--config", str(path)]))
