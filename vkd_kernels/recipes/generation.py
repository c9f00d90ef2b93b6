"""Image generation from little data: a GAN whose discriminator is taught by a frozen teacher (V_kD, section 4.3).

    vkd distill generation                                              digits, a classifier as teacher, a small GAN
    vkd distill generation --recipe vkd-biggan-cifar100-20pct data.root=... teacher.weights=...

    discriminator:  ADV(D(real), D(fake)) + weight * smooth_l1(X P^T, whiten(Y))
    generator:      ADV(D(fake))

X are the discriminator's pooled features, Y the teacher's, of the same images, real and generated ones. The feature
loss trains the discriminator and its projection. None of it reaches the generator, which learns of the teacher only
through what the discriminator has learned: that is KD-DLGAN's training, with the orthogonal feature loss in the place
of its text terms, as the author of V_kD describes it (docs/generation.md).

Bundled: for every seed a new split of the digits, a teacher trained on its pool, and one GAN per arm that sees a tenth
of the pool, all from the same initial weights, batches and latents. What is compared is the generator's moving average:
the Fréchet distance between its images and the held-out ones, in a classifier's features that was trained on these.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn
from torchvision.transforms import v2

import vkd_kernels as vk

from . import engine, gan, images, runs
from .config import Channels, Ints, OptionError, Section, Words, option, section
from .encoders import Features, inception, make_encoder
from .gan import Shape, as_bytes, as_float, make_discriminator, make_generator
from .pictures import AT_ONCE, ClassifierTraining, Pictures
from .task import Arm, DistillConfig, Metric, Optim, Run, Task, generator

TRIAL, PAPER, DIFFAUGMENT, BIGGAN = "tried on the digits", "the paper, section 4.3", "DiffAugment", "BigGAN at 32x32"
BATCH, _, SAMPLES, PICTURE = range(4)  # what a draw is for, beside the seed and the step
JUDGE = "judge.safetensors"
COLUMNS, ROWS, SHOWN_SIZE = 10, 8, 32  # of a picture of samples, and the least side of an image in it


class Data(Section):
    name: str = option("digits", "digits (bundled), folder, or a data set of torchvision: CIFAR10, CIFAR100, ...")
    root: str = option("", "where the images are; of a folder: root/train/<class>/*, root/val/<class>/*")
    download: bool = option(False, "let torchvision fetch what is missing")
    train_split: str = option("", "folder or split to train on; default: train")
    test_split: str = option("", "folder or split that is held out; default: val in a folder, test in torchvision")
    classes: int = option(0, "number of classes; 0: what the data say", ge=0)
    fraction: float = option(0.1, "share of the training images that the GAN sees", source=TRIAL, gt=0, le=1)
    pool: int = option(
        1000, "training images of the 1797 digits; the others are held out", source=TRIAL, ge=100, le=1700
    )
    size: int = option(32, "side of the images in pixels; digits have 8", ge=8)
    channels: Channels = option(3, "of the images; digits have 1")


class Augment(Section):
    """DiffAugment, of real and generated images alike."""

    policy: Words = option(("translation",), "what is done: translation, cutout", source=TRIAL)
    translation: float = option(0.125, "largest shift, as a share of the side", source=DIFFAUGMENT, ge=0, lt=1)
    cutout: float = option(0.5, "side of the square that is cut out, as a share", source=DIFFAUGMENT, ge=0, le=1)


class Teacher(Section):
    name: str = option("classifier", "classifier (trained here), or an image encoder of timm, such as CLIP's")
    weights: str = option("", "its weights: a .safetensors or .pth file; random: none (for tests)")
    pretrained: bool = option(False, "let timm fetch the weights")
    features: Literal["pooled", "head"] = option("pooled", "of timm's: or what its head gives (CLIP's embedding)")
    size: int = option(0, "side that images are enlarged to (nearest); 0: what it was trained on", ge=0)
    widths: Ints = option((24, 48, 96), "channels of the classifier's convolutions", source=TRIAL, min_length=1)
    steps: int = option(300, "training steps of the classifier", ge=1)
    batch_size: int = option(64, "images per training step of the classifier", ge=2)
    lr: float = option(2e-3, "peak learning rate of the classifier", gt=0)


class Student(Section):
    """The generator."""

    name: Literal["small", "biggan"] = option("small", "generator and discriminator")
    latent: int = option(32, "numbers an image is made from", ge=1)
    widths: Ints = option((64, 48, 24), "channels of small", min_length=3, max_length=3)
    width: int = option(256, "channels of biggan", source=BIGGAN, ge=8)


class Discriminator(Section):
    widths: Ints = option((16, 32, 48), "channels of small; the last is the feature's", source=TRIAL, min_length=1)
    width: int = option(256, "channels of biggan", source=BIGGAN, ge=8)


class Distill(DistillConfig):
    images: Literal["both", "real"] = option("both", "images that are distilled", source=TRIAL)
    statistics: Literal["pool", "gan"] = option("pool", "images that whitening's are of: or the GAN's", source=TRIAL)
    method: Literal["zca", "cholesky", "pca"] = option("zca", "of whitening", source=TRIAL)
    eps: float = option(0.0, "of the normalization; 0: 1e-5, for whiten 0.05", source=TRIAL, ge=0, lt=1)


class MetricConfig(Section):
    features: Literal["classifier", "inception"] = option("classifier", "trained on held-out images; inception: FID")
    weights: str = option("", "file with torch-fidelity's weights of Inception")
    download: bool = option(False, "let torch-fidelity fetch them")
    samples: int = option(2000, "images to generate for it", source=TRIAL, ge=2)
    batch_size: int = option(200, "of them at once", ge=1)


class GanOptim(Optim):
    """Adam for both networks; `lr` is the generator's."""

    discriminator_lr: float = option(1e-3, "learning rate of discriminator and projection", source=TRIAL, gt=0)
    discriminator_steps: int = option(1, "discriminator steps per generator step", source=TRIAL, ge=1)
    loss: Literal["non_saturating", "hinge"] = option("non_saturating", "adversarial loss", source=TRIAL)


