import importlib
import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import faceless
from faceless.align import ARCFACE
from faceless.backbones import ARCHITECTURES
from faceless.backbones.ghostfacenet import SameConv2d
from faceless.backbones.iresnet import IResNet
from faceless.backbones.mobilefacenet import MobileFaceNet
from faceless.backbones.slimresnet import SlimResNet
from faceless.backbones.vit import VITS, ViT
from faceless.errors import InputError
from faceless.randomness import Rng

# Small enough for every test; each architecture once.
SMALL = {
    "iresnet18": {"embedding_dim": 16, "input_size": 32},
    "mobilefacenet": {"embedding_dim": 16, "input_size": 64, "width": 0.25},
    "slimresnet": {"embedding_dim": 16, "input_size": 48, "widths": (8, 16), "depths": (1, 2)},
}


def faces(count, size=64):
    return Rng.of(0, "faces", range(count)).integers(256, 3, size, size).byte()


def counts(net, size):
    """Parameters and MACs; the counter sees convolutions and matrix products, two operations per MAC."""
    with torch.device("meta"):
        pixels = torch.zeros(1, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        net.eval()(pixels)
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("build", "parameters", "macs"),
    # Counted on the classes of deepinsight/insightface, fdbtrs/AdaDistill, jankolf/QUD and fdbtrs/QuantFace.
    [
        (lambda: IResNet(18), 24_025_600, 2_609_954_816),
        (lambda: IResNet(34), 34_139_328, 4_459_642_880),
        (lambda: IResNet(50), 43_590_848, 6_309_330_944),
        (lambda: IResNet(100), 65_156_160, 12_089_606_144),
        (lambda: MobileFaceNet(embedding_dim=512), 1_199_488, 221_161_984),
        (lambda: MobileFaceNet(embedding_dim=256), 1_068_416, 221_030_912),
        (lambda: MobileFaceNet(embedding_dim=128), 1_002_880, 220_965_376),
        (lambda: MobileFaceNet(embedding_dim=128, affine=True), 1_003_136, 220_965_376),
        # Ours; by hand in docs/backbones.md.
        (lambda: SlimResNet(embedding_dim=128), 1_617_376, 379_802_624),
    ],
)
def test_parameters_and_macs(build, parameters, macs):
    with torch.device("meta"):
        net = build()
    assert counts(net, 112) == (parameters, macs)


