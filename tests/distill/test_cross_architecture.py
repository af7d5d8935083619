"""URFM against its formula written out in loops; landmarks; what keeps the two networks from agreeing on nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distill.losses.cross_architecture import URFM, PromptGuard, bucket
from faceless import align
from faceless.recognizer import Output


def outputs(batch: int = 3, seed: int = 0) -> tuple[Output, Output]:
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    student = Output(draw(batch, 6), features={"map": draw(batch, 5, 4, 3)})
    return student, Output(draw(batch, 6), features={"tokens": draw(batch, 10, 8)})  # a class token and 3 x 3


def built(**settings: object) -> URFM:
    loss = URFM(student_layer="map", teacher_layer="tokens", centers=4, dim=8, heads=2, **settings)
    loss.prepare(*outputs())
    return loss.double()


def normal(rows: np.ndarray) -> np.ndarray:
    return (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-5)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def index(distance: float) -> int:
    if distance <= 1.9:
        return round(distance)
    return int(min(round(1.9 + math.log(distance / 1.9) / math.log(15.2 / 1.9) * 1.9), 3.8))


def written_out(loss: URFM, side: object, x: np.ndarray, marks: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Local features and attention of one face from its map ``[C, H, W]``."""
    w = {name: p.detach().numpy() for name, p in side.named_parameters()}
    queries = loss.queries.detach().numpy() @ w["query.weight"].T
    height, width = x.shape[1:]
    places = [((i + 0.5) / width * 2, (j + 0.5) / height * 2) for j in range(height) for i in range(width)]
    anchors = [(0.5, 0.5), (1.5, 0.5), (0.5, 1.5), (1.5, 1.5)]
    feature = normal(x.reshape(len(x), -1).T)
    local = []
    for query, anchor in zip(queries, anchors):
        row = []
        for f, place in zip(feature, places):
            facial = np.mean([abs(math.dist(place, 2 * m) - math.dist(anchor, 2 * m)) for m in marks])
            bias = w["positions"][index(math.dist(place, anchor) + loss.gamma * facial)]
            row.append((query + bias) @ (w["key.weight"] @ f) / math.sqrt(8))
        local.append(sum(p * (w["value.weight"] @ f) for p, f in zip(softmax(np.array(row)), feature)))
    q, k, v = np.split(np.array(local) @ w["mix.weight"].T, 3, axis=1)
    attention = [softmax(q[:, h] @ k[:, h].T / 2) for h in (slice(0, 4), slice(4, 8))]
    mixed = np.concatenate([a @ v[:, h] for a, h in zip(attention, (slice(0, 4), slice(4, 8)))], 1)
    return mixed @ w["out.weight"].T, attention


@pytest.mark.parametrize("framing", ["dlib", "arcface"])
@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_urfm(framing: str, gamma: float) -> None:
    loss = built(framing=framing, gamma=gamma, attention=2.0, local=3.0, keep=0.5)
    student, teacher = outputs()
    # Where the template lies: of 112 pixels, with integers at pixel centers.
    template = ((align.template(framing, "arcface5", 112) + 0.5) / 112).numpy()
    own = np.array(template) + 0.1
    student.features["landmarks"] = torch.tensor(np.stack([own, np.full((5, 2), np.nan), template]))
    looked, found, kept = [], [], []
    for i in range(3):
        s, a_s = written_out(loss, loss.of_student, student.features["map"][i].numpy(), own if i == 0 else template)
        tokens = teacher.features["tokens"][i, 1:].T.reshape(8, 3, 3).numpy()
        t, a_t = written_out(loss, loss.of_teacher, tokens, template)
        looked.append(np.mean([((x - y) ** 2).sum(1) for x, y in zip(a_s, a_t)]))
        found.append(np.mean((normal(s) - normal(t)) ** 2))
        read, truth = loss.readout.weight.detach().numpy() @ t.mean(0), teacher.embedding[i].numpy()
        kept.append(1 - read @ truth / np.linalg.norm(read) / np.linalg.norm(truth))
    expected = 2 * np.mean(looked) + 3 * np.mean(found) + 0.5 * np.mean(kept)
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_buckets_are_those_of_the_code_of_kprpe() -> None:
    # Computed by hand from mk-minchul/CVLface's piecewise_index with (1.9, 3.8, 15.2).
    distances = torch.tensor([0.0, 0.49, 0.51, 1.4, 1.6, 1.9, 2.5, 3.5, 3.7, 15.2, 100.0])
    assert bucket(distances).tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3]


