"""Classification: the bundled run, real images, the paper's students and recipes, losses, stored answers."""

import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from tests.recipes import setups
from tests.recipes.setups import of_folder
from vkd_kernels import cli
from vkd_kernels.recipes import classification, engine, models, runs, task
from vkd_kernels.recipes import config as configs
from vkd_kernels.recipes.classification import DistilledStudent
from vkd_kernels.recipes.config import OptionError
from vkd_kernels.recipes.runs import RunError

ROOT = Path(__file__).parents[2]
configured = partial(setups.configured, "classification")
recipe = partial(setups.recipe, "classification")
job = partial(setups.job, "classification")
NOT_PRETRAINED = {"pretrained": False}
RECIPES = {"vkd-deit-ti-imagenet": "vkd_deit_tiny", "vkd-deit-s-imagenet": "vkd_deit_small"}


# ---- models ----------------------------------------------------------------------------------------------------------

TINY_SHAPE = models.Shape(classes=5, size=32, channels=3)


@pytest.mark.parametrize(("name", "width", "heads", "millions"), [("tiny", 192, 3, 6.6), ("small", 384, 6, 23.8)])
def test_the_papers_students(name, width, heads, millions):
    config = configured(student__name=f"vkd_deit_{name}").student
    model = models.make_student(config, models.Shape(1000, 224, 3), empty=True)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.01)
    assert model.pos_embed.shape == (1, 198, width) and len(model.blocks) == 12
    assert model.blocks[0].attn.num_heads == heads
    convolutions = [m for m in model.patch_embed.modules() if isinstance(m, torch.nn.Conv2d)]
    stem = [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0]) for m in convolutions]
    assert stem == [(3, 64, 7, 2), (64, 64, 3, 1), (64, 64, 3, 1), (64, width, 8, 8)]
    out = models.run(model, torch.empty(2, 3, 224, 224, device="meta"))
    assert out.tokens.shape == (2, 196, width) and out.logits.shape == out.distilled.shape == (2, 1000)


def test_distillation_token_is_the_mean_of_the_patches_and_evaluation_averages_the_heads():
    model = models.make_student(configured(student__name="vkd_deit_tiny").student, TINY_SHAPE)
    pictures = torch.randn(2, 3, 32, 32)
    patches = model.patch_embed(pictures)
    tokens = model._pos_embed(patches) - model.pos_embed
    torch.testing.assert_close(tokens[:, 1], patches.mean(1), atol=1e-5, rtol=0)
    first, second = model.train()(pictures)
    assert first.shape == second.shape == (2, 5)
    tokens = model.eval().forward_features(pictures)
    both = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2
    torch.testing.assert_close(model(pictures), both)
    torch.testing.assert_close(models.run(model, pictures).tokens, tokens[:, 2:])


@pytest.mark.parametrize(
    ("name", "positions", "width"),
    [
        ("regnety_160.deit_in1k", 49, 3024),
        ("deit_tiny_distilled_patch16_224", 196, 192),
        ("vit_small_patch14_reg4_dinov2", 256, 384),
        ("swin_tiny_patch4_window7_224", 49, 768),
    ],
)
def test_features_of_timms_models(name, positions, width):
    """Maps with channels first and last, tokens behind none, two and five others."""
    model = models.make_teacher(configured(teacher__name=name).teacher, models.Shape(7, 224, 3), empty=True).eval()
    out = models.run(model, torch.empty(2, 3, 224, 224, device="meta"))
    assert out.tokens.shape == (2, positions, width) and out.logits.shape == (2, 7) and model.num_features == width


# ---- losses ----------------------------------------------------------------------------------------------------------


class Heads(torch.nn.Module):
    """A student of one layer: positions (N, P, 4) are the images, with one head or two."""

    def __init__(self, heads=1):
        super().__init__()
        self.embed = torch.nn.Linear(4, 6)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(6, 3) for _ in range(heads))
        self.num_features, self.num_classes = 6, 3

    def forward_features(self, pictures):
        return self.embed(pictures)

    def forward_head(self, features):
        logits = tuple(head(features.mean(1)) for head in self.heads)
        return logits if len(logits) > 1 else logits[0]


