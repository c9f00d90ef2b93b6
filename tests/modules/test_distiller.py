"""FeatureDistiller: taps, poolings, masks, projections, the logit loss; frozen teachers; the loops people have."""

import collections
import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import vkd_kernels as vk
from tests.helpers import processes
from vkd_kernels import projection


class ViT(nn.Module):
    """Tokens as timm's models have them: prefix tokens first, "norm" last, the head on the first token."""

    def __init__(self, width=6, prefix=1, classes=3):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 2, stride=2)
        self.cls_token = nn.Parameter(torch.randn(1, prefix, width))
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(2)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def no_weight_decay(self):
        return {"cls_token"}

    def forward(self, images):  # (N, 3, 8, 8)
        tokens = self.embed(images).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), tokens], 1)  # (N, prefix + 16, width)
        return self.head(self.norm(self.blocks(tokens))[:, 0])


class CNN(nn.Module):
    """Maps as torchvision's models have them, with batch norm's state and a change in place."""

    def __init__(self, width=10, classes=3, stride=2):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=stride, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(width, classes)

    def forward(self, images):
        return self.fc(self.relu(self.bn(self.conv(images))).mean((2, 3)))  # the map: (N, width, 4, 4)


class ModelOutput(collections.OrderedDict):
    """What Hugging Face's models return: entries by name, by attribute and by position."""

    __getattr__ = collections.OrderedDict.__getitem__


class Encoder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.layer = nn.GRU(width, width, batch_first=True)  # returns a tuple

    def forward(self, input_ids):
        states = self.layer(self.embedding(input_ids))[0]
        return ModelOutput(last_hidden_state=states, pooler_output=states[:, 0])


