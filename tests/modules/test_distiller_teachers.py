"""FeatureDistiller with several teachers, its losses balanced; the student exported as a stand-in for a teacher."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vkd_kernels as vk
from tests.helpers.distillers import CNN, FEATURES, IMAGES, TOKENS_TO_MAP, ViT, gradients, loss_like, make, outputs_of
from vkd_kernels.balance import LossBalance, LossTerm

POOLED = {"student_pool": "mean_tokens", "student_skip": 1}
PAIRS = [
    {
        "student": "norm",
        "teacher": "dino:norm",
        **POOLED,
        "teacher_pool": "mean_tokens",
        "teacher_skip": 1,
        "name": "a",
    },
    {"student": "norm", "teacher": "clip:relu", **POOLED, "teacher_pool": "spatial_mean", "name": "b", "weight": 0.5},
    {"student": "head", "teacher": "clip:", "name": "c"},
]


def two_teachers(pairs=PAIRS, **options):
    torch.manual_seed(0)
    teachers = options.pop("teachers", None) or {"dino": ViT(9), "clip": CNN(10)}
    return make(pairs, ViT(6), teachers, **options)


def test_two_teachers_equal_two_distillers():
    distiller = two_teachers(teacher_weights={"clip": 3.0}, logit_weight={"clip": 0.7})
    assert set(distiller.teacher) == {"dino", "clip"} and distiller.teacher["dino"].norm.normalized_shape == (9,)
    losses = distiller(IMAGES)[1]
    x = outputs_of(distiller.student, ["norm", "head"], IMAGES)
    dino = outputs_of(distiller.teacher["dino"], ["norm"], IMAGES)["norm"]
    clip = outputs_of(distiller.teacher["clip"], ["relu", "fc"], IMAGES)
    pooled = x["norm"][:, 1:].mean(1)
    expected = {
        "a": loss_like(distiller, "a", 6, 9)(pooled, dino[:, 1:].mean(1)),
        "b": loss_like(distiller, "b", 6, 10)(pooled, clip["relu"].mean((2, 3))),
        "c": loss_like(distiller, "c", 3, 3)(x["head"], clip["fc"]),
        "logits:clip": F.kl_div(F.log_softmax(x["head"], 1), F.softmax(clip["fc"], 1), reduction="batchmean"),
    }
    total = expected["a"] + 3 * (0.5 * expected["b"] + expected["c"]) + 0.7 * expected["logits:clip"]
    torch.testing.assert_close(losses, {**expected, "total": total})
    assert not any("dino" in name or "clip" in name for name in distiller.state_dict())
    other = two_teachers(PAIRS[::-1])
    other.load_state_dict(distiller.state_dict())
    assert all(torch.equal(other.projection(n), distiller.projection(n)) for n in "abc")


def test_every_teacher_has_its_own_input_and_dtype():
    teachers = {"dino": ViT(9).bfloat16(), "clip": CNN(10).double()}
    large = F.interpolate(IMAGES, scale_factor=2)
    options = {"example_teacher_input": {"clip": large[:1]}, "teachers": teachers}
    distiller = two_teachers(**options).eval()
    losses = distiller(IMAGES, teacher_input={"clip": {"images": large}})[1]
    clip = outputs_of(teachers["clip"], ["relu"], large.double())["relu"].mean((2, 3))
    x = outputs_of(distiller.student, ["norm"], IMAGES)["norm"][:, 1:].mean(1)
    torch.testing.assert_close(losses["b"], loss_like(distiller, "b", 6, 10)(x, clip.float()))
    assert losses["a"].isfinite() and next(teachers["dino"].parameters()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="a key of teacher_input must be one of 'dino', 'clip'; got 'siglip'"):
        distiller(IMAGES, teacher_input={"siglip": large})
    with pytest.raises(TypeError, match="teacher_input must map 'dino', 'clip' to inputs; got a float32 tensor"):
        distiller(IMAGES, teacher_input=large)
    with pytest.raises(TypeError, match="indices are for stored features; these teachers are models"):
        distiller(IMAGES, indices=[0, 1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pairs": [{**PAIRS[0], "teacher": "norm"}]}, ValueError, "teacher must be 'name:module' .* 'dino', 'clip'"),
        ({"pairs": [{**PAIRS[0], "teacher": "dinov3:norm"}]}, ValueError, "names 'dino', 'clip' .*got 'dinov3:norm'"),
        ({"pairs": [{**PAIRS[0], "teacher": "dino:nrm"}]}, ValueError, "teacher has no module 'nrm'.*'norm'"),
        ({"pairs": [{**PAIRS[0], "name": "logits:dino"}]}, ValueError, "names of their own"),
        ({"logit_weight": 1.0}, TypeError, "logit_weight must map names of teachers to weights; got float 1.0"),
        ({"logit_weight": {"dinov3": 1.0}}, ValueError, "a key of logit_weight must be one of 'dino', 'clip'"),
        (
            {"teacher_weights": {"x": 1.0}},
            ValueError,
            "a key of teacher_weights must be one of 'dino', 'clip'; got 'x'",
        ),
        (
            {"teachers": {"dino": 3, "clip": CNN(10)}},
            TypeError,
            r"teacher\['dino'\] must be a torch.nn.Module; got int 3",
        ),
        ({"teachers": {"": CNN(10)}}, ValueError, "teacher must be a model or map names to models"),
        (
            {"teachers": {"dino": {"a": CNN(9)}, "clip": CNN(10)}},
            TypeError,
            r"teacher\['dino'\] must be a torch.nn.Mod",
        ),
        ({"balance": "mean"}, ValueError, "balance must be one of None, 'running_mean'; got 'mean'"),
        ({"drop_best": 2.0}, ValueError, "drop_best must be .*<= 1"),
        ({"balance": "running_mean", "reduction": "sum"}, ValueError, "they need reduction='mean'; got 'sum'"),
        ({"drop_best": 0.5, "reduction": "sum"}, ValueError, "they need reduction='mean'; got 'sum'"),
    ],
)
def test_bad_teachers(options, error, message):
    with pytest.raises(error, match=message):
        two_teachers(**options)
    with pytest.raises(ValueError, match="drop_best=0.5 leaves out one of several teachers; there is one"):
        make(drop_best=0.5)


def test_logits_stands_for_the_logit_losses_of_all_teachers():
    """In masks and total_rows; a teacher's own entry stands above it."""
    classes = {"dino": CNN(classes=3), "clip": CNN(classes=3)}
    distiller = vk.FeatureDistiller(ViT(), classes, [], logit_weight={"dino": 1.0, "clip": 0.5})
    kept = torch.arange(len(IMAGES)) < 2
    losses = distiller(IMAGES, masks={"logits": kept})[1]
    for name, value in distiller(IMAGES[kept])[1].items():
        torch.testing.assert_close(losses[name], value)
    whole = distiller(IMAGES)[1]
    losses = distiller(IMAGES, masks={"logits": kept, "logits:clip": torch.ones_like(kept)})[1]
    torch.testing.assert_close(losses["logits:clip"], whole["logits:clip"])
    assert losses["logits:dino"] != whole["logits:dino"]
    count = len(IMAGES)
    losses = distiller(IMAGES, total_rows={"logits": 4 * count, "logits:clip": 2 * count})[1]
    torch.testing.assert_close(losses["logits:dino"], whole["logits:dino"] / 4)
    torch.testing.assert_close(losses["logits:clip"], whole["logits:clip"] / 2)
    torch.testing.assert_close(distiller(IMAGES, total_rows={})[1], whole)


