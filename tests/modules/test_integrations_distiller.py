"""FeatureDistiller with the real libraries: timm, torchvision, transformers, Lightning; EMA, GradScaler, export.

Its own behavior: test_distiller*.py. docs/integrations.md is the table.
"""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.distillers import CNN, IMAGES, TOKENS_TO_MAP, ViT, gradients, hooks_on, loss_like, make
from tests.helpers.stacks import orthogonality_error
from tests.modules.test_integrations import averaged_by_timm, averaged_by_torch


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------ real libraries


def timm_model(name, **options):
    return pytest.importorskip("timm", reason="needs timm (the extra integrations)").create_model(name, **options)


def torchvision_model(name, **options):
    models = pytest.importorskip("torchvision.models", reason="needs torchvision (the extra integrations)")
    return getattr(models, name)(**options)


def timm_vit(**options):
    return timm_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=24, num_heads=2, **options)


def timm_deit_distilled():
    return timm_model(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=24, num_heads=2, num_classes=5
    )


def timm_regnet():
    return timm_model("regnetx_002", num_classes=5)


def timm_swin():
    return timm_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=2,
        depths=(1, 1),
        embed_dim=12,
        num_heads=(1, 2),
        num_classes=5,
    )


TAPS = {  # the module whose output forward_features returns, how to pool it, the same by hand
    "timm ViT": (timm_vit, "norm", {"pool": "mean_tokens", "skip": 1}, lambda x: x[:, 1:].mean(1)),
    "timm ViT, class token": (timm_vit, "norm", {"pool": "class_token"}, lambda x: x[:, 0]),
    "timm DeiT, two tokens": (
        timm_deit_distilled,
        "norm",
        {"pool": "mean_tokens", "skip": 2},
        lambda x: x[:, 2:].mean(1),
    ),
    "timm RegNet": (timm_regnet, "final_conv", {"pool": "spatial_mean"}, lambda x: x.mean((2, 3))),
    "timm Swin, channels last": (
        timm_swin,
        "norm",
        {"pool": lambda x: x.mean((1, 2))},
        lambda x: x.mean((1, 2)),
    ),
}


@pytest.mark.parametrize("student", TAPS)
def test_timm_models_by_what_forward_features_returns(student):
    build, module, options, by_hand = TAPS[student]
    pair = {"student": module, "teacher": "final_conv", "teacher_pool": "spatial_mean", "name": "x"}
    pair |= {f"student_{name}": value for name, value in options.items()}
    images = torch.randn(3, 3, 32, 32)
    distiller = make([pair], build(), timm_regnet(), example_input=images).eval()
    x = by_hand(distiller.student.forward_features(images))
    y = distiller.teacher.forward_features(images).mean((2, 3))
    expected = loss_like(distiller, "x", x.shape[1], y.shape[1])(x, y)
    output, losses = distiller(images)
    torch.testing.assert_close(losses["x"], expected)
    torch.testing.assert_close(output, distiller.student(images))


@pytest.mark.parametrize(("name", "module"), [("resnet18", "layer4"), ("mobilenet_v3_small", "features")])
def test_torchvision_models(name, module):
    student, teacher = torchvision_model(name, num_classes=5), torchvision_model("resnet18", num_classes=5)
    pairs = [
        {"student": module, "student_pool": pool, "teacher": "layer4", "teacher_pool": pool, "name": pool}
        for pool in ("spatial", "spatial_mean")
    ]
    images = torch.randn(3, 3, 64, 64)
    distiller = make(pairs, student, teacher, example_input=images, logit_weight=1.0)
    layers = nn.Sequential(*list(student.children())[:-2]) if name == "resnet18" else student.features
    seen = copy.deepcopy(layers)(images)  # a copy: batch norm's statistics move
    target = nn.Sequential(*list(teacher.children())[:-2])(images)
    losses = distiller(images)[1]
    s, t = seen.shape[1], target.shape[1]
    expected = loss_like(distiller, "spatial", s, t)(seen.permute(0, 2, 3, 1), target.permute(0, 2, 3, 1))
    torch.testing.assert_close(losses["spatial"], expected, rtol=1e-4, atol=1e-5)
    expected = loss_like(distiller, "spatial_mean", s, t)(seen.mean((2, 3)), target.mean((2, 3)))
    torch.testing.assert_close(losses["spatial_mean"], expected, rtol=1e-4, atol=1e-5)


def bert(transformers, width, kind="BertForSequenceClassification"):
    config = transformers.BertConfig(
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
    )
    return getattr(transformers, kind)(config).eval()


