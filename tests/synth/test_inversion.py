"""Faces from a teacher alone: statistics, targets and priors against closed forms; inversion that does what it says."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from scipy import special, stats
from scipy.spatial.distance import jensenshannon
from torch import nn

import faceless
from faceless.backbones.dlib_resnet import DlibResNet29
from faceless.errors import InputError
from faceless.randomness import Rng
from faceless.recognizer import InputSpec, Output, Recognizer
from synth.generate import generate, read_settings
from synth.generators.adversarial import GeneratorTraining
from synth.inversion.activation import ActivationMaximization
from synth.inversion.deep_inversion import DeepInversion, agreement
from synth.inversion.priors import NoiseImages, energy, repulsion, total_variation
from synth.inversion.statistics import BatchStatistics, _moments, batch_norms, layers, measure
from synth.inversion.synthesized import Synthesized
from synth.inversion.targets import Classes, Moments, Sphere, VonMisesFisher, center, von_mises_fisher

ROOT = Path(__file__).resolve().parents[2]
TINY = {"widths": [8, 16], "depths": [1, 1], "embedding_dim": 16, "input_size": 32}


class Small(nn.Module):
    """Convolution, batch normalization, linear layer, batch normalization: ends as an IResNet does."""

    embedding_dim = 6

    def __init__(self, classes: int = 0):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 64, 6)
        self.head = None if not classes else nn.Linear(6, classes)
        self.features = nn.BatchNorm1d(6)

    def forward(self, x):
        e = self.features(self.fc(F.relu(self.bn(self.conv(x))).flatten(1)))
        return e if self.head is None else (e, self.head(e))


def soft(count: int, side: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures in 0..255."""
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(noise, (side, side), mode="bilinear") * 40 + 110).clamp(0, 255)


def seen(net: Recognizer, side: int = 32) -> Recognizer:
    """The same network once it has seen pictures."""
    net.train()
    with torch.no_grad():
        for seed in range(30):
            net(soft(16, side, seed))
    return net.eval()


@pytest.fixture(scope="module")
def teacher() -> Recognizer:
    return seen(faceless.create("slimresnet", **TINY))


@pytest.fixture(scope="module")
def ending_in_norm() -> Recognizer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Recognizer(Small(), InputSpec(16, 16), name="small")
        nn.init.normal_(net.backbone.features.bias, 0, 2.0)
        return seen(net, 16)


def rng(n: int, seed: int = 0) -> Rng:
    return Rng.of(seed, "latents", range(n))


def test_distance_of_the_batch_that_was_remembered():
    """Momentum None makes the running averages those of the only batch; torch's variance is the unbiased one."""
    net = nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.Flatten(), nn.BatchNorm1d(12, momentum=None))
    x = torch.randn(5, 3, 2, 2)
    net.train()(x)
    net.eval()
    with BatchStatistics(batch_norms(net), first=7.0) as statistics:
        y = net[1](net[0](x))
        net(x)
        got = statistics.distance()
    first = x.var((0, 2, 3)) / 20  # unbiased minus biased variance of 20 numbers
    second = (y.var(0, correction=0) - net[2].running_var).norm() + (y.mean(0) - net[2].running_mean).norm()
    torch.testing.assert_close(got, 7 * first.norm() + second)


@pytest.mark.parametrize("shape", [(4, 3, 5, 2), (6, 3), (2, 3, 7)])
def test_moments_and_their_gradients_are_those_of_torch(shape):
    x = (3 * torch.randn(shape, dtype=torch.float64) + 2).requires_grad_()
    if len(shape) == 4:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    places = [0, *range(2, len(shape))]
    torch.testing.assert_close(_moments(x), torch.var_mean(x, places, correction=0)[::-1])
    assert torch.autograd.gradcheck(_moments, x)


def test_hooks_are_there_once_and_only_inside(teacher, monkeypatch):
    counts = lambda: sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in teacher.modules())  # noqa: E731
    registered = []
    original = nn.Module.register_forward_pre_hook
    monkeypatch.setattr(
        nn.Module, "register_forward_pre_hook", lambda *a, **k: registered.append(1) or original(*a, **k)
    )
    DeepInversion(teacher=teacher, schedule=[(2, 3), (1, 3)]).invert(2, rng(2))
    assert len(registered) == len(batch_norms(teacher.backbone)) and counts() == 0
    with pytest.raises(ZeroDivisionError), BatchStatistics(batch_norms(teacher.backbone)):
        assert counts() == len(batch_norms(teacher.backbone))
        1 / 0  # noqa: B018
    assert counts() == 0