def test_balanced_losses_weigh_alike_whatever_their_scale():
    distiller = two_teachers(balance="running_mean", logit_weight={"clip": 1.0})
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
    means = {}
    for step in range(4):
        _, losses, metrics = distiller(IMAGES, metrics=True)
        for name in ("a", "b", "c", "logits:clip"):
            means.setdefault(name, []).append(losses[name].item())
            weights = torch.tensor([0.99 ** (step - i) for i in range(step + 1)], dtype=torch.float64)
            mean = (weights * torch.tensor(means[name], dtype=torch.float64)).sum() / weights.sum()
            torch.testing.assert_close(metrics[f"balance/{name}"].double(), 1 / mean, rtol=1e-4, atol=0)
        share = {name: metrics[f"balance/{name}"] * losses[name].detach() for name in means}
        expected = share["a"] + 0.5 * share["b"] + share["c"] + share["logits:clip"]
        torch.testing.assert_close(losses["total"].detach(), expected)
        if step == 0:
            torch.testing.assert_close(losses["total"].item(), 3.5)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
    other = two_teachers(PAIRS[::-1], balance="running_mean", logit_weight={"clip": 1.0})
    other.load_state_dict(distiller.state_dict())
    for module in (distiller.eval(), other.eval()):  # evaluation leaves the means alone
        before = copy.deepcopy(module.balance.state_dict())
        metrics = module(IMAGES * 2, metrics=True)[2]
        assert all(torch.equal(value, before[name]) for name, value in module.balance.state_dict().items())
        torch.testing.assert_close(metrics["balance/a"].item(), 1 / distiller.balance.means["[a]"]().item())
    assert make().state_dict().keys() == make(balance=None).state_dict().keys()
    assert not any("balance" in name for name in make().state_dict())