def batch_of(labeled=8, positions=9, places=(), alone=False):
    targets = torch.randn(8, 3).softmax(1)
    targets[labeled:] = 0
    batch = {"images": torch.randn(8, positions, 4), "targets": targets}
    return batch if alone else {**batch, "logits": torch.randn(8, 3), "features": torch.randn(8, *places, 10) * 3 + 1}


@pytest.mark.parametrize("projection", ["orthogonal", "linear", "identity"])
def test_losses_are_the_formulas(projection):
    values = {"distill__projection": projection, "distill__scale": 0.7, "distill__temperature": 2, "distill__beta": 0.5}
    model = DistilledStudent(Heads(2), configured(**values).distill, 10, labeled_share=0.5)
    batch = batch_of(labeled=4)
    losses = model(batch)
    tokens = model.student.embed(batch["images"]).double()
    first, second = (h.double() for h in model.student.forward_head(tokens.float()))
    labels = -(batch["targets"].double() * first.log_softmax(1)).sum() / 4  # mean over the four that have labels
    soft, hard = (batch["logits"].double() / 2).softmax(1), (second / 2).log_softmax(1)
    logits = 4 * (soft * (soft.log() - hard)).sum() / 8
    y = batch["features"].double()
    target = (y - y.mean(1, keepdim=True)) / (y.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    difference = 0.7 * tokens.mean(1) @ model.feature_loss.projection.weight.double().T - target
    large = difference.abs() > 0.5
    features = torch.where(large, difference.abs() - 0.25, difference**2).mean()  # smooth L1, beta 0.5
    truth = {"labels": labels, "logits": logits, "features": features, "total": labels + logits + 10 * features}
    assert losses.keys() == truth.keys()
    for name, value in truth.items():
        torch.testing.assert_close(losses[name].double(), value, atol=1e-5, rtol=1e-5)
    spared = [p for group in task.parameter_groups(model, 0.05) if not group["weight_decay"] for p in group["params"]]
    assert all(any(p is q for q in spared) for p in model.feature_loss.parameters())


def test_ranks_average_to_the_whole():
    """Also where one rank has all the labels."""
    model = DistilledStudent(Heads(), classification.Config().distill, 10, labeled_share=0.5)
    batch = batch_of(labeled=4)
    parts = [model({name: value[half] for name, value in batch.items()}) for half in (slice(4), slice(4, 8))]
    for name, value in model(batch).items():
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, value)


def test_a_student_alone_trains_both_of_its_heads():
    distill = configured(distill__weight=0, distill__logit_weight=0).distill
    model, batch = DistilledStudent(Heads(2), distill, 0, labeled_share=1.0), batch_of(alone=True)
    losses = model(batch)
    assert model.feature_loss is None and losses.keys() == {"labels", "total"}
    heads = model.student.forward_head(model.student.embed(batch["images"]))
    torch.testing.assert_close(losses["total"], sum(F.cross_entropy(x, batch["targets"]) for x in heads) / 2)


def test_tokens_are_compared_position_by_position():
    distill = configured(distill__features="tokens").distill
    model = DistilledStudent(Heads(), distill, 10, labeled_share=1.0)
    batch = batch_of(positions=4, places=(4,))
    tokens = model.student.embed(batch["images"])
    torch.testing.assert_close(model(batch)["features"], model.feature_loss(tokens, batch["features"]))
    with pytest.raises(ValueError, match="student and teacher"):
        model(batch_of(positions=9, places=(4,)))


# ---- the teacher -----------------------------------------------------------------------------------------------------


def saved_teacher(folder, classes=2):
    model = models.make_teacher(configured(teacher__name="regnety_002").teacher, models.Shape(classes, 32, 3))
    runs.save_safetensors(folder / "weights.safetensors", model.state_dict())
    return {"teacher__name": "regnety_002", "teacher__weights": str(folder / "weights.safetensors")}


