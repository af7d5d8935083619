"""Diffusion models through ``diffusers``: initial noise, and for some an identity, to faces.

The folder of a pipeline is read part by part (network, decoder, scheduler, text encoder), each of a class that is named
here; the sampling loop is ours. So one class serves DDPM, DDIM, latent diffusion and Stable Diffusion, on batches, with
gradients, and with a scheduler chosen by name.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from faceless.errors import InputError, suggest
from faceless.files import read_json, sha256
from faceless.randomness import Rng
from synth.generators.base import Generator

# What is read from a pipeline's folder, and the classes that each part may be of.
PARTS = {
    "unet": ("UNet2DModel", "UNet2DConditionModel"),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "vqvae": ("VQModel",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
# One pass of the network and one step for each of its timesteps, whatever the scheduler does in between.
SCHEDULERS = (
    "DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "EulerAncestralDiscrete",
    "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "TCD",
    "UniPCMultistep",
)  # fmt: skip
# A sample's seed for noise on the way: two numbers, small enough to be whole in half precision.
SEEDS, SEED_VALUES = 2, 2048
MAX_CONTEXTS = 4 << 30  # bytes


@dataclass
class Contexts:
    """The vectors that stand for identities: rows of a parquet file, or points on the hypersphere.

    Args:
        file: parquet with a column of lists of equal length, one identity a row; null draws them.
        column: of that file.
        normalize: scale the rows to unit length, as the models here were trained. Whole sequences of tokens, the
            output of a text encoder, are to be left as they are.
        count: identities drawn; of a file, null takes all of its rows and a number the first so many.
        min_angle: degrees between any two of the identities drawn. Random directions in 512 dimensions lie more than 70
            apart by themselves.
        dim: of the vectors drawn; null for that of the network's cross-attention.
        seed: of the identities drawn.
        real: of a file, whether its vectors are embeddings of real people; null if that is not known. What a generator
            makes from a person's embedding shows that person; the record of the corpus and of the run says so.
        token: a word of ``prompt`` whose embedding is replaced by the identity's, padded with zeros (Arc2Face, arXiv
            2403.11641: ``id`` in ``photo of a id person``). Null gives the vectors to the network directly.
    """

    file: str | None = None
    column: str = "embedding"
    normalize: bool = True
    count: int | None = None
    min_angle: float = 60.0
    dim: int | None = None
    seed: int = 0
    real: bool | None = None
    token: str | None = None

    def __post_init__(self) -> None:
        if self.count is None and self.file is None:
            raise InputError("contexts.count is null; say how many identities to draw, or give contexts.file")
        if self.count is not None and not 1 <= self.count <= 1 << 24:
            raise InputError(f"contexts.count is {self.count}; it must be from 1 to {1 << 24}")
        if self.real and self.file is None:
            raise InputError("contexts.real is about a file's vectors; those drawn are nobody's")
        if not 0 <= self.min_angle < 180:
            raise InputError(f"contexts.min_angle is {self.min_angle}; it must be from 0 to 180 degrees")
        if self.dim is not None and not 2 <= self.dim <= 1 << 16:
            raise InputError(f"contexts.dim is {self.dim}; it must be from 2 to 65536")

    def origin(self) -> dict[str, Any]:
        """Whom the vectors stand for, for the record: people whom nobody invented, as far as anybody knows, or none."""
        if self.file is None:
            return {}
        return {"identities_from": {"file_sha256": sha256(self.file), "real": self.real}}

    def vectors(self, dim: int) -> Tensor:
        """``[K, D]`` float32; drawn ones have ``self.dim`` or else ``dim`` numbers."""
        if self.file is None:
            return spread(self.count or 1, self.dim or dim, self.min_angle, self.seed)
        rows = read_vectors(Path(self.file), self.column, self.count)
        return F.normalize(rows, dim=1) if self.normalize else rows


def spread(count: int, dim: int, min_angle: float, seed: int) -> Tensor:
    """``[count, dim]`` random points on the unit sphere, any two at least ``min_angle`` degrees apart.

    Uniform points are taken in turn unless they come too close to one that was taken before.

    Raises:
        InputError: so many do not fit, or chance does not find room for them.

    >>> points = spread(5, 3, 40.0, seed=0)
    >>> bool((points @ points.T - 2 * torch.eye(5)).max() <= math.cos(math.radians(40)))
    True
    """
    limit = math.cos(math.radians(min_angle))
    taken, fixed, drawn, portion = torch.empty(count, dim), 0, 0, 1024
    while fixed < count:
        if drawn >= 64 * (count + portion):
            raise InputError(
                f"contexts: no room for {count} identities in {dim} dimensions at {min_angle:g} degrees "
                f"({fixed} found); lower contexts.count or contexts.min_angle"
            )
        points = F.normalize(Rng.of(seed, "contexts", range(drawn, drawn + portion)).normal(dim), dim=1)
        drawn += portion
        if fixed:
            points = points[(points @ taken[:fixed].T).amax(1) <= limit]
        close = (points @ points.T > limit).triu(1)  # row: the earlier of the two
        free = torch.ones(len(points), dtype=torch.bool)
        for later in close.any(0).nonzero().flatten().tolist():
            free[later] = not (close[:, later] & free).any()
        points = points[free][: count - fixed]
        taken[fixed : fixed + len(points)] = points
        fixed += len(points)
    return taken


def read_vectors(path: Path, column: str, count: int | None = None) -> Tensor:
    """The first ``count`` rows of a parquet column of lists, ``[n, D]`` float32.

    Raises:
        InputError: no such file or column, lists of unequal lengths, numbers that are not finite, or too many of them.
    """
    try:
        file = pq.ParquetFile(path, memory_map=True)
        if column not in file.schema_arrow.names:
            raise InputError(f"{path}: there is no column {column!r}; it has {', '.join(file.schema_arrow.names)}")
        wanted = file.metadata.num_rows if count is None else count
        if wanted > file.metadata.num_rows or not wanted:
            raise InputError(f"{path}: {file.metadata.num_rows} rows; contexts.count asks for {count}")
        parts: list[Tensor] = []
        missing, numbers = wanted, 0
        for batch in file.iter_batches(1024, columns=[column]):
            rows = batch.column(0).slice(0, missing)
            lists = rows.flatten()
            numbers += 4 * len(lists)
            if rows.null_count or len(lists) % len(rows) or numbers > MAX_CONTEXTS:
                raise InputError(f"{path}: column {column!r} holds too much, or lists of unequal length, or none")
            sizes = (
                rows.value_lengths().unique() if not pa.types.is_fixed_size_list(rows.type) else [rows.type.list_size]
            )
            if len(sizes) != 1:
                raise InputError(f"{path}: column {column!r} holds lists of unequal length")
            values = torch.from_numpy(lists.to_numpy(zero_copy_only=False).astype("float32"))
            parts.append(values.view(len(rows), -1))
            missing -= len(rows)
            if not missing:
                break
        vectors = torch.cat(parts)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file of identities") from error
    except (pa.ArrowException, OSError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path}: column {column!r} is not readable as lists of numbers ({error})") from error
    if not vectors.numel() or not vectors.isfinite().all():
        raise InputError(f"{path}: column {column!r} holds numbers that are not finite, or none")
    return vectors


class Diffusion(Generator):
    """A diffusion model from the folder of a ``diffusers`` pipeline.

    The latent is the initial noise. Where the scheduler asks for more noise on the way (DDPM, Euler ancestral, LCM), it
    is followed by two whole numbers, the sample's seed: each step gets the initial noise with its numbers in another
    order and with signs drawn from that seed. So faces depend on their latent alone, on any batch split, without a
    random state, and near latents give near faces with those schedulers too, which unrelated noise would not. Where the
    pipeline is conditioned on identities, one last number says which: candidate i of a corpus shows identity i modulo
    their count. `perturb` keeps seed and identity.

    Args:
        source: a local folder, or ``hf-hub:owner/name`` (``@revision`` pins it).
        scheduler: class name with or without ``Scheduler``, such as ``DDIM``, ``DPMSolverMultistep`` or ``LCM``; null
            takes the pipeline's own.
        steps: passes of the network, 2 to 4 for LCM, 20 to 50 for DPMSolverMultistep or DDIM, 1000 for DDPM.
        spacing: of the timesteps; ``trailing`` begins at pure noise with however few steps, ``leading``, what many
            pipelines say, does not (Lin et al., arXiv 2305.08891). Null takes the pipeline's own.
        scheduler_options: further constructor arguments of the scheduler.
        eta: noise added by DDIM, 0 to 1.
        prompt, negative_prompt: for a pipeline with a text encoder (needs ``transformers``).
        guidance: weight w of the conditional prediction, ``uncond + w (cond - uncond)`` (Ho and Salimans, arXiv
            2207.12598). The unconditional one sees the negative prompt, or zeros where there is no text encoder.
        contexts: the identities of a pipeline that is conditioned on embeddings.
        dtype: of the networks. Noise and scheduler stay in float32.
        trust_remote_code: let ``diffusers`` run Python files that come with the pipeline. Without it, such a pipeline
            is refused. Settings can only say so on the command line.

    Shape:
        latents ``[B, C, H, W]`` of standard normal numbers, or ``[B, C * H * W + 1 to 3]`` with seeds or identities;
        faces ``[B, 3, face_size, face_size]``.

    Raises:
        InputError: no such pipeline, one of an unknown kind, damaged or with code in it; an unknown scheduler.
    """

    packages = ("diffusers", "transformers")
    text: Tensor | None
    text_empty: Tensor | None
    vectors: Tensor | None
    tokens: Tensor

    def __init__(
        self,
        source: str,
        *,
        scheduler: str | None = None,
        steps: int = 50,
        spacing: Literal["trailing", "leading", "linspace"] | None = "trailing",
        scheduler_options: dict[str, Any] | None = None,
        eta: float = 0.0,
        prompt: str | None = None,
        negative_prompt: str = "",
        guidance: float = 1.0,
        contexts: Contexts | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        trust_remote_code: bool = False,
    ):
        super().__init__()
        if not 1 <= steps <= 10_000:
            raise InputError(f"steps is {steps}; it must be from 1 to 10000")
        if not 0 <= eta <= 1:
            raise InputError(f"eta is {eta}; it must be from 0 to 1")
        self.steps, self.eta, self.guidance, self.dtype = steps, eta, guidance, getattr(torch, dtype)
        folder = find(source, text=prompt is not None, code=trust_remote_code)
        parts = read_parts(folder, text=prompt is not None, trust_remote_code=trust_remote_code)
        self.unet: Any = parts["unet"]
        self.decoder: Any = parts.get("vae", parts.get("vqvae"))
        if self.dtype != torch.float32:
            with quiet():
                self.unet.to(self.dtype)
                self.decoder is None or self.decoder.to(self.dtype)
        self._scheduler = scheduler_class(folder, scheduler)
        self._schedule_config = scheduler_config(folder, self._scheduler, spacing, scheduler_options or {})
        config = self.unet.config
        self.noise_shape = noise_shape(source, config, self.decoder)
        self.face_size = self.noise_shape[1] * (1 if self.decoder is None else decoder_factor(self.decoder))
        self._condition(source, parts, prompt, negative_prompt, contexts)
        self.count = math.prod(self.noise_shape)
        self.seeds = SEEDS if self.draws() else 0
        behind = self.seeds + bool(self.identities)
        self.latent_shape = (self.count + behind,) if behind else self.noise_shape
        self.continuous = not behind
        self.licence = licence(folder)
        self._record = {
            "weights_sha256": digest(folder, [name for name in PARTS if name in parts]),
            "scheduler": self._scheduler.__name__,
            "steps": steps,
        } | ({} if contexts is None else contexts.origin())
        self.eval().requires_grad_(False)

    def _condition(
        self, source: str, parts: dict[str, Any], prompt: str | None, negative_prompt: str, contexts: Contexts | None
    ) -> None:
        """Set up what the network is told besides noise and time: classes, text, embeddings, or nothing."""
        config = self.unet.config
        self.identities = config.get("num_class_embeds") or 0
        width = config.get("encoder_hid_dim") or config.get("cross_attention_dim")
        self.crossed = type(self.unet).__name__ == "UNet2DConditionModel"
        if config.get("addition_embed_type") or config.get("class_embed_type"):
            raise InputError(f"{source}: a network conditioned on more than text, embeddings or class numbers")
        if self.crossed and isinstance(width, (list, tuple)):
            if len(set(width)) != 1:
                raise InputError(f"{source}: a network whose blocks attend to vectors of several sizes")
            width = width[0]
        self.encoder: Any = None
        self.place = -1  # of the token that is an identity
        for name in ("text", "text_empty", "vectors"):
            self.register_buffer(name, None)
        if not self.crossed:
            if prompt is not None or contexts is not None or self.guidance != 1:
                raise InputError(f"{source}: is unconditional; leave out prompt, contexts and guidance")
            return
        if prompt is None and contexts is None:
            raise InputError(f"{source}: is conditioned; give contexts (identities), a prompt, or both")
        if contexts is not None:
            if (contexts.token is None) == (prompt is not None):
                raise InputError("contexts.token names a word of prompt: give both or neither")
            self.vectors = contexts.vectors(int(width))
            self.identities = len(self.vectors)
        if prompt is not None:
            self._read_text(source, parts, prompt, negative_prompt, contexts)
        elif self.vectors is not None:
            if self.vectors.shape[1] % width:
                raise InputError(
                    f"contexts: vectors of {self.vectors.shape[1]} numbers; {source} attends to vectors of {width}"
                )
            self.vectors = self.vectors.unflatten(1, (-1, width))

    def _read_text(
        self, source: str, parts: dict[str, Any], prompt: str, negative_prompt: str, contexts: Contexts | None
    ) -> None:
        encoder, tokenizer = parts["text_encoder"], parts["tokenizer"]
        length = encoder.config.max_position_embeddings
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        tokens = tokenizer([prompt, negative_prompt], **options).input_ids
        with torch.inference_mode():
            text, empty = encoder(tokens)[0].clone().split(1)
        self.text_empty = empty.clone()
        if contexts is None or self.vectors is None:
            self.text = text.clone()
            return
        word = tokenizer.encode(contexts.token, add_special_tokens=False)
        places = (tokens[0] == word[0]).nonzero().flatten().tolist() if len(word) == 1 else []
        if len(places) != 1:
            raise InputError(f"contexts.token {contexts.token!r} is not one word that stands once in prompt {prompt!r}")
        hidden = encoder.get_input_embeddings().embedding_dim
        if self.vectors.shape[1] > hidden:
            raise InputError(f"contexts: {self.vectors.shape[1]} numbers do not fit a token of {hidden} of {source}")
        self.vectors = F.pad(self.vectors, (0, hidden - self.vectors.shape[1]))
        self.encoder, self.place = encoder.to(self.dtype), places[0]
        self.register_buffer("tokens", tokens[:1])

    def schedule(self) -> Any:
        """A scheduler at its first step; schedulers remember the steps before, so each batch has its own."""
        try:
            scheduler = self._scheduler.from_config(self._schedule_config)
            # Timesteps and coefficients stay on the CPU: looking one up never waits for an accelerator.
            scheduler.set_timesteps(self.steps)
        except (ValueError, TypeError, NotImplementedError, AttributeError, IndexError, RuntimeError) as error:
            raise InputError(f"scheduler {self._scheduler.__name__}: {error}") from error
        if self.eta and "eta" not in inspect.signature(scheduler.step).parameters:
            raise InputError(f"eta is {self.eta}, which {self._scheduler.__name__} does not know; leave it out")
        return scheduler

    def draws(self) -> int:
        """How often the scheduler asks for noise on the way, found by a trial on one number."""
        scheduler, sample = self.schedule(), torch.zeros(1, 1, 1, 1)
        with Draws(sample, None) as drawn:
            for time in scheduler.timesteps:
                sample = self._step(scheduler, sample, time, sample)
        return drawn.count

    def _step(self, scheduler: Any, predicted: Tensor, time: Tensor, sample: Tensor) -> Tensor:
        return scheduler.step(predicted, time, sample, **({"eta": self.eta} if self.eta else {})).prev_sample

    def sample_latents(self, n: int, rng: Rng) -> Tensor:
        if len(rng) != n:
            raise ValueError(f"{n} latents from random numbers for {len(rng)} samples")
        parts = [rng.normal(self.count)]
        if self.seeds:
            parts.append(rng.child("seed").integers(SEED_VALUES, self.seeds).float())
        if self.identities:
            parts.append((rng.indices % self.identities).float()[:, None])
        return torch.cat(parts, 1).view(n, *self.latent_shape)

    def identity(self, latents: Tensor) -> Tensor | None:
        return latents[:, -1].round().long() if self.identities else None

    def perturb(self, latents: Tensor, scale: Tensor, rng: Rng) -> Tensor:
        """Spherical interpolation (Shoemake, SIGGRAPH 1985) to other noise: 0 keeps, 1 replaces, more is taken as 1.

        In between, the noise stays as long as noise is, which linear interpolation would shorten. Identities stay.
        """
        noise, behind = latents.flatten(1).split((self.count, latents[0].numel() - self.count), 1)
        other = rng.normal(noise.shape[1]).to(noise)
        part = scale.to(noise).clamp(0, 1)[:, None]
        angle = torch.acos((F.normalize(noise, dim=1) * F.normalize(other, dim=1)).sum(1, keepdim=True).clamp(-1, 1))
        sine = angle.sin()
        # Parallel vectors have no plane to turn in; a straight line does the same there.
        straight = sine < 1e-4
        sine = sine.masked_fill(straight, 1)
        keep = torch.where(straight, 1 - part, ((1 - part) * angle).sin() / sine)
        take = torch.where(straight, part, (part * angle).sin() / sine)
        return torch.cat((keep * noise + take * other, behind), 1).view_as(latents)

    def synthesize(self, latents: Tensor) -> Tensor:
        identity = self.identity(latents)
        flat = latents.flatten(1).float()
        noise = flat[:, : self.count].reshape(-1, *self.noise_shape)
        seed = flat[:, self.count : self.count + self.seeds].round().long() if self.seeds else None
        told = self._told(len(noise), identity)
        twice = self.crossed and self.guidance != 1 and not self.unet.config.get("time_cond_proj_dim")
        scheduler = self.schedule()
        sample = noise * scheduler.init_noise_sigma
        draws = Draws(noise, seed)
        for time in scheduler.timesteps:
            seen = scheduler.scale_model_input(sample, time).to(self.dtype)
            if twice:
                seen = torch.cat((seen, seen))
            predicted = self.unet(seen, time, **told).sample.float()
            if twice:
                without, with_it = predicted.chunk(2)
                predicted = without + self.guidance * (with_it - without)
            with draws:
                sample = self._step(scheduler, predicted, time, sample)
        if self.decoder is not None:
            scaled = sample / self.decoder.config.scaling_factor + (self.decoder.config.get("shift_factor") or 0)
            sample = self.decoder.decode(scaled.to(self.dtype)).sample.float()
        return (sample * 127.5 + 127.5).clamp(0, 255)

    def _told(self, count: int, identity: Tensor | None) -> dict[str, Tensor]:
        """What the network is told besides noise and time."""
        if not self.crossed:
            return {} if identity is None else {"class_labels": identity}
        if self.encoder is not None and self.vectors is not None and identity is not None:
            context = self._encode(self.vectors[identity].to(self.dtype))
        elif self.vectors is not None and identity is not None:
            context = self.vectors[identity]
        else:
            assert self.text is not None
            context = self.text.expand(count, -1, -1)
        width = self.unet.config.get("time_cond_proj_dim")
        if width:
            # Distilled with guidance: its weight is told instead of applied (Meng et al., arXiv 2210.03142).
            rates = torch.exp(torch.arange(width // 2, device=context.device) * (-math.log(1e4) / (width // 2 - 1)))
            angles = (self.guidance - 1) * 1000 * rates
            embedded = F.pad(torch.cat((angles.sin(), angles.cos())), (0, width % 2))
            told = {"timestep_cond": embedded.to(self.dtype).expand(count, -1)}
        else:
            told = {}
            if self.guidance != 1:
                empty = torch.zeros_like(context) if self.text_empty is None else self.text_empty.expand_as(context)
                context = torch.cat((empty, context))
        return told | {"encoder_hidden_states": context.to(self.dtype)}

    def _encode(self, vectors: Tensor) -> Tensor:
        """Text of which one token is an identity's vector, ``[B, width]`` to ``[B, tokens, width]``."""

        def replace(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return torch.cat((output[:, : self.place], vectors[:, None], output[:, self.place + 1 :]), 1)

        hook = self.encoder.get_input_embeddings().register_forward_hook(replace)
        try:
            text: Tensor = self.encoder(self.tokens.expand(len(vectors), -1))[0]
            return text
        finally:
            hook.remove()

    def provenance(self) -> dict[str, Any]:
        record = super().provenance() | self._record
        if self.vectors is not None:
            vectors = self.vectors.detach().float().cpu().contiguous().numpy().tobytes()
            record |= {"identities": self.identities, "contexts_sha256": hashlib.sha256(vectors).hexdigest()}
        return record


class Draws(TorchFunctionMode):
    """While active, ``torch.randn`` gives the next rearrangement of some noise instead of drawing.

    Schedulers draw their noise by themselves, from a generator with a state. The order of the numbers is the same for
    all samples, their signs are each sample's own: so each rearrangement is standard normal and uncorrelated with the
    noise and with all others.

    Args:
        noise: ``[B, ...]``.
        seed: ``[B, 2]`` int64 in 0..2047; None for the noise as it is.

    Attributes:
        count: rearrangements given so far.
    """

    def __init__(self, noise: Tensor, seed: Tensor | None):
        super().__init__()
        self.noise, self.count = noise, 0
        self.seed = None if seed is None else seed[:, 0] * SEED_VALUES + seed[:, 1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.randn, torch.randn_like):
            return func(*args, **(kwargs or {}))
        shape = args[0].shape if func is torch.randn_like else torch.Size(args[0])
        if shape != self.noise.shape:
            raise RuntimeError(f"a scheduler draws noise of shape {list(shape)} for {list(self.noise.shape)}")
        step, self.count = self.count, self.count + 1
        if self.seed is None:
            return self.noise
        flat = self.noise.flatten(1)
        places = torch.arange(flat.shape[1], device=flat.device)
        bits = Rng.of(0, "diffusion/order", places, step).bits(2)
        order = torch.argsort((bits[:, 0] << 31) ^ bits[:, 1], stable=True)
        words = Rng.of(0, "diffusion/signs", self.seed, step).bits(-(-flat.shape[1] // 32))
        signs = words[:, :, None] >> torch.arange(32, device=flat.device) & 1
        return (flat[:, order] * (1 - 2 * signs.flatten(1)[:, : flat.shape[1]]).to(flat)).view(shape)


def find(source: str, *, text: bool, code: bool) -> Path:
    """The folder of a pipeline, fetched from the hub if it is named there: only the files that are read."""
    if not source.startswith("hf-hub:"):
        if not (Path(source) / "model_index.json").is_file():
            hint = f"; for the hub write hf-hub:{source}" if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) else ""
            raise InputError(f"{source}: no diffusers pipeline is here (no model_index.json){hint}")
        return Path(source)
    import huggingface_hub

    match = re.fullmatch(r"hf-hub:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if match is None:
        raise InputError(f"{source}: write hf-hub:owner/name, or hf-hub:owner/name@revision")
    folders = ["unet", "vae", "vqvae", "scheduler"] + (["text_encoder", "tokenizer"] if text else [])
    wanted = ["model_index.json", "README.md", *(f"{name}/*.{end}" for name in folders for end in ("json", "txt"))]
    wanted += [f"{name}/*.safetensors" for name in folders] + ["*.py"]
    refused = ["*.fp16.*", "*.non_ema.*"]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                match[1], revision=match[2], allow_patterns=wanted, ignore_patterns=refused
            )
        )
    except Exception as error:  # its own errors, those of the HTTP library below it, OSError, ValueError
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{source}: could not be fetched from the hub ({lines[0]})") from error


def read_parts(folder: Path, *, text: bool, trust_remote_code: bool) -> dict[str, Any]:
    """Network, decoder and, with ``text``, text encoder and tokenizer; nothing in the folder is executed.

    Raises:
        InputError: a part is missing, damaged, of a class that is not in `PARTS`, or code lies beside it.
    """
    index = described(folder / "model_index.json")
    if trust_remote_code:
        return run_remote_code(folder, text)
    if code := next(folder.rglob("*.py"), None):
        raise InputError(
            f"{code}: the pipeline comes with code of its own, which is not run; "
            "read it, and if you trust it say trust_remote_code: true, on the command line"
        )
    present = {name: entry for name, entry in index.items() if name in PARTS and entry not in (None, [None, None])}
    for name in ("unet", *(("text_encoder", "tokenizer") if text else ())):
        if name not in present:
            raise InputError(f"{folder}: a pipeline without {name} (model_index.json)")
    wanted = [name for name in present if text or name not in ("text_encoder", "tokenizer")]
    return {name: read_part(folder, name, present[name]) for name in wanted}


def read_part(folder: Path, name: str, entry: Any) -> Any:
    library, kind = entry if isinstance(entry, list) and len(entry) == 2 else (None, entry)
    home = "transformers" if name in ("text_encoder", "tokenizer") else "diffusers"
    if library != home or kind not in PARTS[name]:
        raise InputError(f"{folder}: {name} is {library}.{kind}; this reads {home}'s {' and '.join(PARTS[name])}")
    if name != "tokenizer":
        bounded(folder / name / "config.json")
    module = _library(home)
    options: dict[str, Any] = {"local_files_only": True}
    if name != "tokenizer":
        options |= {"use_safetensors": True, "output_loading_info": True}
    try:
        with quiet():
            read = getattr(module, kind).from_pretrained(str(folder / name), **options)
    except Exception as error:  # many types, for damaged and for hostile files
        first = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"{folder / name}: not readable ({type(error).__name__}: {first})") from error
    if name == "tokenizer":
        return read
    part, info = read
    # Positions are counted, not learned; some checkpoints hold them and some do not.
    missing = [key for key in info["missing_keys"] if not key.endswith("position_ids")]
    if missing or info["mismatched_keys"]:
        raise InputError(
            f"{folder / name}: the weights do not fit config.json ({(*missing, *info['mismatched_keys'])[0]})"
        )
    return part


