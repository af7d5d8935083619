"""Prioritized replay against OpenAI's; that of SSD-KD was not published."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.sources import Place
from distill.synthesis import SynthesisSource
from synth.generators.adversarial import LatentInversion

pytestmark = pytest.mark.official

BASELINES = "openai/baselines"


@pytest.mark.parametrize("priority", [0.6, 1.0])
def test_importance_weights_of_a_run(official, priority) -> None:
    """Theirs are divided by the largest weight of the whole pool, and so only make steps smaller."""
    stubs = {"baselines.common.segment_tree": "baselines/common/segment_tree.py"}
    theirs = official(BASELINES, "baselines/deepq/replay_buffer.py", stubs).PrioritizedReplayBuffer(16, priority)
    schedule = official(BASELINES, "baselines/common/schedules.py").LinearSchedule(100, final_p=1.0, initial_p=0.4)
    ours = SynthesisSource(synthesizer=LatentInversion(), pool=11, priority=priority, correction=(0.4, 1.0))
    ours.prepare(Place(batch_size=4, steps=100))
    ours.stored, ours.worth = 11, torch.rand(11) + 1e-3
    nothing = np.zeros(1)
    for _ in range(11):
        theirs.add(nothing, nothing, 0.0, nothing, False)
    theirs.update_priorities(range(11), ours.worth.tolist())
    for step in (0, 37, 99):
        *_, weights, rows = theirs.sample(64, schedule.value(step))
        every = ours.weights(torch.arange(11), step)
        torch.testing.assert_close(
            (every / every.max())[rows].double(), torch.from_numpy(weights), rtol=1e-5, atol=1e-7
        )