@pytest.mark.parametrize(
    ("name", "options", "parameters", "macs"),
    # Counted on the classes of mk-minchul/AdaFace, gist-ailab/teaching-where-to-look, fdbtrs/PocketNet,
    # otroshi/edgeface, otroshi/synthdistill, and timm.
    [
        ("ir18", {}, 24_020_352, 2_597_109_760),
        ("ir50", {}, 43_585_600, 6_296_485_888),
        ("ir101", {}, 65_150_912, 12_076_761_088),
        ("cbam50", {}, 43_814_000, 6_310_054_214),
        ("cbam100", {}, 65_529_266, 12_090_811_878),
        ("cbam152", {}, 71_177_796, 12_322_051_318),
        ("pocketnet-s", {}, 925_632, 283_541_120),
        ("pocketnet-s", {"embedding_dim": 256}, 991_424, 283_606_656),
        ("pocketnet-m", {}, 1_686_656, 538_215_680),
        ("pocketnet-m", {"embedding_dim": 256}, 1_752_448, 538_281_216),
        ("edgeface-xxs", {}, 1_244_744, 47_297_978),
        ("edgeface-xs", {"rank_ratio": 0.6}, 1_770_492, 76_893_212),
        ("edgeface-s", {"rank_ratio": 0.5}, 3_652_520, 152_897_808),
        ("edgeface-base", {}, 18_225_812, 699_127_094),
        ("tinyfar-a", {}, 5_562_844, 126_773_712),
        ("tinyfar-b", {}, 3_105_434, 75_453_920),
        ("tinyfar-c", {}, 1_832_106, 38_172_896),
        ("mobilenetv2", {}, 2_879_744, 81_559_168),
        ("mobilenetv3-large", {}, 4_857_904, 60_061_000),
        ("mobilenetv3-small", {}, 2_042_656, 16_457_800),
        ("vit-s16", {}, 21_806_336, 1_099_370_496),
        ("vit-s8", {}, 21_641_600, 4_555_342_848),
        ("swin-s", {}, 49_225_226, 2_241_870_336),
        # deepinsight/insightface, jankolf/QUD, timesler/facenet-pytorch; GhostFaceNet on a port of the Keras code.
        ("mbf", {}, 2_059_520, 437_520_896),
        ("mbf-large", {}, 6_314_880, 1_816_482_816),
        ("mixfacenet-xs", {}, 1_040_866, 76_561_120),
        ("mixfacenet-s", {}, 3_073_110, 218_141_424),
        ("mixfacenet-m", {}, 3_953_046, 303_388_992),
        ("ghostfacenet", {}, 4_059_748, 211_909_644),
        ("ghostfacenet", {"stride": 2}, 4_037_836, 59_316_222),
        ("inception-resnet-v1", {"input_size": 160}, 23_482_624, 1_417_662_304),
        ("mobilefacenet-relu6", {}, 999_936, 233_810_432),
        # deepinsight/insightface, mk-minchul/CVLface; 51,744 and 206,976 are 11 * 49 buckets of each head and block.
        ("vit-t", {}, 19_137_792, 1_504_882_688),
        ("vit-s", {}, 76_023_296, 5_746_548_736),
        ("vit-b", {}, 113_833_472, 11_437_170_688),
        ("vit-l", {}, 255_684_352, 25_337_794_560),
        ("vit-h", {}, 756_393_984, 89_198_870_528),
        ("cvlface-vit-small", {}, 95_952_384, 9_174_843_392),
        ("cvlface-vit-base", {}, 114_869_760, 13_346_275_328),
        ("cvlface-vit-small", {"keypoints": True}, 95_952_384 + 51_744, 9_174_843_392 + 196 * 10 * 4_704),
        ("cvlface-vit-base", {"keypoints": True}, 114_869_760 + 206_976, 13_346_275_328 + 196 * 10 * 18_816),
    ],
)
def test_published_counts_by_name(name, options, parameters, macs):
    architecture = ARCHITECTURES[name]
    options = {"embedding_dim": architecture.embedding_dim, "input_size": 112} | options
    with torch.device("meta"):
        net = architecture.build(**options)
    assert counts(net, options["input_size"]) == (parameters, macs)


def test_ghostfacenet_has_the_numbers_of_its_keras_model():
    """With the statistics of batch normalization, which Keras counts as parameters; from its training notebooks."""
    for name, stride, expected in (
        ("ghostfacenet", 1, 4_088_300),
        ("ghostfacenet", 2, 4_066_388),
        ("ghostfacenet-v2", 1, 6_880_288),
    ):
        with torch.device("meta"):
            net = ARCHITECTURES[name].build(stride=stride)
        statistics = sum(b.numel() for name, b in net.named_buffers() if "running" in name)
        assert sum(p.numel() for p in net.parameters()) + statistics == expected


def test_tensorflow_pads_below_and_to_the_right():
    conv = SameConv2d(1, 1, 3, 2)
    conv.weight.data = torch.arange(9.0).view(1, 1, 3, 3)
    picture = torch.zeros(1, 1, 4, 4)
    picture[..., 3, 3] = 1
    # Windows begin at 0 and 2: the last pixel lies in the middle of the last one, were both sides padded at its corner.
    assert conv(picture).flatten().tolist() == [0, 0, 0, 4]
    assert SameConv2d(1, 1, 5, 2)(torch.zeros(1, 1, 7, 8)).shape == (1, 1, 4, 4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ir18", {"input_size": 32}),
        ("cbam18", {"input_size": 32}),
        ("pocketnet-s", {"input_size": 32}),
        ("edgeface-xxs", {"input_size": 64}),
        ("edgeface-xs", {"input_size": 64, "rank_ratio": 0.6}),
        ("tinyfar-c", {"input_size": 48}),
        ("mobilenetv3-small", {"input_size": 64}),
        ("mbf", {"input_size": 48}),
        ("mixfacenet-xs", {"input_size": 64, "shuffle": False}),
        ("ghostfacenet", {"input_size": 48, "width": 0.5, "stride": 2}),
        ("ghostfacenet-v2", {"input_size": 48, "width": 0.5}),
        ("mobilefacenet-relu6", {"input_size": 48}),
        ("vit-t", {"input_size": 18}),
        ("inception-resnet-v1", {"input_size": 75}),
        ("timm", {"input_size": 32, "model": "vit_tiny_patch16_224"}),
        ("timm", {"input_size": 64, "model": "swin_tiny_patch4_window7_224"}),
    ],
)
def test_networks_train_and_come_back_from_a_folder(tmp_path, name, options):
    net = faceless.create(name, embedding_dim=16, **options)
    images = faces(4, options["input_size"])
    net.train()(images).embedding.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
    again = faceless.load(faceless.save(net, tmp_path / "net"))
    assert torch.equal(again.embed(images), net.embed(images))
    assert again.options == net.options


