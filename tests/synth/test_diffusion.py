"""Diffusion against the pipelines of ``diffusers`` on the same noise, and against a distribution in closed form."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from distill.sources import OnlineSource
from faceless.errors import InputError
from faceless.files import sha256
from faceless.randomness import Rng
from mining.resampling import ConfusedPairs, HardPool
from synth.corpus import Corpus
from synth.datasheet import whom
from synth.generate import generate, read_settings
from synth.generators.diffusion import SCHEDULERS, Contexts, Diffusion, Draws, spread

diffusers = pytest.importorskip("diffusers")
TINY = {"layers_per_block": 1, "norm_num_groups": 4, "block_out_channels": (8, 16)}
BLOCKS = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
CROSSED = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
CODED = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
}


def crossed(width=12, **more):
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=width,
        attention_head_dim=4,
        **TINY,
        **CROSSED,
        **more,
    )


def stable(folder, unet, text_encoder=None, tokenizer=None):
    pipeline = diffusers.StableDiffusionPipeline(
        diffusers.AutoencoderKL(**TINY, **CODED, scaling_factor=0.5),
        text_encoder,
        tokenizer,
        unet,
        diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        None,
        None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny pipelines of every kind, with random weights, as their authors' classes save them."""
    root = tmp_path_factory.mktemp("pipelines")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = diffusers.UNet2DModel(sample_size=16, **TINY, **BLOCKS)
        diffusers.DDPMPipeline(plain, diffusers.DDPMScheduler()).save_pretrained(root / "ddpm")
        classes = diffusers.UNet2DModel(sample_size=16, num_class_embeds=3, **TINY, **BLOCKS)
        diffusers.DDPMPipeline(classes, diffusers.DDPMScheduler()).save_pretrained(root / "classes")
        inner = diffusers.UNet2DModel(sample_size=8, in_channels=4, out_channels=4, **TINY, **BLOCKS)
        vq = diffusers.VQModel(**TINY, **CODED, num_vq_embeddings=16, scaling_factor=0.5)
        diffusers.LDMPipeline(vq, inner, diffusers.DDIMScheduler()).save_pretrained(root / "ldm")
        stable(root / "identities", crossed())
        stable(root / "lcm", crossed(time_cond_proj_dim=10))
        # Attention starts out so weak that a condition would hardly show.
        for name in ("identities", "lcm"):
            folder = root / name / "unet"
            unet = diffusers.UNet2DConditionModel.from_pretrained(folder)
            for key, value in unet.named_parameters():
                if "attn2.to_" in key or "cond_proj" in key:
                    value.data.mul_(8)
            unet.save_pretrained(folder)
    return root


def noise(net, count=4):
    return net.sample_latents(count, Rng.of(0, "test", range(count)))


def pictures(output):
    """What a pipeline returns as numpy, in our terms."""
    return torch.from_numpy(output.images).permute(0, 3, 1, 2) * 255


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_the_pipeline_of_diffusers(folders, eta):
    net = Diffusion(str(folders / "ddpm"), scheduler="DDIM", steps=6, spacing="leading", eta=eta)
    start = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    pipeline = diffusers.DDIMPipeline.from_pretrained(folders / "ddpm")
    pipeline.set_progress_bar_config(disable=True)
    expected = pictures(pipeline(3, torch.Generator().manual_seed(5), eta, 6, output_type="np"))
    faces = net.synthesize(torch.cat((start.flatten(1), torch.zeros(3, 2)), 1) if eta else start)
    assert faces.shape == (3, 3, net.face_size, net.face_size) and net.face_size == 16
    if eta:
        assert (faces - expected).abs().mean() > 1  # other noise on the way, as it must be
    else:
        torch.testing.assert_close(faces, expected, atol=0.02, rtol=0)


