"""The weighted sum, the centering and the projection of the objective, and the checks before a run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import faceless
from distill.losses.adaptive_centers import FrozenCenters
from distill.losses.base import Loss
from distill.losses.contrastive import QUD
from distill.losses.embedding import CosineEmbedding, FeatureL2
from distill.losses.features import Hint
from distill.losses.logits import CrossEntropy, LogitKD
from distill.losses.margin import ArcFace
from distill.losses.ranking import EKD
from distill.losses.self_distillation import DeepToShallow
from distill.objective import Adaptive, Classifier, GradientBalance, Objective
from distill.settings import Optimizer
from distill.train import make_optimizer
from faceless.errors import InputError
from faceless.recognizer import Output


def outputs(student_dim: int = 8, teacher_dim: int = 8) -> tuple[Output, Output]:
    torch.manual_seed(0)
    return Output(torch.randn(5, student_dim)), Output(torch.randn(5, teacher_dim) + 3)


def test_weighted_sum() -> None:
    student, teacher = outputs()
    objective = Objective(
        {"a": CosineEmbedding(), "b": FeatureL2()}, {"a": 2.0, "b": 0.25}, student_dim=8, teacher_dim=8
    )
    loss, terms = objective(student, teacher)
    s, t = student.embedding.double().numpy(), teacher.embedding.double().numpy()
    cosine = np.mean([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(s, t)])
    squares = np.mean((s - t) ** 2)
    assert float(terms["a"]) == pytest.approx(cosine, rel=1e-5)
    assert float(terms["b"]) == pytest.approx(squares, rel=1e-5)
    assert float(loss) == pytest.approx(2 * cosine + 0.25 * squares, rel=1e-5)


def test_faces_that_come_together_have_no_label_for_some_losses() -> None:
    student, teacher = outputs()
    head = ArcFace(embedding_dim=8, classes=4)
    labels, alone = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([False, False, True, True, True])
    losses: dict[str, Loss] = {"arcface": head, "ekd": EKD()}
    objective = Objective(
        losses, dict.fromkeys(losses, 1.0), student_dim=8, teacher_dim=8, scattered=["arcface"]
    ).eval()
    _, terms = objective(student, teacher, labels, None, alone)
    chosen = [Output(x.embedding[2:]) for x in (student, teacher)]
    torch.testing.assert_close(terms["arcface"], head(*chosen, labels[2:]).detach())
    assert terms["arcface"] != head(student, teacher, labels)
    torch.testing.assert_close(terms["ekd"], EKD().eval()(student, teacher, labels))


def test_centering_moves_the_teacher_only_and_comparable_agrees_with_the_loss() -> None:
    student, teacher = outputs()
    objective = Objective({"a": CosineEmbedding()}, {"a": 1.0}, student_dim=8, teacher_dim=8, center=True)
    mean = teacher.embedding.mean(0)
    objective.centering.prime(mean)
    loss, _ = objective(student, teacher)
    expected = 1 - F.cosine_similarity(student.embedding, teacher.embedding - mean).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    s, t = objective.comparable(student, teacher)
    assert torch.equal(s.embedding, student.embedding)
    torch.testing.assert_close(t.embedding, teacher.embedding - mean)
    objective.centering = None
    learning = [Output(x.embedding.clone().requires_grad_()) for x in (student, teacher)]
    assert not any(x.embedding.requires_grad for x in objective.comparable(*learning))


def test_another_dimension_is_projected_or_refused() -> None:
    student, teacher = outputs(student_dim=4)
    objective = Objective({"a": CosineEmbedding()}, {"a": 1.0}, student_dim=4, teacher_dim=8)
    objective(student, teacher)[0].backward()
    assert objective.projection is not None
    assert objective.projection.weight.grad is not None
    with pytest.raises(InputError, match="have 4 numbers and the teacher's 8"):
        Objective({"a": CosineEmbedding()}, {"a": 1.0}, student_dim=4, teacher_dim=8, projection="none")


@pytest.mark.parametrize("classes", [None, 6])
def test_exits_answer_as_the_projected_student_does(classes: int | None) -> None:
    student = faceless.create("slimresnet", embedding_dim=4, input_size=32, widths=(8, 16), depths=(1, 1))
    exits = DeepToShallow(layers=["stages.0"], classes=classes)
    objective = Objective({"self": exits}, {"self": 1.0}, student_dim=4, teacher_dim=8)
    objective.probe(student, faceless.create("slimresnet", embedding_dim=8, input_size=32))
    faces, labels = torch.randint(0, 256, (3, 3, 32, 32)).float(), torch.tensor([0, 1, 5])
    said = student(faces, features=objective.student_features)
    loss, _ = objective(said, Output(torch.randn(3, 8)), labels)
    loss.backward()
    assert objective.projection is not None and (objective.projection.weight.grad is not None) == (classes is not None)
    assert [exit_.linear.out_features for exit_ in exits.exits] == [8]


def networks() -> tuple[faceless.Recognizer, faceless.Recognizer]:
    student = faceless.create("slimresnet", embedding_dim=8, input_size=32, widths=(8, 16), depths=(1, 1))
    teacher = faceless.create("slimresnet", embedding_dim=8, input_size=48, widths=(8, 24), depths=(1, 1))
    return student, teacher


def test_probing_builds_adapters_and_features_reach_the_loss() -> None:
    student, teacher = networks()
    hint = Hint(student_layer="stages.1", teacher_layer="stages.1")
    objective = Objective({"hint": hint}, {"hint": 1.0}, student_dim=8, teacher_dim=8)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    objective.probe(student, teacher)
    assert hint.adapter is not None and hint.adapter.weight.shape == (24, 16, 1, 1)
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())
    faces = torch.rand(3, 3, 40, 40) * 255
    out = student(faces, features=objective.student_features)
    with torch.no_grad():
        seen = teacher(faces, features=objective.teacher_features)
    objective(out, seen)[0].backward()
    assert hint.adapter.weight.grad is not None
    assert student.backbone.stages[1][0].conv1.weight.grad is not None


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (lambda: Hint(student_layer="stages.7", teacher_layer="stages.1"), "student has no layer 'stages.7'"),
        (lambda: LogitKD(), "losses.x: LogitKD needs logits"),
        (lambda: QUD(embedding_dim=9), "losses.x"),
    ],
)
def test_what_a_loss_cannot_get_is_said_before_the_run(loss: Callable[[], Loss], named: str) -> None:
    objective = Objective({"x": loss()}, {"x": 1.0}, student_dim=8, teacher_dim=8)
    with pytest.raises(InputError, match=named):
        objective.probe(*networks())


def balanced(rule: str = "matched", **settings: object) -> tuple[Objective, torch.nn.Parameter, Output, torch.Tensor]:
    """Three terms of a student of one shared matrix; the class centers belong to one term alone."""
    torch.manual_seed(0)
    losses = {"kd": LogitKD(), "l2": FeatureL2(), "ce": CrossEntropy()}
    objective = Objective(
        losses,
        {"kd": 0.5, "l2": 0.25, "ce": 0.25},
        student_dim=8,
        teacher_dim=8,
        adaptive=Adaptive(rule=rule, **settings),
        classifier=Classifier(scale=10.0),
    ).double()
    objective.prime(torch.randn(6, 8).double())
    weight = torch.nn.Parameter(torch.randn(8, 8).double())
    objective.watch([weight])
    return objective, weight, Output(torch.randn(5, 8).double()), torch.tensor([0, 1, 1, 5, -1])


def norms(objective: Objective, weight: torch.nn.Parameter, teacher: Output, labels: torch.Tensor) -> dict[str, float]:
    """Norm of each term's own gradient, one backward pass each."""
    found = {}
    student, seen = objective.scores.of_student(Output(faces() @ weight)), objective.scores.of_teacher(teacher)
    for name, loss in objective.losses.items():
        (gradient,) = torch.autograd.grad(loss(student, seen, labels), weight, retain_graph=True)
        found[name] = float(gradient.norm())
    return found