class TextModel(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.encoder = Encoder(width)
        self.classifier = nn.Linear(width, 3)

    def forward(self, input_ids, attention_mask=None):
        encoded = self.encoder(input_ids)
        return ModelOutput(logits=self.classifier(encoded.pooler_output))


TOKENS_TO_MAP = {
    "student": "norm", "student_pool": "mean_tokens", "student_skip": 1, "teacher": "relu",
    "teacher_pool": "spatial_mean",
}  # fmt: skip
IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def make(pairs=(TOKENS_TO_MAP,), student=None, teacher=None, **options):
    torch.manual_seed(0)
    options.setdefault("example_input", IMAGES[:1])
    return vk.FeatureDistiller(student or ViT(), teacher or CNN(), list(pairs), **options)


def outputs_of(model, names, *args):
    """The definition of a tap: hooks of the test's own."""
    found = {}
    handles = [
        model.get_submodule(n).register_forward_hook(lambda _, __, y, n=n: found.__setitem__(n, y)) for n in names
    ]
    model(*args)
    for handle in handles:
        handle.remove()
    return found


def hooks_on(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def loss_like(distiller, name, s, t, **options):
    """An OrthoProjLoss of its own with the projection of that pair."""
    module = vk.OrthoProjLoss(s, t, **options)
    module.projection.weight = distiller.projection(name).detach()
    return module


# -------------------------------------------------------------------------------------------------- poolings and masks

POOLED = {
    "class_token": lambda x: x[:, 0],
    "mean_tokens": lambda x: x[:, 2:].mean(1),
    "tokens": lambda x: x[:, 2:],
}


@pytest.mark.parametrize("pool", POOLED)
def test_token_poolings(pool):
    pair = {"student": "norm", "student_pool": pool, "student_skip": 2, "teacher": "norm", "teacher_pool": pool,
            "teacher_skip": 2, "name": "x"}  # fmt: skip
    distiller = make([pair], ViT(6, 2), ViT(9, 2))
    x = outputs_of(distiller.student, ["norm"], IMAGES)["norm"]
    y = outputs_of(distiller.teacher, ["norm"], IMAGES)["norm"]
    output, losses = distiller(IMAGES)
    torch.testing.assert_close(output, distiller.student(IMAGES))
    p = distiller.projection("x")
    expected = F.smooth_l1_loss(POOLED[pool](x) @ p.T, F.layer_norm(POOLED[pool](y), (9,)))
    torch.testing.assert_close(losses["x"], expected)
    torch.testing.assert_close(losses["total"], expected)


@pytest.mark.parametrize("pool", ["spatial_mean", "spatial", "function"])
def test_map_poolings(pool):
    hand = {"spatial_mean": lambda x: x.mean((2, 3)), "spatial": lambda x: x.permute(0, 2, 3, 1)}
    hand["function"] = lambda x: x.amax((2, 3))
    given = hand["function"] if pool == "function" else pool
    pair = {"student": "relu", "teacher": "relu", "student_pool": given, "teacher_pool": given}
    distiller = make([pair], CNN(4), CNN(10)).eval()
    x, y = (outputs_of(m, ["relu"], IMAGES)["relu"] for m in (distiller.student, distiller.teacher))
    expected = F.smooth_l1_loss(
        hand[pool](x) @ distiller.projection("relu->relu").T, F.layer_norm(hand[pool](y), (10,))
    )
    torch.testing.assert_close(distiller(IMAGES)[1]["relu->relu"], expected)


def test_models_of_pooled_features_tap_themselves():
    """timm's num_classes=0, an image tower: the output is the feature."""
    distiller = make([{"student": "", "teacher": "", "name": "x"}], ViT(classes=7), CNN(classes=12))
    expected = loss_like(distiller, "x", 7, 12)(distiller.student(IMAGES), distiller.teacher(IMAGES))
    torch.testing.assert_close(distiller(IMAGES)[1]["x"], expected)


def test_masked_means_and_samples():
    distiller = make()
    x = outputs_of(distiller.student, ["norm"], IMAGES)["norm"]
    y = outputs_of(distiller.teacher, ["relu"], IMAGES)["relu"]
    reference = loss_like(distiller, "norm->relu", 6, 10)
    keep = torch.rand(5, 17) > 0.5
    keep[2] = False  # no position left: no row
    keep[3, 0] = not keep[3, 0]  # the class token's place counts for nothing here
    weights = torch.rand(5, 4, 4)
    weights[4] = 0
    weights[:, 1] = 0
    pooled_x = torch.stack([a[1:][k[1:]].mean(0) for a, k in zip(x, keep, strict=True)])
    pooled_y = torch.einsum("nchw,nhw->nc", y, weights) / weights.sum((1, 2))[:, None]
    poison = torch.where(weights[:, None] == 0, torch.nan, 0)  # what is masked may be anything
    adding = distiller.teacher.relu.register_forward_hook(lambda _, __, out: out + poison)
    got = distiller(IMAGES, masks={"norm->relu": (keep, weights)})[1]["total"]
    adding.remove()
    torch.testing.assert_close(got, reference(pooled_x[[0, 1, 3]], pooled_y[[0, 1, 3]]))
    got = distiller(IMAGES, masks={"norm->relu": (keep, None)})[1]["total"]
    torch.testing.assert_close(got, reference(pooled_x[[0, 1, 3, 4]], y.mean((2, 3))[[0, 1, 3, 4]]))
    samples = torch.tensor([0.5, 0, 2, 0, 1])
    expected = reference(x[:, 1:].mean(1), y.mean((2, 3)), samples)
    torch.testing.assert_close(distiller(IMAGES, masks={"norm->relu": samples})[1]["total"], expected)


@pytest.mark.parametrize("per_sample", [False, True])
def test_masks_of_positions(per_sample):
    pair = {"student": "norm", "student_pool": "tokens", "student_skip": 1, "teacher": "norm",
            "teacher_pool": "tokens", "teacher_skip": 1, "name": "x"}  # fmt: skip
    distiller = make([pair], ViT(6), ViT(9))
    x, y = (outputs_of(m, ["norm"], IMAGES)["norm"][:, 1:] for m in (distiller.student, distiller.teacher))
    mask = torch.rand(5) if per_sample else torch.rand(5, 17)
    rows = mask[:, None].expand(5, 16) if per_sample else mask[:, 1:]
    expected = loss_like(distiller, "x", 6, 9)(x, y, rows)
    torch.testing.assert_close(distiller(IMAGES, masks={"x": mask})[1]["x"], expected)
    got = distiller(IMAGES, masks={"x": (mask, mask > 0.5)})[1]["x"]  # two masks: both must let a row through
    torch.testing.assert_close(got, loss_like(distiller, "x", 6, 9)(x, y, rows * (rows > 0.5)))


def test_a_fully_masked_batch_is_zero_with_zero_gradients():
    distiller = make(logit_weight=1.0)
    nothing = torch.zeros(5, dtype=torch.bool)
    _, losses = distiller(torch.full_like(IMAGES, torch.nan), masks={"norm->relu": nothing, "logits": nothing})
    assert losses["total"] == 0
    assert not any(g.any() for name, g in gradients(distiller, losses["total"]).items() if "projections" in name)


def test_text_models_with_attention_masks():
    """Entries of a tuple and of a Hugging Face output; one mask for both sides; logits found by name."""
    ids = torch.randint(11, (5, 7))
    attention = torch.arange(7) < torch.tensor([7, 3, 5, 1, 6])[:, None]
    tap = {"student": "encoder", "student_output": "last_hidden_state", "student_pool": "mean_tokens"}
    pairs = [
        {**tap, "teacher": "encoder", "teacher_output": 0, "teacher_pool": "mean_tokens", "name": "mean"},
        {**tap, "student": "encoder.layer", "student_output": 0, "student_pool": "tokens", "teacher": "encoder.layer",
         "teacher_output": 0, "teacher_pool": "tokens", "name": "tokens"},
        {**tap, "student_pool": "class_token", "teacher": "encoder", "teacher_output": "pooler_output", "name": "cls"},
    ]  # fmt: skip
    example = {"input_ids": ids[:1], "attention_mask": attention[:1]}
    distiller = make(pairs, TextModel(4), TextModel(8), example_input=example, logit_weight=1.0)
    masks = {"mean": attention, "tokens": attention}
    _, losses = distiller(input_ids=ids, attention_mask=attention, masks=masks)
    x = distiller.student.encoder(ids).last_hidden_state
    y = distiller.teacher.encoder(ids).last_hidden_state
    means = [torch.stack([a[m].mean(0) for a, m in zip(z, attention, strict=True)]) for z in (x, y)]
    torch.testing.assert_close(losses["mean"], loss_like(distiller, "mean", 4, 8)(*means))
    torch.testing.assert_close(losses["tokens"], loss_like(distiller, "tokens", 4, 8)(x[attention], y[attention]))
    torch.testing.assert_close(losses["cls"], loss_like(distiller, "cls", 4, 8)(x[:, 0], y[:, 0]))
    assert set(losses) == {"mean", "tokens", "cls", "logits", "total"}


@pytest.mark.parametrize("resample", ["student", "teacher"])
def test_maps_of_other_sizes_are_resampled_on_request(resample):
    pair = {"student": "conv", "teacher": "conv", "student_pool": "spatial", "teacher_pool": "spatial", "name": "x"}
    with pytest.raises(ValueError, match=r"\(1, 8, 8, 4\).*\(1, 4, 4, 10\).*resample="):
        make([pair], CNN(4, stride=1), CNN(10))
    models = CNN(4, stride=1), CNN(10)
    distiller = make([{**pair, "resample": resample}], *models).eval()
    x, y = (outputs_of(m, ["conv"], IMAGES)["conv"] for m in models)
    size = (4, 4) if resample == "student" else (8, 8)
    x, y = (F.interpolate(z, size, mode="bilinear", antialias=True).permute(0, 2, 3, 1) for z in (x, y))
    torch.testing.assert_close(distiller(IMAGES)[1]["x"], loss_like(distiller, "x", 4, 10)(x, y))


# -------------------------------------------------------------------------------------- several pairs, one Cayley call

SEVERAL = [
    {**TOKENS_TO_MAP, "name": "a", "weight": 2.0, "loss": "mse", "scale": "match"},
    {**TOKENS_TO_MAP, "name": "b", "student": "blocks.1", "weight": 0.5, "normalization": "batch_norm", "eps": 1e-2},
    {**TOKENS_TO_MAP, "name": "c", "student": "embed", "student_pool": "spatial_mean", "teacher": "conv",
     "scale": "learned", "weight": 0.0},
    {**TOKENS_TO_MAP, "name": "wide", "student_pool": "class_token", "teacher": "fc", "teacher_pool": None,
     "beta": 0.5, "scale": 3.0},
]  # fmt: skip
OPTIONS = {
    "a": {"loss": "mse", "scale": "match"}, "b": {"normalization": "batch_norm", "eps": 1e-2},
    "c": {"scale": "learned"}, "wide": {"beta": 0.5, "scale": 3.0},
}  # fmt: skip


def test_several_pairs_equal_separate_losses(monkeypatch):
    calls = []
    monkeypatch.setattr(projection, "cayley", lambda w: calls.append(tuple(w.shape)) or vk.cayley(w))
    distiller = make(SEVERAL, logit_weight=0.3, temperature=2.0)
    assert set(distiller.state_dict()) - {f"student.{n}" for n in distiller.student.state_dict()} == {
        "projections.10x6.unconstrained", "projections.10x6.map.signs", "projections.3x6.unconstrained",
        "projections.3x6.map.signs", "scales.2",
    }  # fmt: skip
    losses = distiller(IMAGES)[1]
    assert sorted(calls) == [(1, 3, 6), (3, 10, 6)]  # one call per shape: T = 10 three times, T = 3 < S once

    student, teacher = copy.deepcopy(distiller.student), distiller.teacher
    modules = {n: loss_like(distiller, n, 6, 3 if n == "wide" else 10, **options) for n, options in OPTIONS.items()}
    x = outputs_of(student, ["norm", "blocks.1", "embed"], IMAGES)
    y = outputs_of(teacher, ["relu", "conv", "fc"], IMAGES)
    expected = {
        "a": modules["a"](x["norm"][:, 1:].mean(1), y["relu"].mean((2, 3))),
        "b": modules["b"](x["blocks.1"][:, 1:].mean(1), y["relu"].mean((2, 3))),
        "c": modules["c"](x["embed"].mean((2, 3)), y["conv"].mean((2, 3))),
        "wide": modules["wide"](x["norm"][:, 0], y["fc"]),
        "logits": 4 * F.kl_div(
            F.log_softmax(student(IMAGES) / 2, 1), F.softmax(teacher(IMAGES) / 2, 1), reduction="batchmean"
        ),
    }  # fmt: skip
    total = 2 * expected["a"] + 0.5 * expected["b"] + 0 * expected["c"] + expected["wide"] + 0.3 * expected["logits"]
    torch.testing.assert_close(losses, {**expected, "total": total})

    got = gradients(distiller, losses["total"] + losses["c"])
    want = gradients(student, total + expected["c"])
    for name, gradient in want.items():
        torch.testing.assert_close(got[f"student.{name}"], gradient)
    stacked = torch.stack([modules[n].projection.unconstrained.grad for n in "abc"])
    signs = torch.stack([modules[n].projection.map.signs for n in "abc"])
    # Assigning P again may choose other signs, and so other coordinates: then gradients are not comparable.
    same = (signs == distiller.projections["10x6"].map.signs).all(-1).flatten()
    assert same.any()
    torch.testing.assert_close(got["projections.10x6.unconstrained"][same], stacked[same], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got["scales.2"], modules["c"].scale.grad)


def test_projections_start_orthonormal_and_differ():
    distiller = make(SEVERAL)
    p = [distiller.projection(name) for name in "abc"]
    for matrix in (*p, distiller.projection("wide").T):
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(matrix.shape[1]), rtol=0, atol=1e-5)
    assert (p[0] - p[1]).abs().max() > 0.1
    with pytest.raises(ValueError, match="name must be one of 'a', 'b', 'c', 'wide'; got 'd'"):
        distiller.projection("d")


def test_explicit_dims_need_no_example():
    distiller = make([{**TOKENS_TO_MAP, "dims": (6, 10)}], example_input=None)
    assert distiller.projection("norm->relu").shape == (10, 6) and distiller(IMAGES)[1]["total"] > 0
    for example in (None, IMAGES[:1]):
        wrong = make([{**TOKENS_TO_MAP, "dims": (6, 11)}], example_input=example)
        with pytest.raises(ValueError, match=r"'norm->relu': its projection is 11x6.*\(5, 6\).*\(5, 10\)"):
            wrong(IMAGES)


def test_the_example_leaves_the_student_as_it_was():
    student = CNN(4)
    student.relu.eval()
    before = copy.deepcopy(student.state_dict())
    pair = {"student": "relu", "teacher": "relu", "student_pool": "spatial_mean", "teacher_pool": "spatial_mean"}
    make([pair], student)
    assert student.training and student.bn.training and not student.relu.training and hooks_on(student) == 0
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_logits_alone_with_masked_rows_and_entries():
    class TwoHeads(ViT):  # DeiT in training: (class head, distillation head)
        def forward(self, images):
            return super().forward(images), super().forward(-images)

    distiller = make([], TwoHeads(), logit_weight=1.0, student_logits=1)
    mask = torch.tensor([True, False, True, True, False])
    _, losses = distiller(IMAGES, masks={"logits": mask})
    x, y = ViT.forward(distiller.student, -IMAGES), distiller.teacher(IMAGES)
    expected = F.kl_div(F.log_softmax(x[mask], 1), F.log_softmax(y[mask], 1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(losses, {"logits": expected, "total": expected})
    with pytest.raises(TypeError, match="the student's output must be a tensor; student_logits=None.*entries are 0, 1"):
        make([], TwoHeads(), logit_weight=1.0)(IMAGES)
    with pytest.raises(ValueError, match=r"same shape \(..., classes\); got \(5, 3\) and \(5, 4\)"):
        make([], teacher=CNN(classes=4), logit_weight=1.0)(IMAGES)


# -------------------------------------------------------------------------------------------------- the frozen teacher


def test_the_teacher_is_frozen_and_apart():
    teacher = CNN()
    distiller = make(teacher=teacher)
    assert distiller.teacher is teacher
    assert not any(p.requires_grad for p in teacher.parameters())
    before = copy.deepcopy(teacher.state_dict())
    distiller.train()
    distiller(IMAGES)
    assert not teacher.training
    teacher.train()  # even so
    distiller(IMAGES)
    assert not teacher.training and distiller.student.training
    recording = []
    teacher.fc.register_forward_hook(lambda *_: recording.append(torch.is_grad_enabled()))
    distiller(IMAGES.clone().requires_grad_())
    assert recording == [False]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    ids = {id(p) for p in teacher.parameters()}
    assert not ids & {id(p) for p in distiller.parameters()}
    assert all(name.startswith(("student.", "projections.")) for name in distiller.state_dict())


def test_the_teacher_keeps_its_dtype_and_follows_the_device():
    distiller = make(teacher=CNN().bfloat16())
    assert distiller(IMAGES)[1]["total"].dtype == torch.float32  # images are cast for it
    distiller.to(torch.float64)
    assert {p.dtype for p in distiller.teacher.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in distiller.parameters()} == {torch.float64}
    assert distiller(IMAGES.double())[1]["total"].dtype == torch.float64
    distiller.to("meta")
    assert {p.device.type for p in (*distiller.parameters(), *distiller.teacher.parameters())} == {"meta"}


def test_16_bit_students_have_float32_projections():
    distiller = make(student=ViT().bfloat16(), example_input=IMAGES[:1].bfloat16())
    assert distiller.projection("norm->relu").dtype == torch.float32
    assert distiller(IMAGES.bfloat16())[1]["total"].isfinite()


def test_another_input_for_the_teacher():
    """Another resolution, as a tensor, a tuple or keywords; the example as well. It is cast for the teacher."""
    large = F.interpolate(IMAGES, scale_factor=2)
    for given in (large, (large,), {"images": large}):
        options = {"example_input": IMAGES, "example_teacher_input": given, "logit_weight": 1.0}
        distiller = make(teacher=CNN().bfloat16(), **options).eval()
        output, losses = distiller(IMAGES, teacher_input=given)
        torch.testing.assert_close(output, distiller.student(IMAGES))
        x = outputs_of(distiller.student, ["norm"], IMAGES)["norm"]
        found = outputs_of(distiller.teacher, ["relu", "fc"], large.bfloat16())
        expected = loss_like(distiller, "norm->relu", 6, 10)(x[:, 1:].mean(1), found["relu"].mean((2, 3)))
        torch.testing.assert_close(losses["norm->relu"], expected)
        expected = F.kl_div(F.log_softmax(output, 1), F.softmax(found["fc"].float(), 1), reduction="batchmean")
        torch.testing.assert_close(losses["logits"], expected)


def test_stored_outputs_of_the_teacher():
    """The teacher is then what returns what it is given: features of one tap, or of several with the logits."""
    running = make(SEVERAL, logit_weight=0.5)
    stored = outputs_of(running.teacher, ["relu", "conv", "fc"], IMAGES)

    class Stored(nn.Module):
        def forward(self, **outputs):
            return outputs

    pairs = [{**pair, "teacher": "", "teacher_output": pair["teacher"]} for pair in SEVERAL]
    options = {"logit_weight": 0.5, "teacher_logits": "fc", "example_input": IMAGES, "example_teacher_input": stored}
    distiller = make(pairs, running.student, Stored(), **options)
    distiller.load_state_dict(running.state_dict())
    torch.testing.assert_close(distiller(IMAGES, teacher_input=stored), running(IMAGES))

    pair = {**TOKENS_TO_MAP, "teacher": "", "dims": (6, 10), "name": "a"}
    alone = make([pair], running.student, nn.Identity(), example_input=None)
    got = alone(IMAGES, teacher_input=stored["relu"])[1]["a"]
    expected = loss_like(alone, "a", 6, 10)(
        outputs_of(alone.student, ["norm"], IMAGES)["norm"][:, 1:].mean(1), stored["relu"].mean((2, 3))
    )
    torch.testing.assert_close(got, expected)


# ----------------------------------------------------------------------------------------------------- the meta device


def test_built_on_the_meta_device():
    with torch.device("meta"):
        distiller = make(SEVERAL, example_input=torch.empty(1, 3, 8, 8))
    assert all(p.is_meta for p in (*distiller.parameters(), *distiller.teacher.parameters(), *distiller.buffers()))
    distiller.to_empty(device="cpu")
    models = ViT(), CNN()
    distiller.student.load_state_dict(models[0].state_dict())
    distiller.teacher.load_state_dict(models[1].state_dict())  # undefined till now, as the student's
    for tensor in (*distiller.projections.parameters(), *distiller.projections.buffers(), *distiller.scales.values()):
        nn.init.constant_(tensor, torch.nan)  # what to_empty() may leave
    distiller.reset_parameters()
    for name in ("a", "b", "c", "wide"):
        p = distiller.projection(name)
        torch.testing.assert_close(vk.diagnostics.orthogonality_error(p).item(), 0.0, rtol=0, atol=1e-5)
    assert distiller.scales["2"].item() == pytest.approx((10 / 6) ** 0.5)
    built = make(SEVERAL, *models)
    built.load_state_dict(distiller.state_dict())
    torch.testing.assert_close(distiller(IMAGES)[1], built(IMAGES)[1])


def test_a_teacher_with_weights_keeps_them_when_the_student_starts_on_the_meta_device():
    with torch.device("meta"):
        student = ViT()
    teacher = CNN()
    before = copy.deepcopy(teacher.state_dict())
    example = torch.empty(1, 3, 8, 8, device="meta")
    distiller = make(student=student, teacher=teacher, example_input=example, example_teacher_input=IMAGES[:1])
    assert distiller.projections["10x6"].unconstrained.is_meta
    distiller.to_empty(device="cpu").reset_parameters()
    distiller.student.load_state_dict(ViT().state_dict())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert distiller(IMAGES)[1]["total"].isfinite()


def test_reset_parameters_leaves_the_models_alone():
    distiller = make(SEVERAL)
    before = copy.deepcopy(distiller.state_dict())
    nn.init.zeros_(distiller.scales["2"])
    distiller.reset_parameters()
    after = distiller.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed - {name for name in changed if name.endswith("map.signs")} == {
        "projections.10x6.unconstrained", "projections.3x6.unconstrained"
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- hooks


def test_hooks_are_gone_after_each_pass_also_a_failed_one():
    distiller = make()
    for model in (distiller.student, distiller.teacher):
        distiller(IMAGES)
        assert hooks_on(model) == 0
        with pytest.raises(RuntimeError):
            distiller(torch.randn(2, 7, 8, 8))
        assert hooks_on(model) == 0
    distiller(IMAGES)


def test_attached_hooks_stay_until_removed_and_do_nothing_outside():
    distiller = make()
    expected = distiller(IMAGES)[1]["total"]
    with distiller:
        assert hooks_on(distiller.student) == hooks_on(distiller.teacher) == 1
        distiller.student(IMAGES)  # validation between steps is not seen
        torch.testing.assert_close(distiller(IMAGES)[1]["total"], expected)
        twin = copy.deepcopy(distiller)
        torch.testing.assert_close(twin(IMAGES)[1]["total"], expected)
        twin.remove()
        assert hooks_on(twin.student) == hooks_on(twin.teacher) == 0 and hooks_on(distiller.student) == 1
    assert hooks_on(distiller.student) == hooks_on(distiller.teacher) == 0
    assert distiller.attach().attach() is distiller and hooks_on(distiller.student) == 1
    distiller.remove()
    assert hooks_on(distiller.student) == 0


def test_modules_that_run_twice_or_never_are_refused():
    class Twice(ViT):
        def forward(self, images):
            return super().forward(images) + super().forward(images)

    with pytest.raises(RuntimeError, match=r"'norm->relu': the output of student module 'norm'.*ran 2 times"):
        make(student=Twice())
    with pytest.raises(RuntimeError, match="student module 'blocks'.*ran 0 times"):
        student = ViT()
        student.blocks.forward = None
        student.norm = nn.Sequential(nn.LayerNorm(6), nn.Identity())
        student.norm.add_module("unused", nn.Identity())
        student.forward = lambda images: student.norm(student.embed(images).flatten(2).mT)
        make([{**TOKENS_TO_MAP, "student": "blocks"}], student)


def test_features_changed_in_place_are_refused():
    with pytest.raises(RuntimeError, match="teacher module 'bn' was changed in place afterwards"):
        make([{**TOKENS_TO_MAP, "teacher": "bn"}])


# ---------------------------------------------------------------------------------------------------------- optimisers


def test_parameter_groups():
    student = ViT()
    student.head.weight.requires_grad_(False)
    distiller = make(SEVERAL, student)
    decayed, spared = distiller.parameter_groups(weight_decay=0.05)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in distiller.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "student.embed.weight", "student.blocks.0.0.weight", "student.blocks.1.0.weight"
    }  # fmt: skip
    trained = {name for name, p in distiller.named_parameters() if p.requires_grad}
    assert {names[id(p)] for g in (decayed, spared) for p in g["params"]} == trained
    assert len(decayed["params"]) + len(spared["params"]) == len(trained)
    assert distiller.no_weight_decay() == {
        "student.cls_token", "scales.2", "projections.10x6.unconstrained", "projections.3x6.unconstrained"
    }  # fmt: skip
    torch.optim.AdamW([decayed, spared])


def test_training_with_accumulated_gradients_brings_the_loss_down():
    distiller = make(SEVERAL, logit_weight=1.0)
    optimizer = torch.optim.AdamW(distiller.parameter_groups(weight_decay=0.05), lr=1e-2)
    totals = []
    for _ in range(30):
        for part in IMAGES.split(3):
            total = distiller(part)[1]["total"] * len(part) / len(IMAGES)
            total.backward()
        totals.append(total.item())
        optimizer.step()
        optimizer.zero_grad()
    assert totals[-1] < 0.8 * totals[0]
    whole = make([TOKENS_TO_MAP], logit_weight=1.0).eval()
    want = gradients(whole, whole(IMAGES)[1]["total"])
    whole.zero_grad()
    for part in IMAGES.split(3):
        (whole(part)[1]["total"] * len(part) / len(IMAGES)).backward()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("pair", "error", "message"),
    [
        ({"student": "block.1"}, ValueError, "student has no module 'block.1'.*nearest first, 'blocks.1', 'blocks"),
        ({"teacher": "layer4"}, ValueError, "teacher has no module 'layer4'; it has, nearest first.*'conv'"),
        ({"student_pool": "spatial"}, ValueError, r"'norm' must have the layout \(N, C, H, W\) for student_pool="
         r"'spatial'; got \(1, 17, 6\), which suits 'class_token', 'mean_tokens', 'tokens', a function"),
        ({"teacher_pool": None}, ValueError, r"layout \(N, C\) for teacher_pool=None; got \(1, 10, 4, 4\)"),
        ({"student_pool": "max"}, ValueError, "student_pool must be one of None, 'class_token'.*got 'max'"),
        ({"student_skip": -1}, ValueError, "student_skip must be an int >= 0; got int -1"),
        ({"student_skip": 17}, ValueError, "student_skip=17 leaves none of 17 tokens"),
        ({"teacher": None}, TypeError, "teacher must be the name of a module; got NoneType"),
        ({"student_output": "x"}, TypeError, "student_output='x' finds NoneType"),
        ({"student_pool": "tokens"}, ValueError, r"same positions; got student rows of shape \(1, 16, 6\) and teacher"),
        ({"weight": "1"}, TypeError, "weight must be a number"),
        ({"scale": "auto"}, ValueError, "scale must be one of 'match', 'learned'"),
        ({"normalization": "bn"}, ValueError, "normalization must be one of"),
        ({"loss": "l1"}, ValueError, "loss must be one of"),
        ({"resample": "both"}, ValueError, "resample must be one of None, 'student', 'teacher'"),
        ({"dims": (6,)}, TypeError, r"dims must be \(student's channels, teacher's channels\); got \(6,\)"),
        ({"dims": (6, 0)}, ValueError, "dims must be at least 1"),
        ({"name": 5}, TypeError, "name must be a string; got int 5"),
        ({"student_pool": len}, TypeError, "what student_pool of pair 'norm->relu' returns must be a tensor; got int"),
        ({"name": "total"}, ValueError, "names of their own.*'total'"),
        ({"studnt": "norm"}, TypeError, "unexpected keyword argument 'studnt'"),
    ],
)  # fmt: skip
def test_bad_pairs(pair, error, message):
    with pytest.raises(error, match=message):
        make([{**TOKENS_TO_MAP, **pair}])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"example_input": None}, ValueError, "example_input is needed, or dims of the pairs 'norm->relu'"),
        ({"pairs": [{**TOKENS_TO_MAP, "dims": (6, 10)}], "example_input": None, "example_teacher_input": IMAGES},
         ValueError, "example_teacher_input needs an example_input"),
        ({"pairs": [TOKENS_TO_MAP, TOKENS_TO_MAP]}, ValueError, "names of their own.*'norm->relu', 'norm->relu'"),
        ({"pairs": []}, ValueError, "there must be a loss"),
        ({"pairs": ["norm", "relu"]}, TypeError, "pairs must be a list of dicts with the fields of Pair; got list"),
        ({"teacher": "resnet50"}, TypeError, "teacher must be a torch.nn.Module; got str 'resnet50'"),
        ({"temperature": 0}, ValueError, "temperature must be .*> 0; got 0"),
        ({"logit_weight": "1"}, TypeError, "logit_weight must be a number"),
        ({"process_group": "world"}, TypeError, "process_group must be None or"),
        ({"backend": "cuda"}, ValueError, "backend must be None or one of"),
        ({"dtype": torch.bfloat16}, TypeError, "float32, float64"),
    ],
)  # fmt: skip
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_bad_masks_and_shared_parameters():
    distiller = make()
    with pytest.raises(ValueError, match="a key of masks must be one of 'norm->relu', 'logits'; got 'norm'"):
        distiller(IMAGES, masks={"norm": torch.ones(5)})
    with pytest.raises(TypeError, match=r"masks\['norm->relu'\] must be a tensor or two; got str"):
        distiller(IMAGES, masks={"norm->relu": "attention_mask"})
    with pytest.raises(TypeError, match="masks must map pairs' names to masks; got a float32 tensor"):
        distiller(IMAGES, masks=torch.ones(5))
    with pytest.raises(ValueError, match=r"mask of .*'norm' must have the shape of the rows \(5, 16\); got \(5, 15\)"):
        distiller(IMAGES, masks={"norm->relu": (torch.ones(5, 16), None)})
    with pytest.raises(ValueError, match=r"masks\['norm->relu'\] must agree.*\(5,\) .*\(4,\)"):
        distiller(IMAGES, masks={"norm->relu": (torch.ones(5), torch.ones(4))})
    with pytest.raises(ValueError, match="teacher must share no parameter with student"):
        student = ViT()
        make(student=student, teacher=student)