def test_the_student_of_a_run_in_a_program_of_ones_own(folder, monkeypatch):
    """The code of docs/recipes.md reads and uses the weights as the run itself does."""
    words = ["distill", "classification", "data.name=folder", f"data.root={folder}", "data.size=64", "--arms", "vkd"]
    words += ["teacher.name=resnet10t", f"teacher.weights={folder}/teacher.safetensors", "distill.logit_weight=0"]
    words += ["student.name=resnet10t", "optim.batch_size=8", "optim.steps=3", "--seeds", "1", "--jobs", "0", "--quiet"]
    words += ["--output", "runs/photos"]
    teacher = timm.create_model("resnet10t", num_classes=2)
    runs.save_safetensors(folder / "teacher.safetensors", teacher.state_dict())
    monkeypatch.chdir(folder)
    assert cli.main(words) == 0
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL)[1]
    right, names = 0, {}
    for path in sorted((folder / "val").rglob("*.png")):
        edited = code.replace("num_classes=3", "num_classes=2").replace("photos/val/beech/7.jpg", str(path))
        exec(edited, names)
        right += int(names["logits"].argmax()) == int(path.parent.name[-1])
    assert 100 * right / 6 == pytest.approx(runs.load(Path("runs/photos/vkd/seed-00/result.json"))["accuracy"])


def test_the_documented_command_for_ones_own_images(folder, monkeypatch):
    """A pretrained teacher of a thousand classes, and images of two; nothing is downloaded here."""
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: create_model(*args, **options | NOT_PRETRAINED))
    monkeypatch.setattr(models, "fetch", models.fetch.__wrapped__)  # which would remember that it had fetched
    page = (ROOT / "docs" / "recipes.md").read_text().replace("\\\n", " ")
    command = next(line.split() for line in page.splitlines() if "data.root=photos" in line)
    (folder / "photos").mkdir()
    for split in ("train", "val"):
        (folder / split).rename(folder / "photos" / split)
    monkeypatch.chdir(folder)
    small = ["optim.batch_size=8", "optim.steps=2", "--seeds", "1", "--jobs", "0", "--quiet"]
    assert cli.main([*command[1:], *small]) == 0
    assert Path("runs/photos/figure.png").exists()


def test_stored_answers_are_those_of_the_teacher(folder):
    values = {"augment__views": 2, "optim__batch_size": 8}
    values |= saved_teacher(folder / "teacher")
    for kind in ("pooled", "tokens"):
        training = job(of_folder(folder, distill__features=kind, **values), folder / "run")
        batches = training.batches(3)
        assert (folder / "run" / f"answers-{kind}" / "store.json").exists()  # before the first step, which is timed
        batch = next(batches)
        assert batch["features"].shape == ((8, 368) if kind == "pooled" else (8, 1, 368))
        for name, answer in training.ask(batch["images"]).items():
            torch.testing.assert_close(batch[name], answer)
    with pytest.raises(OptionError, match=r"augment\.mixup, augment\.cutmix: 0 with fixed augment\.views"):
        of_folder(folder, augment__views=2, augment__mixup=0.8)


def test_the_teacher_of_a_subclass_learns_from_the_subclass_own_data_with_the_built_in_loss(folder):
    class Mine(classification.Classification):
        data = setups.image_data(folder)

        def make_model(self, student):
            raise AssertionError("of the student")

    config = of_folder(folder, teacher__steps=7)
    mine = Mine(config, job(config, folder / "run").context)
    teacher = task.as_teacher(classification.TeacherTraining, mine)
    assert isinstance(teacher, Mine) and teacher.data is Mine.data
    assert teacher.steps == 7 and teacher.learner == "teacher"
    assert isinstance(teacher.make_model(torch.nn.Linear(2, 2)), DistilledStudent)


@pytest.mark.parametrize(("warmup", "rise"), [(0.1, 3), (20, 10), (0, 0), (1, 0)])
def test_a_teacher_warms_up_in_the_same_share_of_its_own_steps(folder, warmup, rise):
    config = of_folder(folder, teacher__steps=30, optim__steps=60, optim__warmup=warmup)
    student = job(config, folder / "run")
    teacher = task.as_teacher(classification.TeacherTraining, student)
    rates = [teacher.optim.rate(step, teacher.steps) for step in range(30)]
    assert rates.index(1.0) == max(rise - 1, 0) and not teacher.optim.ema_start


