"""A student that teaches its own shallower layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.losses.base import Loss, labeled_cross_entropy, mean, positive, same_dim
from distill.losses.features import as_map, draw_linear
from distill.losses.logits import divergence
from distill.losses.margin import ClassCenters, check_labels
from faceless.recognizer import Output

GRID = 4  # places along each side that an exit looks at


class Exit(nn.Module):
    """An embedding from a feature map: averaged over a grid of places, then a linear map.

    Args:
        channels: of the map.
        embedding_dim: D.
        seed: of the map's weights, which differ from exit to exit by ``name``.
    """

    def __init__(self, channels: int, embedding_dim: int, seed: int, name: str):
        super().__init__()
        self.linear = nn.Linear(channels * GRID**2, embedding_dim, bias=False)
        draw_linear(self.linear.weight, seed, f"exit {name}")

    def forward(self, x: Tensor) -> Tensor:
        rows = F.adaptive_avg_pool2d(x, GRID).flatten(1)
        return F.linear(rows, self.linear.weight.to(rows.dtype))


class DeepToShallow(Loss):
    """Exits at shallower layers, which learn what the whole student learns, and from the student.

    Each exit gives an embedding e of a feature map; E is the student's, a constant here. Without ``classes``, summed
    over exits: (1 - share) (1 - cos(e, teacher)) + share (1 - cos(e, E)) + hint mean((e - E)^2). The student's own loss
    stands in the recipe as ever. With ``classes``, after the published form, every exit and the student itself have
    class centers: (1 - share) cross-entropy + share T^2 KL(p_E || p_e) + hint mean((e - E)^2) summed over exits, plus
    the student's cross-entropy; no teacher is needed. Exits are dropped when training ends. Zhang et al.: Be Your Own
    Teacher, ICCV 2019, section 3.

    Chosen here: exits of one linear map behind a grid of 4 x 4 places, where the authors put bottleneck blocks; that
    hints compare final embeddings, in the mean over their numbers; and scores that are scaled cosines.

    Args:
        layers: names of the student's sub-modules that get an exit: maps ``[B, C, H, W]`` or tokens ``[B, N, C]``.
        classes: number of identities C, or None for the form without labels.
        share: of the student in what an exit learns (alpha), 0 to 1.
        hint: weight of the squared distance (lambda).
        scale: multiplies the cosines to class centers.
        temperature: T.
        seed: of exits and class centers.

    Shape:
        features as above; with classes labels ``[B]`` in 0..C-1, or -1 for none; returns a scalar.

    Raises:
        ValueError: an argument is out of range, a feature is missing, or `prepare` saw other shapes.

    >>> loss = DeepToShallow(layers=["stages.0"])
    >>> face = Output(torch.randn(2, 8), features={"stages.0": torch.randn(2, 4, 7, 7)})
    >>> loss.prepare(face, face)
    >>> loss(face, face).shape
    torch.Size([])
    """

    needs_features = True

    def __init__(
        self,
        *,
        layers: Sequence[str],
        classes: int | None = None,
        share: float = 0.3,
        hint: float = 0.03,
        scale: float = 32.0,
        temperature: float = 1.0,
        seed: int | None = None,
    ):
        super().__init__()
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(f"layers are {list(layers)}; name one or more, each once")
        if classes is not None and classes < 2:
            raise ValueError(f"classes is {classes}; use 2 or more, or null for none")
        if not 0 <= share <= 1 or hint < 0:
            raise ValueError(f"share is {share} and hint {hint}; share is from 0 to 1, and hint not negative")
        self.student_features = tuple(layers)
        self.classes, self.needs_labels, self.needs_teacher = classes, classes is not None, classes is None
        self.share, self.hint, self.seed = share, hint, seed or 0
        self.scale, self.temperature = positive(scale=scale), positive(temperature=temperature)
        self.exits = nn.ModuleList()
        self.classifiers = nn.ModuleList()

    def prepare(self, student: Output, teacher: Output) -> None:
        dim = student.embedding.shape[1]
        for name in self.student_features:
            self.exits.append(Exit(as_map(student.features[name]).shape[1], dim, self.seed, name))
        if self.classes is not None:
            for i in range(len(self.student_features) + 1):
                self.classifiers.append(ClassCenters(dim, self.classes, self.seed, f"class centers {i}"))

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        deep = student.embedding.detach()
        shallow = [self._exit(i, student) for i in range(len(self.student_features))]
        hints = torch.stack([mean((e - deep).square()) for e in shallow]).sum()
        if self.classes is None:
            _, T = same_dim(student, teacher)
            of_teacher, of_student = (
                torch.stack([mean(1 - F.cosine_similarity(e, target)) for e in shallow]).sum() for target in (T, deep)
            )
            return (1 - self.share) * of_teacher + self.share * of_student + self.hint * hints
        assert labels is not None
        check_labels(labels, self.classes)
        last, *scores = (self.scale * net(e) for net, e in zip(self.classifiers, (student.embedding, *shallow)))
        soft = (last.detach() / self.temperature).log_softmax(1)
        total = labeled_cross_entropy(last, labels) + self.hint * hints
        for z in scores:
            apart = mean(divergence(soft, (z / self.temperature).log_softmax(1)))
            total = total + (1 - self.share) * labeled_cross_entropy(z, labels)
            total = total + self.share * self.temperature**2 * apart
        return total

    def _exit(self, i: int, student: Output) -> Tensor:
        name = self.student_features[i]
        if name not in student.features or not len(self.exits):
            raise ValueError(f"the student gives no feature {name!r}, or prepare has not seen it")
        found = as_map(student.features[name].to(student.embedding.dtype))
        exit_ = self.exits[i]
        assert isinstance(exit_, Exit)
        inputs = exit_.linear.in_features // GRID**2
        if found.shape[1] != inputs or student.embedding.shape[1] != exit_.linear.out_features:
            raise ValueError(
                f"{name} has {found.shape[1]} channels and the embedding {student.embedding.shape[1]} numbers, not "
                f"{inputs} and {exit_.linear.out_features} as in prepare"
            )
        embedding: Tensor = exit_(found)
        return embedding