def faces() -> torch.Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def test_matched_weights_give_each_term_its_share_of_the_gradient() -> None:
    objective, weight, teacher, labels = balanced(lowest=0.0, highest=1.0)
    sizes = norms(objective, weight, teacher, labels)
    assert max(sizes.values()) > 2 * min(sizes.values()), "nothing to balance"
    assert objective.weights_now() == {"kd": 0.5, "l2": 0.25, "ce": 0.25}
    loss, terms = objective(Output(faces() @ weight), teacher, labels)
    weights = objective.weights_now()
    assert sum(weights.values()) == pytest.approx(1.0)
    pulls = {name: weights[name] * sizes[name] for name in weights}
    assert pulls["kd"] == pytest.approx(2 * pulls["l2"], rel=1e-6)
    assert pulls["ce"] == pytest.approx(pulls["l2"], rel=1e-6)
    assert loss.item() == pytest.approx(sum(weights[name] * float(terms[name]) for name in weights), rel=1e-9)
    # Weights are constants, and the graph still stands.
    loss.backward()
    assert weight.grad is not None and objective.scores.students.grad is not None


def test_literal_weights_swap_two_norms_as_the_published_algorithm_does() -> None:
    objective, weight, teacher, labels = balanced("literal", lowest=0.0, highest=1.0)
    g = norms(objective, weight, teacher, labels)
    objective(Output(faces() @ weight), teacher, labels)
    wanted = {"kd": 0.5 / g["ce"], "l2": 0.25 / g["l2"], "ce": 0.25 / g["kd"]}
    for name, found in objective.weights_now().items():
        assert found == pytest.approx(wanted[name] / sum(wanted.values()), rel=1e-6)