def run_remote_code(folder: Path, text: bool) -> dict[str, Any]:
    """The parts as the pipeline's own code makes them. Called only when the user wrote ``trust_remote_code: true``."""
    options = {} if text else {"text_encoder": None, "tokenizer": None}
    try:
        pipeline = _library("diffusers").DiffusionPipeline.from_pretrained(
            str(folder), trust_remote_code=True, local_files_only=True, use_safetensors=True, **options
        )
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"{folder}: not readable ({type(error).__name__}: {first})") from error
    parts = {name: part for name, part in pipeline.components.items() if name in PARTS and part is not None}
    if "unet" not in parts:
        raise InputError(f"{folder}: a pipeline without unet")
    return parts


def _library(name: str) -> Any:
    os.environ.setdefault("DIFFUSERS_DISABLE_TELEMETRY", "1")
    try:
        return __import__(name)
    except ImportError as error:
        raise InputError(f"{name} is not installed; install faceless-distill[text], or give no prompt") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and notices of the libraries that read weights."""
    import diffusers

    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(level)
        diffusers.utils.logging.enable_progress_bar()


def scheduler_class(folder: Path, name: str | None) -> Any:
    """The scheduler class of a name, or that of the pipeline."""
    if name is None:
        entry = described(folder / "model_index.json").get("scheduler")
        own = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        name = str(own)
    short = name.removesuffix("Scheduler")
    if short not in SCHEDULERS:
        raise InputError(f"scheduler {name!r} is not one that is known here; {suggest(short, SCHEDULERS)}")
    return getattr(_library("diffusers"), f"{short}Scheduler")


def scheduler_config(folder: Path, scheduler: Any, spacing: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The pipeline's settings of its scheduler, with the user's."""
    known = inspect.signature(scheduler.__init__).parameters
    for key in options:
        if key not in known:
            raise InputError(f"scheduler_options: {scheduler.__name__} has no {key!r}; {suggest(key, known)}")
    if spacing is not None and "timestep_spacing" in known:
        options = {"timestep_spacing": spacing} | options
    return bounded(folder / "scheduler" / "scheduler_config.json") | options