@pytest.mark.parametrize("count", ["total_rows", "num_items_in_batch"])
def test_balanced_micro_batches_add_up_to_the_balanced_batch(count):
    """The means are of the losses, not of a micro-batch's shares of them."""

    class Labeled(ViT):
        def forward(self, images, **_):
            return super().forward(images)

    distiller = make(PAIRS, Labeled(6), {"dino": Labeled(9), "clip": CNN(10)}, balance="running_mean")
    if count == "num_items_in_batch":
        distiller = make([PAIRS[0]], Labeled(6), {"dino": Labeled(9)}, balance="running_mean")

    def total(images):
        if count == "total_rows":
            return distiller(images, total_rows=len(IMAGES))[1]["total"]
        labels = torch.ones(len(images), dtype=torch.long)
        return distiller(images, labels=labels, num_items_in_batch=len(IMAGES))[1]["total"]

    expected = sum(pair.weight for pair in distiller.pairs)
    torch.testing.assert_close(total(IMAGES[:2]).item(), expected * 2 / len(IMAGES))  # each loss over itself
    whole, parts = distiller.eval()(IMAGES)[1]["total"], (IMAGES[:2], IMAGES[2:])
    torch.testing.assert_close(sum(total(part) for part in parts), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_running_means_stay_exact_in_a_distiller_that_is_cast(dtype):
    balance = LossBalance([LossTerm("a", "", 1.0)], "running_mean", 0.0).to(dtype)
    exact = LossBalance([LossTerm("a", "", 1.0)], "running_mean", 0.0)
    for step in range(500):
        loss = torch.tensor(1 - step / 1000)
        torch.testing.assert_close(balance({"a": loss})[0], exact({"a": loss})[0])


def test_losses_that_are_not_finite_leave_the_running_mean_alone():
    balance = LossBalance([LossTerm("a", "", 1.0)], "running_mean", 0.0)
    for value in (2.0, float("inf"), float("nan"), 2.0):
        factor = balance({"a": torch.tensor(value)})[0]["a"]
        assert factor == 0.5


def test_reset_parameters_starts_the_balance_anew():
    distiller = two_teachers(balance="running_mean", drop_best=0.5)
    for buffer in distiller.balance.buffers():
        buffer.fill_(7)
    distiller.reset_parameters()
    assert not any(buffer.any() for buffer in distiller.balance.buffers())


def test_a_masked_batch_leaves_the_running_mean_alone():
    distiller = two_teachers(balance="running_mean")
    distiller(IMAGES)
    before = distiller.balance.means["[a]"]().clone()
    nothing = torch.zeros(5, dtype=torch.bool)
    losses = distiller(IMAGES, masks={name: nothing for name in "abc"})[1]
    assert losses["total"] == 0 and torch.equal(distiller.balance.means["[a]"](), before)


def test_the_best_learned_teacher_is_left_out_of_its_share_of_the_steps():
    distiller = two_teachers(drop_best=0.3)
    reference = two_teachers()
    reference.load_state_dict(distiller.state_dict(), strict=False)
    dropped = []
    for step in range(20):
        if step == 7:
            resumed = two_teachers(drop_best=0.3)
            resumed.load_state_dict(distiller.state_dict())
            distiller = resumed
        _, losses, metrics = distiller(IMAGES, metrics=True)
        means = {"dino": losses["a"], "clip": (losses["b"] + losses["c"]) / 2}
        best = min(means, key=lambda name: means[name].item())
        out = {name for name in means if metrics[f"dropped/{name}"] == 1}
        assert out <= {best}
        dropped.append(bool(out))
        weights = {"a": 1.0, "b": 0.5, "c": 1.0}
        owner = {"a": "dino", "b": "clip", "c": "clip"}
        expected = sum(weights[n] * losses[n] for n in weights if owner[n] not in out)
        torch.testing.assert_close(losses["total"], expected)
        if out == {"clip"}:
            name = "pair_losses.[b].projection.unconstrained"
            assert not gradients(distiller, losses["total"])[name].any()
    assert sum(dropped) == 6
    torch.testing.assert_close(distiller.eval()(IMAGES)[1]["total"], reference.eval()(IMAGES)[1]["total"])


def test_a_pair_that_did_not_run_is_not_the_best_learned():
    terms = [LossTerm("a", "dino", 1.0), LossTerm("b", "clip", 1.0), LossTerm("c", "clip", 1.0)]
    cases = {(0.0, 0.5, 0.6): [], (0.4, 0.0, 0.5): ["dino"], (0.4, 0.3, 0.0): ["clip"]}  # one teacher alone stays
    cases[-1e-8, 0.5, 0.6] = ["dino"]  # a cosine's rounding
    for losses, best in cases.items():
        balance = LossBalance(terms, None, 1.0)
        _, report = balance({name: torch.tensor(loss) for name, loss in zip("abc", losses, strict=True)})
        assert [teacher for teacher in ("dino", "clip") if report[f"dropped/{teacher}"] == 1] == best


def test_two_teachers_balanced_compile_to_one_graph():
    torch._dynamo.reset()
    options = {"balance": "running_mean", "drop_best": 0.5}
    distiller, other = two_teachers(**options), two_teachers(**options)
    compiled = torch.compile(distiller.attach(), backend="aot_eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(IMAGES)[1], other(IMAGES)[1])


# ------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("scale", [1.0, "match", "learned"])
def test_an_exported_student_gives_vectors_in_the_teachers_space(scale):
    distiller = make([{**TOKENS_TO_MAP, "name": "x", "scale": scale}])
    module = distiller.export("x")
    features = outputs_of(distiller.student, ["norm"], IMAGES)["norm"][:, 1:].mean(1)
    factor = (10 / 6) ** 0.5 if scale != 1.0 else 1.0
    expected = factor * features @ distiller.projection("x").T
    torch.testing.assert_close(module(IMAGES), expected)
    target = F.layer_norm(outputs_of(distiller.teacher, ["relu"], IMAGES)["relu"].mean((2, 3)), (10,))
    torch.testing.assert_close(F.smooth_l1_loss(module(IMAGES), target), distiller(IMAGES)[1]["x"])
    assert type(module.projection) is nn.Linear and not any(p.requires_grad for p in module.parameters())
    with torch.no_grad():
        distiller.student.norm.weight.mul_(2)
    torch.testing.assert_close(module(IMAGES), expected)  # a copy
    with pytest.raises(ValueError, match="name must be one of 'x'; got 'y'"):
        distiller.export("y")


def test_an_exported_student_is_in_eval_mode_and_the_distillers_stays_in_training_mode():
    student = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    pair = {"student": "", "teacher": "", "dims": (8, 9), "name": "x"}
    distiller = vk.FeatureDistiller(student, nn.Linear(6, 9), [pair])
    module = distiller.export("x")
    before = [buffer.clone() for buffer in module.buffers()]
    assert torch.equal(module(FEATURES), module(FEATURES))
    assert all(torch.equal(*buffers) for buffers in zip(module.buffers(), before, strict=True))
    assert all(part.training for part in distiller.student.modules())


@pytest.mark.parametrize("projection", ["orthogonal", "linear"])
@pytest.mark.parametrize("pool", ["mean_tokens", "tokens"])
def test_an_exported_student_of_batch_norm_is_standardized(pool, projection):
    """As the loss does it, with the statistics of a batch."""
    pair = {"student": "norm", "teacher": "norm", "teacher_pool": pool, "student_pool": pool, "name": "x"}
    options = {"normalization": "batch_norm", "projection": projection, "eps": 0.1}
    distiller = make([{**pair, **options}], ViT(6), ViT(9))
    images = torch.cat([IMAGES, IMAGES.flip(0) * 2])
    with pytest.raises(ValueError, match="calibration_input must be given for a pair with normalization='batch_norm'"):
        distiller.export("x")
    module = distiller.export("x", calibration_input=images)
    target = outputs_of(distiller.teacher, ["norm"], images)["norm"]
    target = target if pool == "tokens" else target.mean(1)
    target = vk.functional.standardize(target.flatten(0, -2), eps=0.1)
    vectors = module(images).flatten(0, -2)
    torch.testing.assert_close(F.smooth_l1_loss(vectors, target), distiller(images)[1]["x"].detach())
    torch.testing.assert_close(vectors.mean(0), torch.zeros(9), rtol=0, atol=1e-5)
    torch.testing.assert_close(module(IMAGES), module(images)[:5])
    with pytest.raises(ValueError, match="and for no other.*'layer_norm'"):
        make([pair], ViT(6), ViT(9)).export("x", calibration_input=images)


@pytest.mark.parametrize("pool", ["tokens", "class_token"])
def test_an_exported_student_goes_through_torch_export_onnx_and_copies(pool):
    pair = {"student": "norm", "teacher": "norm", "teacher_pool": pool, "student_pool": pool, "name": "x"}
    module = make([pair], ViT(6), ViT(9)).export("x")
    expected = module(IMAGES)
    for strict in (False, True):
        program = torch.export.export(module, (IMAGES,), strict=strict)
        assert "vkd" not in str(program.graph)
        torch.testing.assert_close(program.module()(IMAGES), expected)
    torch.testing.assert_close(copy.deepcopy(module)(IMAGES), expected)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    torch.testing.assert_close(torch.load(stream, weights_only=False)(IMAGES), expected)


def test_an_exported_student_goes_to_onnx():
    pytest.importorskip("onnxscript", reason="needs onnxscript, with which PyTorch writes ONNX")
    module = make([{**TOKENS_TO_MAP, "name": "x"}]).export("x")
    program = torch.onnx.export(module, (IMAGES,), dynamo=True, verbose=False)
    assert not {node.domain for node in program.model.graph} - {"", "pkg.onnxscript.torch_lib"}
    pytest.importorskip("onnxruntime", reason="needs onnxruntime, which runs what was written")
    torch.testing.assert_close(program(IMAGES)[0], module(IMAGES), rtol=1e-4, atol=1e-5)


def test_an_exported_student_that_is_tapped_itself():
    distiller = make([{"student": "", "teacher": "", "name": "x"}], ViT(classes=7), CNN(classes=12))
    expected = distiller.student(IMAGES) @ distiller.projection("x").T
    torch.testing.assert_close(distiller.export("x")(IMAGES), expected)


def test_pairs_of_cosine_and_of_targets_by_a_module():
    class Halved(nn.Module):
        def forward(self, features, mask):
            return features / 2

    pairs = [
        {**TOKENS_TO_MAP, "name": "cosine", "loss": "cosine"},
        {**TOKENS_TO_MAP, "name": "module", "normalization": Halved(), "loss": {"mse": 0.5, "smooth_l1": 0.5}},
    ]
    distiller = make(pairs)
    x = outputs_of(distiller.student, ["norm"], IMAGES)["norm"][:, 1:].mean(1)
    y = outputs_of(distiller.teacher, ["relu"], IMAGES)["relu"].mean((2, 3))
    losses = distiller(IMAGES)[1]
    expected = 1 - F.cosine_similarity(x @ distiller.projection("cosine").T, F.layer_norm(y, (10,)), dim=1).mean()
    torch.testing.assert_close(losses["cosine"], expected)
    z = x @ distiller.projection("module").T
    torch.testing.assert_close(losses["module"], 0.5 * (F.mse_loss(z, y / 2) + F.smooth_l1_loss(z, y / 2)))
    assert vk.Pair(**pairs[0]).loss == "cosine"