def test_weights_are_bounded_refreshed_on_their_cadence_and_survive_a_checkpoint() -> None:
    objective, weight, teacher, labels = balanced(every=3, momentum=0.5)
    seen = []
    for step in range(7):
        objective(Output((1 + step) * faces() @ weight), teacher, labels)
        seen.append(objective.weights_now())
        assert all(0.045 < share < 0.91 for share in seen[-1].values())
    # Each of the first three steps, then every third.
    assert seen[0] != seen[1] != seen[2] != seen[3] == seen[4] == seen[5] != seen[6]
    again, _, _, _ = balanced(every=3, momentum=0.5)
    again.watch([weight])
    again.load_state_dict(objective.state_dict())
    assert again.weights_now() == seen[-1]
    for step in (8, 9, 10):
        for one in (objective, again):
            one(Output(step * faces() @ weight), teacher, labels)
        assert again.weights_now() == objective.weights_now()


def test_magnitude_weights_divide_by_the_running_mean_of_each_term() -> None:
    objective, weight, teacher, labels = balanced("magnitude", lowest=0.0, highest=1.0, every=1, momentum=0.5)
    sizes: dict[str, list[float]] = {"kd": [], "l2": [], "ce": []}
    for step in range(3):
        loss, terms = objective(Output((1 + step) * faces() @ weight), teacher, labels)
        for name, value in terms.items():
            sizes[name].append(float(value))
        means = {
            name: np.average(values, weights=[0.5**k for k in range(step, -1, -1)]) for name, values in sizes.items()
        }
        wanted = {"kd": 0.5 / means["kd"], "l2": 0.25 / means["l2"], "ce": 0.25 / means["ce"]}
        weights = objective.weights_now()
        for name, found in weights.items():
            assert found == pytest.approx(wanted[name] / sum(wanted.values()), rel=1e-6)
        assert loss.item() == pytest.approx(sum(weights[name] * float(terms[name]) for name in weights), rel=1e-9)


@pytest.mark.parametrize("rule", ["matched", "magnitude"])
def test_a_term_without_a_gradient_does_not_count_until_it_has_one(rule: str) -> None:
    """As of a memory that is still empty: a size of 0 is no small size, by which all others would vanish."""

    class Starting(FeatureL2):
        on = 0.0

        def compute(self, student: Output, teacher: Output, labels: torch.Tensor | None) -> torch.Tensor:
            return self.on * super().compute(student, teacher, labels)

    losses = {"late": Starting(), "cosine": CosineEmbedding(), "l2": FeatureL2(form="unit-mean")}
    objective = Objective(
        losses,
        {"late": 3.0, "cosine": 1.0, "l2": 1.0},
        student_dim=8,
        teacher_dim=8,
        adaptive=Adaptive(rule=rule, momentum=0.0, every=2, lowest=0.0, highest=1.0),
    ).double()
    weight = torch.nn.Parameter(torch.eye(8, dtype=torch.float64))
    objective.watch([weight])
    teacher = Output(torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).double())

    def sizes() -> dict[str, float]:
        found = {}
        for name, loss in losses.items():
            term = loss(Output(faces() @ weight), teacher)
            (slope,) = torch.autograd.grad(term, weight)
            found[name] = float(slope.norm() if rule == "matched" else term.detach())
        return found

    objective(Output(faces() @ weight), teacher)
    weights, size = objective.weights_now(), sizes()
    assert weights["late"] == pytest.approx(3.0)
    assert weights["cosine"] + weights["l2"] == pytest.approx(2.0)
    assert weights["cosine"] * size["cosine"] == pytest.approx(weights["l2"] * size["l2"], rel=1e-6)
    losses["late"].on = 1.0
    objective(Output(faces() @ weight), teacher)
    weights, size = objective.weights_now(), sizes()
    assert sum(weights.values()) == pytest.approx(5.0)
    assert weights["late"] * size["late"] == pytest.approx(3 * weights["l2"] * size["l2"], rel=1e-6)