def test_landmarks_move_attention(monkeypatch):
    monkeypatch.setitem(VITS, "tiny", (8, 16, 2, 2, 2))
    net = ViT("tiny", keypoints=True, embedding_dim=4, input_size=32).eval()
    plain = ViT("tiny", embedding_dim=4, input_size=32).eval()
    plain.load_state_dict(net.state_dict(), strict=False)
    images, template = torch.rand(3, 3, 32, 32), torch.tensor(ARCFACE) / 112
    # Landmarks have no say in a new network, and that of the template is taken where none are given.
    assert torch.allclose(net(images), plain(images), atol=1e-6)
    net.keypoint_linear.weight.data.normal_()
    assert torch.allclose(net(images), net(images, template.expand(3, 5, 2)), atol=1e-6)
    assert not torch.allclose(net(images), net(images, template.flip(0).expand(3, 5, 2)), atol=1e-5)
    # By hand: what query 5 (row 1, column 1) adds for key 2 (row 0, column 2) in head 1 of block 1.
    center = torch.tensor([1.5 / 4, 1.5 / 4])
    number = 49 * (1 * 2 + 1) + (3 + 1) * 7 + (3 - 1)
    weight, bias = net.keypoint_linear.weight[number], net.keypoint_linear.bias[number]
    expected = weight @ (center - template).flatten() + bias
    assert torch.allclose(net.biases(None)[1][0, 1, 5, 2], expected, atol=1e-5)
    net(images, template.expand(3, 5, 2)).sum().backward()
    assert net.keypoint_linear.weight.grad.abs().sum() > 0


def test_dlib_macs():
    with torch.device("meta"):
        net = ARCHITECTURES["dlib-resnet29"].build()
    assert counts(net, 150)[1] == 270_854_144


