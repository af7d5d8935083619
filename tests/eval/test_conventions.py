"""Conventions of pixels: networks whose right one is known by construction are tried with right and wrong ones."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import faceless
from eval.benchmarks import Benchmark
from eval.conventions import Check, check, few, main, tinted
from faceless.errors import InputError
from faceless.randomness import Rng
from faceless.recognizer import InputSpec, Recognizer

RGB = InputSpec(32, 32)


def people(count=5, faces=4):
    """Blurred gray patterns, one for each person, with a little noise."""
    coarse = Rng.of(0, "people", range(count)).uniform(1, 4, 4, low=20, high=235)
    pattern = nn.functional.interpolate(coarse, (32, 32), mode="bicubic").repeat_interleave(faces, 0)
    noise = Rng.of(0, "noise", range(count * faces)).normal(1, 32, 32) * 12
    images = (pattern + noise).clamp(0, 255).byte().expand(-1, 3, -1, -1).contiguous()
    return Benchmark(
        "toy",
        images,
        torch.arange(count).repeat_interleave(faces),
        [str(n) for n in range(count)],
        {"framing": "arcface"},
    )


def trained(spec):
    """A network whose batch normalizations remember tinted faces as ``spec`` hands them over."""
    backbone = faceless.create("slimresnet", embedding_dim=8, input_size=32, widths=(8, 16), depths=(1, 1)).backbone
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.momentum = 1.0
    with torch.no_grad():
        Recognizer(backbone.train(), spec)(tinted(people(8, 2).images))
    return backbone.eval()


def declared(backbone, spec) -> Check:
    return check(Recognizer(backbone, spec), people())


@pytest.mark.parametrize(
    "truth",
    [
        RGB,
        replace(RGB, channel_order="BGR"),
        replace(RGB, mean=(0, 0, 0), std=(1, 1, 1), value_range=1.0),
        replace(RGB, mean=(0, 0, 0), std=(1, 1, 1)),
        replace(RGB, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), value_range=1.0),
    ],
    ids=["RGB", "BGR", "0..1", "0..255", "ImageNet"],
)
def test_the_right_convention_is_found_from_batch_normalization(truth):
    backbone = trained(truth)
    assert not any("statistics" in line for line in declared(backbone, truth).warnings)
    order = "BGR" if truth.channel_order == "RGB" else "RGB"
    found = declared(backbone, replace(truth, channel_order=order, mean=truth.mean[::-1], std=truth.std[::-1]))
    assert any(f"as {truth.channel_order}, else the same fit" in line for line in found.warnings)
    shifted = replace(truth, mean=(60.0,) * 3, std=(60.0,) * 3, value_range=255.0)
    (line, *_) = declared(backbone, shifted).warnings
    assert f"mean={truth.mean}, std={truth.std}" in line
    assert f"value_range={truth.value_range:g}" in line


class Saturating(nn.Module):
    """Sees nothing but numbers between -3 and 3, and remembers none."""

    embedding_dim = 64

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(x.clamp(-3, 3).mean(1), 8).flatten(1)
        return x - x.mean(1, keepdim=True) + 1e-6


def test_without_batch_normalization_the_scores_tell():
    good = declared(Saturating(), RGB)
    assert good.declared.mismatch is None
    assert not good.warnings
    (line,) = declared(Saturating(), replace(RGB, mean=(-6000.0,) * 3, std=(500.0,) * 3)).warnings[:1]
    assert "told apart better than as declared" in line


def test_untrained_and_broken_networks_are_called_so():
    constant = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    nn.init.zeros_(constant[1].weight)
    constant.embedding_dim = 4
    assert "hardly told apart" in declared(constant, RGB).warnings[-1]
    nn.init.constant_(constant[1].weight, float("nan"))
    assert "hardly told apart" in declared(constant, RGB).warnings[-1]


def test_conventions_that_differ_by_a_percent_are_one():
    close = replace(RGB, mean=(127.5,) * 3, std=(128.0,) * 3)
    names = [trial.convention for trial in declared(Saturating(), close).others]
    assert "RGB, (x - 127.5) / 127.5" not in names
    assert {"BGR, else the same", "RGB, x / 255", "RGB, x"} <= set(names)


def test_another_framing_is_tried_and_the_table_has_all():
    other = replace(people(), record={"framing": "dlib"})
    found = check(Recognizer(Saturating(), RGB), people(), other)
    assert found.others[-1].convention == "dlib framing"
    assert found.others[-1].separation == found.declared.separation
    lines = found.table().splitlines()
    assert len(lines) == 2 + len(found.others)
    assert "(declared)" in lines[1]


def test_tinted_faces_are_redder_than_blue_and_keep_their_order():
    ramp = torch.arange(256.0).view(1, 1, 1, 256).expand(1, 3, 1, 256)
    red, green, blue = tinted(ramp)[0, :, 0]
    assert (red[1:255] > green[1:255]).all()
    assert (green[1:] > blue[1:]).all()
    assert (red.diff() > 0).all()
    assert (blue.diff() > 0).all()
    assert red.max() <= 255


def test_few_takes_the_first_faces_of_the_first_people():
    found = few(people(), people=2, faces=3)
    assert found.identities.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(found.images[3], people().images[4])


def test_pairs_are_needed():
    with pytest.raises(InputError, match="several faces each"):
        check(Recognizer(Saturating(), RGB), few(people(), faces=1))
    with pytest.raises(InputError, match="several faces each"):
        check(Recognizer(Saturating(), RGB), few(people(), people=1))


@pytest.mark.slow
def test_the_command_finds_nothing_wrong_with_dlib(capsys):
    main(["--model", "dlib-resnet29"])
    out = capsys.readouterr().out
    assert "warning" not in out
    assert "arcface framing" in out