def test_a_teacher_of_other_classes_teaches_by_its_features(folder):
    values = saved_teacher(folder / "teacher", classes=7)
    with pytest.raises(RunError, match=r"teacher\.weights: .*another architecture.*head\.fc"):
        job(of_folder(folder, optim__batch_size=8, **values), folder / "run").train_teacher()
    with pytest.raises(RunError, match=r"head\.fc.*; if only the head differs, distill\.logit_weight=0 leaves it out"):
        classification.Classification.check(of_folder(folder, optim__batch_size=8, **values))
    config = of_folder(folder, distill__logit_weight=0, optim__batch_size=8, **values)
    classification.Classification.check(config)
    batch = next(job(config, folder / "run").batches(0))
    assert "logits" not in batch and batch["features"].shape == (8, 368)
    config = configured(teacher__name="resnet18", teacher__pretrained=True).teacher
    with pytest.raises(OptionError, match=r"teacher\.pretrained: resnet18 has 1000 classes, not 2; with distill"):
        models.make_teacher(config, models.Shape(2, 32, 3))


def test_a_pretrained_teacher_by_any_name_of_timm_knows_the_classes(folder):
    timm.models.save_for_hf(timm.create_model("resnet10t", num_classes=5), folder / "hub", model_config={})
    words = {"teacher__name": f"local-dir:{folder}/hub", "teacher__pretrained": True, "optim__batch_size": 8}
    with pytest.raises(OptionError, match=r"teacher\.pretrained: local-dir:.* has 5 classes, not 2"):
        classification.Classification.check(of_folder(folder, **words))
    classification.Classification.check(of_folder(folder, distill__logit_weight=0, **words))


def test_features_that_are_no_patches_are_refused(folder):
    """timm's pit and coat have a class token and no number of prefix tokens."""
    check, words = classification.Classification.check, {"optim__batch_size": 8, "teacher__batch_size": 8}
    with pytest.raises(
        OptionError, match=r"^student\.name: timm does not say which tokens of coat_lite_tiny are patches"
    ):
        check(of_folder(folder, student__name="coat_lite_tiny", **words))
    check(of_folder(folder, student__name="coat_lite_tiny", distill__weight=0, **words))  # logits alone
    with pytest.raises(OptionError, match=r"^student\.name: crossvit_tiny_240 cannot take an image \(32, 3\): "):
        check(of_folder(folder, student__name="crossvit_tiny_240", **words))


def test_a_warm_up_longer_than_the_epochs_is_refused_before_the_teacher_is_trained(folder):
    config = of_folder(folder, optim__steps=0, optim__epochs=2, optim__warmup=50, optim__batch_size=4)
    with pytest.raises(OptionError, match=r"^optim\.warmup: 50, but there are only 6 steps, of optim\.epochs=2; lower"):
        job(config, folder / "run").train_teacher()
    assert not (folder / "run" / "metrics.jsonl").exists()


def test_without_a_network_the_error_names_the_remedy_before_anything_is_trained(folder, monkeypatch):
    def unreachable(*args, pretrained=False, **options):
        if pretrained:
            raise FileNotFoundError("cannot find the requested files")
        return create_model(*args, **options)

    create_model = models.timm.create_model
    monkeypatch.setattr(models.timm, "create_model", unreachable)
    words = {"teacher__name": "resnet18", "teacher__pretrained": True, "optim__batch_size": 8}
    with pytest.raises(RunError, match=r"teacher\.pretrained: .*requested files; .*give teacher\.weights=FILE"):
        classification.Classification.check(of_folder(folder, distill__logit_weight=0, **words))
    with pytest.raises(OptionError, match=r"teacher\.pretrained: resnet18 has 1000 classes, not 2"):
        classification.Classification.check(of_folder(folder, **words))


def test_what_cannot_be_trained_is_said_before(folder):
    check = classification.Classification.check
    check(of_folder(folder, optim__batch_size=12, teacher__batch_size=12))
    with pytest.raises(OptionError, match=r"^optim\.batch_size: 13, but there are only 12 training images"):
        check(of_folder(folder, optim__batch_size=13, teacher__batch_size=12))
    with pytest.raises(OptionError, match=r"^teacher\.batch_size: 13, but there are only 12 training images"):
        check(of_folder(folder, optim__batch_size=12, teacher__batch_size=13))
    batches = {"optim__batch_size": 8, "teacher__batch_size": 8, "distill__features": "tokens"}
    check(of_folder(folder, teacher__pools=(1, 2), student__patch=4, **batches))
    with pytest.raises(OptionError, match=r"^distill\.features: tokens, but the student has 64 positions and .* 256;"):
        check(of_folder(folder, student__patch=4, **batches))
    small = models.make_student(of_folder(folder, student__width=16).student, models.Shape(2, 32, 3))
    runs.save_safetensors(folder / "student.safetensors", small.state_dict())
    with pytest.raises(RunError, match=r"student\.weights: .* is of another architecture: .*size mismatch"):
        check(of_folder(folder, student__weights=str(folder / "student.safetensors"), **batches))
    other = {**saved_teacher(folder / "teacher"), "teacher__name": "resnet10t"}
    with warnings.catch_warnings(), pytest.raises(RunError, match=r"another architecture: .*Missing key"):
        warnings.simplefilter("error")  # PyTorch's about meta tensors are not for a user
        check(of_folder(folder, **{**batches, "distill__features": "pooled"}, **other))


