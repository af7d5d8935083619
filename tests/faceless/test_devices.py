"""Names of devices: what torch knows and Faceless runs on, and what is here."""

from __future__ import annotations

import pytest
import torch

from faceless.devices import chosen_device
from faceless.errors import InputError
from synth.generators.dcgan import DCGAN
from synth.settings import Generation
from synth.survey import Survey


def test_auto_is_a_gpu_where_there_is_one():
    assert chosen_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert chosen_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "meta", "mps", "", "cuda:x"])
def test_another_device_is_refused_by_its_key(name):
    with pytest.raises(InputError, match=f"^where is '{name}'; use auto, cpu or cuda$"):
        chosen_device(name, "where")


@pytest.mark.parametrize("name", ["cuda:99"] if torch.cuda.is_available() else ["cuda", "cuda:0", "cuda:99"])
def test_a_gpu_that_is_not_here_is_refused(name):
    with pytest.raises(InputError, match=f"device is '{name}', but torch sees"):
        chosen_device(name)


def test_settings_of_corpora_and_surveys_take_auto():
    there = "cuda" if torch.cuda.is_available() else "cpu"
    assert Survey(corpus="corpora/some", device="auto").device == there
    assert Generation(generator=DCGAN(), device="auto").device == there
