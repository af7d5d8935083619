"""The DCGAN against the same network written out in functional form, and what it refuses to load."""

import pickle

import pytest
import torch
import torch.nn.functional as F

from faceless import assets
from faceless.errors import InputError
from faceless.randomness import Rng
from synth.generators.dcgan import DCGAN


def written_out(state: dict, z: torch.Tensor) -> torch.Tensor:
    """Radford et al.: transposed convolutions 4x4, batch norm and ReLU between, tanh at the end."""
    x = z[:, :, None, None]
    for layer, norm in ((0, 1), (3, 4), (6, 7), (9, 10)):
        x = F.conv_transpose2d(
            x, state[f"main.{layer}.weight"], stride=1 if layer == 0 else 2, padding=0 if layer == 0 else 1
        )
        name = f"main.{norm}"
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        x = F.relu(F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"]))
    return torch.tanh(F.conv_transpose2d(x, state["main.12.weight"], stride=2, padding=1))


def test_faces_are_those_of_the_checkpoint():
    state = torch.load(assets.fetch("dcgan-digiface"), map_location="cpu", weights_only=True)
    state = state.get("netG_state_dict", state)
    net = DCGAN()
    z = net.sample_latents(6, Rng.of(0, "test", range(6)))
    faces = net.synthesize(z)
    assert faces.shape == (6, 3, 64, 64) and faces.min() >= 0 and faces.max() <= 255
    torch.testing.assert_close((faces - 127.5) / 127.5, written_out(state, z), atol=1e-5, rtol=0)


def test_any_batch_split_gives_the_same_faces():
    net = DCGAN(None, channels=8)
    z = net.sample_latents(7, Rng.of(0, "test", range(7)))
    torch.testing.assert_close(
        net.synthesize(z), torch.cat([net.synthesize(z[:3]), net.synthesize(z[3:])]), atol=1e-3, rtol=0
    )


def test_random_weights_depend_on_the_seed_alone_and_give_varied_pictures():
    one, again, other = DCGAN(None, channels=8), DCGAN(None, channels=8), DCGAN(None, channels=8, seed=1)
    z = one.sample_latents(4, Rng.of(0, "test", range(4)))
    assert torch.equal(one.synthesize(z), again.synthesize(z))
    assert not torch.equal(one.synthesize(z), other.synthesize(z))
    assert one.synthesize(z).std(0).mean() > 10


def test_perturbation_has_the_scale_asked_for():
    net = DCGAN(None, channels=8)
    z = torch.zeros(2, 100)
    scale = torch.tensor([0.0, 2.0])
    moved = net.perturb(z, scale, Rng.of(0, "test", range(2)))
    assert torch.equal(moved[0], z[0]) and moved[1].std() == pytest.approx(2.0, rel=0.2)


def test_latents_and_their_random_numbers_must_match():
    with pytest.raises(ValueError, match="3 latents from random numbers for 2"):
        DCGAN(None, channels=8).sample_latents(3, Rng.of(0, "test", range(2)))


class Boom:
    def __reduce__(self):
        return (open, ("boom", "w"))


@pytest.mark.parametrize("content", [b"", b"not weights", pickle.dumps(Boom()), pickle.dumps([1, 2])])
def test_hostile_weights_are_refused_in_one_line(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"weights\.pt"):
        DCGAN(tmp_path / "weights.pt")
    assert not (tmp_path / "boom").exists()


def test_other_networks_and_missing_files_are_refused(tmp_path):
    torch.save(DCGAN(None, channels=4).state_dict(), tmp_path / "small.pt")
    with pytest.raises(InputError, match="does not hold this DCGAN"):
        DCGAN(tmp_path / "small.pt")
    with pytest.raises(InputError, match="no such generator weights"):
        DCGAN(tmp_path / "none.pt")
