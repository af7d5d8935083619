"""Losses for students that train together (see `distill.cohort`): what each learns alone, and what from the others."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from distill.losses.base import Loss, labeled_cross_entropy, mean, positive
from distill.losses.logits import divergence
from distill.losses.margin import ClassCenters, check_labels
from faceless.recognizer import Output


class _PeerLoss(Loss):
    needs_features = True

    def __init__(self, peers: int):
        super().__init__()
        if peers < 1:
            raise ValueError(f"peers is {peers}; there must be one besides the student, or more")
        self.student_features = tuple(f"peers.{i}" for i in range(peers))

    def everyone(self, student: Output) -> list[Output]:
        """The student and its peers."""
        found = [student]
        for name in self.student_features:
            if name not in student.features:
                raise ValueError(f"the student gives no feature {name!r}; name as many peers in the settings")
            found.append(Output(student.features[name].to(student.embedding.dtype)))
        return found


class _Copies(_PeerLoss):
    """A loss that is applied several times, each time with a state of its own."""

    def __init__(self, loss: Loss, peers: int, copies: int):
        super().__init__(peers)
        if loss.needs_features or loss.needs_logits or loss.needs_centers:
            raise ValueError(
                f"{type(loss).__name__} wants more than embeddings and labels, which is all that peers have"
            )
        self.needs_teacher, self.needs_labels, self.classes = loss.needs_teacher, loss.needs_labels, loss.classes
        self.copies = nn.ModuleList(copy.deepcopy(loss) for _ in range(copies))


class EachPeer(_Copies):
    """Teach the peers as the student is taught: the sum of a loss over the peers, each with a state of its own.

    The student itself is not among them: its losses stand in the recipe as ever.

    Args:
        loss: any that wants embeddings and labels only.
        peers: how many the settings name.

    Shape:
        features ``peers.0``, … ``[B, D]``, and whatever the loss wants; returns a scalar.

    Raises:
        ValueError: no peers, too few of them, or a loss that wants feature maps, logits or centers.

    >>> from distill.losses.embedding import CosineEmbedding
    >>> face = Output(torch.ones(2, 4))
    >>> EachPeer(loss=CosineEmbedding(), peers=1)(Output(face.embedding, features={"peers.0": -face.embedding}), face)
    tensor(2.)
    """

    def __init__(self, *, loss: Loss, peers: int = 1):
        super().__init__(loss, peers, peers)

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        peers = self.everyone(student)[1:]
        return torch.stack([loss(peer, teacher, labels) for loss, peer in zip(self.copies, peers)]).sum()


class Mutual(_Copies):
    """Let student and peers teach each other: the sum over all of them of the mean loss against the others.

    Who teaches is a constant for who learns. Any loss between embeddings serves, those of relations too, where the
    networks' spaces have nothing in common. No labels, unless the loss wants them.
    Deep mutual learning (Zhang et al., CVPR 2018, equation 8) with another measure than scores over classes, for which
    see `DeepMutual`.

    Args:
        loss: as for `EachPeer`; each ordered pair has its own state.
        peers: how many the settings name.

    Shape:
        as for `EachPeer`; what the teacher says is not used.

    Raises:
        ValueError: as for `EachPeer`.

    >>> from distill.losses.embedding import CosineEmbedding
    >>> face = Output(torch.ones(2, 4))
    >>> Mutual(loss=CosineEmbedding(), peers=1)(Output(face.embedding, features={"peers.0": -face.embedding}), face)
    tensor(4.)
    """

    def __init__(self, *, loss: Loss, peers: int = 1):
        super().__init__(loss, peers, (peers + 1) * peers)
        self.needs_teacher = False

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        everyone = self.everyone(student)
        pairs = [(a, b) for i, a in enumerate(everyone) for j, b in enumerate(everyone) if i != j]
        terms = [loss(learner, other, labels) for loss, (learner, other) in zip(self.copies, pairs)]
        return torch.stack(terms).sum() / (len(everyone) - 1)


class DeepMutual(_PeerLoss):
    """Deep mutual learning: student and peers classify, and each matches the scores of the others.

    For each network i the cross-entropy of its scaled cosines to class centers of its own, without a margin, plus
    ``weight`` times the mean over the others j of T^2 KL(p_j || p_i); summed over networks. Who teaches is a constant.
    No teacher is needed. All networks see the same batch and move together; the authors move one after the other, each
    on a batch of its own.
    Zhang, Xiang, Hospedales, Lu: Deep Mutual Learning, CVPR 2018, equations 5 to 8.

    Args:
        embedding_dim: D of student and peers.
        classes: number of identities C.
        peers: how many the settings name.
        scale: multiplies the cosines.
        temperature: T.
        weight: of the divergence beside the cross-entropy.
        seed: of the class centers.

    Shape:
        features ``peers.0``, … ``[B, D]``, labels ``[B]`` in 0..C-1, or -1 for none; returns a scalar.

    Raises:
        ValueError: an argument is out of range, or labels or peers do not fit.

    >>> student = Output(torch.randn(4, 8), features={"peers.0": torch.randn(4, 8)})
    >>> DeepMutual(embedding_dim=8, classes=5)(student, student, torch.tensor([0, 3, 3, -1])).shape
    torch.Size([])
    """

    needs_teacher = False
    needs_labels = True

    def __init__(
        self,
        *,
        embedding_dim: int,
        classes: int,
        peers: int = 1,
        scale: float = 32.0,
        temperature: float = 1.0,
        weight: float = 1.0,
        seed: int | None = None,
    ):
        super().__init__(peers)
        if classes < 2:
            raise ValueError(f"classes is {classes}; use 2 or more")
        self.classes: int = classes
        self.embedding_dim = embedding_dim
        self.scale, self.temperature = positive(scale=scale), positive(temperature=temperature)
        self.weight = weight
        self.classifiers = nn.ModuleList(
            ClassCenters(embedding_dim, classes, seed or 0, f"class centers {i}") for i in range(peers + 1)
        )

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        assert labels is not None
        check_labels(labels, self.classes)
        everyone = self.everyone(student)
        dims = [out.embedding.shape[1] for out in everyone]
        if wrong := set(dims) - {self.embedding_dim}:
            raise ValueError(
                f"embedding_dim is {self.embedding_dim}, and a network's embeddings have {min(wrong)} numbers"
            )
        scores = [self.scale * net(out.embedding) for net, out in zip(self.classifiers, everyone)]
        total = torch.stack([labeled_cross_entropy(z, labels) for z in scores]).sum()
        soft = [(z / self.temperature).log_softmax(1) for z in scores]
        for i, learner in enumerate(soft):
            for j, other in enumerate(soft):
                if i != j:
                    apart = mean(divergence(other.detach(), learner))
                    total = total + self.weight * self.temperature**2 * apart / (len(soft) - 1)
        return total
