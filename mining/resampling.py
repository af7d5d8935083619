"""What to draw next, given where the student disagrees with its teacher."""

from __future__ import annotations

from torch import Tensor


class SynthDistillRule:
    """Draw again around each latent, the further the better student and teacher agree on its face.

    The perturbation of latent i has standard deviation ``coefficient * (1 + cos_i) / 2``: faces on which the student
    disagrees are revisited nearby, the others are left behind. Otroshi Shahreza, George, Marcel: SynthDistill, IJCB
    2023, equation 4, which uses it in W of StyleGAN2 with coefficient 1.

    Args:
        coefficient: in units of the latent's own standard deviation.

    >>> import torch
    >>> SynthDistillRule(coefficient=0.5).scale(torch.tensor([1.0, 0.0, -1.0]))
    tensor([0.5000, 0.2500, 0.0000])
    """

    def __init__(self, *, coefficient: float = 1.0):
        if coefficient <= 0:
            raise ValueError(f"coefficient is {coefficient}; it must be positive")
        self.coefficient = coefficient

    def scale(self, cosines: Tensor) -> Tensor:
        """Standard deviations ``[B]`` from student-teacher cosines ``[B]``."""
        return (1 + cosines) / 2 * self.coefficient
