"""Image generation from little data: a GAN whose discriminator is taught by a frozen teacher (V_kD, section 4.3).

    vkd distill generation                                              digits, a classifier as teacher, a small GAN
    vkd distill generation --recipe fashion-mnist data.root=...         the same on a thousand garments
    vkd distill generation --recipe vkd-biggan-cifar100-20pct data.root=... teacher.weights=...

    discriminator:  ADV(D(real), D(fake)) + weight * smooth_l1(X P^T, whiten(Y))
    generator:      ADV(D(fake))

X are the discriminator's pooled features, Y the teacher's, of the same images, real and generated ones. The feature
loss trains the discriminator and its projection. None of it reaches the generator, which learns of the teacher only
through what the discriminator has learned: that is KD-DLGAN's training, with the orthogonal feature loss in the place
of its text terms, as the author of V_kD describes it (docs/generation.md).

Without options: for every seed a new split of the digits, a teacher trained on all training images, and one GAN per arm
that sees a tenth of them, all from the same initial weights, batches and latents. What is compared is the generator's
moving average: the Fréchet distance between its images and the held-out ones, in the features of a classifier that was
trained on these.
"""

from __future__ import annotations

import importlib
import io
import itertools
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn
from torchvision.utils import save_image

import vkd_kernels as vk

from . import gan, images, models, runs
from .config import Channels, Ints, OptionError, Section, UserPath, Words, option, section
from .gan import Discriminator, Generator, as_bytes, as_float
from .models import Shape
from .pictures import AT_ONCE, Pictures, classifier_features, make_encoder, train_classifier
from .task import Arm, DistillConfig, Metric, Optim, Run, Task, generator, parameter_groups

TRIAL = "tried on the digits"
BATCH, _, SAMPLES, PICTURE, FLIP = range(5)  # what a draw is for, beside the seed and the step
SAMPLES_AT_ONCE, SHOWN = 100, 80  # of the generator: for the distance, and in a picture


class Data(images.Source):
    fraction: float = option(0.1, "share of the training images that the GAN sees", source=TRIAL, gt=0, le=1)
    size: int = option(8, "side of the images in pixels: 8, 16, 32, 64, ...", ge=8)
    channels: Channels = option(1, "channels of the images: 3 for color")


class Augment(Section):
    """DiffAugment, of real and generated images alike; and mirroring, of real ones alone."""

    policy: Words = option(("translation",), "kinds of it: translation, cutout", source=TRIAL)
    background: float = option(-1.0, "what these put in, from -1, black, to 1; 0: gray, as DiffAugment", ge=-1, le=1)
    flip: float = option(0.0, "probability that a real image is mirrored", ge=0, le=1)


class Teacher(Section):
    name: str = option("classifier", "classifier (trained here), or an image encoder of timm, such as CLIP's")
    weights: UserPath = option("", "its weights: a .safetensors or .pth file")
    pretrained: bool = option(False, "let timm download the weights")
    features: Literal["pooled", "head"] = option("pooled", "of an encoder of timm; head: CLIP's embedding")
    widths: Ints = option((24, 48, 96), "channels of the classifier's convolutions", source=TRIAL, min_length=1)
    steps: int = option(300, "training steps of the classifier", ge=1)
    batch_size: int = option(64, "images per training step of the classifier", ge=2)
    lr: float = option(2e-3, "peak learning rate of the classifier", gt=0)


class Student(Section):
    """Generator and discriminator: BigGAN's."""

    latent: int = option(32, "channels of the latents", source=TRIAL, ge=1)
    width: int = option(32, "channels of both networks", source=TRIAL, ge=8)


class Distill(DistillConfig):
    statistics: Literal["pool", "gan"] = option("pool", "of whitening: all training images, or the GAN's", source=TRIAL)
    method: Literal["zca", "cholesky", "pca"] = option("zca", "method of whitening", source=TRIAL)
    eps: float = option(0.0, "eps of the normalization; 0: 1e-5, or 0.05 for whiten", source=TRIAL, ge=0, lt=1)


class MetricConfig(Section):
    features: Literal["classifier", "inception"] = option("classifier", "of one of held-out images; inception: FID")
    weights: UserPath = option("", "file with torch-fidelity's weights of Inception")
    download: bool = option(False, "let torch-fidelity download them")
    samples: int = option(2000, "images to generate for the distance", source=TRIAL, ge=2)


class GanOptim(Optim):
    """Adam for both networks; `lr` is the generator's."""

    discriminator_lr: float = option(1e-3, "learning rate of discriminator and projection", source=TRIAL, gt=0)
    discriminator_steps: int = option(1, "discriminator steps per generator step", source=TRIAL, ge=1)