def test_students_alone_need_no_teacher(folder):
    alone = {"teacher__steps": 0, "distill__weight": 0, "distill__logit_weight": 0, "optim__batch_size": 8}
    training = job(of_folder(folder, student__name="resnet10t", **alone), folder / "run")
    assert training.train_teacher() == {} and next(training.batches(0)).keys() == {"images", "targets"}
    with pytest.raises(OptionError, match=r"teacher\.weights: give a file"):
        job(of_folder(folder, **{**alone, "distill__weight": 1}), folder / "run").train_teacher()


# ---- the paper's recipes ---------------------------------------------------------------------------------------------

PAPER = {  # docs/classification.md
    **{"teacher.name": "regnety_160.deit_in1k", "data.size": 224, "data.crop": 0.875, "data.classes": 1000},
    **{"augment.crop_min": 0.08, "augment.flip": 0.5, "augment.three_augment": True},
    **{"augment.color_jitter": 0.3, "augment.mixup": 0.8, "augment.cutmix": 1.0},
    **{"distill.features": "pooled", "distill.projection": "orthogonal", "distill.normalization": "layer_norm"},
    **{"distill.scale": 1.0, "distill.weight": 1.0, "distill.beta": 1.0, "distill.logit_weight": 1.0},
    **{"distill.temperature": 1.0, "distill.label_smoothing": 0.1, "student.drop_path": 0.0, "optim.lr": 5e-4},
    **{"optim.min_lr": 5e-6, "optim.betas": (0.9, 0.999), "optim.weight_decay": 0.05, "optim.warmup": 0.0},
    **{"optim.schedule": "cosine", "optim.epochs": 300.0, "optim.batch_size": 512, "optim.clip_norm": 0.0},
    **{"optim.ema": 0.0, "optim.precision": "bf16-mixed"},
}


@pytest.mark.parametrize(("name", "student"), RECIPES.items())
def test_recipe_has_the_papers_values(name, student):
    values = configs.flatten(recipe(name))
    assert {key: values[key] for key in PAPER} == PAPER and values["student.name"] == student
    with pytest.raises(OptionError, match=r"teacher\.weights: give a file, or teacher\.pretrained=true"):
        classification.trained_here(recipe(name))


class RandomImages:
    """Two images of a thousand classes at full size."""

    classes, size, channels, images, views = 1000, 224, 3, 2, 0

    def batches(self, learner, start, batch_size, rank, ranks):
        while True:
            yield torch.randn(batch_size, 3, 224, 224), torch.rand(batch_size, 1000).softmax(1), None

    def held_out(self, rank, ranks):
        yield torch.randn(2, 3, 224, 224), torch.tensor([3, 4])


@pytest.fixture(scope="module")
def regnet():
    return models.make_teacher(configured(teacher__name="regnety_160.deit_in1k").teacher, models.Shape(1000, 224, 3))


@pytest.mark.parametrize(("name", "student"), RECIPES.items())
def test_one_step_of_a_paper_recipe_at_full_size(name, student, regnet, tmp_path):
    values = {"optim__batch_size": 2, "optim__steps": 1, "optim__epochs": 0}
    training = job(recipe(name, teacher__weights="-", **values), tmp_path)
    training.data, training.teacher = RandomImages(), classification.Teaching(regnet.eval(), "pooled")
    before = {}
    plain = training.make_model

    def make_model(student):
        model = plain(student)
        before.update({key: value.detach().clone() for key, value in model.named_parameters()})
        return model

    training.make_model = make_model
    result = engine.train(training)
    assert not [key for key, value in training.model.named_parameters() if torch.equal(value, before[key])]
    assert result["diagnostics"]["max |PᵀP - I|"] < 1e-5 and "accuracy" in result
