"""Several students that train together: the first is the run's, the others its peers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from faceless.errors import InputError
from faceless.recognizer import Output, Recognizer

PEER = "peers."


class Cohort(Recognizer):
    """A student with peers, which losses reach as features ``peers.0``, ``peers.1``, …: their embeddings.

    Peers are only asked when they are wanted, and each prepares the faces for itself. What is saved, averaged for
    validation or verified is the student; its layers keep their names.

    Args:
        student: the run's.
        peers: one or more.
    """

    def __init__(self, student: Recognizer, peers: Sequence[Recognizer]):
        super().__init__(
            student.backbone, student.spec, name=student.name, options=student.options, source=student.source
        )
        self.peers = nn.ModuleList(peers)

    def forward(self, images: Tensor, features: Sequence[str] = ()) -> Output:
        own = [name for name in features if not name.startswith(PEER)]
        out = super().forward(images, own)
        known = {f"{PEER}{number}": peer for number, peer in enumerate(self.peers)}
        for name in features:
            if name in own:
                continue
            if name not in known:
                raise InputError(f"peers: a loss wants {name}, and there are {len(known)}; name as many as it does")
            out.features[name] = known[name](images).embedding
        return out

    def others(self) -> list[Recognizer]:
        """The peers."""
        return [cast(Recognizer, peer) for peer in self.peers]


def alone(student: Recognizer) -> Recognizer:
    """The student without its peers, if it has some."""
    if not isinstance(student, Cohort):
        return student
    own = Recognizer(student.backbone, student.spec, name=student.name, options=student.options, source=student.source)
    return own.to(student.scale.device).train(student.training)