def test_gradient_reaches_the_teacher_only_where_it_learns_and_never_its_side_of_the_mapping() -> None:
    def slopes(**settings: object) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        loss = built(**settings)
        student, teacher = outputs()
        teacher.features["tokens"].requires_grad_()
        loss(student, teacher).backward()
        return teacher.features["tokens"].grad, {name: p.grad for name, p in loss.named_parameters()}

    nothing, frozen = slopes()
    found, learning = slopes(teacher_learns=True)
    assert nothing is None and found is not None and found.abs().max() > 0
    # The teacher's mapping follows the teacher's embedding alone, whoever learns.
    _, more = slopes(teacher_learns=True, attention=50.0, local=50.0)
    for name, slope in frozen.items():
        torch.testing.assert_close(learning[name], slope)
        if name.startswith(("of_teacher", "readout")):
            torch.testing.assert_close(more[name], slope)
    assert all(slope is not None and slope.abs().max() > 0 for slope in frozen.values())


def test_teacher_features_get_the_gradient_of_the_comparison() -> None:
    loss = built(teacher_learns=True, keep=1e-9).eval()
    student, teacher = outputs()

    def compare(tokens: torch.Tensor) -> torch.Tensor:
        return loss(student, Output(teacher.embedding, features={"tokens": tokens}))

    assert torch.autograd.gradcheck(compare, teacher.features["tokens"].requires_grad_(), atol=1e-7)


def test_a_student_learns_to_look_as_the_teacher_does_and_the_teacher_keeps_its_faces() -> None:
    """Both maps come from hidden faces; trained together, the student's follows, and the embedding stays readable."""
    random = torch.Generator().manual_seed(0)
    loss = URFM(student_layer="map", teacher_layer="tokens", centers=4, dim=16, heads=2)
    to_tokens, to_embedding = (torch.randn(n, 12, generator=random) for n in (9 * 8, 6))
    net = torch.nn.Linear(12, 5 * 12)
    with torch.no_grad():
        net.weight.copy_(0.3 * torch.randn(60, 12, generator=random))

    def draw(count: int) -> tuple[Output, Output]:
        hidden = torch.randn(count, 12, generator=random)
        tokens = (hidden @ to_tokens.T).view(count, 9, 8)
        embedding = hidden @ to_embedding.T
        return Output(embedding, features={"map": net(hidden).view(count, 5, 4, 3)}), Output(
            embedding, features={"tokens": tokens}
        )

    loss.prepare(*draw(2))
    optimizer = torch.optim.Adam([*loss.parameters(), *net.parameters()], 0.01)

    def parts() -> tuple[float, float]:
        with torch.no_grad():
            student, teacher = draw(256)
            whole = loss(student, teacher).item()
            loss.attention, loss.local = 0.0, 0.0
            kept = loss(student, teacher).item()
            loss.attention, loss.local = 1.0, 1.0
        return whole - kept, kept

    before = parts()
    for _ in range(150):
        optimizer.zero_grad()
        loss(*draw(32)).backward()
        optimizer.step()
    after = parts()
    assert after[0] < 0.6 * before[0] and after[1] < 0.5 * before[1]


def test_what_cannot_be_is_refused() -> None:
    layers = {"student_layer": "map", "teacher_layer": "tokens"}
    for wrong, named in (
        ({"centers": 5}, "square"),
        ({"heads": 3}, "heads"),
        ({"gamma": -1.0}, "gamma"),
        ({"framing": "none"}, "framing"),
        ({"keep": 0.0}, "keep"),
    ):
        with pytest.raises(ValueError, match=named):
            URFM(**layers, **wrong)
    student, teacher = outputs()
    with pytest.raises(ValueError, match="prepare"):
        URFM(**layers)(student, teacher)
    with pytest.raises(ValueError, match="no feature 'map'"):
        built()(Output(student.embedding), teacher)
    with pytest.raises(ValueError, match="prompts"):
        PromptGuard()(student, teacher)
