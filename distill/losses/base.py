"""What every distillation loss is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from distill.gather import processes
from faceless.recognizer import Output


class Loss(nn.Module, ABC):
    """A number that says how far the student is from the teacher.

    Subclasses write `compute` (a `FaceLoss`: `each`), called outside autocast, with embeddings in float32 or
    better and a teacher that carries no gradient. What a loss remembers lives in buffers and parameters, and changes in
    training mode only. Too few samples give a zero that is connected to the student, never NaN.

    Over processes: a loss of single samples is the mean over the process's own batch, which DDP averages; batches of
    equal size per process therefore give what one process would. A loss of pairs gathers first, and is equal on every
    process.

    A loss that draws numbers has a ``seed``: None is that of the run (`distill.settings.Run`), and 0 outside of one.

    Attributes:
        needs_teacher: whether it looks at what the teacher says.
        needs_labels: whether ``labels`` must be given; a label of -1 marks a face without one, which does not count.
        needs_logits: whether both outputs must carry logits over the same classes.
        needs_features: whether the outputs must carry feature maps.
        needs_centers: whether it wants the mean teacher embedding of each class, through ``prime(centers [C, D])``.
        classes: how many identities its labels may name; None where any number will do.
        student_features, teacher_features: names of the sub-modules whose outputs these are.
    """

    needs_teacher: bool = True
    needs_labels: bool = False
    needs_logits: bool = False
    needs_features: bool = False
    needs_centers: bool = False
    classes: int | None = None
    student_features: tuple[str, ...] = ()
    teacher_features: tuple[str, ...] = ()

    def forward(
        self, student: Output, teacher: Output, labels: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Scalar loss of a batch.

        Args:
            student, teacher: embeddings ``[B, Ds]`` and ``[B, Dt]`` of any norm and floating type.
            labels: ``[B]`` int64, for losses that say `needs_labels`.
            weights: ``[B]``, one for each face, whose term it multiplies; the mean stays over B. None weights nothing.

        Raises:
            ValueError: shapes that do not fit, labels missing, or weights for a loss that is no `FaceLoss`.
        """
        S, T = student.embedding, teacher.embedding
        if S.ndim != 2 or T.ndim != 2 or len(S) != len(T):
            raise ValueError(f"embeddings are [B, D] with one B, got {list(S.shape)} and {list(T.shape)}")
        if self.needs_labels:
            if labels is None:
                raise ValueError(f"{type(self).__name__} needs labels and this batch has none")
            if labels.shape != S.shape[:1]:
                raise ValueError(f"labels are [{len(S)}] for this batch, got {list(labels.shape)}")
        if self.needs_logits and (student.logits is None or teacher.logits is None):
            raise ValueError(f"{type(self).__name__} needs logits of student and teacher")
        dtype = torch.promote_types(torch.promote_types(S.dtype, T.dtype), torch.float32)
        if weights is not None and weights.shape != S.shape[:1]:
            raise ValueError(f"weights are [{len(S)}] for this batch, got {list(weights.shape)}")
        with torch.autocast(S.device.type, enabled=False):
            student, teacher = _precise(student, dtype), _precise(teacher, dtype, constant=True)
            if weights is None:
                return self.compute(student, teacher, labels)
            return mean(self.each(student, teacher) * weights)

    def prepare(self, student: Output, teacher: Output) -> None:
        """Build what depends on the shapes of the two outputs, before an optimizer or a checkpoint asks for it.

        Called once with what both networks say of a few faces, in eval mode: batch statistics move without gradient
        too.
        """

    @abstractmethod
    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        """The formula of the class, on embeddings made ready by `forward`."""

    def each(self, student: Output, teacher: Output) -> Tensor:
        """``[B]``: the terms that a `FaceLoss` is the mean of; any other loss has none, and cannot weight faces."""
        raise ValueError(f"{type(self).__name__} is no mean over single faces, and cannot weight them")


class FaceLoss(Loss):
    """A loss that is the mean of one term for each face, which subclasses write in `each`; it can weight the faces."""

    @abstractmethod
    def each(self, student: Output, teacher: Output) -> Tensor:
        """The formula of the class for each face, ``[B]``, on embeddings made ready by `forward`."""

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        return mean(self.each(student, teacher))


def _precise(output: Output, dtype: torch.dtype, constant: bool = False) -> Output:
    """Embedding and logits in ``dtype``, without gradient where they are a constant."""

    def convert(x: Tensor) -> Tensor:
        if constant:
            # Autograd refuses to save what a teacher under inference_mode gives; a clone is an ordinary tensor.
            x = x.clone() if x.is_inference() else x.detach()
        return x.to(dtype)

    logits = None if output.logits is None else convert(output.logits)
    return replace(output, embedding=convert(output.embedding), logits=logits)


def same_dim(student: Output, teacher: Output) -> tuple[Tensor, Tensor]:
    """Both embeddings, which must have one D; a student of another D is projected before the loss."""
    S, T = student.embedding, teacher.embedding
    if S.shape[1] != T.shape[1]:
        raise ValueError(f"student and teacher embeddings have {S.shape[1]} and {T.shape[1]} numbers; project one")
    return S, T


def mean(values: Tensor) -> Tensor:
    """Mean of all values; 0, still connected to the graph, when there are none."""
    return values.sum() / max(values.numel(), 1)


def labeled_mean(values: Tensor, labels: Tensor) -> Tensor:
    """Mean of ``values [B]`` over the faces that have a label; 0, still connected to the graph, when there are none.

    Processes may have different numbers of labeled faces: the average of what they return is the mean over all.
    """
    known = labels >= 0
    count = known.sum()
    if processes() > 1:
        dist.all_reduce(count)
    return torch.where(known, values, 0).sum() * processes() / count.clamp(min=1)


def labeled_cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of ``scores [B, C]``, mean over the faces that have a label (see `labeled_mean`)."""
    return labeled_mean(F.cross_entropy(scores, labels.clamp(min=0), reduction="none"), labels)


def positive(**named: float) -> float:
    """Check and return the one named value.

    >>> positive(temperature=0.1)
    0.1
    """
    ((name, value),) = named.items()
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be positive")
    return value


def one_of(choices: tuple[str, ...], **named: str) -> str:
    """Check that the one named value is among ``choices``, and return it."""
    ((name, value),) = named.items()
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(map(repr, choices))}")
    return value
