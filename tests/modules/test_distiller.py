"""FeatureDistiller: poolings, masks, projections, the logit loss, options."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vkd_kernels as vk
from tests.helpers.distillers import (
    CNN,
    FEATURES,
    IMAGES,
    OPTIONS,
    SEVERAL,
    TOKENS_TO_MAP,
    TextModel,
    ViT,
    gradients,
    hooks_on,
    loss_like,
    make,
    outputs_of,
)
from vkd_kernels import parametrization, projection

# -------------------------------------------------------------------------------------------------- poolings and masks

POOLED = {
    "class_token": lambda x: x[:, 0],
    "mean_tokens": lambda x: x[:, 2:].mean(1),
    "tokens": lambda x: x[:, 2:],
}


@pytest.mark.parametrize("pool", POOLED)
def test_token_poolings(pool):
    pair = {
        "student": "norm",
        "student_pool": pool,
        "student_skip": 2,
        "teacher": "norm",
        "teacher_pool": pool,
        "teacher_skip": 2,
        "name": "x",
    }
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
    pair = {
        "student": "norm",
        "student_pool": "tokens",
        "student_skip": 1,
        "teacher": "norm",
        "teacher_pool": "tokens",
        "teacher_skip": 1,
        "name": "x",
    }
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
    assert not any(g.any() for name, g in gradients(distiller, losses["total"]).items() if "pair_losses" in name)


def test_text_models_with_attention_masks():
    """Entries of a tuple and of a Hugging Face output; one mask for both sides; logits found by name."""
    ids = torch.randint(11, (5, 7))
    attention = torch.arange(7) < torch.tensor([7, 3, 5, 1, 6])[:, None]
    tap = {"student": "encoder", "student_output": "last_hidden_state", "student_pool": "mean_tokens"}
    pairs = [
        {**tap, "teacher": "encoder", "teacher_output": 0, "teacher_pool": "mean_tokens", "name": "mean"},
        {
            **tap,
            "student": "encoder.layer",
            "student_output": 0,
            "student_pool": "tokens",
            "teacher": "encoder.layer",
            "teacher_output": 0,
            "teacher_pool": "tokens",
            "name": "tokens",
        },
        {**tap, "student_pool": "class_token", "teacher": "encoder", "teacher_output": "pooler_output", "name": "cls"},
    ]
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


def test_several_pairs_equal_separate_losses(monkeypatch):
    calls = []
    for module in (projection, parametrization):
        monkeypatch.setattr(module, "cayley", lambda w: calls.append(tuple(w.shape)) or vk.cayley(w))
    distiller = make(SEVERAL, logit_weight=0.3, temperature=2.0)
    assert set(distiller.state_dict()) - {f"student.{n}" for n in distiller.student.state_dict()} == {
        *(f"pair_losses.[{n}].projection.{entry}" for n in OPTIONS for entry in ("unconstrained", "map.signs")),
        "pair_losses.[c].scale",
    }
    losses = distiller(IMAGES)[1]
    assert sorted(calls) == [(3, 6), (3, 10, 6)]  # one call per shape: T = 10 three times, T = 3 < S once

    student, teacher = copy.deepcopy(distiller.student), distiller.teacher
    modules = {n: loss_like(distiller, n, 6, 3 if n == "wide" else 10, **options) for n, options in OPTIONS.items()}
    x = outputs_of(student, ["norm", "blocks.1", "embed"], IMAGES)
    y = outputs_of(teacher, ["relu", "conv", "fc"], IMAGES)
    expected = {
        "a": modules["a"](x["norm"][:, 1:].mean(1), y["relu"].mean((2, 3))),
        "b": modules["b"](x["blocks.1"][:, 1:].mean(1), y["relu"].mean((2, 3))),
        "c": modules["c"](x["embed"].mean((2, 3)), y["conv"].mean((2, 3))),
        "wide": modules["wide"](x["norm"][:, 0], y["fc"]),
        "logits": 4
        * F.kl_div(F.log_softmax(student(IMAGES) / 2, 1), F.softmax(teacher(IMAGES) / 2, 1), reduction="batchmean"),
    }
    total = 2 * expected["a"] + 0.5 * expected["b"] + 0 * expected["c"] + expected["wide"] + 0.3 * expected["logits"]
    torch.testing.assert_close(losses, {**expected, "total": total})

    got = gradients(distiller, losses["total"] + losses["c"])
    want = gradients(student, total + expected["c"])
    for name, gradient in want.items():
        torch.testing.assert_close(got[f"student.{name}"], gradient)
    compared = 0
    for name in "abc":
        # Assigning P again may choose other signs, and so other coordinates: then gradients are not comparable.
        projection_, copied = distiller.pair_losses.of(name).projection, modules[name].projection
        if torch.equal(projection_.map.signs, copied.map.signs):
            gradient = got[f"pair_losses.[{name}].projection.unconstrained"]
            torch.testing.assert_close(gradient, copied.unconstrained.grad, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared
    torch.testing.assert_close(got["pair_losses.[c].scale"], modules["c"].scale.grad)


def test_pairs_of_equal_shape_that_differ_in_one_option_each_have_their_own():
    whiten = {"normalization": "whiten"}
    options = [{}, {"beta": 0.1}, {"scale": 3.0}, {**whiten, "eps": 0.1}, {**whiten, "eps": 0.5}]
    pairs = [{"student": "", "teacher": "", "name": str(i), **own} for i, own in enumerate(options)]
    distiller = vk.FeatureDistiller(nn.Identity(), nn.Linear(6, 9), pairs, example_input=FEATURES)
    losses = distiller(FEATURES)[1]
    for name, own in zip("01234", options, strict=True):
        expected = vk.functional.ortho_proj_loss(
            FEATURES, distiller.teacher(FEATURES), distiller.projection(name), **own
        )
        torch.testing.assert_close(losses[name], expected)


def test_pairs_of_one_group_each_learn_their_own_scale():
    pairs = [{"student": "", "teacher": "", "name": name, "scale": "learned", "loss": "mse"} for name in "abc"]
    distiller = vk.FeatureDistiller(nn.Identity(), nn.Linear(6, 9), pairs, example_input=FEATURES)
    for factor, name in enumerate("abc", start=1):
        nn.init.constant_(distiller.pair_losses.of(name).scale, factor)
    losses = distiller(FEATURES)[1]
    losses["total"].backward()
    target = distiller.teacher(FEATURES)
    for factor, name in enumerate("abc", start=1):
        scale = torch.tensor(float(factor), requires_grad=True)
        expected = vk.functional.ortho_proj_loss(FEATURES, target, distiller.projection(name), scale=scale, loss="mse")
        expected.backward()
        torch.testing.assert_close(losses[name], expected)
        torch.testing.assert_close(distiller.pair_losses.of(name).scale.grad, scale.grad.reshape(1))


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


def test_logits_by_a_function_of_the_output():
    """Vocabularies that differ in their padding alone are cut to what both have."""
    distiller = make([], teacher=CNN(classes=5), logit_weight=1.0, teacher_logits=lambda output: output[:, :3])
    expected = F.kl_div(
        F.log_softmax(distiller.student(IMAGES), 1),
        F.log_softmax(distiller.teacher(IMAGES)[:, :3], 1),
        reduction="batchmean",
        log_target=True,
    )
    torch.testing.assert_close(distiller(IMAGES)[1], {"logits": expected, "total": expected})
    compiled = torch.compile(distiller, backend="eager")
    torch.testing.assert_close(compiled(IMAGES)[1]["logits"], expected)
    head = torch.nn.Linear(5, 3)
    distiller = make([], teacher=CNN(classes=5), logit_weight=1.0, teacher_logits=lambda output: head(output))
    distiller(IMAGES)[1]["total"].backward()
    assert head.weight.grad is None  # a teacher is not trained
    with pytest.raises(TypeError, match="teacher_logits must not be a module, which would be trained"):
        make([], teacher=CNN(classes=5), logit_weight=1.0, teacher_logits=head)
    with pytest.raises(TypeError, match="what student_logits returns must be a tensor; got list"):
        make([], logit_weight=1.0, student_logits=list)(IMAGES)
    with pytest.raises(ValueError, match=r"got \(5, 3\) and \(5, 5\).*teacher_logits=lambda output: output.logits\["):
        make([], teacher=CNN(classes=5), logit_weight=1.0)(IMAGES)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("pair", "error", "message"),
    [
        ({"student": "block.1"}, ValueError, "student has no module 'block.1'.*nearest first, 'blocks.1', 'blocks"),
        ({"teacher": "layer4"}, ValueError, "teacher has no module 'layer4'; it has, nearest first.*'conv'"),
        (
            {"student_pool": "spatial"},
            ValueError,
            r"'norm' must have the layout \(N, C, H, W\) for student_pool="
            r"'spatial'; got \(1, 17, 6\), which suits 'class_token', 'mean_tokens', 'tokens', a function",
        ),
        ({"teacher_pool": None}, ValueError, r"layout \(N, C\) for teacher_pool=None; got \(1, 10, 4, 4\)"),
        ({"student_pool": "max"}, ValueError, "student_pool must be one of None, 'class_token'.*got 'max'"),
        ({"student_skip": -1}, ValueError, "student_skip must be an int >= 0; got int -1"),
        ({"student_skip": 17}, ValueError, "student_skip=17 leaves none of 17 tokens"),
        ({"teacher": None}, TypeError, "teacher must be the name of a module; got NoneType"),
        ({"student_output": "x"}, TypeError, "has no entry 'x' of student_output='x'; Tensor has no entries"),
        ({"student_output": 0}, TypeError, "'norm' is a tensor already.*one sample of the batch: leave student_output"),
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
)
def test_bad_pairs(pair, error, message):
    with pytest.raises(error, match=message):
        make([{**TOKENS_TO_MAP, **pair}])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"example_input": None}, ValueError, "example_input is needed, or dims of the pairs 'norm->relu'"),
        (
            {"pairs": [{**TOKENS_TO_MAP, "dims": (6, 10)}], "example_input": None, "example_teacher_input": IMAGES},
            ValueError,
            "example_teacher_input needs an example_input",
        ),
        ({"pairs": [TOKENS_TO_MAP, TOKENS_TO_MAP]}, ValueError, "names of their own.*'norm->relu', 'norm->relu'"),
        ({"pairs": []}, ValueError, "there must be a loss"),
        ({"pairs": ["norm", "relu"]}, TypeError, "list of dicts with the fields of Pair, or of Pairs; got list"),
        ({"teacher": "resnet50"}, TypeError, "teacher must be a torch.nn.Module; got str 'resnet50'"),
        ({"reduction": "none"}, ValueError, "reduction must be one of 'mean', 'sum'; got 'none'"),
        ({"temperature": 0}, ValueError, "temperature must be .*> 0; got 0"),
        ({"logit_weight": "1"}, TypeError, "logit_weight must be a number"),
        ({"process_group": "world"}, TypeError, "process_group must be None or"),
        ({"backend": "cuda"}, ValueError, "backend must be None or one of"),
        ({"dtype": torch.bfloat16}, TypeError, "None, float32 or float64"),
    ],
)
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
    expected = r"masks\['norm->relu'\] must have the shape \(5,\) or .*teacher's positions, \(5, \.\.\.\); got \(4,\)"
    with pytest.raises(ValueError, match=expected):
        distiller(IMAGES, masks={"norm->relu": (torch.ones(5), torch.ones(4))})
    with pytest.raises(ValueError, match="teacher shares 'cls_token' with the student, and it requires"):
        student = ViT()
        make(student=student, teacher=student)