def noise_shape(source: str, config: Any, decoder: Any) -> tuple[int, int, int]:
    side = config.sample_size
    sides = set(side) if isinstance(side, (list, tuple)) else {side}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int):
        raise InputError(f"{source}: faces are square, sample_size is {config.sample_size}")
    channels = config.in_channels
    expected = 3 if decoder is None else decoder.config.latent_channels
    if config.out_channels != channels or channels != expected:
        raise InputError(
            f"{source}: a network from {channels} to {config.out_channels} channels; expected {expected} to {expected}"
        )
    return channels, side, side


def decoder_factor(decoder: Any) -> int:
    """How many times larger than its input a decoder's picture is."""
    config = decoder.config
    stages = config.get("block_out_channels") or config.decoder_block_out_channels
    return 2 ** (len(stages) - 1)


def described(path: Path) -> dict[str, Any]:
    """What a pipeline's file says of it.

    Raises:
        InputError: missing, too large, or no JSON object.
    """
    if not path.is_file():
        raise InputError(f"{path}: missing; this is not the whole folder of a pipeline")
    return read_json(path)


def bounded(path: Path) -> dict[str, Any]:
    """A part's description with numbers that some network may have: a stranger's could ask for a billion layers."""
    config = described(path)

    def check(key: str, value: Any, depth: int = 0) -> None:
        if depth > 4 or (isinstance(value, (list, tuple)) and key != "trained_betas" and len(value) > 64):
            raise InputError(f"{path}: {key} is nested too deep or too long")
        if isinstance(value, list):
            for item in value[:100_000]:
                check(key, item, depth + 1)
        elif isinstance(value, dict):
            for name, item in value.items():
                check(f"{key}.{name}", item, depth + 1)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            most = 64 if "layers" in key else 1 << 20
            if not -1e6 <= value <= (most if isinstance(value, int) else 1e6):
                raise InputError(f"{path}: {key} is {value}, more than any network has")

    for key, value in config.items():
        check(key, value)
    return config


def digest(folder: Path, names: list[str]) -> str:
    """SHA-256 of what ``sha256sum`` prints for the files of these parts and of the scheduler, by name."""
    files = sorted(
        path.relative_to(folder).as_posix()
        for name in (*names, "scheduler")
        for path in (folder / name).glob("*")
        if path.suffix in (".safetensors", ".json", ".txt") and path.is_file()
    )
    lines = "".join(f"{sha256(folder / name)}  {name}\n" for name in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def licence(folder: Path) -> str:
    """What the model card says, ``unknown`` without one."""
    card = folder / "README.md"
    try:
        text = card.read_text(encoding="utf-8")[:65536]
        head = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
        return str(head["license"])[:100] if isinstance(head, dict) and "license" in head else "unknown"
    except (OSError, ValueError, yaml.YAMLError, IndexError):
        return "unknown"
