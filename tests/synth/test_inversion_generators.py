"""Generators trained against a teacher: their terms against closed forms, and what they learn."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import entropy
from torch import nn

import faceless
from faceless.errors import InputError
from faceless.randomness import Rng
from faceless.recognizer import InputSpec, Output, Recognizer
from synth.generate import generate, read_settings
from synth.generators.adversarial import (
    Categories,
    Contrast,
    ConvGenerator,
    GeneratorTraining,
    LatentInversion,
    imbalance,
    negative_entropy,
    shifted,
    zoomed,
)
from synth.inversion.rounds import InversionRounds
from synth.inversion.statistics import BatchStatistics, batch_norms
from synth.inversion.synthesized import Synthesized

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"latent_dim": 8, "channels": 8, "directions": 12}


class Tiny(nn.Module):
    """Convolution, batch normalization, linear layer; with classes, logits too."""

    embedding_dim = 6

    def __init__(self, classes: int):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Linear(8 * 64, 6)
        self.head = nn.Linear(6, classes) if classes else None

    def forward(self, x):
        e = self.fc(F.relu(self.bn(self.conv(x))).flatten(1))
        return e if self.head is None else (e, self.head(e))


def network(seed: int, classes: int = 0) -> Recognizer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Recognizer(Tiny(classes), InputSpec(16, 16), name="tiny")
        nn.init.normal_(net.backbone.fc.weight, 0, 0.2)
        if classes:
            nn.init.normal_(net.backbone.head.weight, 0, 1.0)
        net.train()
        with torch.no_grad():
            for k in range(20):
                noise = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(k))
                net((F.interpolate(noise, (16, 16), mode="bilinear") * 40 + 110).clamp(0, 255))
    return net.eval().requires_grad_(False)


def rng(n: int, step: int = 0) -> Rng:
    return Rng.of(0, "test", range(n), step=step)


def began(method, teacher, student=None):
    method.begin(teacher, student, "tiny")
    return method


def test_entropies():
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)) * 3
    p = F.softmax(logits.double(), 1).numpy()
    assert np.isclose(negative_entropy(logits), -entropy(p, axis=1).mean(), rtol=1e-5)
    assert np.isclose(imbalance(logits), -entropy(p.mean(0)), rtol=1e-5)
    sure = torch.eye(4) * 1000  # probabilities of exactly 0
    assert imbalance(sure).isfinite() and negative_entropy(sure) == 0


def test_categories_are_cosines_around_the_mean_or_the_teachers_own_logits():
    net = network(0)
    categories = Categories(net, directions=5, scale=10.0, seed=3)
    e = torch.randn(4, 6)
    directions = Rng.of(3, "directions", range(5)).normal(6)
    torch.testing.assert_close(categories(Output(e)), 10 * F.cosine_similarity(e[:, None], directions[None], dim=2))
    assert Categories(network(0, classes=3), directions=5).count == 3
    logits = torch.randn(4, 3)
    assert categories(Output(e, logits)) is logits


def test_contrast_is_infonce_with_the_memory():
    features, batch = 10, 3
    contrast = Contrast(features, dim=4, size=6, negatives=100, temperature=0.5)
    local, whole = torch.randn(2, batch, features, generator=torch.Generator().manual_seed(0))
    project = lambda x: F.normalize(contrast.head(x))  # noqa: E731

    def infonce(a, b):
        logits = (project(a) @ project(b).T / 0.5).double()
        return torch.logsumexp(logits, 1) - logits.diagonal()

    torch.testing.assert_close(contrast(local, whole, rng(batch)).double(), infonce(local, whole).mean())
    pairs = torch.randn(8, 2, features, generator=torch.Generator().manual_seed(1))
    contrast.push(pairs[:4, 0], pairs[:4, 1])
    contrast.push(pairs[4:, 0], pairs[4:, 1])  # the ring of six is full, the first two are gone
    each = infonce(torch.cat([local, pairs[2:, 0]]), torch.cat([whole, pairs[2:, 1]]))
    torch.testing.assert_close(contrast(local, whole, rng(batch)).double(), each[:batch].mean() + each[batch:].mean())


def test_views():
    images = torch.rand(6, 3, 16, 16) * 255
    moved = shifted(images, rng(6), 3)
    assert torch.equal(moved.flatten(1).sort(1).values, images.flatten(1).sort(1).values)  # the same pixels elsewhere
    near = zoomed(images, rng(6))
    assert near.shape == images.shape and near.min() >= 0 and near.max() <= 255
    assert torch.allclose(zoomed(torch.full_like(images, 7.0), rng(6)), torch.tensor(7.0))
    assert torch.equal(zoomed(images, rng(6))[2:4], zoomed(images[2:4], rng(6).rows(slice(2, 4))))


def test_generator_is_conditional():
    net = ConvGenerator(latent_dim=4, classes=3, channels=4, face_size=16, seed=1)
    z = torch.randn(1, 4).expand(3, 4)
    faces = net(z, torch.arange(3))
    assert faces.shape == (3, 3, 16, 16) and faces.min() >= 0 and faces.max() <= 255
    assert (faces[0] - faces[1]).abs().max() > 1
    again = ConvGenerator(latent_dim=4, classes=3, channels=4, face_size=16, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))
    with pytest.raises(InputError, match="multiple of 4"):
        ConvGenerator(face_size=18)


def test_dafl_fills_all_classes_surely():
    """The three terms of DAFL: sure of each face, all classes alike."""
    teacher = network(0, classes=4)
    method = began(GeneratorTraining(**SMALL, category=1.0, balance=5.0, activation=0.01, lr=5e-3), teacher)
    with torch.no_grad():
        before = teacher(method.draw(rng(64))).logits
    for number in range(60):
        method.learn(number, rng(32, number))
    with torch.no_grad():
        after = teacher(method.draw(rng(64))).logits
    assert len(after.argmax(1).unique()) == 4
    assert imbalance(after) < min(imbalance(before), -1.3)  # ln 4 is 1.39
    assert negative_entropy(after) > max(negative_entropy(before) + 0.1, -0.4)


def test_conditional_generator_makes_what_it_is_told():
    teacher = network(1, classes=4)
    method = began(GeneratorTraining(**SMALL, category=1.0, conditional=True, lr=5e-3), teacher)
    for number in range(60):
        method.learn(number, rng(32, number))
    told = method.drawn_category(rng(64))
    with torch.no_grad():
        assert (teacher(method.draw(rng(64))).logits.argmax(1) == told).float().mean() > 0.9


@pytest.mark.parametrize(("kind", "classes"), [("l1", 4), ("kl", 4), ("cosine", 0)])
def test_adversarial_generator_finds_disagreement(kind, classes):
    teacher, student = network(0, classes), network(1, classes)
    method = began(GeneratorTraining(**SMALL, adversarial=1.0, divergence=kind, lr=5e-3), teacher, student)

    def gap():
        with torch.no_grad():
            faces = method.draw(rng(64))
            a, b = teacher(faces), student(faces)
        if classes:
            return (a.logits - b.logits).abs().mean()
        return 1 - F.cosine_similarity(a.embedding, b.embedding).mean()

    before = gap()
    for number in range(40):
        method.learn(number, rng(32, number))
    assert gap() > 1.2 * before


def test_maximum_entropy_generator_makes_the_teacher_unsure():
    teacher = network(0, classes=4)
    method = began(GeneratorTraining(**SMALL, entropy=1.0, lr=5e-3), teacher)
    with torch.no_grad():
        before = negative_entropy(teacher(method.draw(rng(64))).logits)
    for number in range(40):
        method.learn(number, rng(32, number))
    with torch.no_grad():
        after = negative_entropy(teacher(method.draw(rng(64))).logits)
    assert after < before - 0.1 and after < -1.2


def test_fast_inversion_learns_to_begin_well():
    """A few steps from the meta generator reach what they do not reach from new weights."""
    teacher = network(0, classes=4)
    options = {"category": 1.0, "statistics": 1.0, "iterations": 3, "lr": 5e-4, "jitter": 0}
    losses = []
    for start in ("meta", "fresh"):
        method = began(LatentInversion(**SMALL, **options, start=start), teacher)
        total = 0.0
        for number in range(40):
            made = method.learn(number, rng(32, number))
            if number >= 30:
                with torch.no_grad(), BatchStatistics(batch_norms(teacher.backbone), first=1.0) as statistics:
                    logits = teacher(made).logits
                    wanted = method.drawn_category(rng(32, number))
                    total += float(F.cross_entropy(logits, wanted) + statistics.distance())
        losses.append(total)
    assert losses[0] < 0.8 * losses[1]


def test_cmi_faces_are_unlike_earlier_ones():
    teacher = network(0)
    options = {"statistics": 0.1, "momentum": 0.0, "category": 0.0, "start": "fresh", "iterations": 15, "lr": 1e-2}
    spreads = []
    for contrast in (0.0, 2.0):
        method = began(LatentInversion(**SMALL, **options, contrast=contrast, memory=64), teacher)
        made = torch.cat([method.learn(number, rng(8, number)) for number in range(3)])
        with torch.no_grad(), BatchStatistics(batch_norms(teacher.backbone), keep_means=True) as statistics:
            teacher(made)
            f = F.normalize(statistics.features() - statistics.features().mean(0))
            spreads.append(statistics.features().std(0).mean())
    assert spreads[1] > spreads[0]
    assert f.shape == (24, 8)


def test_frequent_and_easy_categories_weigh_less():
    method = began(LatentInversion(**SMALL, category=1.0, statistics=0.0, focus=2.0), network(0, classes=2))
    method.counts += torch.tensor([30.0, 10.0])
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [float(np.log(3.0)), 0.0]])
    weights = method.importance(logits, torch.tensor([0, 1, 0]))
    torch.testing.assert_close(weights, torch.tensor([0.25 * 0.25, 0.75 * 0.25, 0.25 * 0.0625]))


METHODS = {
    "dafl": lambda: GeneratorTraining(
        **SMALL, category=1.0, balance=1.0, adversarial=1.0, statistics=0.1, momentum=0.9
    ),
    "fast": lambda: LatentInversion(
        **SMALL, category=1.0, adversarial=1.0, statistics=1.0, momentum=0.9, iterations=2, focus=1.0, warmup=1
    ),
    "cmi": lambda: LatentInversion(**SMALL, start="fresh", statistics=1.0, contrast=0.5, memory=16, iterations=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_restored_method_goes_on_as_if_never_stopped(name):
    teacher, student = network(0), network(1)
    student.requires_grad_(True)
    before = copy.deepcopy(student.state_dict())
    method = began(METHODS[name](), teacher, student)
    for number in range(3):
        method.learn(number, rng(8, number))
    state = {key: value.clone() for key, value in method.state().items()}
    expected = [method.learn(number, rng(8, number)) for number in (3, 4)]
    other = began(METHODS[name](), teacher, student)
    other.restore(state)
    for number, faces in zip((3, 4), expected):
        assert torch.equal(other.learn(number, rng(8, number)), faces)
    # The student was looked at and nothing else.
    assert all(p.grad is None for p in student.parameters())
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_inversion_rounds_compete_with_the_student_of_the_moment():
    teacher, student = network(0), network(1).requires_grad_(True)
    gaps = []
    for adaptive in (0.0, 5.0):
        options = {"schedule": [(1, 30)], "main": 0.0, "repulsion": 0.0, "jitter": 0}
        method = began(InversionRounds(adaptive=adaptive, **options), teacher, student)
        faces = method.learn(0, rng(8))
        gaps.append((teacher.embed(faces) * student.embed(faces)).sum(1).mean())
    assert gaps[1] < gaps[0] - 0.1 and all(p.grad is None for p in student.parameters())


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda t: began(GeneratorTraining(**SMALL, adversarial=1.0), t), "needs a student"),
        (lambda t: began(InversionRounds(adaptive=1.0), t), "needs a student"),
        (lambda t: began(GeneratorTraining(**SMALL), t), "all weights of GeneratorTraining are 0"),
        (lambda t: GeneratorTraining(**SMALL, momentum=1.0), "momentum below 1"),
        (lambda t: GeneratorTraining(**SMALL, conditional=True), "conditional needs category"),
        (lambda t: GeneratorTraining(**SMALL, steps=0), "steps must be"),
        (lambda t: LatentInversion(**SMALL, iterations=0), "iterations"),
        (lambda t: LatentInversion(**SMALL, statistics=1.0, focus=2.0), "focus weighs"),
        (lambda t: began(LatentInversion(**SMALL, category=1.0), t).draw(rng(2)), "rounds only: set pool"),
        (lambda t: Synthesized(teacher=t, synthesizer=GeneratorTraining(adversarial=1.0)), "needs a student"),
    ],
)
def test_what_a_method_lacks_is_one_line(make, line):
    with pytest.raises(InputError, match=line):
        make(network(0))


def test_a_student_whose_answers_cannot_be_compared_is_refused():
    wide = faceless.create("slimresnet", embedding_dim=8, input_size=32, widths=[8], depths=[1]).eval()
    wants = GeneratorTraining(**SMALL, adversarial=1.0)
    for method in (wants, InversionRounds(adaptive=1.0, schedule=[(1, 1)])):
        with pytest.raises(InputError, match="8 numbers and the teacher's 6"):
            began(method, network(0), wide)
        with pytest.raises(InputError, match="3 classes and the teacher 4"):
            began(method, network(0, classes=4), network(1, classes=3))
        began(method, network(0, classes=4), network(1, classes=4))
    agreeing = GeneratorTraining(**SMALL, adversarial=1.0, agreeing=True)
    with pytest.raises(InputError, match="agreeing compares categories"):
        began(agreeing, network(0, classes=4), network(1))
    began(agreeing, network(0), network(1))


def test_a_method_that_matches_statistics_refuses_a_teacher_without():
    class Plain(nn.Module):
        embedding_dim = 4

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3 * 256, 4)

        def forward(self, x):
            return self.fc(x.flatten(1))

    net = Recognizer(Plain(), InputSpec(16, 16), name="plain")
    with pytest.raises(InputError, match="exposes no batch statistics"):
        began(LatentInversion(**SMALL, statistics=1.0), net)
    began(GeneratorTraining(**SMALL, category=1.0), net)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    net = faceless.create("slimresnet", embedding_dim=8, input_size=32, widths=[8], depths=[1])
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    faceless.save(net.eval(), folder)
    return folder


@pytest.mark.parametrize("recipe", ["dafl", "maximum_entropy", "fast", "cmi"])
def test_corpora_by_recipe(tmp_path, saved, recipe):
    def settings(folder: str):
        init = "generator.init_args"
        arguments = {
            "config": f"synth/recipes/{recipe}.yaml",
            f"{init}.teacher": str(saved),
            f"{init}.rounds": 2,
            f"{init}.training_batch": 4,
            f"{init}.synthesizer.init_args.channels": 4,
            f"{init}.synthesizer.init_args.directions": 8,
            "output": str(tmp_path / folder),
            "count": 12,
            "block": 6,
            "batch": 6,
            "workers": 0,
            "image_format": "png",
        }
        if recipe in ("fast", "cmi"):
            arguments[f"{init}.synthesizer.init_args.iterations"] = 2
        return read_settings([text for key, value in arguments.items() for text in (f"--{key}", str(value))])

    corpus = generate(settings("a"), progress=False)
    faces = corpus.images(range(12)).float()
    assert faces.shape == (12, 3, 32, 32) and (faces[0] - faces[6]).abs().mean() > 1
    # The second block alone is the second block of the whole: each has a generator of its own.
    made = settings("b").build().generator
    alone = made.invert(6, Rng.of(0, "latents", range(6, 12)))
    assert (alone - faces[6:]).abs().mean() < 0.5  # rounded