def test_a_teacher_without_batch_norm_is_refused_with_alternatives():
    net = Recognizer(DlibResNet29(), InputSpec(150, 150), name="dlib-resnet29")
    with pytest.raises(InputError, match=r"resnet29: exposes no batch statistics.*iresnet18.*measure.*NoiseImages"):
        DeepInversion(teacher=net)
    ActivationMaximization(teacher=net)  # one of the alternatives


def test_measured_statistics(tmp_path, teacher):
    names = ["stem.0", "stages.1.0.conv1"]
    faces = soft(24)
    measure(teacher, faces.split(7), names, tmp_path / "s.safetensors")
    found = layers(teacher, "tiny", str(tmp_path / "s.safetensors"))
    with torch.no_grad():
        maps = teacher(faces, features=names).features
    for layer, name in zip(found, names):
        x = maps[name].double().numpy()
        np.testing.assert_allclose(layer.mean, x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.variance, x.var((0, 2, 3)), rtol=1e-4)
    with BatchStatistics(found, first=1.0) as statistics:
        teacher(faces)
        assert statistics.distance() < 1e-3
        teacher(faces.flip(0) * 0.5)
        assert statistics.distance() > 0.1
    no_norm = DeepInversion(teacher=teacher, recorded=str(tmp_path / "s.safetensors"), schedule=[(1, 3)])
    assert no_norm.invert(2, rng(2)).shape == (2, 3, 32, 32)


def test_statistics_of_a_wider_network_are_one_line(tmp_path, teacher):
    wider = faceless.create("slimresnet", **TINY | {"widths": [12, 16]})
    measure(wider, [soft(4)], ["stem.0"], tmp_path / "s.safetensors")
    made = DeepInversion(teacher=teacher, recorded=str(tmp_path / "s.safetensors"), schedule=[(1, 1)])
    with pytest.raises(InputError, match=r"'stem.0' are of 16 channels, and the teacher has 8 there"):
        made.invert(2, rng(2))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"\x80\x04.", "not readable as safetensors"),
        ({"a.mean": torch.ones(2)}, "not written by"),
        ({"nowhere.mean": torch.ones(2), "nowhere.variance": torch.ones(2)}, "no module 'nowhere'"),
        ({"stem.0.mean": torch.ones(2), "stem.0.variance": -torch.ones(2)}, "'stem.0' are damaged"),
    ],
)
def test_damaged_statistics_are_one_line(tmp_path, teacher, content, line):
    path = tmp_path / "s.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        order = "\n".join(dict.fromkeys(key.rpartition(".")[0] for key in content))
        safetensors.torch.save_file(content, path, metadata={"order": order})
    with pytest.raises(InputError, match=line):
        layers(teacher, "tiny", str(path))
    with pytest.raises(InputError, match="no such file"):
        layers(teacher, "tiny", str(tmp_path / "none"))


@pytest.mark.parametrize(("dim", "kappa"), [(2, 2.0), (3, 0.5), (16, 21.3), (512, 702.0)])
def test_von_mises_fisher(dim, kappa):
    n = 3000 if dim < 100 else 400
    means = F.normalize(Rng.of(1, "means", range(n)).normal(dim))
    drawn = von_mises_fisher(means, kappa, rng(n)).double()
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(n, dtype=torch.float64), atol=1e-4, rtol=0)
    cosines = (drawn * means).sum(1).numpy()
    # Mean resultant length: a ratio of Bessel functions (Mardia and Jupp, 2000, equation 9.3.7).
    expected = special.ive(dim / 2, kappa) / special.ive(dim / 2 - 1, kappa)
    assert abs(cosines.mean() - expected) < 4 * cosines.std() / n**0.5
    # Uniform across: what is left of the mean direction has no direction of its own.
    across = F.normalize(drawn - torch.from_numpy(cosines)[:, None] * means)
    assert across.mean(0).norm() < 3 / n**0.5
    if dim == 3:  # the cosine's distribution function has a closed form
        low, high = np.exp(-kappa), np.exp(kappa)
        assert stats.kstest(cosines, lambda w: (np.exp(kappa * w) - low) / (high - low)).pvalue > 1e-3