# ----------------------------------------------------------------------------------------------- the loops people have


def test_copies_pickles_and_state_dicts():
    distiller = make(SEVERAL, logit_weight=1.0)
    expected = distiller(IMAGES)[1]["total"]
    other = make(SEVERAL, teacher=distiller.teacher, logit_weight=1.0)
    nn.init.normal_(other.projections["10x6"].unconstrained)
    stream = io.BytesIO()
    torch.save(distiller.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream, weights_only=True))
    for twin in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller)), other):
        assert torch.equal(twin(IMAGES)[1]["total"], expected)
    twin = copy.deepcopy(distiller)
    gradients(twin, twin(IMAGES)[1]["total"])
    assert twin.teacher is not distiller.teacher and all(p.grad is None for p in distiller.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    distiller = make([{**TOKENS_TO_MAP, "normalization": "none"}], logit_weight=1.0)
    expected = distiller(IMAGES)[1]
    with torch.autocast("cpu", dtype=dtype):
        output, losses = distiller(IMAGES)
        p = distiller.projection("norm->relu")
    assert output.dtype == dtype and p.dtype == torch.float32
    torch.testing.assert_close(p.T @ p, torch.eye(6), rtol=0, atol=1e-5)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.05, atol=0.01)
    assert all(g.isfinite().all() for g in gradients(distiller, losses["total"]).values())