class Config(Section):
    data: Data = section(Data)
    augment: Augment = section(Augment)
    teacher: Teacher = section(Teacher)
    student: Student = section(Student)
    discriminator: Discriminator = section(Discriminator)
    distill: Distill = section(Distill, source=TRIAL, normalization="whiten", weight=5.0)
    metric: MetricConfig = section(MetricConfig)
    optim: GanOptim = section(
        GanOptim,
        source=TRIAL,
        lr=5e-4,
        betas=(0.5, 0.99),
        weight_decay=0.0,
        schedule="constant",
        steps=2500,
        batch_size=32,
        ema=0.99,
    )
    run: Run = section(Run, accelerator="cpu", eval_every=250, save_every=500)

    @model_validator(mode="after")
    def _checked(self) -> Config:
        if self.optim.clip_norm:
            raise OptionError("optim.clip_norm: a GAN's steps know none; leave it at 0")
        if unknown := {*self.augment.policy} - {"translation", "cutout"}:
            raise OptionError(f"augment.policy: unknown {min(unknown)!r}; there are translation and cutout")
        if self.metric.features == "inception" and self.shape(1).channels != 3:
            raise OptionError("metric.features: inception needs images of three channels")
        size, widths = self.shape(1).size, self.discriminator.widths
        if self.student.name == "biggan" and (size < 16 or size & (size - 1)):
            raise OptionError(f"data.size: biggan makes images of 16, 32, 64, ... pixels; got {size}")
        if self.student.name == "small" and (size % 4 or size < 2 ** len(widths)):
            raise OptionError(
                f"data.size: must be a multiple of 4, and at least {2 ** len(widths)} for {len(widths)} "
                f"discriminator.widths; got {size}"
            )
        return self

    def shape(self, classes: int) -> Shape:
        return Shape(1, 8, 10) if self.data.name == "digits" else Shape(self.data.channels, self.data.size, classes)


class DistilledGAN(nn.Module):
    """Generator, discriminator and projection: `forward(batch)` -> the losses of the one that the batch is for.

    They are in one module so that data-parallel wrapping reduces all gradients; in either kind of step the parameters
    of the other network get none. `teacher` (images -> targets (N, T)) is frozen and no part of it.
    """

    def __init__(
        self, student: nn.Module, discriminator: nn.Module, feature_loss: Any, teacher: Any, config: Any
    ) -> None:
        super().__init__()
        self.generator, self.discriminator, self.feature_loss = student, discriminator, feature_loss
        self.hinge, self.distill, self.frozen = config.optim.loss == "hinge", config.distill, (teacher,)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.discriminator_losses(batch) if "real" in batch else self.generator_losses(batch)

    def discriminator_losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        with torch.no_grad():
            fake = self.generator(batch["latents"], batch["fake_labels"])
        pictures = gan.augment(torch.cat([batch["real"], fake]), batch["amounts"])  # the real ones first
        verdict = self.discriminator(pictures, torch.cat([batch["labels"], batch["fake_labels"]]))
        real, generated = verdict.logits.float().chunk(2)
        if self.hinge:
            total = F.relu(1 - real).mean() + F.relu(1 + generated).mean()
        else:
            total = F.softplus(-real).mean() + F.softplus(generated).mean()
        losses = {"discriminator": total}
        if self.feature_loss is not None:
            count = len(real) if self.distill.images == "real" else len(pictures)
            with torch.no_grad():
                target = self.frozen[0](pictures[:count])
            losses["features"] = self.feature_loss(verdict.features[:count], target)
            total = total + self.distill.weight * losses["features"]
        return {**losses, "total": total}

    def generator_losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        fake = gan.augment(self.generator(batch["latents"], batch["fake_labels"]), batch["amounts"])
        logits = self.discriminator(fake, batch["fake_labels"]).logits.float()
        return {"generator": -logits.mean() if self.hinge else F.softplus(-logits).mean()}


