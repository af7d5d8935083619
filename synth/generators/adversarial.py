"""Generators that are trained against a teacher (and a student), without data; and pictures inverted through them.

One set of terms makes up the published methods; the recipes name their weights. Everything asks a recognizer for
categories, so that it serves embedding teachers and classifiers: see `Categories`.

Sources: DAFL (Chen et al., ICCV 2019), DFAD (Fang et al., arXiv 1912.11006), ZSKT (Micaelli, Storkey, NeurIPS 2019),
DFQ (Choi et al., CVPRW 2020), CMI (Fang et al., IJCAI 2021), FastDFKD (Fang et al., AAAI 2022), SSD-KD (Liu et al.,
CVPR 2024); weights as in zju-vipa/Fast-Datafree where a paper leaves them open.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceless.errors import InputError
from faceless.randomness import Rng
from faceless.recognizer import Output, Recognizer
from synth.inversion.base import Synthesizer, answers, check_comparable
from synth.inversion.statistics import BatchStatistics, layers
from synth.inversion.targets import center


class ConvGenerator(nn.Module):
    """Latents to pictures: a linear layer, then twice up and convolved (DAFL's generator).

    Batch normalization takes the statistics of the batch at hand, always: the networks it feeds are asked about batches
    too, and averages of a generator that changes at every step would lag behind.

    Args:
        latent_dim: z dimension.
        classes: if not 0, a class label goes in beside the latent, as a one-hot vector.
        channels: of the last hidden layer.
        face_size: side in pixels, a multiple of 4.
        seed: of the initial weights.

    Shape:
        latents ``[B, latent_dim]`` and labels ``[B]`` int64; pictures ``[B, 3, face_size, face_size]`` in 0..255.
    """

    def __init__(
        self, *, latent_dim: int = 256, classes: int = 0, channels: int = 64, face_size: int = 112, seed: int = 0
    ):
        super().__init__()
        if face_size % 4 or not 8 <= face_size <= 1024:
            raise InputError(f"face_size is {face_size}; it must be a multiple of 4 from 8 to 1024")
        self.latent_dim, self.classes, self.face_size = latent_dim, classes, face_size
        norm = lambda width: nn.BatchNorm2d(width, track_running_stats=False)  # noqa: E731
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            self.start = nn.Linear(latent_dim + classes, 2 * channels * (face_size // 4) ** 2)
            self.main = nn.Sequential(
                nn.Unflatten(1, (2 * channels, face_size // 4, face_size // 4)),
                norm(2 * channels),
                nn.Upsample(scale_factor=2),
                nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, bias=False),
                norm(2 * channels),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Upsample(scale_factor=2),
                nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False),
                norm(channels),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Conv2d(channels, 3, 3, padding=1),
                nn.Sigmoid(),
            )

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is not None and self.classes:
            latents = torch.cat([latents, F.one_hot(labels, self.classes).to(latents)], 1)
        return self.main(self.start(latents)) * 255


class Categories(nn.Module):
    """What a recognizer takes a face for, as logits: its own, or the cosines of its embedding with fixed directions.

    Args:
        directions: K, for a teacher without logits; uniform on the sphere around its mean embedding.
        scale: of the cosines.
        seed: of the directions.
    """

    anchors: Tensor
    middle: Tensor

    def __init__(self, teacher: Recognizer, *, directions: int = 1000, scale: float = 64.0, seed: int = 0):
        super().__init__()
        logits = answers(teacher).logits
        self.count = directions if logits is None else logits.shape[1]
        anchors = F.normalize(Rng.of(seed, "directions", range(directions)).normal(teacher.embedding_dim))
        self.register_buffer("anchors", (anchors * scale).to(teacher.scale.device), persistent=False)
        self.register_buffer("middle", center(teacher), persistent=False)

    def forward(self, seen: Output) -> Tensor:
        if seen.logits is not None:
            return seen.logits
        return F.normalize(seen.embedding - self.middle) @ self.anchors.T


def negative_entropy(logits: Tensor) -> Tensor:
    """Mean over faces of ``sum p log p``: small where the teacher cannot decide."""
    return (F.softmax(logits, 1) * F.log_softmax(logits, 1)).sum(1).mean()


def imbalance(logits: Tensor) -> Tensor:
    """``sum q log q`` of the mean q of the batch's probabilities: small where categories are equally frequent."""
    q = F.softmax(logits, 1).mean(0)
    return torch.special.xlogy(q, q).sum()


def alikeness(student: Output, teacher: Output, kind: str, agreed: Tensor | None = None) -> Tensor:
    """How alike student and teacher judge, to be made small by a generator.

    Args:
        kind: ``kl``: minus KL(teacher, student) of the logits; ``l1``: minus their mean absolute difference, without
            logits that of the embeddings; ``cosine``, and ``kl`` without logits: the embeddings' cosine, less one.
        agreed: ``[B]``: count only faces whose category both agree on (CMI, FastDFKD).
    """
    if kind == "cosine" or student.logits is None or teacher.logits is None:
        a, b = student.embedding, teacher.embedding
        each = -(a - b).abs().mean(1) if kind == "l1" else F.cosine_similarity(a, b) - 1
    elif kind == "l1":
        each = -(student.logits - teacher.logits).abs().mean(1)
    else:
        p, q = F.log_softmax(teacher.logits, 1), F.log_softmax(student.logits, 1)
        each = -(p.exp() * (p - q)).sum(1)
    return (each if agreed is None else each * agreed).mean()


class Contrast(nn.Module):
    """Each face is to be told from all earlier ones by what the teacher's layers see of it (CMI, equation 6).

    Args:
        features: sum of the channels of the layers, from `BatchStatistics.features`.
        dim: of the trained projection; hidden layer as wide.
        size: of the memory of earlier faces, ``negatives`` of which are compared with at a time.
        temperature: divides the cosines.
    """

    bank: Tensor
    filled: Tensor

    def __init__(
        self, features: int, *, dim: int = 256, size: int = 4096, negatives: int = 1024, temperature: float = 0.2
    ):
        super().__init__()
        self.negatives, self.temperature = negatives, temperature
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(0)
            self.head = nn.Sequential(nn.Linear(features, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.register_buffer("bank", torch.zeros(size, 2, features))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def forward(self, local: Tensor, whole: Tensor, rng: Rng) -> Tensor:
        """InfoNCE of two views ``[B, features]`` of the same faces, against each other and the memory.

        As published, remembered faces are anchors as well.
        """
        held = min(int(self.filled), len(self.bank))
        chosen = rng.rows(slice(0, 1)).child("negatives").bits(held)[0].argsort()[: self.negatives].to(local.device)
        remembered = self.bank[chosen]
        a = F.normalize(self.head(torch.cat([local, remembered[:, 0]])))
        b = F.normalize(self.head(torch.cat([whole, remembered[:, 1]])))
        logits = a @ b.detach().T / self.temperature
        each = F.cross_entropy(logits, torch.arange(len(a), device=a.device), reduction="none")
        return each[: len(local)].mean() + (each[len(local) :].mean() if held else 0.0)

    @torch.no_grad()
    def push(self, local: Tensor, whole: Tensor) -> None:
        places = (self.filled + torch.arange(len(local), device=local.device)) % len(self.bank)
        self.bank[places] = torch.stack([local, whole], 1)
        self.filled += len(local)


class Adversarial(Synthesizer):
    """A generator whose pictures are judged by a weighted sum of terms.

    Args:
        latent_dim, channels, face_size: of the generator; ``face_size`` None takes the teacher's.
        conditional: the generator is told the category that it is to make.
        directions, scale: see `Categories`.
        statistics, momentum: weight of `BatchStatistics.distance`, and its running average.
        category: of the cross-entropy with the category that was drawn (or, with none, that the teacher leans to).
        activation: of minus the mean absolute embedding: real faces excite a network more than noise.
        balance: of `imbalance`.
        entropy: of `negative_entropy`: maximum-entropy methods seek what the teacher cannot decide.
        adversarial: of `alikeness`, of the kind ``divergence``; with ``agreeing``, of faces whose category student and
            teacher agree on.
        warmup: rounds before the adversarial term sets in.
        seed: of the initial weights.
    """

    networks: tuple[Recognizer, Recognizer | None]

    def __init__(
        self,
        *,
        latent_dim: int = 256,
        channels: int = 64,
        face_size: int | None = None,
        conditional: bool = False,
        directions: int = 1000,
        scale: float = 64.0,
        statistics: float = 0.0,
        momentum: float = 0.0,
        category: float = 0.0,
        activation: float = 0.0,
        balance: float = 0.0,
        entropy: float = 0.0,
        adversarial: float = 0.0,
        divergence: Literal["kl", "l1", "cosine"] = "kl",
        agreeing: bool = False,
        warmup: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        if conditional and not category:
            raise InputError("conditional needs category: a generator that is told a category must be held to it")
        if min(latent_dim, channels) < 1 or directions < 2 or scale <= 0 or not 0 <= momentum < 1:
            raise InputError(
                "latent_dim and channels must be at least 1, directions at least 2, scale positive, momentum below 1"
            )
        self.latent_dim, self.channels, self.face_size, self.seed = latent_dim, channels, face_size, seed
        self.conditional, self.directions, self.scale = conditional, directions, scale
        self.weights = {
            "statistics": statistics,
            "category": category,
            "activation": activation,
            "balance": balance,
            "entropy": entropy,
            "adversarial": adversarial,
        }
        self.momentum, self.divergence, self.agreeing, self.warmup = momentum, divergence, agreeing, warmup
        self.competes = bool(adversarial)

    def begin(self, teacher: Recognizer, student: Recognizer | None, name: str) -> None:
        if self.weights["adversarial"]:
            if student is None:
                raise InputError("adversarial is not 0, which needs a student")
            check_comparable(student, teacher, by_logits=self.divergence != "cosine")
            if self.agreeing and (answers(student).logits is None) != (answers(teacher).logits is None):
                raise InputError("agreeing compares categories: student and teacher need logits both, or neither")
        if not (any(self.weights.values()) or self.uses_statistics):
            raise InputError(f"all weights of {type(self).__name__} are 0: set category, statistics or another")
        # In a tuple: the networks are not part of this module, and its state does not hold them.
        self.networks = teacher, student
        device = teacher.scale.device
        found = layers(teacher, name) if self.uses_statistics else []
        self.statistics = BatchStatistics(found, momentum=self.momentum, first=1.0)
        self.categories = Categories(teacher, directions=self.directions, scale=self.scale, seed=self.seed)
        self.generator = ConvGenerator(
            latent_dim=self.latent_dim,
            classes=self.categories.count if self.conditional else 0,
            channels=self.channels,
            face_size=self.face_size or teacher.spec.height,
            seed=self.seed,
        ).to(device)

    @property
    def uses_statistics(self) -> bool:
        return bool(self.weights["statistics"])

    def importance(self, logits: Tensor, target: Tensor) -> Tensor:
        """Weights ``[B]`` of the faces in the category term."""
        return torch.ones(len(target), device=target.device)

    def drawn_category(self, rng: Rng) -> Tensor:
        return rng.child("category").integers(self.categories.count).to(self.device)

    @property
    def device(self) -> torch.device:
        return self.networks[0].scale.device

    def loss(self, images: Tensor, number: int, target: Tensor | None = None) -> Tensor:
        """The weighted terms of pictures ``[B, 3, S, S]`` that should be of categories ``target [B]``, a scalar."""
        teacher, student = self.networks
        weights = self.weights
        seen = teacher(images)
        logits = self.categories(seen)
        loss = images.new_zeros(())
        if weights["statistics"]:
            loss = loss + weights["statistics"] * self.statistics.distance()
        if weights["category"]:
            wanted = logits.argmax(1) if target is None else target
            each = F.cross_entropy(logits, wanted, reduction="none") * self.importance(logits.detach(), wanted)
            loss = loss + weights["category"] * each.mean()
        if weights["activation"]:
            loss = loss - weights["activation"] * seen.embedding.abs().mean()
        if weights["balance"]:
            loss = loss + weights["balance"] * imbalance(logits)
        if weights["entropy"]:
            loss = loss + weights["entropy"] * negative_entropy(logits)
        if weights["adversarial"] and number >= self.warmup:
            assert student is not None
            judged = student(images)
            agreed = self.categories(judged).argmax(1) == logits.argmax(1) if self.agreeing else None
            loss = loss + weights["adversarial"] * alikeness(judged, seen, self.divergence, agreed)
        return loss

    def state(self) -> dict[str, Tensor]:
        return {f"module.{name}": value for name, value in self.state_dict().items()} | {
            f"average.{k}.{part}": value
            for k, pair in enumerate(self.statistics.average)
            for part, value in zip(("mean", "variance"), pair)
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        own = {name.removeprefix("module."): value for name, value in state.items() if name.startswith("module.")}
        self.load_state_dict(own)
        self.statistics.average = [
            (state[f"average.{k}.mean"].to(self.device), state[f"average.{k}.variance"].to(self.device))
            for k in range(len(self.statistics.layers))
            if f"average.{k}.mean" in state
        ]


class GeneratorTraining(Adversarial):
    """One generator, trained a little in every round: DAFL, DFAD, ZSKT, DFQ, maximum entropy, by the terms' weights.

    Args:
        steps: of the generator per round.
        lr: of Adam (0.5, 0.999).
        **terms: see `Adversarial`.
    """

    draws = True

    def __init__(self, *, steps: int = 1, lr: float = 1e-3, **terms: Any):
        super().__init__(**terms)
        if steps < 1 or lr <= 0:
            raise InputError("steps must be at least 1, and lr positive")
        self.steps, self.lr = steps, lr

    def begin(self, teacher: Recognizer, student: Recognizer | None, name: str) -> None:
        super().begin(teacher, student, name)
        self.optimizer = torch.optim.Adam(self.generator.parameters(), lr=self.lr, betas=(0.5, 0.999))

    def pictures(self, rng: Rng) -> tuple[Tensor, Tensor | None]:
        label = self.drawn_category(rng) if self.conditional else None
        return self.generator(rng.child("z").normal(self.latent_dim).to(self.device), label), label

    @torch.inference_mode(False)
    @torch.enable_grad()
    def learn(self, number: int, rng: Rng) -> Tensor:
        parameters = list(self.generator.parameters())
        with self.statistics:
            for step in range(self.steps):
                images, label = self.pictures(rng.child(f"step {step}"))
                loss = self.loss(images, number, label)
                # Of the generator only: the student's own gradients are not touched.
                for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters)):
                    parameter.grad = grad
                self.optimizer.step()
            self.statistics.remember()
        self.optimizer.zero_grad()
        return images.detach()

    @torch.no_grad()
    def draw(self, rng: Rng) -> Tensor:
        return self.pictures(rng)[0]

    def state(self) -> dict[str, Tensor]:
        return super().state() | flatten(self.optimizer, "optimizer")

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        unflatten(self.optimizer, "optimizer", state)


class LatentInversion(Adversarial):
    """Pictures inverted through a generator: in every round latents and generator are fitted to new targets together.

    With ``start`` ``meta`` the generator begins each round where earlier rounds have taught it to begin, so that a few
    steps suffice (FastDFKD); with ``fresh`` it begins anew (CMI). Its faces go to the source's pool.

    Args:
        start: see above.
        iterations: steps per round.
        lr, lr_z: of Adam (0.5, 0.999) for the generator's copy and the latents; the meta generator's is ``lr`` times
            ``iterations``, for the sum of the gradients of a round (first-order MAML).
        contrast: weight of `Contrast`; 0 leaves it out.
        memory: faces that `Contrast` remembers.
        focus: exponent of SSD-KD's modulating function: categories that are frequent already and faces that the teacher
            is sure of weigh less, by ``(1 - share of the category) (1 - p)^focus``; None weighs all alike.
        jitter: largest shift, in pixels, of what the networks see.
        **terms: see `Adversarial`.
    """

    counts: Tensor

    def __init__(
        self,
        *,
        start: Literal["meta", "fresh"] = "meta",
        iterations: int = 5,
        lr: float = 3e-3,
        lr_z: float = 0.01,
        contrast: float = 0.0,
        memory: int = 4096,
        focus: float | None = None,
        jitter: int = 4,
        **terms: Any,
    ):
        super().__init__(**terms)
        if iterations < 1 or lr <= 0 or lr_z <= 0 or jitter < 0 or memory < 1:
            raise InputError("iterations and memory must be at least 1, lr and lr_z positive, jitter not negative")
        if focus is not None and not self.weights["category"]:
            raise InputError("focus weighs the faces in the category term, whose weight is 0: set category too")
        self.start, self.iterations, self.lr, self.lr_z = start, iterations, lr, lr_z
        self.contrast_weight, self.memory, self.focus, self.jitter = contrast, memory, focus, jitter
        self.contrast: Contrast | None = None

    @property
    def uses_statistics(self) -> bool:
        return bool(self.weights["statistics"] or self.contrast_weight)

    def begin(self, teacher: Recognizer, student: Recognizer | None, name: str) -> None:
        super().begin(teacher, student, name)
        self.register_buffer("counts", torch.zeros(self.categories.count, device=self.device))
        self.meta = torch.optim.Adam(self.generator.parameters(), lr=self.lr * self.iterations, betas=(0.5, 0.999))
        if self.contrast_weight:
            self.statistics.keep_means = True
            features = sum(len(layer.mean) for layer in self.statistics.layers)
            self.contrast = Contrast(features, size=self.memory).to(self.device)
            self.head_optimizer = torch.optim.Adam(self.contrast.head.parameters(), lr=self.lr, betas=(0.5, 0.999))

    @torch.inference_mode(False)
    @torch.enable_grad()
    def learn(self, number: int, rng: Rng) -> Tensor:
        target = self.drawn_category(rng)
        z = rng.child("z").normal(self.latent_dim).to(self.device).requires_grad_()
        fitted = copy.deepcopy(self.generator) if self.start == "meta" else self.fresh(number)
        weights = list(fitted.parameters())
        groups: list[dict[str, Any]] = [{"params": weights}, {"params": [z], "lr": self.lr_z}]
        optimizer = torch.optim.Adam(groups, self.lr, (0.5, 0.999))
        taught = [torch.zeros_like(weight) for weight in weights]
        head = [] if self.contrast is None else list(self.contrast.head.parameters())
        leaves = [*weights, z, *head]
        with self.statistics:
            for step in range(self.iterations):
                moved = rng.child(f"view {step}")
                images = fitted(z, target if self.conditional else None)
                views: list[Tensor] = []
                if self.contrast is not None:  # first: the statistics are then those of the whole view
                    self.networks[0](zoomed(images, moved))
                    views.append(self.statistics.features())
                whole = shifted(images, moved, self.jitter)
                loss = self.loss(whole, number, target)
                if self.contrast is not None:
                    views.append(self.statistics.features())
                    loss = loss + self.contrast_weight * self.contrast(views[0], views[1], moved)
                # One list for the networks' sake: nothing but these leaves collects a gradient.
                for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves)):
                    leaf.grad = grad
                for total, weight in zip(taught, weights):
                    assert weight.grad is not None
                    total += weight.grad
                optimizer.step()
                if head:
                    self.head_optimizer.step()
            self.statistics.remember()
            if self.contrast is not None:
                self.contrast.push(views[0].detach(), views[1].detach())
        if self.start == "meta":
            for parameter, total in zip(self.generator.parameters(), taught):
                parameter.grad = total
            self.meta.step()
            self.meta.zero_grad()
        with torch.no_grad():
            made = fitted(z, target if self.conditional else None)
            if self.focus is not None:
                found = self.categories(self.networks[0](made)).argmax(1)
                self.counts += torch.bincount(found, minlength=len(self.counts))
        return made

    def fresh(self, number: int) -> ConvGenerator:
        """A generator of new weights, others in every round."""
        generator = self.generator
        return ConvGenerator(
            latent_dim=self.latent_dim,
            classes=generator.classes,
            channels=self.channels,
            face_size=generator.face_size,
            seed=self.seed + number + 1,
        ).to(self.device)

    def importance(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.focus is None:
            return super().importance(logits, target)
        sure = F.softmax(logits, 1).gather(1, target[:, None])[:, 0]
        share = self.counts[target] / self.counts.sum().clamp(min=1)
        return (1 - share) * (1 - sure).pow(self.focus)

    def state(self) -> dict[str, Tensor]:
        found = super().state() | flatten(self.meta, "meta")
        return found if self.contrast is None else found | flatten(self.head_optimizer, "head")

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        unflatten(self.meta, "meta", state)
        if self.contrast is not None:
            unflatten(self.head_optimizer, "head", state)


def shifted(images: Tensor, rng: Rng, jitter: int) -> Tensor:
    """All pictures shifted alike, up to ``jitter`` pixels, and mirrored or not."""
    once = rng.rows(slice(0, 1))
    rows, columns = (once.child("jitter").integers(2 * jitter + 1, 2)[0] - jitter).tolist()
    mirrored = int(once.child("flip").integers(2, 1))
    moved = images.roll((rows, columns), (2, 3)) if jitter else images
    return moved.flip(3) if mirrored else moved


def zoomed(images: Tensor, rng: Rng) -> Tensor:
    """Of each picture a part of its own, a quarter of the area at least, enlarged and mirrored or not."""
    side = rng.child("zoom").uniform(low=0.5, high=1.0).to(images)
    corner = (rng.child("place").uniform(2, low=-1.0, high=1.0).to(images)) * (1 - side)[:, None]
    mirrored = 1 - 2 * rng.child("mirror").integers(2, 1)[:, 0].to(images)
    zero = torch.zeros_like(side)
    matrix = torch.stack([side * mirrored, zero, corner[:, 0], zero, side, corner[:, 1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def flatten(optimizer: torch.optim.Optimizer, name: str) -> dict[str, Tensor]:
    """The tensors of an optimizer's state under one name each."""
    return {
        f"{name}.{parameter}.{key}": value
        for parameter, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def unflatten(optimizer: torch.optim.Optimizer, name: str, state: dict[str, Tensor]) -> None:
    """Put back what `flatten` gave."""
    found: dict[int, dict[str, Tensor]] = {}
    for full, value in state.items():
        if full.startswith(f"{name}."):
            parameter, key = full.removeprefix(f"{name}.").split(".")
            found.setdefault(int(parameter), {})[key] = value
    optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})
