"""The frozen teacher: its weights, and what it says of a batch, computed as batches come or read from disk."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch

from .. import runs
from ..config import OptionError
from ..engine import Context
from . import losses, models
from .data import Data, Samples

CACHE_IN_RUN = "auto"


class Teacher:
    """`teacher(samples)` -> logits (N, classes) and features, (N, T) or (N, positions, T), on this rank's device.

    `folder` is where it was trained, if it was, and where the answers to fixed views are kept unless `teacher.cache`
    names another place. They are computed when first asked for, once for all arms.
    """

    def __init__(self, config: Any, data: Data, folder: Path, context: Context) -> None:
        self.config, self.data, self.context, self.fabric = config, data, context, context.fabric
        self.weights = config.teacher.weights or (str(folder / "teacher.safetensors") if trained_here(config) else "")
        cache = config.teacher.cache
        if cache not in (None, CACHE_IN_RUN) and data.fresh:
            raise OptionError(f"teacher.cache: {cache} would hold answers to other images than are shown: {data.fresh}")
        self.cache = None if cache is None or data.fresh else folder if cache == CACHE_IN_RUN else Path(cache)

    @torch.no_grad()
    def __call__(self, samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
        if self.cache is None or samples.rows is None:
            return self.answer(self.fabric.to_device(samples.images))
        found = self.stored[samples.rows.numpy()]
        logits, features = (torch.from_numpy(numpy.ascontiguousarray(found[name])) for name in found.dtype.names)
        return self.fabric.to_device((logits, features))

    def answer(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with self.fabric.autocast():
            tokens, logits, _ = models.run(self.model, images)
            return logits, losses.teacher_features(tokens, self.config.distill)

    @cached_property
    def model(self) -> models.Model:
        model = models.make_teacher(self.config.teacher, models.shape_of(self.data), self.weights)
        return self.fabric.to_device(model.requires_grad_(False).eval())

    @cached_property
    def stored(self) -> numpy.ndarray:  # (views x images,), a record of logits and features each; read page by page
        """The answers to every fixed view. Their file is named after all that they depend on."""
        assert self.cache is not None
        path = self.cache / f"cache-{self.fingerprint()}.npy"
        if not path.exists() and self.fabric.is_global_zero:
            runs.write_atomically(path, self.write_answers)
        self.fabric.barrier()
        try:
            return numpy.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise runs.RunError(f"cannot read {path} ({error}): delete this file to have it made again") from error

    @torch.no_grad()
    def write_answers(self, file: BinaryIO) -> None:
        rows = self.data.views * self.data.images
        for number, images in enumerate(self.data.every_view()):
            answers = [x.float().cpu().numpy() for x in self.answer(self.fabric.to_device(images))]
            names = zip(("logits", "features"), answers, strict=True)
            kind = numpy.dtype([(name, answer.dtype, answer.shape[1:]) for name, answer in names])
            if number == 0:
                header = {"descr": numpy.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (rows,)}
                numpy.lib.format.write_array_header_1_0(file, header)
            records = numpy.empty(len(images), kind)
            records["logits"], records["features"] = answers
            file.write(records.tobytes())

    def fingerprint(self) -> str:
        t, distill = self.config.teacher, self.config.distill
        digest = hashlib.sha256(repr((t.name, t.classes, distill.features, self.config.optim.precision)).encode())
        if self.weights:
            with open(self.weights, "rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
        digest.update(self.data.fingerprint().encode())
        return digest.hexdigest()[:16]


def trained_here(config: Any) -> bool:
    """Whether the teacher is trained by this run; an error where its weights come from nowhere."""
    t = config.teacher
    if t.weights or t.pretrained:
        return False
    if not t.steps:
        raise OptionError(
            "teacher.weights: give a file with the teacher's weights, or teacher.pretrained=true to have timm fetch "
            "them, or teacher.steps=N to train it here"
        )
    return True
