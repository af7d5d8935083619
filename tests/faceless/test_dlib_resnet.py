"""Our DlibResNet29 against dlib's own evaluation of the same file, and hostile files against its reader."""

import random
import resource

import numpy as np
import pytest
import torch

import faceless
from faceless import assets
from faceless.backbones.dlib_resnet import DlibResNet29, read_dat
from faceless.errors import InputError
from faceless.randomness import Rng


@pytest.fixture(scope="module")
def teacher():
    return faceless.load("dlib-resnet29")


@pytest.fixture(scope="module")
def dat():
    return assets.fetch("dlib-resnet29").read_bytes()


@pytest.fixture(scope="module")
def chips():
    """150 x 150: faces of the DCGAN, photographs cut roughly, noise, black, white."""
    from PIL import Image

    from synth.generators.dcgan import DCGAN

    generator = DCGAN()
    faces = generator.synthesize(generator.sample_latents(6, Rng.of(0, "test", range(6))))
    folder = assets.fetch("att-faces")
    photos = []
    for person in (1, 7, 40):
        with Image.open(folder / f"s{person}" / "3.pgm") as image:
            photos.append(np.asarray(image.convert("RGB").crop((6, 16, 86, 96)).resize((150, 150))))
    rng = Rng.of(1, "test", range(3))
    return torch.cat(
        [
            torch.nn.functional.interpolate(faces, (150, 150), mode="bilinear").round().clamp(0, 255).byte(),
            torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2),
            rng.integers(256, 3, 150, 150).byte(),
            torch.zeros(1, 3, 150, 150, dtype=torch.uint8),
            torch.full((1, 3, 150, 150), 255, dtype=torch.uint8),
        ]
    )


def by_dlib(chips):
    dlib = pytest.importorskip("dlib", reason="compares with dlib; install faceless-distill[align]")
    model = dlib.face_recognition_model_v1(str(assets.fetch("dlib-resnet29")))
    rows = [np.array(model.compute_face_descriptor(chip)) for chip in chips.permute(0, 2, 3, 1).contiguous().numpy()]
    return torch.from_numpy(np.stack(rows)).float()


def test_equals_dlib(teacher, chips):
    theirs = by_dlib(chips)
    with torch.no_grad():
        ours = teacher(chips).embedding
    assert torch.cosine_similarity(ours, theirs).min() >= 0.9999
    assert (ours - theirs).abs().max() < 1e-5  # values are about 0.1; two float32 orders of summation


def test_counts(teacher, dat):
    """29 convolutions, 5,574,720 of the 5,614,592 numbers of the file, which has 22,466,066 bytes."""
    net = teacher.backbone
    assert len(dat) == 22_466_066
    assert len(net.convolutions()) == 29
    convolutions = sum(p.numel() for c in net.convolutions() for p in c.parameters())
    affine = 2 * sum(c.out_channels for c in net.convolutions())
    assert convolutions == 5_574_720
    assert convolutions + affine + net.fc.weight.numel() == 5_614_592


def test_norms_and_spec(teacher, chips):
    norms = teacher(chips[:9]).embedding.norm(dim=1)
    assert norms.min() > 1.2
    assert norms.max() < 1.6
    assert (teacher.spec.height, teacher.spec.framing, teacher.embedding_dim) == (150, "dlib", 128)
    assert not teacher.training


def test_rows_do_not_depend_on_their_batch(teacher, chips):
    chips = chips[3:9]
    alone = torch.cat([teacher.embed(chip[None]) for chip in chips])
    assert (alone - teacher.embed(chips)).abs().max() < 1e-6
    assert (alone - teacher.embed(chips, batch_size=4)).abs().max() < 1e-6


def test_bf16_and_channels_last_stay_close(teacher, chips):
    chips = chips[4:8]
    full = teacher.embed(chips)
    last = faceless.load("dlib-resnet29").to(memory_format=torch.channels_last)
    assert torch.cosine_similarity(full, last.embed(chips)).min() > 0.999999
    with torch.autocast("cpu", torch.bfloat16):
        half = last.embed(chips)
    assert half.dtype == torch.float32
    assert torch.cosine_similarity(full, half).min() > 0.999


def test_pixel_gradient_is_the_slope(teacher, chips):
    """In float64 the directional derivative equals a central difference."""
    net = faceless.load("dlib-resnet29").double()
    pixels = chips[9:10].double().requires_grad_()  # noise: no two equal pixels, so max pooling has a slope
    direction = Rng.of(2, "direction", range(1)).normal(3, 150, 150).double()
    target = Rng.of(3, "target", range(1)).normal(128).double()

    def loss(images):
        return (net(images).embedding * target).sum()

    (gradient,) = torch.autograd.grad(loss(pixels), pixels)
    step = 1e-6
    with torch.no_grad():
        slope = (loss(pixels + step * direction) - loss(pixels - step * direction)) / (2 * step)
    assert torch.isclose((gradient * direction).sum(), slope, rtol=1e-4)
    assert all(p.requires_grad for p in teacher.backbone.parameters())


def test_every_truncation_is_an_input_error(dat, tmp_path):
    file = tmp_path / "cut.dat"
    rng = random.Random(0)
    ends = {0, 1, 2, 15, 50, 200, 1000, len(dat) - 1, len(dat) - 5, *(rng.randrange(len(dat)) for _ in range(12))}
    ends |= set(range(0, 700, 97))
    for end in ends:
        file.write_bytes(dat[:end])
        with pytest.raises(InputError, match=r"cut\.dat: .* at byte"):
            read_dat(file)
    file.write_bytes(dat + b"\0")
    with pytest.raises(InputError, match="1 bytes too many"):
        read_dat(file)


def test_flipped_bytes_give_the_network_or_an_input_error(dat, tmp_path):
    """Of the header every byte to several values; of the rest a sample; memory stays bounded."""
    file = tmp_path / "flip.dat"
    reference = {key: value.shape for key, value in DlibResNet29().state_dict().items()}
    rng = random.Random(1)
    header = dat.index(b"con_")
    places = [(at, 0xFF) for at in range(0, header, 11)] + [
        (rng.randrange(header), 1 << rng.randrange(8)) for _ in range(15)
    ]
    places += [(rng.randrange(header, len(dat)), 1 << rng.randrange(8)) for _ in range(8)]
    # The bytes just before and after the pixels of each tensor are where sizes are.
    marks = [at for kind in (b"con_", b"affine_", b"fc_2") for at in find_all(dat, kind)]
    places += [(at + rng.randrange(-60, 40), rng.randrange(1, 256)) for at in rng.sample(marks, 15)]
    accepted = 0
    for at, flip in places:
        damaged = bytearray(dat)
        damaged[at] ^= flip
        file.write_bytes(damaged)
        try:
            net = read_dat(file)
        except InputError as error:
            assert "flip.dat" in str(error)
        else:
            accepted += 1
            assert {key: value.shape for key, value in net.state_dict().items()} == reference
    assert accepted < len(places)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 6e6  # KiB; a wild size would ask for far more


def find_all(data, word):
    at = data.find(word)
    while at >= 0:
        yield at
        at = data.find(word, at + 1)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\x01\x01\x0dloss_metric_2", b"not a network at all"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x.dat").write_bytes(content)
    with pytest.raises(InputError, match="not dlib's face recognition ResNet"):
        faceless.load(tmp_path / "x.dat")