class Generation(Task):
    title = "Image generation from little data: a GAN whose discriminator is taught by a frozen teacher (V_kD)."
    Config = Config
    metric = Metric("frechet", "Fréchet distance", higher_is_better=False, digits=2)
    unused_parameters = True  # a step trains one of the two networks
    arms = {
        "alone": Arm("GAN alone", {"distill.weight": 0.0}),
        "alone-longer": Arm("GAN alone, equal time", {"distill.weight": 0.0}, longer=1.25),
        "linear": Arm("linear projection", {"distill.projection": "linear"}),
        "vkd": Arm("V_kD", {"distill.projection": "orthogonal"}),
        "vkd-unwhitened": Arm("V_kD, teacher not whitened", {"distill.normalization": "none"}),
    }
    compared, baseline = ("alone", "alone-longer", "linear", "vkd"), "alone"
    recipes = Path(__file__).parent / "configs" / "generation"

    @cached_property
    def data(self) -> Pictures:
        return Pictures(self.config.data, self.seed, self.config.shape)

    @property
    def images(self) -> int:
        return len(self.data.seen)

    # ---- teacher and judge -------------------------------------------------------------------------------------------

    def train_teacher(self) -> dict[str, Any]:
        """Train the seed's classifiers where they are needed, and measure what whitening the teacher takes."""
        numbers: dict[str, Any] = {}
        folder = self.context.folder
        if self.config.teacher.name == "classifier" and self.config.distill.weight:
            training = ClassifierTraining(self.config, self.context, self.data)
            result = engine.train(training, weights="teacher.safetensors")
            numbers = {name: result[name] for name in ("accuracy", "seconds", "cpu_seconds")}
        if self.config.metric.features == "classifier":
            place = replace(self.context, folder=folder / "judge")
            training = ClassifierTraining(self.config, place, self.data)
            numbers["judge_accuracy"] = engine.train(training, weights=JUDGE)["accuracy"]
        if self.config.distill.weight:
            whitening = self.measured_whitening()
            if self.fabric.is_global_zero:
                runs.save_safetensors(folder / "statistics.safetensors", whitening.state_dict())
        self.fabric.barrier()
        copies = self.data.pool[self.data.seen[self.mine]].split(self.config.metric.batch_size)
        numbers["distance_of_the_training_images"] = self.distance(copies)
        return numbers

    @torch.no_grad()
    def measured_whitening(self) -> nn.Module:
        """Statistics over all training images: a batch with fewer images than channels has a singular covariance, and
        whitening by it would amplify rounding."""
        rows = self.data.seen if self.config.distill.statistics == "gan" else torch.arange(len(self.data.pool))
        parts = []
        for part in rows.split(AT_ONCE):
            with self.fabric.autocast():
                parts.append(self.encoder(self.fabric.to_device(as_float(self.data.pool[part]))).float().cpu())
        whitening = vk.Whitening(self.encoder.num_features, momentum=1.0)
        whitening(torch.cat(parts))  # the first update takes the statistics over as they are
        return whitening

    @cached_property
    def encoder(self) -> Any:
        """The frozen teacher: images from -1 to 1 -> features."""
        folder = self.context.teacher
        weights = str(folder / "teacher.safetensors") if folder else ""
        return self.fabric.to_device(make_encoder(self.config.teacher, self.data.shape, weights))

    def target(self) -> Any:
        """images (N, C, H, W) -> what the discriminator's features are compared with (N, T): a constant."""
        d, path = self.config.distill, (self.context.teacher or Path()) / "statistics.safetensors"
        if d.normalization != "whiten":
            return lambda pictures: self.encoder(pictures).float()
        whitening = vk.Whitening(self.encoder.num_features, method=d.method, eps=d.eps or 0.05, momentum=1.0)
        runs.load_state(whitening, runs.load_weights(path), "statistics.safetensors")
        whitening.eval()  # (y - mean) A = y A + shift, computed once
        eye = torch.eye(whitening.num_features, dtype=torch.float64)
        shift = whitening(torch.zeros_like(eye[:1]))
        shift, matrix = self.fabric.to_device((shift.float(), (whitening(eye) - shift).float()))

        def whitened(pictures: Tensor) -> Tensor:
            features = self.encoder(pictures).float()
            with torch.autocast(features.device.type, enabled=False):
                return torch.addmm(shift, features, matrix)

        return whitened

    @cached_property
    def judge(self) -> Any:
        """torchmetrics' Fréchet distance to the held-out images, of which every rank reads its share."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        if self.config.metric.features == "inception":
            network = inception(self.config.metric.weights)
        else:
            own = self.context.folder / JUDGE
            places = [own, *([self.context.teacher / "judge" / JUDGE] if self.context.teacher else [])]
            path = next((place for place in places if place.exists()), own)
            network = gan.Classifier(self.config.teacher.widths, self.data.shape)
            runs.load_state(network, runs.load_weights(path), str(path))
        judge: Any = FrechetInceptionDistance(Features(network.requires_grad_(False).eval()), reset_real_features=False)
        judge = judge.to(self.fabric.device)
        for part in self.data.held_out[self.mine].split(self.config.metric.batch_size):
            judge.update(self.fabric.to_device(part), real=True)
        return judge

    @torch.no_grad()
    def distance(self, pictures: Any) -> float:
        self.judge.reset()
        for part in pictures:
            self.judge.update(self.fabric.to_device(part), real=False)
        return float(self.judge.compute())

    # ---- the GAN -----------------------------------------------------------------------------------------------------

    def make_student(self) -> nn.Module:
        return make_generator(self.config, self.data.shape)

    def make_model(self, student: nn.Module) -> nn.Module:
        c, discriminator = self.config, make_discriminator(self.config, self.data.shape)
        if not c.distill.weight:
            return DistilledGAN(student, discriminator, None, None, c)
        whitened = c.distill.normalization == "whiten"  # such targets come so: nothing is left to normalize
        feature_loss = c.distill.feature_loss(
            discriminator.num_features,
            self.encoder.num_features,
            self.context.process_group,
            **({"normalization": "none"} if whitened else {}),
        )
        return DistilledGAN(student, discriminator, feature_loss, self.target(), c)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam for each network; the projection trains with the discriminator."""
        o, m = self.optim, cast(Any, self.model)
        critics = [m.discriminator, *([m.feature_loss] if m.feature_loss is not None else [])]
        options: dict[str, Any] = {"betas": tuple(o.betas), "weight_decay": o.weight_decay}
        options["fused"] = True
        parameters = [p for part in critics for p in part.parameters()]
        return {
            "generator": torch.optim.Adam(m.generator.parameters(), lr=o.lr, **options),
            "discriminator": torch.optim.Adam(parameters, lr=self.config.optim.discriminator_lr, **options),
        }

    def batches(self, start: int) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
        """What one step needs: a batch per discriminator step, and one for the generator."""
        for step in itertools.count(start):
            draw = generator(self.seed, step, BATCH)
            critics = [self.discriminator_batch(draw) for _ in range(self.config.optim.discriminator_steps)]
            yield critics, self.fabric.to_device({**self.latents(draw), "amounts": self.amounts(draw)})

    def discriminator_batch(self, draw: torch.Generator) -> dict[str, Any]:
        rows = self.data.seen[torch.randint(len(self.data.seen), (self.optim.batch_size,), generator=draw)][self.mine]
        batch = {"real": as_float(self.data.pool[rows]), "labels": self.data.labels[rows], **self.latents(draw)}
        of_real, of_fake = self.amounts(draw), self.amounts(draw)
        batch["amounts"] = {name: torch.cat([amount, of_fake[name]]) for name, amount in of_real.items()}
        return self.fabric.to_device(batch)

    def latents(self, draw: torch.Generator) -> dict[str, Any]:
        size, classes = self.optim.batch_size, self.data.shape.classes
        latents = torch.randn(size, self.config.student.latent, generator=draw)
        return {
            "latents": latents[self.mine],
            "fake_labels": torch.randint(classes, (size,), generator=draw)[self.mine],
        }

    def amounts(self, draw: torch.Generator) -> dict[str, Tensor]:
        a = self.config.augment
        amounts = gan.draw_amounts(
            a.policy, self.optim.batch_size, self.data.shape.size, draw, shift=a.translation, cut=a.cutout
        )
        return {name: amount[self.mine] for name, amount in amounts.items()}

    def step(self, loop: Any, batch: Any) -> dict[str, Tensor]:
        """The discriminator's steps, then one of the generator through a discriminator that stays as it is."""
        critics, last = batch
        losses: dict[str, Tensor] = {}
        for part in critics:
            losses = loop.model(part)
            self.fabric.backward(losses["total"])
            loop.apply("discriminator")
        discriminator: Any = self.model.discriminator
        discriminator.requires_grad_(False)
        losses = losses | loop.model(last)
        self.fabric.backward(losses["generator"])
        loop.apply("generator")
        discriminator.requires_grad_(True)
        return {name: loss.detach() for name, loss in losses.items() if name != "total"}

    def evaluate(self, student: nn.Module) -> dict[str, float]:
        """Of latents that are the same at every evaluation and in every arm."""
        m = self.config.metric
        latents = torch.randn(m.samples, self.config.student.latent, generator=generator(self.seed, SAMPLES))
        labels = torch.arange(m.samples) % self.data.shape.classes
        parts = zip(latents[self.mine].split(m.batch_size), labels[self.mine].split(m.batch_size), strict=True)
        return {"frechet": self.distance(student(*self.fabric.to_device(part)) for part in parts)}

    def pictures(self, student: nn.Module, folder: Path) -> None:
        """A grid of samples of fixed latents, one class per column where the generator knows classes."""
        from torchvision.utils import make_grid

        count = ROWS * COLUMNS
        latents = torch.randn(count, self.config.student.latent, generator=generator(self.seed, PICTURE))
        labels = torch.arange(count) % COLUMNS % self.data.shape.classes
        samples = as_bytes(student(*self.fabric.to_device((latents, labels)))).cpu()
        larger = math.ceil(SHOWN_SIZE / samples.shape[-1])
        samples = samples.repeat_interleave(larger, 2).repeat_interleave(larger, 3)
        grid, file = v2.functional.to_pil_image(make_grid(samples, nrow=COLUMNS, pad_value=128)), io.BytesIO()
        grid.save(file, format="PNG")
        runs.write_atomically(folder / "samples.png", lambda out: out.write(file.getvalue()))

    @classmethod
    def describe(cls, config: Any) -> dict[str, Any]:
        """Sizes and shapes of the networks; opens a data set only to count its classes."""
        data, classes = config.data, config.data.classes or 10
        if data.name != "digits" and data.root:
            classes = images.open_images(data)[2]
        elif data.name.startswith("CIFAR"):
            classes = int(data.name.removeprefix("CIFAR"))
        shape: Shape = config.shape(classes)
        student, discriminator = make_generator(config, shape), make_discriminator(config, shape)
        about: dict[str, Any] = {
            "images": [shape.channels, shape.size, shape.size],
            "classes": shape.classes,
            "generator": {"name": config.student.name, "parameters": size(student), "latent": config.student.latent},
            "discriminator": {"parameters": size(discriminator), "features": discriminator.num_features},
        }
        if config.distill.weight:
            encoder = make_encoder(config.teacher, shape, empty=True)
            about["teacher"] = {
                "name": config.teacher.name,
                "parameters": size(encoder),
                "features": encoder.num_features,
                "images enlarged to": getattr(encoder, "size", shape.size),
            }
            about["projection (teacher, discriminator)"] = [encoder.num_features, discriminator.num_features]
        o = config.optim
        return about | {
            "steps": o.steps or f"{o.epochs:g} epochs",
            "images per discriminator step": o.batch_size,
            "discriminator steps per step": o.discriminator_steps,
        }

    @classmethod
    def check(cls, config: Any) -> None:
        t = config.teacher
        if config.distill.weight and t.name != "classifier" and not (t.weights or t.pretrained):
            raise OptionError(f"teacher.weights: give a file with those of {t.name}, or teacher.pretrained=true")
        if config.metric.features == "inception" and not (config.metric.weights or config.metric.download):
            raise OptionError(
                "metric.weights: give torch-fidelity's file weights-inception-2015-12-05-6726825d.pth, or "
                "metric.download=true to have it fetched"
            )
        for option_, path in (("teacher.weights", t.weights), ("metric.weights", config.metric.weights)):
            if path not in ("", "random") and not Path(path).is_file():
                raise OptionError(f"{option_}: there is no file {path}")
        if config.data.name != "digits":
            images.open_images(config.data)
        cls.describe(config)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
