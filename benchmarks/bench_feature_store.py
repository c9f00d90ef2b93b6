"""A step of dense distillation with a live teacher, and with its features from a store: a small MobileNetV3 taught by
DINOv2's ViT-S/14, the smallest of its kind; timm's models with random weights, random images of 224 x 224, on a CPU.

    pytest benchmarks/bench_feature_store.py --benchmark-only        a table, and a record
    python -m benchmarks.bench_feature_store                         the record alone, without pytest

Forward, backward and AdamW. The teacher's patch tokens, resampled from 16 x 16 to the student's 14 x 14 positions, are
compared with the student's map of stride 16. The learning rate is 0, so that every step meets the same weights.

    live teacher           FeatureDistiller(student, teacher, pairs)
    store                  FeatureDistiller(student, store, pairs): float16 features of the batch's images by their
                           indices, drawn anew for every step, from files in the page cache
    student alone          the student's forward and backward pass, with no teacher and no loss to speak of
"""

import functools
import importlib.util
import sys
import tempfile
from typing import NamedTuple

import torch

import vkd_kernels as vk
from benchmarks import floors, harness
from benchmarks.bench_training_step import forward_flops

LIMITS = {"loss": 1e-3}  # float16 features beside float32 ones
NAMES = ("live teacher", "store", "student alone")


class Size(NamedTuple):
    student: str
    teacher: str
    tap: str  # of the student: a map of stride 16
    teacher_options: tuple[tuple[str, int], ...]
    image: int
    batch: int
    stored: int  # images in the store


CPU_SIZE = Size(
    student="mobilenetv3_small_100",
    teacher="vit_small_patch14_dinov2",
    tap="blocks.3",
    teacher_options=(),
    image=224,
    batch=16,
    stored=64,
)


def models(size: Size) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(student, teacher)"""
    import timm

    teacher = timm.create_model(size.teacher, img_size=size.image, num_classes=0, **dict(size.teacher_options))
    return timm.create_model(size.student, num_classes=0), teacher.eval().requires_grad_(False)


class Setting:
    """The images, the store of all their features, and one distiller for each source of the teacher's side."""

    def __init__(self, size: Size, seed: int = 0):
        torch.manual_seed(seed)
        self.size = size
        self.student, teacher = models(size)
        self.images = torch.randn(size.stored, 3, size.image, size.image)
        pair = vk.Pair(
            student=size.tap,
            student_pool="spatial",
            teacher="norm",
            teacher_pool="tokens",
            teacher_skip=teacher.num_prefix_tokens,
            resample="teacher",
        )
        self.folder = tempfile.TemporaryDirectory()
        store = vk.FeatureStore.build(self.folder.name, teacher, self.images, [pair], batch_size=16, progress=False)
        self.distillers = {
            name: vk.FeatureDistiller(self.student, source, [pair], example_input=self.images[:2])
            for name, source in (("live teacher", teacher), ("store", store))
        }
        self.distillers["store"].load_state_dict(self.distillers["live teacher"].state_dict())
        self.generators = {name: torch.Generator().manual_seed(seed) for name in (*NAMES, "truth")}

    def loss(self, name: str) -> torch.Tensor:
        """The loss of the next batch of the candidate: all go through the same batches."""
        indices = torch.randperm(self.size.stored, generator=self.generators[name])[: self.size.batch]
        images = self.images[indices]
        if name == "student alone":
            return self.student(images).square().mean()
        if name == "store":
            return self.distillers[name](images, indices=indices)[1]["total"]
        return self.distillers["live teacher"](images)[1]["total"]


def calls(name: str, setting: Setting) -> harness.Calls:
    module = setting.student if name == "student alone" else setting.distillers[name]
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.05)

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return harness.Calls(lambda: setting.loss(name), backward)


def check(truth: float, output: torch.Tensor, gradients: object) -> dict[str, float]:
    return {"loss": abs(output.item() - truth) / abs(truth)}


def store_case(size: Size) -> harness.Case:
    missing = None if importlib.util.find_spec("timm") else "timm is not installed"
    flops, rows = 0, 0
    if not missing:
        with torch.device("meta"):
            student, teacher = models(size)
        flops = size.batch * (3 * forward_flops(student, size.image) + forward_flops(teacher, size.image))
        rows = size.batch * (size.image // 16) ** 2
    return harness.Case(
        name=f"{size.student} from {size.teacher}, {size.batch} images",
        parameters={"n": rows, "image": size.image, "batch": size.batch, "stored": size.stored},
        dtype="float32",
        cost=floors.Cost(flops, 0),  # of the models' products, the student's three times: the bytes are not counted
        inputs=lambda seed: None if missing else Setting(size, seed),
        input_bytes=1 << 62,  # one set of inputs
        candidates=[
            harness.Candidate(
                name,
                functools.partial(calls, name),
                None if name == "student alone" else check,
                missing,
                passes=("both",),
            )
            for name in NAMES
        ],
        limits=LIMITS,
        passes=("both",),
        has_shares=False,  # only the live teacher runs
        truth=lambda setting: None if missing else setting.loss("truth").item(),
    )


def dtypes(device: str) -> tuple[torch.dtype, ...]:
    return (torch.float32,)


def cases(device: str) -> list[harness.Case]:
    return [store_case(CPU_SIZE)] if device == "cpu" else []


def test_feature_store(measured, case, candidate, which):  # type: ignore[no-untyped-def]
    measured(case, candidate, which)


if __name__ == "__main__":
    sys.exit(harness.main("feature_store", cases, dtypes))
