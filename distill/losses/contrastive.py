"""Losses that pull a student embedding to the teacher's of the same face and push it from those of other faces."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses.base import Loss, mean, one_of, positive, same_dim
from distill.memory import EmbeddingMemory
from faceless.recognizer import Output


class QUD(Loss):
    """Contrast each student embedding with a queue of earlier teacher embeddings.

    Cross-entropy over [s.t, s.Q] / temperature with the first as target: the teacher's embedding of the same face
    attracts, those of earlier faces repel. No labels. Near ln(1 + K) for an untrained student; the floor is above 0.
    Kolf, Damer, Boutros: QUD, BMVC 2024, equation 3.

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
        seed: int = 0,
    ):
        super().__init__()
        self.temperature = positive(temperature=temperature)
        self.update = one_of(("fifo", "simQ", "dissimQ"), update=update)
        if same_person is not None and not -1 <= same_person <= 1:
            raise ValueError(f"same_person is {same_person}; it is a cosine")
        self.same_person = same_person
        self.negatives = EmbeddingMemory(queue_size, embedding_dim, initial=initial, seed=seed)

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        s, t = (F.normalize(x) for x in same_dim(student, teacher))
        cosines = self.negatives.products(s)
        if self.same_person is not None:
            cosines = cosines.masked_fill(self.negatives.products(t) > self.same_person, -torch.inf)
        if self.training:
            self._remember(t)  # after the negatives were read: a face is never its own negative
        logits = torch.cat(((s * t).sum(1, keepdim=True), cosines), 1) / self.temperature
        first = torch.zeros(len(s), dtype=torch.int64, device=s.device)
        return mean(F.cross_entropy(logits, first, reduction="none"))

    def _remember(self, t: Tensor) -> None:
        if self.update == "fifo":
            self.negatives.push(t)
        else:
            self.negatives.replace(t, similar=self.update == "simQ")