class Config(Section):
    data: Data = section(Data)
    augment: Augment = section(Augment)
    teacher: Teacher = section(Teacher)
    student: Student = section(Student)
    distill: Distill = section(Distill, source=TRIAL, normalization="whiten", weight=5.0)
    metric: MetricConfig = section(MetricConfig)
    optim: GanOptim = section(
        GanOptim,
        source=TRIAL,
        lr=5e-4,
        betas=(0.5, 0.99),
        weight_decay=0.0,
        schedule="constant",
        steps=1500,
        batch_size=32,
        ema=0.99,
    )
    run: Run = section(Run, accelerator="cpu", eval_every=250, save_every=500)

    @model_validator(mode="after")
    def _checked(self) -> Config:
        if unknown := {*self.augment.policy} - {"translation", "cutout"}:
            raise OptionError(f"augment.policy: unknown {min(unknown)!r}; there are translation and cutout")
        images.check_bundled(self.data, "data")
        if self.data.size.bit_count() != 1:
            raise OptionError(f"data.size: the networks make images of 8, 16, 32, ... pixels; got {self.data.size}")
        return self


class DistilledGAN(nn.Module):
    """Generator, discriminator and projection: `forward(real, labels)` -> the discriminator's losses, `forward()` ->
    the generator's. The engine has seeded what they draw with (seed, step, rank).

    They are in one module so that data-parallel wrapping reduces all gradients; in either kind of step the parameters
    of the other network get none. `teacher` (images -> targets (N, T)) is frozen and no part of it.
    """

    def __init__(
        self, config: Any, shape: Shape, student: nn.Module, discriminator: Any, teacher: Any = None, **loss: Any
    ) -> None:
        super().__init__()
        self.config, self.classes, self.frozen = config, shape.classes, (teacher,)
        self.generator, self.discriminator, self.feature_loss = student, discriminator, None
        if teacher is not None:
            self.feature_loss = config.distill.feature_loss(discriminator.num_features, **loss)

    def forward(self, real: Tensor | None = None, labels: Any = None, *, count: int) -> dict[str, Tensor]:
        """`count`: images to generate."""
        device = next(self.generator.parameters()).device
        latents = torch.randn(count, self.config.student.latent, device=device)
        fake_labels = torch.randint(self.classes, (count,), device=device)
        a = self.config.augment
        if real is None:
            fake = gan.diff_augment(self.generator(latents, fake_labels), a.policy, a.background)
            logits = self.discriminator(fake, fake_labels).logits.float()
            return {"generator": -logits.mean()}
        with torch.no_grad():
            fake = self.generator(latents, fake_labels)
        pictures = gan.diff_augment(torch.cat([real, fake]), a.policy, a.background)  # the real ones first
        verdict = self.discriminator(pictures, torch.cat([labels, fake_labels]))
        of_real, of_fake = verdict.logits.float().chunk(2)
        total = F.relu(1 - of_real).mean() + F.relu(1 + of_fake).mean()
        losses = {"discriminator": total}
        if self.feature_loss is not None:
            with torch.no_grad():
                target = self.frozen[0](pictures)
            losses["features"] = self.feature_loss(verdict.features, target)
            total = total + self.config.distill.weight * losses["features"]
        return {**losses, "total": total}