def test_ancestral_noise_reaches_the_scheduler(folders):
    """The loop written out with diffusers' scheduler, which is handed the noise where it takes noise."""
    net = Diffusion(str(folders / "ddpm"), scheduler="DDIM", steps=4, eta=1.0)
    latents = noise(net)
    assert net.latent_shape == (3 * 16 * 16 + 2,)
    z, seed = latents[:, :-2].view(4, 3, 16, 16), latents[:, -2:].long()
    scheduler = net.schedule()
    sample, draws = z, Draws(z, seed)
    with torch.no_grad():
        for time in scheduler.timesteps:
            with draws:
                other = torch.randn(z.shape)
            sample = scheduler.step(net.unet(sample, time).sample, time, sample, 1.0, variance_noise=other).prev_sample
    torch.testing.assert_close(net.synthesize(latents), (sample * 127.5 + 127.5).clamp(0, 255), atol=0.02, rtol=0)


def test_latent_diffusion_is_the_pipeline_of_diffusers(folders):
    net = Diffusion(str(folders / "ldm"), steps=5, spacing=None)
    assert net.latent_shape == (4, 8, 8) and net.face_size == 16
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    pipeline = diffusers.LDMPipeline.from_pretrained(folders / "ldm")
    pipeline.set_progress_bar_config(disable=True)
    expected = pictures(pipeline(2, torch.Generator().manual_seed(1), num_inference_steps=5, output_type="np"))
    torch.testing.assert_close(net.synthesize(start), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("name", "scheduler", "guidance"), [("identities", "DPMSolverMultistep", 3.0), ("lcm", "LCM", 2.0)]
)
def test_stable_diffusion_is_the_pipeline_of_diffusers(folders, name, scheduler, guidance):
    contexts = Contexts(count=5, min_angle=40.0)
    spoken_by_nobody = {"text_encoder": None, "tokenizer": None}
    net = Diffusion(
        str(folders / name), scheduler=scheduler, steps=3, spacing=None, guidance=guidance, contexts=contexts
    )
    z = noise(net)
    assert net.latent_shape == (4 * 8 * 8 + (3 if name == "lcm" else 1),) and z[:, -1].tolist() == [0, 1, 2, 3]
    start = z[:, :256].view(4, 4, 8, 8)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        folders / name, safety_checker=None, feature_extractor=None, image_encoder=None, **spoken_by_nobody
    )
    pipeline.set_progress_bar_config(disable=True)
    kind = getattr(diffusers, f"{scheduler}Scheduler")
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    tokens = contexts.vectors(12)[:4, None]
    with Draws(start, z[:, 256:258].long() if name == "lcm" else None):  # LCM draws on the way
        expected = pipeline(
            latents=start,
            prompt_embeds=tokens,
            negative_prompt_embeds=torch.zeros_like(tokens),
            num_inference_steps=3,
            guidance_scale=guidance,
            output_type="np",
        )
    torch.testing.assert_close(net.synthesize(z), pictures(expected), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_batch_split_gives_the_same_faces_with_every_scheduler(folders, name):
    net = Diffusion(str(folders / "ddpm"), scheduler=name, steps=4)
    z = noise(net, 3)
    whole = net.synthesize(z)
    assert whole.isfinite().all() and whole.std() > 1
    torch.testing.assert_close(whole, torch.cat([net.synthesize(z[:1]), net.synthesize(z[1:])]), atol=0.02, rtol=0)
    state = torch.random.get_rng_state()
    assert torch.equal(net.synthesize(z), whole)
    assert torch.equal(torch.random.get_rng_state(), state)


class Exact(nn.Module):
    """The perfect noise predictor for faces that are normally distributed: ``E[noise | x_t]`` in closed form."""

    def __init__(self, values, axes, alphas):
        super().__init__()
        self.values, self.axes, self.alphas = values, axes, alphas
        self.config = SimpleNamespace(get=lambda name: None)

    def forward(self, x, time):
        a = self.alphas[int(time)]
        gain = (1 - a).sqrt() / (a * self.values + 1 - a)
        out = ((x.flatten(1).double() @ self.axes) * gain) @ self.axes.T
        return SimpleNamespace(sample=out.view_as(x).float())


class OneByOne(TorchFunctionMode):
    """Row k + 1 gets the k-th noise, all ones; the other rows get none."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.randn:
            return func(*args, **(kwargs or {}))
        self.count += 1
        noise = torch.zeros(args[0])
        noise[self.count] = 1
        return noise


def variances(net, values):
    """Of what comes out along each axis if all noise is independent: everything is linear, so the squares add up."""
    scheduler = net.schedule()
    sample = torch.zeros(net.steps + 1, len(values))
    sample[0] = scheduler.init_noise_sigma
    network, modes = Exact(values, torch.eye(len(values)).double(), net.unet.alphas), OneByOne()
    for time in scheduler.timesteps:
        predicted = network(scheduler.scale_model_input(sample, time), time).sample
        with modes:
            sample = net._step(scheduler, predicted, time, sample)
    return sample.double().square().sum(0)


@pytest.mark.parametrize(
    ("scheduler", "steps", "eta"),
    [
        ("DDPM", 100, 0.0),
        ("DDIM", 50, 0.0),
        ("DDIM", 50, 1.0),
        ("DPMSolverMultistep", 20, 0.0),
        ("EulerAncestralDiscrete", 60, 0.0),
    ],
)
def test_faces_have_the_distribution_of_independent_noise(folders, scheduler, steps, eta):
    """The covariance of what a perfect network makes: that noise on the way is rearranged must not be found out."""
    options = {"clip_sample": False} if scheduler.startswith("DD") else {}
    net = Diffusion(str(folders / "ddpm"), scheduler=scheduler, steps=steps, eta=eta, scheduler_options=options)
    net.noise_shape, net.count = (3, 4, 4), 48
    net.latent_shape = (48 + net.seeds,) if net.seeds else (3, 4, 4)
    places = torch.arange(4.0)
    row = torch.exp(-((places[:, None] - places) ** 2) / 4).double()
    covariance = 0.04 * torch.kron(torch.eye(3).double(), torch.kron(row, row)) + 1e-4 * torch.eye(48).double()
    values, axes = torch.linalg.eigh(covariance)
    net.unet = Exact(values, axes, net.schedule().alphas_cumprod.double())
    expected = axes * variances(net, values) @ axes.T
    # So few steps miss the distribution of the faces, by a part of it; no step would be left out by chance.
    assert float(expected.trace() / covariance.trace()) == pytest.approx(1, abs=0.3)
    faces = (net.synthesize(noise(net, 10_000)).double() - 127.5).flatten(1) / 127.5
    found = faces.T @ faces / len(faces)
    chance = float(expected.trace() / torch.linalg.matrix_norm(expected)) / 100  # of ten thousand samples
    assert torch.linalg.matrix_norm(found - expected) / torch.linalg.matrix_norm(expected) < 1.5 * chance
    assert faces.mean(0).abs().max() < 5 * 0.2 / 100


def test_rearranged_noise_is_noise():
    z = torch.randn(500, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    seed = Rng.of(0, "test", range(500)).integers(2048, 2)
    with Draws(z, seed):
        draws = torch.stack([torch.randn(z.shape) for _ in range(4)] + [torch.randn_like(z), z]).flatten(2)
    for i in range(6):
        assert torch.equal(draws[i].abs().sort(1).values, z.flatten(1).abs().sort(1).values)
        for j in range(i):
            # Over samples, no place of one draw knows of any place of the other.
            correlation = draws[i].T @ draws[j] / 500
            assert correlation.abs().max() < 8 * 500**-0.5
            assert correlation.square().mean() == pytest.approx(1 / 500, rel=0.1)


def test_perturbation_turns_the_noise_and_keeps_the_identity(folders):
    net = Diffusion(str(folders / "identities"), steps=2, contexts=Contexts(count=3))
    z = noise(net)
    moved = net.perturb(z, torch.tensor([0.0, 0.25, 1.0, 7.0]), Rng.of(1, "test", range(4)))
    other = Rng.of(1, "test", range(4)).normal(256)
    assert torch.equal(moved[:, -1], z[:, -1]) and torch.equal(net.identity(moved), torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(moved[0], z[0])
    torch.testing.assert_close(moved[2:, :-1], other[2:], atol=1e-5, rtol=0)
    # Shoemake's formula in double precision, for the one in between.
    a, b = z[1, :-1].double(), other[1].double()
    angle = math.acos(float(a @ b / a.norm() / b.norm()))
    expected = (math.sin(0.75 * angle) * a + math.sin(0.25 * angle) * b) / math.sin(angle)
    torch.testing.assert_close(moved[1, :-1].double(), expected, atol=1e-5, rtol=0)
    assert moved[1, :-1].std() == pytest.approx(1, abs=0.15)
    same = net.perturb(z[:1], torch.tensor([0.5]), SimpleNamespace(normal=lambda n: 2 * z[:1, :-1]))
    torch.testing.assert_close(same[:, :-1], 1.5 * z[:1, :-1])


def test_near_noise_gives_near_faces_with_ancestral_schedulers_too(folders):
    net = Diffusion(str(folders / "ddpm"), scheduler="EulerAncestralDiscrete", steps=8)
    z = noise(net)
    near, far = (
        net.synthesize(net.perturb(z, torch.full((4,), scale), Rng.of(1, "test", range(4)))) for scale in (0.02, 1.0)
    )
    face = net.synthesize(z)
    assert (near - face).abs().mean() < 0.2 * (far - face).abs().mean()


def test_classes_are_identities(folders):
    net = Diffusion(str(folders / "classes"), steps=2)
    z = noise(net, 5)
    assert net.identities == 3 and net.identity(z).tolist() == [0, 1, 2, 0, 1]
    assert "may be real people" in whom(net.provenance())
    as_other = z.clone()
    as_other[0, -1] = 2
    assert not torch.equal(net.synthesize(z[:1]), net.synthesize(as_other[:1]))


def test_latents_of_identities_that_there_are_not_are_refused(folders, tmp_path):
    net = Diffusion(str(folders / "classes"), steps=2)
    z = noise(net, 3)
    z[1, -1] = 3
    rows = pa.FixedSizeListArray.from_arrays(pa.array(z.flatten().numpy()), z.shape[1])
    pq.write_table(pa.table({"latent": rows}), tmp_path / "around.parquet")
    generator = {"class_path": "synth.generators.diffusion.Diffusion"}
    generator["init_args"] = {"source": str(folders / "classes"), "steps": 2}
    (tmp_path / "a.yaml").write_text(
        json.dumps(
            {"generator": generator, "align": None, "count": 4, "workers": 0, "output": str(tmp_path / "corpus")}
            | {"around": str(tmp_path / "around.parquet")}
        )
    )
    with pytest.raises(InputError, match="identities up to 3, and the generator knows 0 to 2"):
        generate(read_settings(["--config", str(tmp_path / "a.yaml")]), progress=False)


def test_nothing_is_drawn_between_two_classes_or_seeds(folders):
    """Half way between class 0 and class 2 is class 1, which neither face shows."""
    net = Diffusion(str(folders / "classes"), steps=2)
    with pytest.raises(InputError, match=r"ConfusedPairs draws between two latents.*Diffusion.*HardPool"):
        OnlineSource(generator=net, resampling=ConfusedPairs())
    OnlineSource(generator=net, resampling=HardPool())
    plain = [Diffusion(str(folders / "ddpm"), scheduler=name, steps=2) for name in ("DDIM", "EulerAncestralDiscrete")]
    assert [one.continuous for one in plain] == [True, False]
    OnlineSource(generator=plain[0], resampling=ConfusedPairs())


def test_gradients_reach_the_noise(folders):
    net = Diffusion(str(folders / "ldm"), steps=2)
    z = noise(net, 1).requires_grad_()
    net.synthesize(z).mean().backward()
    assert z.grad.isfinite().all() and z.grad.abs().sum() > 0


def test_half_precision_stays_near(folders):
    full, half = (Diffusion(str(folders / "ldm"), steps=3, dtype=dtype) for dtype in ("float32", "bfloat16"))
    z = noise(full)
    faces = half.synthesize(z)
    assert faces.dtype == torch.float32 and next(half.parameters()).dtype == torch.bfloat16
    assert 0 < (faces - full.synthesize(z)).abs().mean() < 12


def test_identities_on_the_sphere_keep_their_distance():
    points = spread(300, 8, 35.0, seed=0)
    cosines = points @ points.T - 2 * torch.eye(300)
    assert cosines.max() <= math.cos(math.radians(35)) + 1e-6
    torch.testing.assert_close(points.norm(dim=1), torch.ones(300))
    assert torch.equal(points[:50], spread(50, 8, 35.0, seed=0)) and not torch.equal(points, spread(300, 8, 35.0, 1))
    # Those that come first are taken as they are drawn: one at a time in plain Python.
    drawn = F.normalize(Rng.of(0, "contexts", range(1024)).normal(8), dim=1)
    taken = []
    for point in drawn:
        if all(float(point @ other) <= math.cos(math.radians(35)) for other in taken):
            taken.append(point)
    torch.testing.assert_close(points[:60], torch.stack(taken)[:60])
    with pytest.raises(InputError, match="no room for 10 identities in 2 dimensions at 60 degrees"):
        spread(10, 2, 60.0, seed=0)  # six fit on a circle, if placed with care


def test_identities_from_a_parquet_column(folders, tmp_path):
    rows = np.random.default_rng(0).normal(size=(7, 12)).astype(np.float32)
    pq.write_table(pa.table({"who": pa.array(rows.tolist()), "age": list(range(7))}), tmp_path / "people.parquet")
    people = str(tmp_path / "people.parquet")
    assert np.allclose(Contexts(people, "who", normalize=False).vectors(12), rows)
    unit = Contexts(people, "who", count=5).vectors(12)
    assert np.allclose(unit, (rows / np.linalg.norm(rows, axis=1, keepdims=True))[:5], atol=1e-6)
    net = Diffusion(str(folders / "identities"), steps=2, contexts=Contexts(people, "who"))
    z = torch.cat((noise(net, 1)[:, :-1].expand(7, -1), torch.arange(7.0)[:, None]), 1)
    faces = net.synthesize(z)
    assert all((faces[i] - faces[j]).abs().max() > 0.1 for i in range(7) for j in range(i))
    assert (
        net.provenance()["contexts_sha256"]
        != Diffusion(str(folders / "identities"), steps=2, contexts=Contexts(people, "who", count=6)).provenance()[
            "contexts_sha256"
        ]
    )
    for real, told in ((None, "real or not: that is not recorded"), (True, "the real people"), (False, "invented as")):
        given = Contexts(people, "who", real=real)
        record = Diffusion(str(folders / "identities"), steps=2, contexts=given).provenance()
        assert record["identities_from"] == {"file_sha256": sha256(people), "real": real}
        assert told in whom(record) and sha256(people) in whom(record)
    with pytest.raises(InputError, match="those drawn are nobody's"):
        Contexts(count=3, real=True)
    for options, line in (
        ({"column": "name"}, "no column 'name'; it has who, age"),
        ({"column": "age"}, "not readable as lists"),
        ({"column": "who", "count": 8}, "7 rows"),
    ):
        with pytest.raises(InputError, match=line):
            Contexts(people, **options).vectors(12)
    ragged = pa.table({"embedding": pa.array([[1.0, 2.0], [1.0]])})
    pq.write_table(ragged, tmp_path / "ragged.parquet")
    with pytest.raises(InputError, match="unequal length"):
        Contexts(str(tmp_path / "ragged.parquet")).vectors(2)
    with pytest.raises(InputError, match="no such file of identities"):
        Contexts(str(tmp_path / "none.parquet")).vectors(2)
    with pytest.raises(InputError, match="vectors of 7 numbers"):
        Diffusion(str(folders / "identities"), steps=2, contexts=Contexts(count=3, dim=7))


@pytest.fixture(scope="module")
def spoken(folders):
    """A pipeline with a tiny CLIP text encoder."""
    transformers = pytest.importorskip("transformers")
    folder = folders / "spoken"
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters), "id</w>"]
    words = folders / "words"
    words.mkdir()
    (words / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (words / "merges.txt").write_text("#version: 0.2\ni d</w>\n")
    tokenizer = transformers.CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=10)
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=10,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = crossed()
        for key, value in unet.named_parameters():
            if "attn2.to_" in key:
                value.data.mul_(8)
        return stable(folder, unet, transformers.CLIPTextModel(config), tokenizer)


def test_prompts_are_those_of_the_pipeline(spoken):
    net = Diffusion(
        str(spoken), steps=3, scheduler="DDIM", spacing=None, prompt="a id b", negative_prompt="c", guidance=4
    )
    z = noise(net, 2)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        spoken, safety_checker=None, feature_extractor=None, image_encoder=None
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    expected = pipeline(
        ["a id b"] * 2, negative_prompt=["c"] * 2, latents=z, num_inference_steps=3, guidance_scale=4, output_type="np"
    )
    torch.testing.assert_close(net.synthesize(z), pictures(expected), atol=0.02, rtol=0)


def test_a_word_of_the_prompt_stands_for_the_identity(spoken):
    """With a vector that is the word's own, nothing changes; with others, everything does."""
    contexts = Contexts(count=3, token="id", dim=8)
    net = Diffusion(str(spoken), steps=2, prompt="a id b", contexts=contexts)
    plain = Diffusion(str(spoken), steps=2, prompt="a id b")
    z = noise(net, 3)
    z[:, :-1] = z[0, :-1]
    faces = net.synthesize(z)
    assert (faces[0] - faces[1]).abs().max() > 0.1
    word = net.encoder.get_input_embeddings().weight[net.tokens[0, net.place]]
    net.vectors[1] = word
    own = net.synthesize(z)[1]
    torch.testing.assert_close(own, plain.synthesize(z[:1, :-1].view(1, 4, 8, 8))[0], atol=0.02, rtol=0)
    with pytest.raises(InputError, match="not one word that stands once"):
        Diffusion(str(spoken), steps=2, prompt="a b", contexts=contexts)
    with pytest.raises(InputError, match="give both or neither"):
        Diffusion(str(spoken), steps=2, contexts=contexts)


class TestHostile:
    @pytest.fixture
    def copy(self, folders, tmp_path):
        return shutil.copytree(folders / "ddpm", tmp_path / "pipeline")

    def change(self, path, **values):
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def test_code_beside_the_weights_is_not_run(self, copy):
        (copy / "unet" / "boom.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\n")
        self.change(copy / "model_index.json", unet=["boom", "Boom"])
        with pytest.raises(InputError, match=r"boom\.py.*not run.*trust_remote_code: true"):
            Diffusion(str(copy), steps=2)
        assert not (copy / "ran").exists()

    @pytest.mark.parametrize("entry", [["os", "system"], ["diffusers", "DiffusionPipeline"], "x", [1, 2, 3], None])
    def test_other_classes_are_not_looked_up(self, copy, entry):
        self.change(copy / "model_index.json", unet=entry)
        with pytest.raises(InputError, match="unet"):
            Diffusion(str(copy), steps=2)

    @pytest.mark.parametrize(
        ("values", "line"),
        [
            ({"layers_per_block": 10**9}, "layers_per_block is 1000000000"),
            ({"block_out_channels": [1 << 30, 1 << 30]}, "more than any network has"),
            ({"block_out_channels": [8] * 1000}, "too long"),
            ({"sample_size": [16, 8]}, "square"),
            ({"block_out_channels": [8, 32]}, "unet"),
            ({"class_embed_type": "timestep"}, "unet: the weights do not fit"),
        ],
    )
    def test_absurd_networks(self, copy, values, line):
        self.change(copy / "unet" / "config.json", **values)
        with pytest.raises(InputError, match=line):
            Diffusion(str(copy), steps=2)

    def test_absurd_schedules(self, copy):
        self.change(copy / "scheduler" / "scheduler_config.json", num_train_timesteps=10**12)
        with pytest.raises(InputError, match="num_train_timesteps"):
            Diffusion(str(copy), steps=2)

    def test_damaged_weights(self, copy):
        path = next((copy / "unet").glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(InputError, match="unet: not readable"):
            Diffusion(str(copy), steps=2)

    def test_pickled_weights_are_not_taken(self, copy):
        path = next((copy / "unet").glob("*.safetensors"))
        path.unlink()
        torch.save({}, copy / "unet" / "diffusion_pytorch_model.bin")
        with pytest.raises(InputError, match="unet: not readable"):
            Diffusion(str(copy), steps=2)

    @pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b"\xff"])
    def test_an_index_that_is_none(self, copy, content):
        (copy / "model_index.json").write_bytes(content)
        with pytest.raises(InputError, match=r"model_index\.json"):
            Diffusion(str(copy), steps=2)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"scheduler": "DPMSolver"}, "did you mean"),
        ({"scheduler": "os.system"}, "known are"),
        ({"scheduler_options": {"beta_strat": 1}}, "no 'beta_strat'; did you mean beta_start"),
        ({"scheduler": "DDPM", "eta": 0.5}, "eta is 0.5, which DDPMScheduler does not know"),
        ({"scheduler": "LCM", "steps": 900}, "LCMScheduler"),
        ({"steps": 0}, "steps is 0"),
        ({"eta": 2.0}, "eta is 2.0"),
        ({"contexts": Contexts(count=2)}, "is unconditional"),
        ({"guidance": 2.0}, "is unconditional"),
    ],
)
def test_bad_settings_are_one_line(folders, options, line):
    with pytest.raises(InputError, match=line) as caught:
        Diffusion(str(folders / "ddpm"), **{"steps": 2} | options)
    assert "\n" not in str(caught.value)


