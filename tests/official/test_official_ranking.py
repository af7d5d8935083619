"""EKD against the code its authors published."""

import pytest
import torch
from torch import Tensor

from distill.losses.ranking import EKD
from faceless.recognizer import Output

pytestmark = pytest.mark.official

TFACE = "recognition/tasks/ekd/distillation/ekd.py"


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    people = torch.randn(20, 32, generator=random, dtype=torch.float64)
    labels = torch.randint(0, 20, (64,), generator=random)
    T = people[labels] + torch.randn(64, 32, generator=random, dtype=torch.float64)
    S = T + torch.randn(64, 32, generator=random, dtype=torch.float64)
    return S, T, labels


@pytest.mark.parametrize("corrected", [False, True], ids=["published", "corrected"])
def test_ekd(official, parity, corrected):
    """With corrected thresholds the published class is given those, divided by the weight that they have gathered."""
    theirs = official("Tencent/TFace", TFACE).EKD().double()
    ours = EKD(corrected=corrected).double()
    hooked = theirs.relative_loss
    gathered = 0.0
    for step in range(5):
        S, T, labels = batch(step)
        state = theirs.s_anchor.clone(), theirs.t_anchor.clone()
        mine = {key: item.clone() for key, item in ours.state_dict().items()}
        gathered = 0.99 * gathered + 0.01

        def published(student, T=T, labels=labels, state=state, gathered=gathered):
            theirs.s_anchor, theirs.t_anchor = state

            def relative_loss(s, t):
                kept = theirs.s_anchor, theirs.t_anchor
                if corrected:
                    theirs.s_anchor, theirs.t_anchor = (anchor / gathered for anchor in kept)
                loss = hooked(s, t)
                theirs.s_anchor, theirs.t_anchor = kept
                return loss

            theirs.relative_loss = relative_loss
            return theirs(student, T, labels)

        def our(student, T=T, labels=labels, mine=mine):
            ours.load_state_dict(mine)
            return ours(Output(student), Output(T), labels)

        name = "EKD" if not corrected else "EKD, corrected thresholds"
        parity(f"{name}, batch {step}", f"Tencent/TFace {TFACE.split('/')[-1]}", our, published, S)
