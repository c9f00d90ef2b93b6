"""Image generation from little data: a GAN whose discriminator is taught by a frozen teacher (V_kD, section 4.3).

    vkd distill generation                                              digits, a classifier as teacher, a small GAN
    vkd distill generation --recipe vkd-biggan-cifar10-10pct data.root=... teacher.weights=...

Bundled: for every seed a new split of the digits, a teacher trained on its pool, and one GAN per arm that sees a tenth
of the pool, all from the same initial weights, batches and latents. What is compared is the generator's moving average:
the Fréchet distance between its images and the held-out ones, in a classifier's features that was trained on these.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vkd_kernels as vk

from .. import runs
from ..engine import Context, Fit, Training, fit, generator
from ..projections import make_feature_loss
from ..tasks import Arm, Defaults
from ..tasks import Metric as Number
from . import augment, data, losses, metrics, models, teachers
from .options import Config

TITLE = (__doc__ or "").splitlines()[0]
PRIMARY = Number("frechet", "Fréchet distance", higher_is_better=False, digits=2, unit="")
UNUSED_PARAMETERS = True  # a step trains one of the two networks

ARMS = {
    "alone": Arm("GAN alone", {"distill.weight": 0.0}),
    "alone-longer": Arm("GAN alone, equal time", {"distill.weight": 0.0}, longer=1.25),
    "linear": Arm("linear projection", {"distill.projection": "linear"}),
    "vkd": Arm("V_kD"),
    "vkd-unwhitened": Arm("V_kD, teacher not whitened", {"distill.normalization": "none"}),
}
DEFAULTS = Defaults(arms=("alone", "alone-longer", "linear", "vkd"), seeds=3, baseline="alone")

BATCH, CLASSIFIER, SAMPLES, PICTURE = range(4)  # what a draw is for, beside the seed and the step
JUDGE = "judge.safetensors"
COLUMNS, ROWS, SHOWN_SIZE = 10, 8, 32  # of a picture of samples, and the least side of an image in it


class Generation(Training):
    """One GAN of one seed, in one arm. The student is the generator."""

    model: losses.DistilledGAN

    def __init__(self, config: Config, seed: int, folder: Path | None, context: Context) -> None:
        self.config, self.seed, self.fabric, self.folder = config, seed, context.fabric, context.folder
        self.images = images = data.open_images(config.data, seed)
        student, discriminator = models.make_pair(config, images.shape)
        if folder is None:  # `vkd evaluate`, `vkd export`
            return super().__init__(student, student, config.optim, 0)
        feature_loss, target = None, None
        if config.distill.weight:
            encoder = open_teacher(config, images.shape, folder, self.fabric)
            target = teachers.make_target(config, encoder, folder, self.fabric)
            feature_loss = projection_of(
                config, discriminator.num_features, encoder.num_features, context.process_group
            )
        model = losses.DistilledGAN(
            student, discriminator, feature_loss, target, kind=config.optim.loss, weight=config.distill.weight,
            distilled=config.distill.images,
        )  # fmt: skip
        super().__init__(model, student, config.optim, config.optim.total_steps(len(images.seen)))
        self.finished = 0  # steps, for the names of pictures
        if (
            config.metric.features == "classifier" and self.fabric.is_global_zero
        ):  # for `vkd evaluate`, of this folder alone
            runs.save_safetensors(self.folder / JUDGE, runs.load_safetensors(folder / "judge" / JUDGE))
        self.fabric.barrier()

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam for each network, without weight decay; the projection trains with the discriminator."""
        o, m = self.config.optim, self.model
        critics = [m.discriminator, *([m.feature_loss] if m.feature_loss is not None else [])]
        options: dict[str, Any] = {
            "betas": o.betas,
            "eps": o.eps,
            "weight_decay": o.weight_decay,
            "fused": o.precision != "16-mixed",
        }
        return {
            "generator": torch.optim.Adam(m.generator.parameters(), lr=o.lr, **options),
            "discriminator": torch.optim.Adam(
                [p for part in critics for p in part.parameters()], lr=o.discriminator_lr, **options
            ),
        }

    def batches(self, start: int) -> Iterator[tuple[list[losses.Batch], losses.GeneratorBatch]]:
        """What one step needs: a batch per discriminator step, and one for the generator."""
        for step in itertools.count(start):
            draw = generator(self.seed, step, BATCH)
            steps = [self.discriminator_batch(draw) for _ in range(self.config.optim.discriminator_steps)]
            yield steps, losses.GeneratorBatch(*self.latents(draw), self.amounts(draw))

    def discriminator_batch(self, draw: torch.Generator) -> losses.Batch:
        size, images = self.optim.batch_size, self.images
        rows = images.seen[torch.randint(len(images.seen), (size,), generator=draw)][self.mine]
        real, labels = self.fabric.to_device((data.as_float(images.pool[rows]), images.pool_labels[rows]))
        latents, fake_labels = self.latents(draw)
        of_real, of_fake = self.amounts(draw), self.amounts(draw)
        amounts = {name: torch.cat([amount, of_fake[name]]) for name, amount in of_real.items()}
        return losses.Batch(real, labels, latents, fake_labels, amounts)

    @property
    def mine(self) -> slice:
        """This rank's share of a global batch."""
        return slice(self.fabric.global_rank, None, self.fabric.world_size)

    def latents(self, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        size, classes = self.optim.batch_size, self.images.shape.classes
        latents = torch.randn(size, self.config.student.latent, generator=draw)
        labels = torch.randint(classes, (size,), generator=draw)
        return self.fabric.to_device((latents[self.mine], labels[self.mine]))

    def amounts(self, draw: torch.Generator) -> losses.Amounts:
        a = self.config.augment
        found = augment.draw(
            a.policy, self.optim.batch_size, self.images.shape.size, draw, shift=a.translation, cut=a.cutout
        )
        return {name: self.fabric.to_device(amount[self.mine]) for name, amount in found.items()}

    def step(self, fit: Fit, batch: tuple[list[losses.Batch], losses.GeneratorBatch]) -> dict[str, Tensor]:
        """The discriminator's steps, then one of the generator through a discriminator that stays as it is."""
        for part in batch[0]:
            found = fit.model(part)
            fit.fabric.backward(found["total"])
            fit.apply("discriminator")
        self.model.discriminator.requires_grad_(False)
        found |= fit.model(batch[1])
        fit.fabric.backward(found["generator"])
        fit.apply("generator")
        self.model.discriminator.requires_grad_(True)
        self.finished = fit.step + 1
        return {name: loss.detach() for name, loss in found.items() if name != "total"}

    # ---- what it is measured by --------------------------------------------------------------------------------------

    @cached_property
    def judge(self) -> metrics.FrechetDistance:
        return open_judge(self.config, self.images, self.folder, self.fabric)

    def evaluate(self, student: nn.Module) -> dict[str, float]:
        return {"frechet": self.judge(self.samples(student))}

    def samples(self, student: nn.Module) -> Iterator[Tensor]:
        """Images of this rank, of latents that are the same at every evaluation and in every arm."""
        m, classes = self.config.metric, self.images.shape.classes
        latents = torch.randn(m.samples, self.config.student.latent, generator=generator(self.seed, SAMPLES))
        labels = torch.arange(m.samples) % classes
        for z, y in zip(latents[self.mine].split(m.batch_size), labels[self.mine].split(m.batch_size), strict=True):
            yield student(*self.fabric.to_device((z, y)))

    def diagnostics(self) -> dict[str, float]:
        loss: Any = self.model.feature_loss
        return (
            {} if loss is None else {"max |PᵀP - I|": vk.diagnostics.orthogonality_error(loss.projection.weight).item()}
        )

    def pictures(self, student: nn.Module, folder: Path) -> None:
        """A grid of samples of fixed latents, one class per column where the generator knows classes."""
        count, classes = ROWS * COLUMNS, self.images.shape.classes
        latents = torch.randn(count, self.config.student.latent, generator=generator(self.seed, PICTURE))
        labels = torch.arange(count) % COLUMNS % classes
        save_grid(student(*self.fabric.to_device((latents, labels))), folder / f"samples-{self.finished:06d}.png")

    def example(self) -> tuple[Tensor, ...]:
        return torch.zeros(2, self.config.student.latent), torch.zeros(2, dtype=torch.long)


def save_grid(images: Tensor, path: Path) -> None:  # (N, C, H, W) from -1 to 1
    from PIL import Image

    larger = math.ceil(SHOWN_SIZE / images.shape[-1])
    images = data.as_bytes(images).cpu().repeat_interleave(larger, 2).repeat_interleave(larger, 3)
    framed = F.pad(images, (1, 1, 1, 1), value=128).expand(-1, 3, -1, -1)
    n, _, h, w = framed.shape
    grid = framed.view(n // COLUMNS, COLUMNS, 3, h, w).permute(0, 3, 1, 4, 2).reshape(n // COLUMNS * h, COLUMNS * w, 3)
    file = io.BytesIO()
    Image.fromarray(grid.numpy()).save(file, format="PNG")
    runs.write_atomically(path, lambda out: out.write(file.getvalue()))


def projection_of(config: Config, student_dim: Any, teacher_dim: Any, group: Any) -> nn.Module:
    """The feature loss of this arm. Whitened targets come so from the teacher: nothing is left to normalise."""
    d = config.distill
    normalization = "none" if d.normalization == "whiten" else d.normalization
    return make_feature_loss(
        d.projection, student_dim, teacher_dim, scale=d.scale, normalization=normalization, beta=d.beta,
        eps=d.eps or 1e-5, process_group=group,
    )  # fmt: skip


# ---- teacher and judge -----------------------------------------------------------------------------------------------


class ClassifierTraining(Training):
    """A classifier learns the labels of images: the bundled teacher those of the pool, the judge the held-out ones."""

    def __init__(
        self,
        config: Config,
        seed: int,
        shape: models.Shape,
        learn: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        fabric: Any,
    ) -> None:
        self.seed, self.learn, self.test, self.fabric, t = seed, learn, test, fabric, config.teacher
        optim = dataclasses.replace(
            config.optim, lr=t.lr, min_lr=0.0, betas=(0.9, 0.999), weight_decay=0.05, warmup=0.1, schedule="cosine",
            steps=t.steps, epochs=0.0, batch_size=t.batch_size, ema=0.0,
        )  # fmt: skip
        classifier = models.Classifier(t.widths, shape)
        super().__init__(Labelled(classifier), classifier, optim, t.steps)

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.learn
        for step in itertools.count(start):
            draw = generator(self.seed, step, CLASSIFIER)
            rows = torch.randint(len(labels), (self.optim.batch_size,), generator=draw)
            rows = rows[self.fabric.global_rank :: self.fabric.world_size]
            yield self.fabric.to_device((data.as_float(images[rows]), labels[rows]))

    def evaluate(self, student: nn.Module) -> dict[str, float]:
        images, labels = self.test
        right = 0
        for part, answers in zip(images.split(teachers.AT_ONCE), labels.split(teachers.AT_ONCE), strict=True):
            found = student(self.fabric.to_device(data.as_float(part))).argmax(1).cpu()
            right += (found == answers).sum().item()
        return {"accuracy": 100 * right / len(labels)}


class Labelled(nn.Module):
    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"total": F.cross_entropy(self.classifier(batch[0]), batch[1], label_smoothing=0.1)}


def open_teacher(config: Config, shape: models.Shape, folder: Path, fabric: Any) -> Any:
    return fabric.to_device(teachers.make_encoder(config.teacher, shape, str(folder / "teacher.safetensors")))


def open_judge(config: Config, images: data.Images, folder: Path, fabric: Any) -> metrics.FrechetDistance:
    """Measures against the held-out images, of which every rank reads its share."""
    real = images.held_out[fabric.global_rank :: fabric.world_size].split(config.metric.batch_size)
    if config.metric.features == "inception":
        features = metrics.inception(config.metric.weights, config.metric.download, fabric)
        return metrics.FrechetDistance(real, fabric, features)
    classifier = models.Classifier(config.teacher.widths, images.shape).requires_grad_(False).eval()
    runs.load_state(classifier, runs.load_safetensors(folder / JUDGE), str(folder / JUDGE))
    return metrics.FrechetDistance(real, fabric, metrics.features_of(fabric.to_device(classifier)))


# ---- what the engine calls -------------------------------------------------------------------------------------------


def train_teacher(config: Config, seed: int, folder: Path, context: Context) -> dict[str, Any]:
    """Train the seed's classifiers where they are needed, and measure what whitening the teacher takes."""
    images = data.open_images(config.data, seed)
    models.check_sizes(config, images.shape)
    found: dict[str, Any] = {}
    pool, held_out = (images.pool, images.pool_labels), (images.held_out, images.held_out_labels)
    run = dataclasses.replace(config.run, eval_every=0, picture_every=0, tensorboard=False)
    if config.teacher.name == "classifier":
        training = ClassifierTraining(config, seed, images.shape, pool, held_out, context.fabric)
        result = fit(training, run, context, weights="teacher.safetensors")
        found = {name: result[name] for name in ("accuracy", "seconds", "cpu_seconds")}
    if config.metric.features == "classifier":
        training = ClassifierTraining(config, seed, images.shape, held_out, pool, context.fabric)
        judge = dataclasses.replace(context, folder=folder / "judge")
        found["judge_accuracy"] = fit(training, run, judge, weights=JUDGE)["accuracy"]
    encoder = open_teacher(config, images.shape, folder, context.fabric)
    statistics = teachers.measure(encoder, images, config.distill.statistics, context.fabric)
    if context.fabric.is_global_zero:
        runs.save_safetensors(folder / "statistics.safetensors", statistics)
    context.fabric.barrier()
    copies = images.pool[images.seen[context.fabric.global_rank :: context.fabric.world_size]]
    distance = open_judge(config, images, folder / "judge", context.fabric)(copies.split(config.metric.batch_size))
    return found | {"distance_of_the_training_images": distance}


def build(config: Config, seed: int, teacher_folder: Path | None, context: Context) -> Generation:
    return Generation(config, seed, teacher_folder, context)


def describe(config: Config) -> dict[str, Any]:
    """Sizes and shapes of the networks; of a folder it counts the classes."""
    shape = data.shape_of(config.data)
    student, discriminator = models.make_pair(config, shape)
    found: dict[str, Any] = {
        "images": [shape.channels, shape.size, shape.size], "classes": shape.classes,
        "generator": {"name": config.student.name, "parameters": size(student), "latent": config.student.latent},
        "discriminator": {"parameters": size(discriminator), "features": discriminator.num_features},
    }  # fmt: skip
    if config.distill.weight:
        encoder = teachers.make_encoder(config.teacher, shape, empty=True)
        found["teacher"] = {
            "name": config.teacher.name, "parameters": size(encoder), "features": encoder.num_features,
            "images enlarged to": getattr(encoder, "size", shape.size),
        }  # fmt: skip
        found["projection (teacher, discriminator)"] = [encoder.num_features, discriminator.num_features]
    o = config.optim
    return found | {
        "steps": o.steps or f"{o.epochs:g} epochs", "images per discriminator step": o.batch_size,
        "discriminator steps per step": o.discriminator_steps,
    }  # fmt: skip


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
