"""A whole training step, and what the feature loss adds to it: DeiT-Ti taught by RegNetY-160 on a GPU, small models of
the same kinds on a CPU; timm's, with random weights, on random images.

    pytest benchmarks/bench_training_step.py --benchmark-only        a table, and records
    python -m benchmarks.bench_training_step [-k NAME]               the records alone, without pytest

Forward, backward and AdamW. The candidates share the models, compiled one by one on a GPU, in channels-last and under
bfloat16 autocast there; the learning rate is 0, so that every step meets the same weights.

    student alone          cross-entropy
    no feature loss        and the teacher's forward pass and logits: what is distilled without features
    vkd_kernels            and OrthoProjLoss
    composition            and what a user would write in its place

`pooled` compares the mean of the student's patch tokens with the mean of the teacher's map, `token` every patch token
with the teacher's map resampled to as many positions.
"""

import dataclasses
import functools
import importlib.util
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import vkd_kernels as vk
from benchmarks import floors, harness
from benchmarks.bench_ortho_proj_loss import Composition

# The sums of losses of the same weights: 16-bit features on a GPU, whose rounding the losses share but not its order.
LIMITS = {"float32": {"loss": 1e-5}, "bfloat16": {"loss": 2e-3}}
LAYOUT = {"cpu": torch.contiguous_format, "cuda": torch.channels_last}
NAMES = ("student alone", "no feature loss", "vkd_kernels", "composition")


class Size(NamedTuple):
    student: str
    teacher: str
    student_options: tuple[tuple[str, int], ...]
    image: int
    batch: int
    classes: int


CPU_SIZE = Size("deit_tiny_patch16_224", "regnety_002", (("depth", 2),), 64, 32, 10)
GPU_SIZE = Size("deit_tiny_patch16_224", "regnety_160", (), 224, 512, 1000)


def models(size: Size):
    """(student, teacher)"""
    import timm

    student = timm.create_model(
        size.student, img_size=size.image, num_classes=size.classes, **dict(size.student_options)
    )
    return student, timm.create_model(size.teacher, num_classes=size.classes).eval().requires_grad_(False)


@functools.cache
def models_on(device: str, size: Size):
    """(student, teacher, their forward_features, compiled on a GPU), the same for every case."""
    torch.manual_seed(0)
    student, teacher = (model.to(device, memory_format=LAYOUT[device]) for model in models(size))
    compiled = torch.compile if device == "cuda" else lambda function: function
    return student, teacher, compiled(student.forward_features), compiled(teacher.forward_features)


def forward_flops(model, image: int) -> int:
    """Of one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, image, image, device="meta"))
    return counter.get_total_flops()


class Setting:
    """Models, images and the parts of a step, shared by the candidates of a case."""

    def __init__(self, size: Size, kind: str, device: str, seed: int = 0):
        self.kind, self.device = kind, device
        self.student, self.teacher, self.tokens, self.map = models_on(device, size)
        torch.manual_seed(seed)
        images = torch.randn(size.batch, 3, size.image, size.image, device=device)
        self.images = images.to(memory_format=LAYOUT[device])
        self.labels = torch.randint(size.classes, (size.batch,), device=device)
        s, t = self.student.num_features, self.teacher.num_features
        self.vkd = vk.OrthoProjLoss(s, t, device=device)
        self.composition = Composition(s, t).to(device)
        with torch.no_grad():
            self.composition.projection.weight = self.vkd.projection.weight

    def loss(self, name: str, feature_loss=None) -> torch.Tensor:
        """The loss of one step of the candidate."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            tokens = self.tokens(self.images)
            logits = self.student.forward_head(tokens)
            loss = F.cross_entropy(logits, self.labels)
            if name == "student alone":
                return loss
            with torch.no_grad():
                features = self.map(self.images)
                targets = self.teacher.forward_head(features).softmax(-1)
            loss = loss + F.cross_entropy(logits, targets)
            return loss if feature_loss is None else loss + feature_loss(*self.rows(tokens, features))

    def rows(self, tokens, features):
        """(student's rows, teacher's rows) of tokens (N, 1 + H W, S) and a map (N, T, h, w)."""
        tokens = tokens[:, self.student.num_prefix_tokens :]
        if self.kind == "pooled":
            return tokens.mean(1), features.mean((2, 3))
        side = round(tokens.shape[1] ** 0.5)
        features = F.interpolate(features, size=(side, side), mode="bilinear", antialias=False)
        return tokens, features.permute(0, 2, 3, 1).flatten(1, 2)

    def truth(self) -> dict[str, float]:
        """Each candidate's loss, the feature loss by its definition in float64."""

        def exactly(student, teacher):
            weight = self.vkd.projection.weight.double()
            return vk.functional.ortho_proj_loss(student.double(), teacher.double(), weight, backend="torch")

        # With gradients, as the candidates: another graph would be compiled otherwise.
        return {name: self.loss(name, exactly if name in NAMES[2:] else None).item() for name in NAMES}


