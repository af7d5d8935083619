"""Losses that pull a student embedding to the teacher's of the same face and push it from those of other faces."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.gather import gather
from distill.losses.base import FaceLoss, Loss, mean, one_of, positive, same_dim
from distill.memory import EmbeddingMemory
from faceless.randomness import Rng
from faceless.recognizer import Output


class QUD(FaceLoss):
    """Contrast each student embedding with a queue of earlier teacher embeddings.

    Cross-entropy over [s.t, s.Q] / temperature with the first as target: the teacher's embedding of the same face
    attracts, those of earlier faces repel. No labels. Near ln(1 + K) for an untrained student; the floor is above 0.
    Kolf, Damer, Boutros: QUD, BMVC 2024.

    Args:
        embedding_dim: D of both networks.
        queue_size: negatives kept over all processes, K. Too many hold other pictures of the same person (on CASIA,
            IJB-C at 1e-5 falls from 75 % at 1,024 to 66 % at 16,384).
        temperature: divides the cosines; smaller is sharper.
        initial: ``"random"`` negatives until K faces were seen (official), or an ``"empty"`` queue.
        update: ``"fifo"``; or, once full, each face takes the place of its most (``"simQ"``) or least (``"dissimQ"``)
            similar negative.
        same_person: negatives whose teacher cosine to the face exceeds this do not count; None keeps all of them.
        seed: of the random negatives.

    Shape:
        both embeddings ``[B, D]`` of any norm; returns a scalar.

    Raises:
        ValueError: an argument is out of range, or the two D differ.

    >>> QUD(embedding_dim=128)(Output(torch.randn(8, 128)), Output(torch.randn(8, 128))).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        queue_size: int = 1024,
        temperature: float = 0.1,
        initial: str = "random",
        update: str = "fifo",
        same_person: float | None = None,
        seed: int | None = None,
    ):
        super().__init__()
        self.temperature = positive(temperature=temperature)
        self.update = one_of(("fifo", "simQ", "dissimQ"), update=update)
        if same_person is not None and not -1 <= same_person <= 1:
            raise ValueError(f"same_person is {same_person}; it is a cosine")
        self.same_person = same_person
        self.negatives = EmbeddingMemory(queue_size, embedding_dim, initial=initial, seed=seed or 0)

    def each(self, student: Output, teacher: Output) -> Tensor:
        s, t = (F.normalize(x) for x in same_dim(student, teacher))
        cosines = self.negatives.products(s)
        divisor = self.divisor(t)
        if self.same_person is not None:
            cosines = cosines.masked_fill(self.negatives.products(t) > self.same_person, -torch.inf)
        if self.training:
            self._remember(t)  # after the negatives were read: a face is never its own negative
        logits = torch.cat(((s * t).sum(1, keepdim=True), cosines), 1) / divisor
        first = torch.zeros(len(s), dtype=torch.int64, device=s.device)
        return F.cross_entropy(logits, first, reduction="none")

    def divisor(self, t: Tensor) -> Tensor | float:
        """Temperature for a batch of the teacher's unit embeddings."""
        return self.temperature

    def _remember(self, t: Tensor) -> None:
        if self.update == "fifo":
            self.negatives.push(t)
        else:
            self.negatives.replace(t, similar=self.update == "simQ")


class CRD(Loss):
    """Contrastive representation distillation, with remembered faces as negatives.

    In a common space (a learned projection of each network), a student anchor must tell the teacher's view of the same
    face from m remembered teacher views, and a teacher anchor the student's from m remembered student views: noise
    contrastive estimation with h = e / (e + m c), e = exp(cosine / temperature), summed over the negatives, mean over
    the batch. The other view of a pair is a constant. c is the mean e of the first batch that finds a memory, then
    fixed. No labels.
    Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020. There the memory has
    one slowly moving row for each picture of a data set; here, as generated faces never return, it is a ring, and the
    positive is the present view.

    Args:
        embedding_dim: D of the teacher, and of the student unless told.
        student_dim: D of the student, where it differs.
        feature_dim: of the common space.
        size: faces remembered over all processes, m once full.
        temperature: divides the cosines.
        seed: of the projections.

    Shape:
        embeddings ``[B, Ds]`` and ``[B, Dt]``; returns a scalar, 0 while the memory is empty.

    Raises:
        ValueError: an argument is not positive, or a D is not what was said.

    >>> loss = CRD(embedding_dim=8, size=64)
    >>> [loss(Output(torch.randn(4, 8)), Output(torch.randn(4, 8))).item() > 0 for _ in range(2)]
    [False, True]
    """

    log_mean: Tensor

    def __init__(
        self,
        *,
        embedding_dim: int,
        student_dim: int | None = None,
        feature_dim: int = 128,
        size: int = 4096,
        temperature: float = 0.07,
        seed: int | None = None,
    ):
        super().__init__()
        self.temperature = positive(temperature=temperature)
        self.student_projection = _projection(
            student_dim or embedding_dim, feature_dim, seed or 0, "student projection"
        )
        self.teacher_projection = _projection(embedding_dim, feature_dim, seed or 0, "teacher projection")
        self.students = EmbeddingMemory(size, feature_dim, initial="empty")
        self.teachers = EmbeddingMemory(size, feature_dim, initial="empty")
        self.register_buffer("log_mean", torch.zeros(2))
        self.ready = False

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        s = _project(self.student_projection, student.embedding)
        t = _project(self.teacher_projection, teacher.embedding)
        sides = ((s, t, self.teachers), (t, s, self.students))
        logits = [self._logits(anchor, other.detach(), memory) for anchor, other, memory in sides]
        total = (s.sum() + t.sum()) * 0
        if len(self.teachers):
            log_mean = self.log_mean if self.ready else torch.stack([_log_mean_exp(x.detach()) for x in logits])
            if self.training and not self.ready and len(s):
                self.log_mean.copy_(log_mean)
                self.ready = True
            log_noise = (log_mean + math.log(len(self.teachers))).to(s.dtype)
            for x, noise in zip(logits, log_noise):
                total = total + mean(F.softplus(noise - x[:, 0]) + F.softplus(x[:, 1:] - noise).sum(1))
        if self.training:
            self.students.push(s)
            self.teachers.push(t)
        return total

    def _logits(self, anchor: Tensor, other: Tensor, memory: EmbeddingMemory) -> Tensor:
        """``[B, 1 + m]``: the positive, then the negatives."""
        return torch.cat(((anchor * other).sum(1, keepdim=True), memory.products(anchor)), 1) / self.temperature

    def get_extra_state(self) -> Tensor:
        return torch.tensor([int(self.ready)])

    def set_extra_state(self, state: Tensor) -> None:
        self.ready = bool(state[0])


def _projection(inputs: int, outputs: int, seed: int, purpose: str) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    bound = inputs**-0.5
    numbers = Rng.of(seed, purpose, range(outputs)).uniform(inputs + 1, low=-bound, high=bound)
    with torch.no_grad():
        layer.weight.copy_(numbers[:, :-1])
        layer.bias.copy_(numbers[:, -1])
    return layer


def _project(layer: nn.Linear, x: Tensor) -> Tensor:
    if x.shape[1] != layer.in_features:
        raise ValueError(f"the projection takes embeddings of {layer.in_features} numbers, got {x.shape[1]}")
    return F.normalize(F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype)))


def _log_mean_exp(x: Tensor) -> Tensor:
    """Log of the mean exp over all numbers of all processes, whose batches are of one size."""
    own = x.flatten().logsumexp(0) - math.log(max(x.numel(), 1))
    every = gather(own.view(1))
    return every.logsumexp(0) - math.log(len(every))