@pytest.mark.parametrize("full_graph", [False, True])
def test_compile(full_graph):
    """With the hooks attached all of it is one graph; without, putting them on is the one break before that graph."""
    torch._dynamo.reset()
    distiller = make(SEVERAL, logit_weight=1.0)
    output, losses = distiller(IMAGES)
    want = gradients(distiller, losses["total"])
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    if full_graph:
        distiller.attach()
    compiled = torch.compile(distiller, backend=backend, fullgraph=full_graph)
    for _ in range(10):  # recompilation in every step would end in an error of Dynamo's or in eager mode
        got, compiled_losses = compiled(IMAGES)
    assert len(graphs) == 1
    torch.testing.assert_close(got, output)
    torch.testing.assert_close(compiled_losses, losses)
    for name, gradient in gradients(distiller, compiled_losses["total"]).items():
        torch.testing.assert_close(gradient, want[name])
    distiller.remove()
    assert hooks_on(distiller.student) == hooks_on(distiller.teacher) == 0


def test_compiled_models_inside():
    torch._dynamo.reset()
    distiller = make()
    expected = distiller(IMAGES)[1]["total"]
    distiller.student = torch.compile(distiller.student, backend="aot_eager")
    torch.testing.assert_close(distiller(IMAGES)[1]["total"], expected)
    assert distiller.no_weight_decay() == {"student._orig_mod.cls_token", "projections.10x6.unconstrained"}