def test_clusters_share_their_anchor(teacher):
    targets = VonMisesFisher(anchors=3, mean_cosine=0.9)
    drawn = targets.sample(rng(60), teacher)
    cosines = drawn @ drawn.T
    same = torch.arange(60)[:, None] % 3 == torch.arange(60) % 3
    # Two draws around one anchor have the product of their cosines with it.
    assert abs(cosines[same & ~torch.eye(60, dtype=torch.bool)].mean() - 0.81) < 0.05
    assert cosines[~same].mean() < 0.6


def test_moments_are_those_of_the_training_embeddings(ending_in_norm, teacher):
    head = ending_in_norm.backbone.features
    drawn = Moments().sample(rng(4000), ending_in_norm)
    torch.testing.assert_close(drawn.mean(0), head.bias.detach(), atol=0.07, rtol=0)
    torch.testing.assert_close(drawn.std(0), head.weight.detach(), atol=0.05, rtol=0)
    assert torch.equal(center(ending_in_norm), head.bias.detach())
    assert center(teacher).abs().sum() == 0  # ends in a linear layer
    with pytest.raises(InputError, match="does not end in a batch normalization"):
        DeepInversion(teacher=teacher, targets=Moments())
    assert isinstance(DeepInversion(teacher=teacher).targets, Sphere)
    assert isinstance(DeepInversion(teacher=ending_in_norm).targets, Moments)


def test_repulsion_is_the_mean_over_pairs():
    e = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    half = 0.5**0.5
    expected = (0 + 0 + 4 * (half - 0.2) ** 2) / 6
    torch.testing.assert_close(repulsion(e), torch.tensor(expected))
    shift = torch.tensor([5.0, -7.0])
    torch.testing.assert_close(repulsion(e + shift, shift), repulsion(e))
    assert repulsion(e[:1]) == 0


def test_image_priors():
    ramp = torch.arange(4.0).expand(2, 3, 4, 4)  # horizontal steps of 1: right and both diagonals
    absolute, euclidean = total_variation(ramp)
    assert absolute == 3
    torch.testing.assert_close(euclidean, torch.tensor((72**0.5) + 2 * (54**0.5)))
    torch.testing.assert_close(energy(ramp), torch.tensor((12 * 14.0) ** 0.5))


def test_disagreement_of_logits_is_jensen_shannon():
    p, q = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)) * 4
    e = torch.zeros(5, 1)
    expected = jensenshannon(F.softmax(p / 3, 1), F.softmax(q / 3, 1), axis=1) ** 2
    assert abs(agreement(Output(e, p), Output(e, q)) - (1 - expected.mean())) < 1e-6
    many = torch.randn(4, 5000, requires_grad=True)
    agreement(Output(e, many), Output(e, torch.randn(4, 5000))).backward()
    assert many.grad.abs().sum() > 0


def test_inversion_matches_statistics_and_targets(ending_in_norm):
    inverter = DeepInversion(teacher=ending_in_norm, schedule=[(2, 60), (1, 60)], jitter=1)
    faces = inverter.invert(12, rng(12))
    assert faces.shape == (12, 3, 16, 16) and faces.min() >= 0 and faces.max() <= 255 and faces.std() > 5
    noise = NoiseImages(teacher=ending_in_norm, kind="pixels").invert(12, rng(12))
    targets = inverter.targets.sample(rng(12), ending_in_norm)
    far, near = [], []
    with torch.no_grad(), BatchStatistics(inverter.layers) as statistics:
        for images, found in ((noise, far), (faces, near)):
            embedding = ending_in_norm(images).embedding
            found += [statistics.distance(), 1 - F.cosine_similarity(embedding, targets).mean()]
    assert near[0] < 0.5 * far[0] and near[1] < 0.3 * far[1]
    # Total variation: an inversion is smoother than pixel noise.
    assert total_variation(faces)[0] < 0.8 * total_variation(noise)[0]