def test_other_sources_are_one_line(folders, tmp_path):
    with pytest.raises(InputError, match="no diffusers pipeline is here"):
        Diffusion(str(tmp_path))
    with pytest.raises(InputError, match="write hf-hub:google/ddpm-celebahq-256"):
        Diffusion("google/ddpm-celebahq-256")
    with pytest.raises(InputError, match="hf-hub:owner/name"):
        Diffusion("hf-hub:a/b/c")
    with pytest.raises(InputError, match="is conditioned; give contexts"):
        Diffusion(str(folders / "identities"))


def test_a_corpus_from_diffusion(folders, tmp_path):
    """Through the command: identities and latents in the rows, the same bytes from another number of processes."""

    def write(name, workers):
        arguments = ["--generator", "synth.generators.diffusion.Diffusion", "--generator.source"]
        arguments += [str(folders / "identities"), "--generator.steps", "2", "--generator.contexts.count", "5"]
        arguments += ["--output", str(tmp_path / name), "--count", "20", "--block", "8", "--batch", "4"]
        arguments += ["--align", "null", "--image_format", "png", "--workers", str(workers)]
        return generate(read_settings(arguments), progress=False)

    corpus = write("one", 0)
    assert corpus.column("identity").tolist() == [i % 5 for i in range(20)]
    net = Diffusion(str(folders / "identities"), steps=2, contexts=Contexts(count=5))
    assert (corpus.images(range(4)) - net.synthesize(corpus.latents(range(4)))).abs().max() <= 0.51
    assert corpus.manifest["generator"]["scheduler"] == "PNDMScheduler"
    assert "numbers the invented people" in (tmp_path / "one/DATASHEET.md").read_text()
    assert "diffusers" in corpus.manifest["versions"]
    again = write("two", 2)
    assert [s["sha256"] for s in again.shards] == [s["sha256"] for s in Corpus(tmp_path / "one").shards]