def test_activation_checkpointing():
    class Checkpointed(ViT):
        def forward(self, images):
            return checkpoint(super().forward, images, use_reentrant=False)

    want, got = make(), make(student=Checkpointed())
    got.load_state_dict(want.state_dict())
    got.teacher.load_state_dict(want.teacher.state_dict())
    want = gradients(want, want(IMAGES)[1]["total"])
    got = gradients(got, got(IMAGES)[1]["total"])
    assert want.keys() == got.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient)


def test_functional_call_and_inference_mode():
    distiller, other = make(), make()
    nn.init.normal_(other.projections["10x6"].unconstrained)
    got = torch.func.functional_call(distiller, dict(other.named_parameters()), (IMAGES,))[1]["total"]
    torch.testing.assert_close(got, other(IMAGES)[1]["total"])
    with torch.inference_mode():
        torch.testing.assert_close(distiller(IMAGES)[1]["total"], make()(IMAGES)[1]["total"])


# ----------------------------------------------------------------------------------------------------------- two ranks

IN_RANKS = [
    {**TOKENS_TO_MAP, "name": "a", "scale": "learned"},
    {**TOKENS_TO_MAP, "name": "b", "student": "blocks.1", "normalization": "batch_norm", "weight": 0.5, "eps": 1e-2},
    {"student": "head", "teacher": "fc", "name": "c", "normalization": "whiten", "eps": 1e-1},
]


def double(group=None):
    torch.manual_seed(0)
    images = IMAGES.double()
    options = {"logit_weight": 0.7, "temperature": 2.0, "example_input": images[:1], "process_group": group}
    return make(IN_RANKS, ViT().double(), CNN().double(), **options), images


def sharded(module):
    for block in module.student.blocks:
        fully_shard(block)
    return fully_shard(module)


def worker(rank):
    whole, images = double()
    mask = torch.tensor([True, True, False, True, True])
    expected = whole(images, masks={"a": mask, "logits": mask})[1]
    want = gradients(whole, expected["total"])
    mine = slice(0, 2) if rank == 0 else slice(2, 5)
    for wrap in (DistributedDataParallel, sharded):
        module, _ = double(dist.group.WORLD)
        ranks = wrap(module)  # kept, for it holds what reduces the gradients
        losses = ranks(images[mine], masks={"a": mask[mine], "logits": mask[mine]})[1]
        torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
        got = gradients(module, losses["total"])
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            whole_gradient = got[name].full_tensor() if wrap is sharded else got[name]
            torch.testing.assert_close(whole_gradient, gradient, rtol=1e-8, atol=1e-11)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_two_ranks_equal_one_process(tmp_path):
    processes.run_ranks(worker, tmp_path)