def test_learned_weights_settle_at_the_fixed_ones_divided_by_their_terms() -> None:
    objective, weight, teacher, labels = balanced("learned")
    assert objective.weights_now() == {"kd": 0.5, "l2": 0.25, "ce": 0.25}
    student = Output((faces() @ weight).detach())
    logs = objective.balance.logs
    optimizer = torch.optim.Adam([logs], 0.1)
    for step in range(200):
        optimizer.zero_grad()
        loss, terms = objective(student, teacher, labels)
        if step == 0:  # a = 0: the weighted sum as it was
            assert loss.item() == pytest.approx(
                sum(w * float(terms[n]) for n, w in objective.weights.items()), rel=1e-9
            )
        loss.backward()
        optimizer.step()
    for name, found in objective.weights_now().items():
        assert found == pytest.approx(objective.weights[name] / float(terms[name]), rel=1e-3)
    again, _, _, _ = balanced("learned")
    again.load_state_dict(objective.state_dict())
    assert again.weights_now() == objective.weights_now()
    with torch.no_grad():
        logs.fill_(-30.0)
    logs.grad = None
    objective(student, teacher, labels)[0].backward()
    assert (logs.grad != 0).all(), "a weight at its bound can come back"


@pytest.mark.parametrize(("name", "step"), [("adam", 0.1), ("adamw", 0.1), ("muon", 0.015), ("sgd", 0.01)])
def test_learned_weights_move_at_a_pace_of_their_own(name: str, step: float) -> None:
    """Ten times that of other vectors, where steps are normalized; every parameter is in one group."""
    objective, _, _, _ = balanced("learned")
    settings = Optimizer(name=name, lr=0.01, weight_decay=0.0, momentum=0.0)
    optimizer = make_optimizer(settings, [objective], objective.tables(), objective.learned_weights())
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in listed} == {id(p) for p in objective.parameters()} and len(listed) == len(set(listed))
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group.get("pace", 1.0)
    logs = objective.balance.logs
    logs.grad = torch.ones_like(logs)
    optimizer.step()
    torch.testing.assert_close(logs.detach(), torch.full_like(logs, -step), rtol=1e-3, atol=0)


def test_a_gradient_that_is_not_finite_changes_no_weight() -> None:
    objective, weight, teacher, labels = balanced(every=1)
    objective(Output(faces() @ weight), teacher, labels)
    before = objective.weights_now()
    objective(Output(faces() @ weight * torch.nan), teacher, labels)
    assert objective.weights_now() == before


def test_weights_do_not_adapt_where_they_cannot() -> None:
    pair, weights = {"a": CosineEmbedding(), "b": FeatureL2()}, {"a": 1.0, "b": 1.0}
    with pytest.raises(InputError, match="two losses or more"):
        GradientBalance(Adaptive(), {"a": CosineEmbedding()}, {"a": 1.0})
    with pytest.raises(InputError, match="one CrossEntropy with one LogitKD"):
        GradientBalance(Adaptive(rule="literal"), pair, weights)
    with pytest.raises(InputError, match="must rise within"):
        Adaptive(lowest=0.9)
    objective = Objective(pair, weights, student_dim=8, teacher_dim=8, adaptive=Adaptive())
    objective.watch([torch.nn.Parameter(torch.zeros(3))])
    student, teacher = outputs()
    with pytest.raises(InputError, match="share no parameter"):
        objective(Output(student.embedding.requires_grad_()), teacher)


def test_class_centers_reach_all_that_want_them() -> None:
    losses = {"kd": LogitKD(), "frozen": FrozenCenters(embedding_dim=8, classes=4)}
    objective = Objective(losses, {"kd": 1.0, "frozen": 1.0}, student_dim=8, teacher_dim=8, classifier=Classifier())
    assert objective.needs_centers and objective.needs_labels == ["frozen"]
    objective.probe(*networks())  # with stand-ins, before any center is known
    centers = torch.randn(4, 8)
    objective.prime(centers)
    torch.testing.assert_close(losses["frozen"].centers, centers)
    student, teacher = outputs()
    _, terms = objective(student, teacher, torch.tensor([0, 1, 2, 3, 3]))
    unit = F.normalize(centers)
    z_s, z_t = (64 * F.normalize(x.embedding) @ unit.T / 4 for x in (student, teacher))
    expected = 16 * F.kl_div(z_s.log_softmax(1), z_t.softmax(1), reduction="batchmean")
    torch.testing.assert_close(terms["kd"], expected)
    assert [p.shape for p in objective.tables()] == [(4, 8)]
    with pytest.raises(InputError, match=r"losses\.frozen is for 4 classes, and the faces have 5"):
        objective.prime(torch.randn(5, 8))
    with pytest.raises(InputError, match=r"losses\.frozen: centers are \[4, 8\], got \[3, 8\]"):
        objective.prime(torch.randn(3, 8))


@pytest.mark.parametrize("bounds", [{"lowest": 0.6, "highest": 0.9}, {"highest": 0.3}])
def test_bounds_that_leave_weights_no_room_are_named(bounds: dict[str, float]) -> None:
    losses: dict[str, Loss] = {"a": CosineEmbedding(), "b": FeatureL2()}
    with pytest.raises(InputError, match="leave the weights of 2 losses no room"):
        GradientBalance(Adaptive(**bounds), losses, {"a": 1.0, "b": 10.0})