@pytest.mark.parametrize(("depth", "keys", "norms"), [(18, 187, 31), (34, 331, 55), (50, 475, 79), (100, 925, 154)])
def test_iresnet_keys(depth, keys, norms):
    with torch.device("meta"):
        net = IResNet(depth)
    assert len(net.state_dict()) == keys
    assert sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in net.modules()) == norms
    assert not net.features.weight.requires_grad


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [32, 47, 64, 112])
def test_input_sizes(name, size):
    net = faceless.create(name, **SMALL[name] | {"input_size": size}).eval()
    assert net(faces(2, size)).embedding.shape == (2, 16)
    assert (net.spec.height, net.spec.width) == (size, size)


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_autocast_and_training(name):
    net = faceless.create(name, **SMALL[name])
    images = faces(6)
    expected = net.eval()(images).embedding
    net = net.to(memory_format=torch.channels_last)
    assert torch.allclose(net(images).embedding, expected, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(images).embedding
    assert torch.cosine_similarity(half.float(), expected).min() > 0.99
    net.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(images).embedding.float().square().sum()
    loss.backward()
    without = [
        key for key, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert not without


@pytest.mark.parametrize("name", SMALL)
def test_rows_do_not_depend_on_their_batch(name):
    net = faceless.create(name, **SMALL[name])
    images = faces(5)
    alone = torch.cat([net.embed(image[None]) for image in images])
    assert torch.allclose(net.embed(images), alone, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_seed_decides_the_weights_and_global_state_stays(name):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    a, b, c = (faceless.create(name, seed=seed, **SMALL[name]).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_initialization_as_published():
    """IResNet: convolutions N(0, 0.1²). MobileFaceNet: He, fan-out, also the linear layer."""
    deep = faceless.create("iresnet18").backbone
    assert abs(deep.layer3[1].conv1.weight.std() - 0.1) < 1e-3
    mobile = faceless.create("mobilefacenet").backbone
    assert abs(mobile.conv_45.project.conv.weight.std() - (2 / 128) ** 0.5) < 3e-3
    assert abs(mobile.output_layer.linear.weight.std() - (2 / 512) ** 0.5) < 1e-3


def test_slimresnet_starts_with_identity_branches():
    images = torch.rand(2, 3, 64, 64)
    net = SlimResNet(embedding_dim=8).eval()
    block = net.stages[1][1]
    x = torch.rand(2, 64, 8, 8)
    assert torch.equal(block(x), x)
    assert net(images).shape == (2, 8)
    assert not torch.equal(SlimResNet(embedding_dim=8, zero_init=False).stages[1][1].eval()(x), x)


@pytest.mark.parametrize("stem", ["conv7", "conv3", "space2depth"])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("activation", ["relu", "prelu"])
def test_slimresnet_options(stem, pool, activation):
    net = SlimResNet(embedding_dim=4, stem=stem, pool=pool, activation=activation, widths=(8, 16), depths=(1, 1))
    side = 96 // (4 if stem == "space2depth" else 2) // (2 if pool else 1)
    assert net.stem(torch.rand(1, 3, 96, 96)).shape == (1, 8, side, side)
    assert net.stages(net.stem(torch.rand(1, 3, 96, 96))).shape == (1, 16, side // 2, side // 2)
    assert any(isinstance(m, torch.nn.PReLU) for m in net.modules()) == (activation == "prelu")


def test_width_multiplies():
    half = MobileFaceNet(embedding_dim=128, width=0.5, activation="relu")
    assert half.conv_6_sep.conv.out_channels == 256
    assert not any(isinstance(m, torch.nn.PReLU) for m in half.modules())
    assert SlimResNet(embedding_dim=8, width=0.5).fc.in_features == 80


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("iresnet51", {}, "did you mean iresnet50"),
        ("slimresnet", {"widhts": (8,)}, "no option 'widhts'; did you mean widths"),
        ("slimresnet", {"widths": (8,), "depths": (1, 1)}, "one of each for every stage"),
        ("slimresnet", {"widths": 8}, "slimresnet: "),
        ("slimresnet", {"depths": (10**9,), "widths": (8,)}, "200 in all"),
        ("slimresnet", {"stem": "conv9"}, "stem is 'conv9'"),
        ("slimresnet", {"input_size": 8}, "use 32 or more"),
        ("mobilefacenet", {"width": 0}, "width is 0"),
        ("mobilefacenet", {"activation": "gelu"}, "activation is 'gelu'"),
        ("mobilefacenet", {"embedding_dim": 0}, "embedding_dim is 0"),
        ("mobilefacenet", {"embedding_dim": "128"}, "embedding_dim is '128'"),
        ("mobilefacenet", {"framing": "ffhq"}, "framing is 'ffhq'"),
        ("dlib-resnet29", {"embedding_dim": 64}, "it has 128 and 150"),
        ("pocketnet-s", {"input_size": 100}, "use a multiple of 16"),
        ("edgeface-xs", {"rank_ratio": 2}, "rank_ratio is 2"),
        ("tinyfar-a", {"input_size": 16}, "use 32 or more"),
        ("ghostfacenet", {"stride": 3}, "use 0.25 to 8, and 1 or 2"),
        ("ghostfacenet-v2", {"input_size": 16}, "use more than 16"),
        ("vit-t", {"input_size": 8}, "use 9 or more"),
        ("inception-resnet-v1", {"input_size": 64}, "use 75 or more"),
        ("timm", {"model": "hf-hub:somebody/something"}, "timm has no model 'hf-hub:somebody/something'"),
        ("timm", {"model": "mobilenetv2_10"}, "did you mean mobilenetv2_1"),
    ],
)
def test_wrong_options_are_one_line(name, options, message):
    with pytest.raises(InputError, match=message):
        faceless.create(name, **options)


@pytest.mark.parametrize(("stem", "pool", "size"), [("conv5", False, 64), ("conv3", True, 50), ("conv7", False, 112)])
def test_slimresnet_flat_head_fits_its_last_map(stem, pool, size):
    widths, depths = (8, 16, 24), (1, 1, 1)
    net = SlimResNet(embedding_dim=5, input_size=size, stem=stem, pool=pool, widths=widths, depths=depths, head="flat")
    assert net(torch.zeros(2, 3, size, size)).shape == (2, 5)
    halvings = 3 + pool
    assert net.fc.in_features == 24 * math.ceil(size / 2**halvings) ** 2


@pytest.mark.slow
def test_the_page_shows_what_is_counted(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    script = importlib.import_module("backbones")
    page = script.PAGE.read_text("utf-8")
    assert script.table(page) == page, "run python scripts/backbones.py --write"