def test_the_same_faces_whoever_asks(teacher):
    inverter = DeepInversion(teacher=teacher, schedule=[(2, 4), (1, 4)])
    once = inverter.invert(4, rng(4))
    with torch.inference_mode():
        again = inverter.invert(4, rng(4))
    assert torch.equal(once, again)
    assert not torch.equal(once, inverter.invert(4, rng(4, seed=1)))
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())


def test_adaptive_inversion_finds_disagreement(teacher):
    student = seen(faceless.create("slimresnet", seed=1, **TINY))
    cosines = []
    for adaptive in (0.0, 5.0):
        inverter = DeepInversion(
            teacher=teacher, student=student, adaptive=adaptive, schedule=[(1, 40)], main=0, repulsion=0, jitter=0
        )
        faces = inverter.invert(8, rng(8))
        cosines.append((teacher.embed(faces) * student.embed(faces)).sum(1).mean())
    assert cosines[1] < cosines[0] - 0.1


def test_classifier(ending_in_norm):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = seen(Recognizer(Small(classes=5), InputSpec(16, 16), name="small"), 16)
    inverter = DeepInversion(teacher=net, targets=Classes(), schedule=[(1, 60)], jitter=1, main=5.0)
    faces = inverter.invert(10, rng(10))
    with torch.no_grad():
        assert (net(faces).logits.argmax(1) == torch.arange(10) % 5).float().mean() > 0.9
    with pytest.raises(InputError, match="has no logits"):
        DeepInversion(teacher=ending_in_norm, targets=Classes())


def test_activation_maximization_reaches_its_targets(teacher):
    maximizer = ActivationMaximization(teacher=teacher, steps=40, repulsion=0.0)
    faces = maximizer.invert(6, rng(6))
    targets = maximizer.targets.sample(rng(6), teacher)
    before = (teacher.embed(soft(6)) * targets).sum(1).mean()
    assert (teacher.embed(faces) * targets).sum(1).mean() > before + 0.3
    sharp = ActivationMaximization(teacher=teacher, steps=40, repulsion=0.0, blur_every=0).invert(6, rng(6))
    assert total_variation(faces)[0] < total_variation(sharp)[0]


def test_noise_images(teacher):
    pixels = NoiseImages(teacher=teacher, kind="pixels", contrast=20.0, face_size=64).invert(50, rng(50))
    assert abs(pixels.mean() - 127.5) < 0.5 and abs(pixels.std() - 20) < 0.3
    natural = NoiseImages(teacher=teacher, contrast=20.0, face_size=64).invert(50, rng(50))
    assert abs(natural.std() - 20) < 0.5
    power = torch.fft.rfft(natural - 127.5, dim=-1).abs().square().mean((0, 1, 2))
    slope = np.polyfit(np.log(np.arange(4, 24)), np.log(power[4:24]), 1)[0]
    assert abs(slope + 1) < 0.3  # 1/f^2 in the plane, summed over one frequency, is 1/f along the other


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"schedule": [(2, 10)]}, "must end at full size"),
        ({"schedule": [(16, 10), (1, 10)]}, "divisors of 32"),
        ({"adaptive": 1.0}, "adaptive needs student"),
        ({"face_size": 3}, "face_size is 3"),
        ({"lr": 0.0}, "lr must be positive"),
    ],
)
def test_bad_arguments(teacher, arguments, line):
    with pytest.raises(InputError, match=line):
        DeepInversion(teacher=teacher, **arguments)


def test_a_student_of_another_dimension_is_refused(teacher):
    with pytest.raises(InputError, match="16"):
        DeepInversion(teacher=teacher, adaptive=1.0, student=faceless.create("slimresnet", embedding_dim=8))


# Corpora


@pytest.fixture(scope="module")
def saved(tmp_path_factory, teacher) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    faceless.save(teacher, folder)
    return folder


def corpus_settings(folder: Path, saved: Path, *more: str):
    arguments = {
        "config": "synth/recipes/deep_inversion.yaml",
        "generator.init_args.teacher": str(saved),
        "generator.init_args.schedule": "[[2, 3], [1, 3]]",
        "output": str(folder),
        "count": 40,
        "block": 16,
        "batch": 8,
        "workers": 0,
        "image_format": "png",
    }
    return read_settings([text for key, value in arguments.items() for text in (f"--{key}", str(value))] + list(more))