def test_transformers_text_models_with_attention_masks():
    """Tokens of the last and of an inner layer, and logits: padding has no part in them, whatever it holds."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (the extra integrations)")
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 1])[:, None]
    inputs = {"input_ids": torch.randint(50, (4, 7)), "attention_mask": mask.long()}
    tokens = {"student_pool": "tokens", "teacher_pool": "tokens"}
    pairs = [
        {
            "student": "bert.encoder",
            "student_output": "last_hidden_state",
            "teacher": "bert.encoder",
            "teacher_output": "last_hidden_state",
            **tokens,
            "name": "last",
        },
        {"student": "bert.encoder.layer.0.output", "teacher": "bert.encoder.layer.0.output", **tokens, "name": "first"},
    ]
    models = bert(transformers, 16), bert(transformers, 24)
    distiller = make(pairs, *models, example_input=inputs, logit_weight=1.0).eval()
    output, losses = distiller(**inputs, masks={"last": mask, "first": mask})
    states = [model(**inputs, output_hidden_states=True).hidden_states for model in models]
    for name, layer in (("last", -1), ("first", 1)):
        x, y = (hidden[layer][mask] for hidden in states)
        torch.testing.assert_close(losses[name], loss_like(distiller, name, 16, 24)(x, y))
    torch.testing.assert_close(output.logits, models[0](**inputs).logits)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(~mask, 49)
    torch.testing.assert_close(distiller(**inputs, masks={"last": mask, "first": mask})[1], losses)


def test_transformers_vision_models():
    transformers = pytest.importorskip("transformers", reason="needs transformers (the extra integrations)")
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    student = transformers.ViTForImageClassification(config).eval()
    pair = {
        "student": "vit.layernorm",
        "student_pool": "mean_tokens",
        "student_skip": 1,
        "teacher": "final_conv",
        "teacher_pool": "spatial_mean",
        "name": "x",
    }
    images = torch.randn(3, 3, 32, 32)
    distiller = make([pair], student, timm_regnet(), example_input=images, logit_weight=1.0).eval()
    losses = distiller(images)[1]
    x = student.vit(images).last_hidden_state[:, 1:].mean(1)
    y = distiller.teacher.forward_features(images).mean((2, 3))
    torch.testing.assert_close(losses["x"], loss_like(distiller, "x", 16, y.shape[1])(x, y))
    logits = student(images).logits, distiller.teacher(images)
    expected = F.kl_div(F.log_softmax(logits[0], 1), F.softmax(logits[1], 1), reduction="batchmean")
    torch.testing.assert_close(losses["logits"], expected)


def test_in_a_lightning_module_that_logs_its_metrics(tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs lightning (the extra integrations)")

    class Distillation(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.distiller = make()

        def training_step(self, batch, index):
            _, losses, metrics = self.distiller(batch[0], metrics=True)
            self.log_dict(metrics)
            return losses["total"]

        def configure_optimizers(self):
            return torch.optim.AdamW(self.distiller.parameter_groups(weight_decay=0.05), lr=1e-2)

    module = Distillation()
    before = module.distiller.projection("norm->relu").detach().clone()
    trainer = lightning.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES), batch_size=3))
    after = module.distiller.projection("norm->relu")
    assert not torch.equal(after, before) and orthogonality_error(after) <= 1e-5
    logged = trainer.callback_metrics
    assert logged["diagnostics/norm->relu/orthogonality_error"] <= 1e-5 and logged["loss/norm->relu"] > 0
    assert not any("teacher" in name for name in module.state_dict())


def test_timms_optimizers_spare_the_projections():
    """timm asks the model for ``no_weight_decay()`` and takes the names for patterns, where [x] is any one letter."""
    optim = pytest.importorskip("timm.optim", reason="needs timm (the extra integrations)")
    pairs = [TOKENS_TO_MAP, {**TOKENS_TO_MAP, "name": "x", "scale": "learned"}]
    distiller = make(pairs)
    groups = [
        optim.create_optimizer_v2(distiller, opt="adamw", lr=1e-3, weight_decay=0.05).param_groups,
        optim.param_groups_weight_decay(distiller, 0.05, no_weight_decay_list=distiller.no_weight_decay()),
        distiller.parameter_groups(0.05),
    ]
    for entries in groups:
        decays = {id(p): group["weight_decay"] for group in entries for p in group["params"]}
        decayed = {name for name, p in distiller.named_parameters() if decays[id(p)] > 0}
        assert decayed >= {"student.head.weight", "student.embed.weight"}
        assert not any("pair_losses" in name or "cls_token" in name for name in decayed)
    distiller.student.no_weight_decay = lambda: {"embed.*", "cls_token"}  # as timm's XCiT has patterns
    assert "student.embed.weight" in distiller.no_weight_decay()
    assert "student.head.weight" not in distiller.no_weight_decay()


def test_timms_layer_decay_of_a_student_in_a_distiller():
    """The lines of docs/integrations.md: a scale for every layer, and the projections at the full rate."""
    student = timm_model("vit_tiny_patch16_224", img_size=8, patch_size=4, depth=2, num_classes=3)
    scheduler = pytest.importorskip("timm.scheduler")
    distiller = make([{**TOKENS_TO_MAP, "name": "x", "scale": "learned"}], student)
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    names = {"distiller": distiller}
    exec(re.search(r"^from timm.optim .*?(?=^```)", page, re.DOTALL | re.MULTILINE)[0], names)
    optimizer = torch.optim.AdamW(names["groups"], lr=1.0)
    scheduler.StepLRScheduler(optimizer, decay_t=10).step(1)
    settings = {
        id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    by_name = {name: settings.pop(id(p)) for name, p in distiller.named_parameters()}
    assert not settings
    assert by_name["student.cls_token"] == (0.75**3, 0.0)
    rates = [by_name[f"student.blocks.{block}.mlp.fc1.weight"] for block in range(2)]
    assert rates == [(0.75**2, 0.05), (0.75, 0.05)] and by_name["student.head.weight"] == (1.0, 0.05)
    of_pairs = {value for name, value in by_name.items() if name.startswith("pair_losses.")}
    assert of_pairs == {(1.0, 0.0)} and sum(name.startswith("pair_losses.") for name in by_name) == 2


def test_in_a_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers (the extra integrations)")
    pytest.importorskip("accelerate", reason="needs accelerate, which transformers.Trainer asks for")
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 2])[:, None]
    fields = {"input_ids": torch.randint(50, (4, 7)), "attention_mask": mask.long()}
    tap = {"student_pool": "mean_tokens", "teacher_pool": "mean_tokens", "name": "x"}
    pair = {"student": "bert.encoder.layer.1.output", "teacher": "bert.encoder.layer.1.output", **tap}
    models = bert(transformers, 16), bert(transformers, 24)
    distiller = make([pair], *models, example_input=fields, logit_weight=1.0)

    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            inputs.pop("labels", None)
            output, losses = model(**inputs, masks={"x": inputs["attention_mask"].bool()})
            return (losses["total"], output) if return_outputs else losses["total"]

    options = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=3,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        per_device_train_batch_size=4,
    )
    optimizer = torch.optim.AdamW(distiller.parameter_groups(weight_decay=0.05), lr=1e-2)
    data = [{name: value[i] for name, value in fields.items()} for i in range(4)]
    trainer = Trainer(distiller, options, train_dataset=data, optimizers=(optimizer, None))
    before = distiller.projection("x").detach().clone()
    trainer.train()
    after = distiller.projection("x")
    assert not torch.equal(after, before) and orthogonality_error(after) <= 1e-5


# ---------------------------------------------------------------------------------------------------------- the stack


@pytest.mark.parametrize("averaged", [averaged_by_torch, averaged_by_timm], ids=lambda f: f.__name__)
def test_ema_of_a_distiller_and_of_its_student(averaged):
    """Of the whole: orthonormal projections, a teacher of its own. Of ``distiller.student``, as one would: no hooks."""
    distiller = make()
    averages = averaged(distiller), averaged(distiller.student)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        distiller(IMAGES)[1]["total"].backward()
        optimizer.step()
        for average, module in zip(averages, (distiller, distiller.student), strict=True):
            (getattr(average, "update_parameters", None) or average.update)(module)
    whole, student = (average.module for average in averages)
    p = whole.projection("norm->relu")
    assert orthogonality_error(p) <= 1e-6 and not torch.equal(p, distiller.projection("norm->relu"))
    assert whole.teacher is not distiller.teacher and whole(IMAGES)[1]["total"].isfinite()
    assert hooks_on(student) == 0
    torch.testing.assert_close(student(IMAGES), whole.student(IMAGES))


def test_gradscaler_skips_a_step_that_overflows():
    distiller = make(logit_weight=1.0)
    optimizer = torch.optim.AdamW(distiller.parameter_groups(weight_decay=0.05), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):
        images = torch.full_like(IMAGES, torch.inf) if step == 3 else IMAGES
        before, scale = [p.detach().clone() for p in distiller.parameters()], scaler.get_scale()
        with torch.autocast("cpu", dtype=torch.float16):
            losses = distiller(images)[1]
        optimizer.zero_grad()
        scaler.scale(losses["total"]).backward()
        scaler.step(optimizer)
        scaler.update()
        unchanged = all(torch.equal(p, q) for p, q in zip(distiller.parameters(), before, strict=True))
        assert unchanged == (step == 3) and scaler.get_scale() == (scale / 2 if step == 3 else scale)
    assert orthogonality_error(distiller.projection("norm->relu")) <= 1e-5


@pytest.mark.parametrize("attached", [False, True])
def test_export_the_distilled_student_alone(attached):
    distiller = make()
    if attached:
        distiller.attach()
    gradients(distiller, distiller(IMAGES)[1]["total"])
    exported = torch.export.export(distiller.student.eval(), (IMAGES,))
    assert "vkd" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(IMAGES), distiller.student(IMAGES))


def test_functional_call_of_a_distiller_with_another_teacher_input():
    distiller, other = make(), make(student=ViT(), teacher=CNN())
    large = F.interpolate(IMAGES, scale_factor=2)
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    with torch.no_grad():
        other.teacher.load_state_dict(distiller.teacher.state_dict())
    got = torch.func.functional_call(distiller, state, (IMAGES,), {"teacher_input": large})[1]
    torch.testing.assert_close(got, other(IMAGES, teacher_input=large)[1])
