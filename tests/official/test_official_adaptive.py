"""Temperatures that adapt, against the code their authors published."""

import math
from types import ModuleType

import pytest
import torch

from distill.losses.adaptive_parameters import AdaptiveTemperatureKD
from faceless.recognizer import Output
from tests.official.test_official_label_losses import batch

pytestmark = pytest.mark.official


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logit_standardization(official, parity, temperature):
    base = ModuleType("_base")
    base.Distiller = torch.nn.Module
    module = official("sunshangquan/logit-standardization-KD", "mdistiller/distillers/KD.py", {"._base": base})
    S, T, _ = batch(9)
    ours = AdaptiveTemperatureKD(temperature=temperature)
    parity(
        f"logit standardization T {temperature:g}",
        "sunshangquan/logit-standardization-KD KD.py",
        lambda s: ours(Output(s, s), Output(T, T)),
        lambda s: module.kd_loss(s, T, temperature, True),
        S,
    )


def test_curriculum_temperature(official, parity):
    """Their epochs are our steps here."""
    temperature = official("zhengli97/CTKD", "models/temp_global.py").Global_T().double()
    divergence = official("zhengli97/CTKD", "distiller_zoo/KD.py").DistillKL()
    ours = AdaptiveTemperatureKD(rule="adversarial", ramp=10).double()
    S, T, _ = batch(10)
    for step in (1, 4, 10, 12):

        def mine(s, step=step):
            ours.step = step
            return ours(Output(s, s), Output(T, T))

        def published(s, step=step):  # as helper/loops.py calls it, with train_student.py's CosineDecay(0, -1, 10)
            force = (math.cos(min(step, 10) * math.pi / 10) + 1) / 2 - 1
            return divergence(s, T, 1 + 20 * torch.sigmoid(temperature(T, s, force)))

        parity(
            f"curriculum temperature, batch {step}",
            "zhengli97/CTKD temp_global.py, KD.py",
            mine,
            published,
            S,
            parameters=((ours.raw, temperature.global_T),),
        )