def test_corpus_of_inverted_faces(tmp_path, saved, teacher):
    corpus = generate(corpus_settings(tmp_path / "one", saved), progress=False)
    assert len(corpus) == 40 and corpus.latent_shape == () and "latent" not in corpus.columns
    with pytest.raises(InputError, match="holds no latents"):
        corpus.latents([0])
    made = corpus.manifest["generator"]
    assert made["teacher"] == str(saved) and made["weights_sha256"] == faceless.load(saved).source["sha256"]
    expected = DeepInversion(teacher=teacher, schedule=[(2, 3), (1, 3)]).invert(8, Rng.of(0, "latents", range(8, 16)))
    assert (corpus.images(range(8, 16)) - expected).abs().max() <= 2  # threads and stored weights; uint8 rounding
    assert "weights SHA-256 " + made["weights_sha256"] in (tmp_path / "one/DATASHEET.md").read_text()


def test_a_corpus_names_the_student_it_was_made_against(tmp_path, saved):
    """By its SHA-256: another student under the same path makes another corpus."""
    student = tmp_path / "student"
    faceless.save(faceless.create("slimresnet", **TINY, framing="dlib", seed=5), student)
    more = ["--generator.init_args.adaptive", "0.2", "--generator.init_args.student", str(student), "--count", "8"]
    made = generate(corpus_settings(tmp_path / "one", saved, *more), progress=False).manifest["generator"]
    assert made["student"] == str(student) and made["student_sha256"] == faceless.load(student).source["sha256"]
    assert made["student_sha256"] in (tmp_path / "one/DATASHEET.md").read_text()
    faceless.save(faceless.create("slimresnet", **TINY, framing="dlib", seed=6), student)
    with pytest.raises(InputError, match="other generator weights"):
        generate(corpus_settings(tmp_path / "one", saved, *more), progress=False)


def test_what_faces_come_from_is_on_record(tmp_path, saved, teacher):
    measure(teacher, [soft(8)], ["stem.0"], tmp_path / "statistics.safetensors")
    made = DeepInversion(teacher=str(saved), recorded=str(tmp_path / "statistics.safetensors"), schedule=[(1, 1)])
    digest = hashlib.sha256((tmp_path / "statistics.safetensors").read_bytes()).hexdigest()
    assert made.provenance()["statistics_sha256"] == digest and "student" not in made.provenance()
    against = Synthesized(teacher=teacher, synthesizer=GeneratorTraining(adversarial=1.0), student=str(saved))
    with pytest.raises(InputError, match="student: GeneratorTraining looks at none"):
        Synthesized(teacher=teacher, synthesizer=GeneratorTraining(category=1.0), student=str(saved))
    assert against.provenance()["student_sha256"] == faceless.load(saved).source["sha256"]


def test_interrupted_corpus_ends_with_the_same_bytes(tmp_path, saved):
    whole = generate(corpus_settings(tmp_path / "whole", saved), progress=False)
    settings = corpus_settings(tmp_path / "cut", saved)
    from synth import generate as module

    built = settings.build()
    run = module.Run(built, module.recorded(settings, built), 0, 1)
    run.begin(settings.yaml())
    with run.pool() as pool:
        pool.advance(0)
    assert not (tmp_path / "cut/manifest.json").exists()
    # The rest in worker processes, which get the teacher by pickle.
    cut = generate(corpus_settings(tmp_path / "cut", saved, "--workers", "1"), progress=False)
    assert [s["sha256"] for s in cut.shards] == [s["sha256"] for s in whole.shards]


def test_command_refuses_a_folded_teacher_in_one_line(tmp_path):
    pytest.importorskip("dlib")
    line = [
        sys.executable, str(ROOT / "synth/generate.py"), "--config", "synth/recipes/deep_inversion.yaml",
        "--generator.init_args.teacher", "dlib-resnet29", "--output", str(tmp_path / "x"),
    ]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "exposes no batch statistics" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "x").exists()


def test_recipes_name_what_exists():
    for path in sorted((ROOT / "synth/recipes").glob("*.yaml")):
        if path.stem in ("deep_inversion", "activation", "noise"):
            content = read_settings(["--config", str(path)]).asdict()
            assert json.dumps(content["align"]) == "null"