class Generation(Task):
    title = "Image generation from little data: a GAN whose discriminator is taught by a frozen teacher (V_kD)."
    Config = Config
    metric = Metric("frechet", "Fréchet distance", higher_is_better=False, digits=2)
    rate_option = "optim.lr or optim.discriminator_lr"
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
        return Pictures(self.config.data, self.seed)

    @property
    def images(self) -> int:
        return len(self.data.seen)

    @property
    def per_epoch(self) -> float:
        return self.images / self.optim.batch_size

    # ---- teacher and judge -------------------------------------------------------------------------------------------

    def train_teacher(self) -> dict[str, Any]:
        """Train the seed's classifiers where they are needed, and measure what whitening the teacher takes."""
        c, numbers, (pool, held_out) = self.config, dict[str, Any](), self.data.parts
        wanted = {"teacher": (pool, held_out)} if c.teacher.name == "classifier" and c.distill.weight else {}
        wanted |= {"judge": (held_out, pool)} if c.metric.features == "classifier" else {}
        for name, (learn, test) in wanted.items():
            data = (learn, test, self.data.shape)
            classifier, numbers[f"{name}_accuracy"] = train_classifier(c.teacher, self.seed, data, self.fabric.device)
            self.save(f"{name}.safetensors", classifier.state_dict())
        if c.distill.weight:
            self.save(self.whitening.name, self.measured_whitening())
        copies = self.data.pool[self.data.seen[self.mine]].split(SAMPLES_AT_ONCE)
        numbers["distance_of_the_training_images"] = self.distance(copies)
        return numbers

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        if self.fabric.is_global_zero:
            runs.save_safetensors(self.teacher_folder / name, tensors)
        self.fabric.barrier()

    @torch.no_grad()
    def measured_whitening(self) -> dict[str, Tensor]:
        """y -> y matrix + shift, by statistics over all training images: a batch with fewer images than channels has a
        singular covariance, and whitening by it would amplify rounding."""
        d, pool, features = self.config.distill, self.data.pool, list[Tensor]()
        for part in (pool[self.data.seen] if d.statistics == "gan" else pool).split(AT_ONCE):
            with self.fabric.autocast():
                features.append(self.encoder(self.fabric.to_device(as_float(part))).double().cpu())
        width = self.encoder.num_features
        whitening = vk.Whitening(width, method=d.method, eps=d.eps or 0.05, momentum=1.0)
        whitening(torch.cat(features))  # the first update takes the statistics over as they are
        shift = whitening.freeze()(torch.zeros(1, width, dtype=torch.float64))
        matrix = whitening(torch.eye(width, dtype=torch.float64)) - shift
        return {"matrix": matrix.float(), "shift": shift.float()}

    @property
    def teacher_folder(self) -> Path:
        return self.context.teacher or self.context.folder

    @property
    def whitening(self) -> Path:
        """The file of what `measured_whitening` gives with these options: an arm may have others than its run."""
        d = self.config.distill
        of_teacher = zlib.crc32(repr(self.config.teacher).encode())
        return self.teacher_folder / f"whitening-{of_teacher:08x}-{d.statistics}-{d.method}-{d.eps}.safetensors"

    @cached_property
    def encoder(self) -> Any:
        """The frozen teacher: images from -1 to 1 -> features."""
        weights = self.teacher_folder / "teacher.safetensors"
        return self.fabric.to_device(make_encoder(self.config.teacher, self.data.shape, weights))

    def target(self) -> Any:
        """images (N, C, H, W) -> what the discriminator's features are compared with (N, T): a constant."""
        if self.config.distill.normalization != "whiten":
            return lambda pictures: self.encoder(pictures).float()
        if not self.whitening.exists():  # every rank measures the same
            runs.save_safetensors(self.whitening, self.measured_whitening())
        w = self.fabric.to_device(runs.load_weights(self.whitening))

        def whitened(pictures: Tensor) -> Tensor:
            features = self.encoder(pictures).float()
            with torch.autocast(features.device.type, enabled=False):
                return torch.addmm(w["shift"], features, w["matrix"])

        return whitened

    @cached_property
    def judge(self) -> Any:
        """torchmetrics' Fréchet distance to the held-out images, of which every rank reads its share."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        m, network = self.config.metric, dict[str, Any](feature=2048)
        if m.weights:  # tensors alone: torch-fidelity would run what else a file holds
            runs.load_weights(Path(m.weights), "metric.weights")
        if m.features == "classifier":
            path = self.teacher_folder / "judge.safetensors"
            network["feature"] = classifier_features(self.config.teacher, self.data.shape, path)
        network["feature_extractor_weights_path"] = m.weights or None
        judge: Any = FrechetInceptionDistance(reset_real_features=False, **network).to(self.fabric.device)
        for part in self.data.held_out[self.mine].split(SAMPLES_AT_ONCE):
            self.measure(judge, part, real=True)
        return judge

    def measure(self, judge: Any, pictures: Tensor, *, real: bool) -> None:
        pictures = self.fabric.to_device(pictures)
        with torch.autocast(pictures.device.type, enabled=False):
            as_it_takes = as_bytes if self.config.metric.features == "inception" else as_float
            judge.update(as_it_takes(pictures), real=real)

    @torch.no_grad()
    def distance(self, pictures: Any) -> float:
        self.judge.reset()
        for part in pictures:
            self.measure(self.judge, part, real=False)
        return float(self.judge.compute())

    # ---- the GAN -----------------------------------------------------------------------------------------------------

    def make_student(self) -> nn.Module:
        return Generator(self.config.student.latent, self.config.student.width, self.data.shape)

    def make_model(self, student: nn.Module) -> nn.Module:
        c, shape = self.config, self.data.shape
        discriminator = Discriminator(c.student.width, shape)
        if not c.distill.weight:
            return DistilledGAN(c, shape, student, discriminator)
        loss = {"teacher_dim": self.encoder.num_features, "process_group": self.context.process_group}
        if c.distill.normalization == "whiten":  # such targets come so: nothing is left to normalize
            loss["normalization"] = "none"
        return DistilledGAN(c, shape, student, discriminator, self.target(), **loss)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam for each network; the projection trains with the discriminator."""
        o, m = self.optim, cast(Any, self.model)
        critics = [m.discriminator, *([m.feature_loss] if m.feature_loss is not None else [])]
        options: dict[str, Any] = {"betas": tuple(o.betas), "fused": True}
        of_generator, of_critics = (parameter_groups(x, o.weight_decay) for x in (m.generator, nn.ModuleList(critics)))
        return {
            "generator": torch.optim.Adam(of_generator, lr=o.lr, **options),
            "discriminator": torch.optim.Adam(of_critics, lr=self.config.optim.discriminator_lr, **options),
        }

    def batches(self, start: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Real images and their labels for every discriminator step of a step."""
        seen, flip = self.data.seen, self.config.augment.flip
        shape = (self.config.optim.discriminator_steps, self.optim.batch_size)
        for step in itertools.count(start):
            rows = seen[torch.randint(len(seen), shape, generator=generator(self.seed, step, BATCH))][:, self.mine]
            turned = torch.rand(shape, generator=generator(self.seed, step, FLIP))[:, self.mine] < flip
            real = as_float(self.data.pool[rows])  # (steps, N, C, H, W)
            real = torch.where(turned[..., None, None, None], real.flip(-1), real)
            yield self.fabric.to_device([*zip(real, self.data.labels[rows], strict=True)])

    def step(self, loop: Any, batch: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The discriminator's steps, then one of the generator through a discriminator that stays as it is."""
        losses: dict[str, Tensor] = {}
        for real, labels in batch:
            losses = loop.model(real, labels, count=len(real))
            self.fabric.backward(losses["total"])
            loop.apply("discriminator")
        discriminator: Any = self.model.discriminator
        discriminator.requires_grad_(False)
        losses = losses | loop.model(count=len(batch[0][0]))
        self.fabric.backward(losses["generator"])
        loop.apply("generator")
        discriminator.requires_grad_(True)
        return {name: loss.detach() for name, loss in losses.items() if name != "total"}

    def renew_buffers(self, average: nn.Module) -> None:
        gan.renew_spectral_norms(average)

    def evaluate(self, student: nn.Module) -> dict[str, float]:
        """Of latents that are the same at every evaluation and in every arm."""
        m = self.config.metric
        latents = torch.randn(m.samples, self.config.student.latent, generator=generator(self.seed, SAMPLES))
        labels = torch.arange(m.samples) % self.data.shape.classes
        parts = zip(latents[self.mine].split(SAMPLES_AT_ONCE), labels[self.mine].split(SAMPLES_AT_ONCE), strict=True)
        return {"frechet": self.distance(student(*self.fabric.to_device(part)) for part in parts)}

    def pictures(self, student: nn.Module, folder: Path) -> None:
        """A grid of samples of fixed latents, one class per column where the generator knows classes."""
        latents = torch.randn(SHOWN, self.config.student.latent, generator=generator(self.seed, PICTURE))
        labels = torch.arange(SHOWN) % 10 % self.data.shape.classes
        samples = student(*self.fabric.to_device((latents, labels)))
        image = io.BytesIO()
        save_image(samples, image, format="png", nrow=10, normalize=True, value_range=(-1, 1))
        runs.write_bytes(folder / "samples.png", image.getvalue())

    @classmethod
    def check(cls, config: Any) -> None:
        super().check(config)
        d, t, m = config.data, config.teacher, config.metric
        if config.distill.weight and t.name != "classifier" and not (t.weights or t.pretrained):
            raise OptionError(f"teacher.weights: give a file with those of {t.name}, or teacher.pretrained=true")
        given = {"weights": t.weights, "pretrained": t.pretrained, "features": t.features != "pooled"}
        if t.name == "classifier" and (ignored := [key for key, value in given.items() if value]):
            raise OptionError(
                f"teacher.{ignored[0]}: it has no effect on the classifier, which is trained here; leave it out, or "
                "name an encoder by teacher.name"
            )
        if m.weights and m.features != "inception":
            raise OptionError(f"metric.weights: {m.weights} has no effect without metric.features=inception")
        if m.features == "inception":
            if d.channels != 3:
                raise OptionError("metric.features: inception needs images of three channels")
            if not (m.weights or m.download):
                raise OptionError("metric.weights: give torch-fidelity's file of Inception, or metric.download=true")
            importlib.import_module("torch_fidelity")
        classes = images.open_images(d, 0)[2]
        if config.distill.weight:
            make_encoder(t, Shape(classes, d.size, d.channels), Path(), empty=True)
            if t.pretrained and not t.weights:
                models.fetch(t.name)