def calls(name: str, setting: Setting) -> harness.Calls:
    feature_loss = {"vkd_kernels": setting.vkd, "composition": setting.composition}.get(name)
    modules = [setting.student] if feature_loss is None else [setting.student, feature_loss]
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.05)

    def backward(loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return harness.Calls(lambda: setting.loss(name, feature_loss), backward)


def check(name, truth, output, gradients):
    return {"loss": abs(output.item() - truth[name]) / abs(truth[name])}


def case_name(size: Size, kind: str) -> str:
    return f"{kind} {size.student} from {size.teacher}, {size.batch} images"


def step_case(size: Size, kind: str, device: str) -> harness.Case:
    missing = None if importlib.util.find_spec("timm") else "timm is not installed"
    dtype = "bfloat16" if device == "cuda" else "float32"
    rows, flops, s, t = 0, 0, 0, 0
    if not missing:
        with torch.device("meta"):
            student, teacher = models(size)
        s, t = student.num_features, teacher.num_features
        rows = size.batch * (student.patch_embed.num_patches if kind == "token" else 1)
        flops = size.batch * (3 * forward_flops(student, size.image) + forward_flops(teacher, size.image))
        flops += floors.loss_cost(rows, s, t, 2).flops
    return harness.Case(
        name=case_name(size, kind),
        parameters={"kind": kind, "n": rows, "s": s, "t": t, "image": size.image, "batch": size.batch},
        dtype=dtype,
        cost=floors.Cost(flops, 0),  # of the models' products, the student's three times: the bytes are not counted
        inputs=lambda seed: None if missing else Setting(size, kind, device, seed),
        input_bytes=1 << 62,  # one set of inputs: a step goes through far more memory than the L2 holds
        candidates=[
            harness.Candidate(
                name, functools.partial(calls, name), functools.partial(check, name), missing, passes=("both",)
            )
            for name in NAMES
        ],
        limits=LIMITS[dtype],
        passes=("both",),
        has_shares=False,  # the student alone has no teacher
        truth=lambda setting: None if missing else setting.truth(),
    )


def dtypes(device):
    return (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)


def cases(device, rehearse=False) -> list[harness.Case]:
    """`rehearse`: the GPU's pooled case by name, small, on a CPU."""
    if rehearse:
        tiny = step_case(CPU_SIZE._replace(batch=2), "pooled", "cpu")
        return [dataclasses.replace(tiny, name=case_name(GPU_SIZE, "pooled"))]
    size = GPU_SIZE if device == "cuda" else CPU_SIZE
    return [step_case(size, kind, device) for kind in ("pooled", "token")]


def test_training_step(measured, case, candidate, which):
    measured(case, candidate, which)


if __name__ == "__main__":
    sys.exit(harness.main("training_step", cases, dtypes))
