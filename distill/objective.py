"""What a student is trained for: a weighted sum of losses against one teacher."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.cohort import PEER
from distill.gather import processes
from distill.losses.base import Loss
from distill.losses.embedding import Centering
from distill.losses.logits import ClassScores, CrossEntropy, LogitKD
from faceless.errors import InputError, suggest
from faceless.recognizer import Output, Recognizer

SCALE = 1024.0  # of gradients whose norms are taken
# What is missing where a loss wants a feature of such a name.
WANTED = {
    PEER: "the losses of distill.losses.mutual are for students with peers; name them under peers",
    "prompted": "PromptGuard is for a teacher with prompts; set prompts",
    "unprompted": "PromptGuard is for a teacher with prompts; set prompts",
}
LOGS = 7.0  # learned weights stay within about a thousandth and a thousand times the fixed ones


@dataclass
class Adaptive:
    """Weights that follow the sizes of the terms' gradients (AFL-KD), or of the terms themselves.

    Each weight is proportional to the fixed one divided by the norm of its term's gradient on the student's parameters
    that all terms reach, so that the fixed weights become shares of the gradient; together they stay what the fixed
    ones sum up to. Every refresh costs one backward pass of the student for each term: with 3 terms and ``every`` 10,
    about a fifth of a training step, on average over the steps.

    Args:
        rule: ``matched``: as above, which is what the authors' text says. ``literal``: as their algorithm 1 has it,
            which gives the cross-entropy the factor 1 / norm of the softened logits' gradient, and vice versa.
            ``magnitude``: by the running mean of the term itself instead of its gradient's norm, which costs nothing.
            ``learned``: each weight is exp(-a) times the fixed one, and a, which learns along, costs a times that
            (uncertainty weights: Kendall, Gal, Cipolla, CVPR 2018, with s = a); its optimum is the fixed weight divided
            by the term. Nothing is bounded to a share then, and the total may be negative.
        every: steps between two refreshes; the first so many steps refresh each.
        momentum: of the running mean of the norms, 0 for the latest only.
        lowest, highest: bounds of a weight, as a share of all weights together, before these are scaled to their sum.
            A term whose gradient vanishes would otherwise take all of it. One without any, as of a memory that is still
            empty, does not count: it keeps what it had, at first its fixed weight.
    """

    rule: Literal["matched", "literal", "magnitude", "learned"] = "matched"
    every: int = 10
    momentum: float = 0.9
    lowest: float = 0.05
    highest: float = 0.9

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"adaptive.every is {self.every}; it must be at least 1")
        if not 0 <= self.momentum < 1:
            raise InputError(f"adaptive.momentum is {self.momentum}; it must be at least 0 and below 1")
        if not 0 <= self.lowest < self.highest <= 1:
            raise InputError(f"adaptive.lowest {self.lowest} and highest {self.highest} must rise within 0..1")


class GradientBalance(nn.Module):
    """The state and the arithmetic of `Adaptive` weights.

    Args:
        settings: the rule.
        losses: the terms; ``literal`` wants one `CrossEntropy` and one `LogitKD` among them.
        weights: the fixed ones, by the same names.

    Raises:
        InputError: a weight is not positive, there is one term only, or ``literal`` does not find its terms.
    """

    norms: Tensor
    weight: Tensor
    shares: Tensor
    order: Tensor

    def __init__(self, settings: Adaptive, losses: Mapping[str, Loss], weights: Mapping[str, float]):
        super().__init__()
        if len(losses) < 2 or min(weights.values()) <= 0:
            raise InputError("adaptive weights need two losses or more, all with a positive weight")
        if settings.rule != "learned" and not settings.lowest * len(losses) < 1 < settings.highest * len(losses):
            raise InputError(
                f"adaptive.lowest {settings.lowest} and highest {settings.highest} leave the weights of {len(losses)} "
                f"losses no room: their share is 1/{len(losses)} on average, so that must lie between"
            )
        self.settings = settings
        self.step = 0
        self.register_buffer("shares", torch.tensor([weights[name] for name in losses]), persistent=False)
        self.register_buffer("norms", torch.zeros(len(losses)))
        self.register_buffer("weight", torch.zeros(len(losses)))
        order = list(range(len(losses)))
        if settings.rule == "literal":
            kinds = [type(loss) for loss in losses.values()]
            if kinds.count(CrossEntropy) != 1 or kinds.count(LogitKD) != 1:
                raise InputError("adaptive.rule literal swaps one CrossEntropy with one LogitKD; use matched")
            a, b = kinds.index(CrossEntropy), kinds.index(LogitKD)
            order[a], order[b] = b, a
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.logs = nn.Parameter(torch.zeros(len(losses))) if settings.rule == "learned" else None

    def now(self) -> Tensor:
        """``[terms]``: the weights; the fixed ones before the first refresh."""
        if self.logs is not None:
            return self.shares * (-self.logs.detach().clamp(-LOGS, LOGS)).exp()
        seen = (self.weight > 0)[self.order]
        means = (self.norms / self.weight.clamp(min=1e-12)).clamp(min=1e-6)[self.order]
        wanted, tiny = self.shares / means * seen, torch.finfo(means.dtype).tiny
        bounded = (wanted / wanted.sum().clamp(min=tiny)).clamp(self.settings.lowest, self.settings.highest) * seen
        weights = (self.shares * seen).sum() * bounded / bounded.sum().clamp(min=tiny)
        return torch.where(seen, weights, self.shares)

    def total(self, terms: Tensor) -> Tensor:
        """The weighted sum of ``terms [terms]``, with what learned weights cost."""
        if self.logs is None:
            return (self.now() * terms).sum()
        if self.training:
            with torch.no_grad():  # the parameter itself: beyond a bound it would have no gradient to come back by
                self.logs.clamp_(-LOGS, LOGS)
        return (self.shares * ((-self.logs).exp() * terms + self.logs)).sum()

    def due(self) -> bool:
        """Whether this step refreshes; counts the steps."""
        if self.logs is not None:
            return False
        self.step += 1
        return self.step <= self.settings.every or (self.step - 1) % self.settings.every == 0

    def refresh(self, terms: Iterable[Tensor], parameters: list[nn.Parameter]) -> None:
        """Take the gradients of ``terms`` (scalars whose graph is kept) with respect to ``parameters`` into account.

        A norm is that of the gradient of all processes together. A refresh with a gradient that is not finite leaves
        the weights as they were.
        """
        terms = list(terms)
        if self.settings.rule == "magnitude":
            self._follow(self._sizes(torch.stack(terms).detach().abs()))
            return
        found: list[tuple[Tensor | None, ...]] = []
        for term in terms:
            # Scaled up, as float16 activations lose small gradients; a term without a graph reaches nothing.
            grads = (
                torch.autograd.grad(term * SCALE, parameters, retain_graph=True, allow_unused=True)
                if term.requires_grad
                else (None,) * len(parameters)
            )
            found.append(grads)
        shared = [i for i in range(len(parameters)) if all(grads[i] is not None for grads in found)]
        if not shared:
            raise InputError("adaptive weights: the losses share no parameter of the student; use fixed weights")
        self._follow(torch.stack([self._norm([cast(Tensor, grads[i]) for i in shared]) for grads in found]) / SCALE)

    def _follow(self, norms: Tensor) -> None:
        good = norms.isfinite().all() & (norms > 0)
        keep = torch.where(good, self.settings.momentum, 1.0).to(self.norms)
        self.norms.lerp_(torch.where(good, norms, 0).to(self.norms), 1 - keep)
        self.weight.lerp_(torch.ones_like(self.weight), 1 - keep)

    @staticmethod
    def _sizes(terms: Tensor) -> Tensor:
        if processes() > 1:
            dist.all_reduce(terms)
        return terms / processes()

    @staticmethod
    def _norm(grads: list[Tensor]) -> Tensor:
        if processes() == 1:
            return torch.stack(torch._foreach_norm([g.float() for g in grads])).norm()
        flat = torch.cat([g.float().flatten() for g in grads])
        dist.all_reduce(flat)
        return flat.norm() / processes()

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.step])

    def set_extra_state(self, state: Tensor) -> None:
        (self.step,) = (int(v) for v in state)


@dataclass
class Classifier:
    """Scores over the training identities, for losses of logits with a teacher that knows other people.

    Args:
        scale: multiplies the cosines to the class centers.
        student: ``learned``: the student has class centers of its own, which start at the teacher's, learn, and are
            dropped at the end; ``teacher``: it is scored against the teacher's.
    """

    scale: float = 64.0
    student: Literal["learned", "teacher"] = "learned"

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise InputError(f"classifier.scale is {self.scale}; it must be positive")


class Objective(nn.Module):
    """Weighted sum of losses, with the teacher centered and a student of another D projected.

    Args:
        losses: by name.
        weights: by the same names.
        student_dim, teacher_dim: D of the two networks.
        center: subtract the teacher's mean embedding (see `Centering`).
        peer_dims: D of the student's peers.
        projection: ``"linear"`` maps a student, or a peer, of another D to the teacher's D with a bias-free matrix that
            is trained along and dropped afterwards; ``"none"`` refuses.
        adaptive: let the weights follow the gradients; None keeps them.
        classifier: give both outputs logits over the training identities; None takes what the networks give.
        scattered: names of the losses for which faces that were shown together have no label.

    Attributes:
        prompts: those of a teacher that learns (`distill.prompts`), which train along; None for a frozen teacher.

    Raises:
        InputError: the dimensions differ and may not be projected, a weight is missing, or weights cannot adapt.

    >>> from distill.losses.embedding import CosineEmbedding
    >>> objective = Objective({"cosine": CosineEmbedding()}, {"cosine": 2.0}, student_dim=4, teacher_dim=4)
    >>> loss, terms = objective(Output(torch.ones(1, 4)), Output(-torch.ones(1, 4)))
    >>> float(loss), float(terms["cosine"])
    (4.0, 2.0)
    """

    def __init__(
        self,
        losses: Mapping[str, Loss],
        weights: Mapping[str, float],
        *,
        student_dim: int,
        teacher_dim: int,
        peer_dims: Sequence[int] = (),
        center: bool = False,
        projection: str = "linear",
        adaptive: Adaptive | None = None,
        classifier: Classifier | None = None,
        scattered: Collection[str] = (),
    ):
        super().__init__()
        if set(losses) != set(weights):
            raise InputError(f"losses {sorted(losses)} and weights {sorted(weights)} do not have the same names")
        self.losses = nn.ModuleDict(losses)
        self.weights = dict(weights)
        self.centering = Centering(teacher_dim) if center else None
        if projection == "none" and (other := {student_dim, *peer_dims} - {teacher_dim}):
            raise InputError(
                f"the student's embeddings have {min(other)} numbers and the teacher's {teacher_dim}: set "
                f"student.embedding_dim (and that of peers) to {teacher_dim}, or projection to linear"
            )
        self.projection = nn.Linear(student_dim, teacher_dim, bias=False) if student_dim != teacher_dim else None
        self.of_peers = nn.ModuleDict(
            {str(i): nn.Linear(dim, teacher_dim, bias=False) for i, dim in enumerate(peer_dims) if dim != teacher_dim}
        )
        self.balance = GradientBalance(adaptive, losses, weights) if adaptive is not None else None
        self.scores: ClassScores | None = None
        if classifier is not None:
            self.scores = ClassScores(teacher_dim, scale=classifier.scale, learned=classifier.student == "learned")
        self.scattered = frozenset(scattered)
        self.prompts: nn.Module | None = None
        self._watched: list[nn.Parameter] = []

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Name the student's parameters, for weights that adapt."""
        self._watched = [p for p in parameters if p.requires_grad]

    def weights_now(self) -> dict[str, float]:
        """The weights by name; of adaptive ones, reading them waits for the device."""
        return dict(zip(self.losses, self.balance.now().tolist())) if self.balance is not None else self.weights

    @property
    def needs_centers(self) -> bool:
        """Whether the mean teacher embedding of each class is wanted before training starts."""
        return self.scores is not None or any(loss.needs_centers for _, loss in self.terms())

    def prime(self, centers: Tensor) -> None:
        """Give the class centers ``[C, D]`` to all that want them.

        Raises:
            InputError: a loss is for another number of classes, or of another D.
        """
        if self.scores is not None:
            self.scores.prime(centers.to(self.scores.centers))
        for name, loss in self.terms():
            if loss.needs_centers:
                if (loss.classes or 0) < len(centers):
                    raise InputError(f"losses.{name} is for {loss.classes} classes, and the faces have {len(centers)}")
                try:
                    cast(Any, loss).prime(centers)
                except ValueError as error:
                    raise InputError(f"losses.{name}: {error}") from error

    def tables(self) -> list[nn.Parameter]:
        """Class centers that learn: parameters of which a step moves the rows of few classes."""
        found = [p for name, p in self.named_parameters() if name.endswith((".centers", "scores.students"))]
        return [p for p in found if p.requires_grad]

    def learned_weights(self) -> list[nn.Parameter]:
        """Logarithms of the weights between losses that learn along."""
        return [] if self.balance is None or self.balance.logs is None else [self.balance.logs]

    def terms(self) -> list[tuple[str, Loss]]:
        """The losses with their names."""
        return [(name, cast(Loss, loss)) for name, loss in self.losses.items()]

    @property
    def needs_labels(self) -> list[str]:
        """Names of the losses that need labels."""
        return [name for name, loss in self.terms() if loss.needs_labels]

    @property
    def student_features(self) -> tuple[str, ...]:
        """Sub-modules of the student's backbone whose outputs the losses want."""
        return tuple(dict.fromkeys(name for _, loss in self.terms() for name in loss.student_features))

    @property
    def teacher_features(self) -> tuple[str, ...]:
        """The same of the teacher's."""
        return tuple(dict.fromkeys(name for _, loss in self.terms() for name in loss.teacher_features))

    @torch.no_grad()
    def probe(self, student: Recognizer, teacher: Recognizer, who: str = "teacher", build: bool = True) -> None:
        """Show the losses what both networks say of two blank faces: misfits show here.

        Args:
            who: what messages call the teacher.
            build: make the adapters that fit these two; what was built for others must fit them if not.

        Raises:
            InputError: a network lacks a feature or logits that a loss wants, or a loss refuses their shapes.
        """
        said = self._said("student", student, self.student_features)
        taught = self._said(who, teacher, self.teacher_features)
        self.eval()
        for name, loss in self.terms():
            try:
                if build:
                    loss.prepare(self._projected(said), taught)
                self._show(loss, said, taught)
            except (ValueError, RuntimeError) as error:
                fits = "" if build else f"the {who} does not fit as the last one does: "
                raise InputError(f"losses.{name}: {fits}{error}") from error
        self.train()

    @staticmethod
    def _said(who: str, network: Recognizer, names: Sequence[str]) -> Output:
        """What a network says of two blank faces, in eval mode."""
        modes = {module: module.training for module in network.modules()}
        network.eval()
        try:
            found: Output = network(torch.full((2, 3, 112, 112), 127.0), features=names)
        except AttributeError as error:
            layers = [name for name, _ in network.backbone.named_modules() if name]
            missing = next((name for name in names if name not in layers), str(error))
            for start, wanted in WANTED.items():
                if missing.startswith(start):
                    raise InputError(f"the {who} has no {missing!r}: {wanted}") from error
            raise InputError(f"the {who} has no layer {missing!r}; {suggest(missing, layers)}") from error
        for module, training in modes.items():
            module.training = training
        return found

    def _show(self, loss: Loss, student: Output, teacher: Output) -> None:
        s, t = self._scored(*self.comparable(student, teacher))
        if loss.needs_centers:
            cast(Any, loss).prime(torch.ones(loss.classes or 0, t.embedding.shape[1]))
        loss(s, t, torch.zeros(2, dtype=torch.long) if loss.needs_labels else None)

    @torch.no_grad()
    def comparable(self, student: Output, teacher: Output) -> tuple[Output, Output]:
        """The two outputs as the losses compare them, projected and centered, without learning from them."""
        student = self._projected(replace(student, embedding=student.embedding.detach()))
        teacher = replace(teacher, embedding=teacher.embedding.detach())  # one with prompts carries gradient too
        if self.centering is not None:
            teacher = replace(teacher, embedding=teacher.embedding - self.centering.mean)
        return student, teacher

    def _projected(self, student: Output) -> Output:
        embedding, features = student.embedding, dict(student.features)
        # In full precision wherever it is asked: in training, under autocast, and for validation, outside of it.
        with torch.autocast(embedding.device.type, enabled=False):
            if self.projection is not None:
                embedding = self.projection(embedding.to(self.projection.weight.dtype))
            for number, projection in self.of_peers.items():
                if (name := f"{PEER}{number}") in features:
                    features[name] = projection(features[name].to(cast(nn.Linear, projection).weight.dtype))
        return replace(student, embedding=embedding, features=features)

    def _scored(self, student: Output, teacher: Output) -> tuple[Output, Output]:
        if self.scores is None:
            return student, teacher
        return self.scores.of_student(student), self.scores.of_teacher(teacher)

    def forward(
        self,
        student: Output,
        teacher: Output,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        scattered: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and each loss before weighting, detached.

        Args:
            weights: ``[B]``, of the faces.
            scattered: ``[B]``, whether a face came by itself.
        """
        student = self._projected(student)
        if self.centering is not None:
            teacher = self.centering(teacher)
        student, teacher = self._scored(student, teacher)
        of_loose = labels if labels is None or scattered is None else labels.masked_fill(~scattered, -1)
        terms = {
            name: loss(student, teacher, of_loose if name in self.scattered else labels, weights)
            for name, loss in self.terms()
        }
        if self.balance is None:
            total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        else:
            if self.training and self._watched and self.balance.due():
                self.balance.refresh(terms.values(), self._watched)
            total = self.balance.total(torch.stack(list(terms.values())))
        return total, {name: term.detach() for name, term in terms.items()}
