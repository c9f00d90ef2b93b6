"""The built-in tasks: their bundled runs, resumed to the same bits; what is refused; the loops of their pages."""

import json
import re
from pathlib import Path

import pytest
import torch

import vkd_kernels as vk
from tests.recipes.setups import TINY, configured, job, load, of_folder, recipe
from tests.recipes.toy import stopped_before
from vkd_kernels import cli
from vkd_kernels.recipes import config as configs
from vkd_kernels.recipes import engine, jobs, runs
from vkd_kernels.recipes.config import OptionError

DOCS = Path(__file__).parents[2] / "docs"
ARMS = {
    "classification": {"alone": 6, "logits": 6, "logits-longer": 7, "linear": 6, "vkd": 6, "vkd-match": 6},
    "detection": {"alone": 6, "alone-longer": 10, "linear": 6, "vkd": 6},
    "generation": {"alone": 6, "alone-longer": 8, "linear": 6, "vkd": 6},
}


@pytest.mark.parametrize(("name", "arms"), ARMS.items())
def test_the_bundled_run_and_what_is_stored_of_it(name, arms, tmp_path, monkeypatch):
    load(name)
    words = ["distill", name, "--output", str(tmp_path / "run"), "--seeds", "1", "--quiet", "--jobs", "0", *TINY[name]]
    assert cli.main([*words, *(["optim.precision=bf16-mixed"] if name == "generation" else [])]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {r["arm"]: r["steps"] for r in metrics["runs"]} == arms
    errors = {r["arm"]: r["diagnostics"].get("max |PᵀP - I|") for r in metrics["runs"]}
    assert errors["vkd"] < 1e-5 < errors["linear"] and errors["alone"] is None
    stored = tmp_path / "run" / "vkd" / "seed-00"
    assert not re.search(
        "projection|discriminator|feature_loss", " ".join(runs.load_weights(stored / "student.safetensors"))
    )
    assert (stored / "figures" / "samples.png").exists() == (name == "generation")
    assert not list(tmp_path.rglob("answers-*")), "what the teacher said is made again when needed"
    if name == "classification":
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "classification").symlink_to(tmp_path / "run")
        monkeypatch.chdir(tmp_path)
        assert [step for step, _ in run_code("recipes.md", {})["curve"]] == [3, 6]
        names = run_code("recipes.md", {}, number=2)
        assert names["student"](torch.zeros(1, names["shape"].channels, *[names["shape"].size] * 2)).shape == (1, 10)


def test_no_teacher_is_trained_or_asked_for_where_no_arm_needs_one(tmp_path):
    words = ["--output", str(tmp_path), "--seeds", "1", "--quiet", "--jobs", "0", *TINY["classification"]]
    assert cli.main(["distill", "classification", *words, "--arms", "alone", "teacher.steps=0"]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["teachers"] == []
    assert not (tmp_path / "teacher").exists()
    for name, needed in (("classification", False), ("detection", False), ("generation", True)):  # which has a judge
        task = load(name)
        alone, vkd = (task.arms[arm].apply(task.Config(), {}) for arm in ("alone", "vkd"))
        assert task.needs_teacher(alone) == needed and task.needs_teacher(vkd)


@pytest.mark.parametrize("name", ["classification", "generation"])
@pytest.mark.parametrize("batch_size", [64, 2000])
def test_batches_that_are_drawn_with_replacement_see_as_many_images_as_the_epochs_have(name, batch_size, tmp_path):
    config = configured(name, "optim.steps=0", "optim.epochs=50", f"optim.batch_size={batch_size}")
    training = job(name, config, tmp_path)
    assert training.steps == round(50 * training.images / batch_size) > 1


@pytest.mark.parametrize("name", ARMS)
def test_a_run_that_is_stopped_anywhere_continues_with_the_same_bits(name, tmp_path):
    """Within the teacher's training, then within a student's."""
    config, task = configured(name, *TINY[name], "run.save_every=1"), load(name)

    def both(root, *, stop=False):
        teacher, student = root / "teacher", root / "student"
        if stop and name != "generation":  # whose teacher is not trained by the loop
            with stopped_before(2), pytest.raises(jobs.Interrupted):
                job(name, config, teacher).train_teacher()
        job(name, config, teacher).train_teacher()
        if stop:
            with stopped_before(4), pytest.raises(jobs.Interrupted):
                engine.train(job(name, config, student, teacher=teacher))
        engine.train(job(name, config, student, teacher=teacher))
        weights = [folder / f"{folder.name}.safetensors" for folder in (teacher, student)]
        return [path.read_bytes() for path in weights], runs.load(student / "result.json")[task.metric.key]

    assert both(tmp_path / "a", stop=True) == both(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("classification", ["digits.labels=2"], "digits.labels: must be less than"),
        ("classification", ["student.widht=3"], "unknown key 'student.widht'; did you mean 'student.width'?"),
        ("classification", ["teacher.weight=a.pth"], "unknown key 'teacher.weight'; did you mean 'teacher.weights'?"),
        ("classification", ["data.name=folder", "data.root=nowhere"], "data.root=nowhere data.name=folder: "),
        ("classification", ["data.name=folder"], "data.root=FOLDER with FOLDER/train/<class>/*"),
        ("classification", ["student.heads=5"], "student.heads: 5 does not divide"),
        ("classification", ["data.mean=0.5"], "data.mean, data.std: one per channel, 3"),
        ("classification", ["--recipe", "vkd-deit-xl"], "--recipe: unknown 'vkd-deit-xl'; there is fashion-mnist"),
        ("classification", ["--recipe", "vkd-deit-ti-imagenet"], "data.root= data.name=folder: "),
        ("classification", ["student.weights=nowhere.pth"], "student.weights: there is no file nowhere.pth"),
        ("classification", ["data.labels=0.3"], "has no effect on the bundled digits; give digits.labels"),
        ("classification", ["augment.views=2"], "has no effect on the bundled digits; give digits.views"),
        ("classification", ["augment.pad=2"], "augment.pad: 2 has no effect on the bundled digits; leave it out"),
        ("classification", ["data.root=photos"], "data.root: photos has no effect on the bundled digits; leave it out"),
        ("classification", ["data.name=CIFAR10", "digits.labels=0.3"], "on data.name=CIFAR10; give data.labels"),
        ("classification", ["data.name=folder", "digits.views=2"], "no effect on data.name=folder; give augment.views"),
        ("classification", ["distill.loss=cosine", "distill.scale=match"], "distill: scale has no effect on the loss"),
        ("classification", ["data.labeled_share=0.005"], "data.labeled_share: 0.005 of 64 is no image; raise it"),
        ("classification", ["digits.labels=0.999"], "digits.labels: 0.999 leaves no image without its label; lower it"),
        ("classification", ["data.name=mnist"], "data.name: there is no 'mnist' in torchvision.datasets; did you mean"),
        ("classification", ["teacher.pools=7"], "teacher.pools: 7, but there are only 4 convolutions"),
        ("classification", ["student.patch=16"], "student.name: small_vit cannot take an image (8, 1): "),
        ("classification", ["teacher.pools=1,2,3,4"], "teacher.name: small_cnn cannot take an image (8, 1): "),
        ("detection", ["scenes.root=photos"], "scenes.root: photos has no effect on the bundled digits; leave it out"),
        ("detection", ["data.root=coco", "scenes.train=100"], "scenes.train: it has no effect on the images of data.r"),
        ("detection", ["student.widths="], "student.widths: "),
        ("detection", ["data.labeled=10"], "optim.batch_size: 16, but there are only 10 training images; lower it"),
        ("detection", ["optim.batch_size=400"], "optim.batch_size: 400, but there are only 300 training images"),
        ("detection", ["teacher.batch_size=2000"], "teacher.batch_size: 2000, but there are only 1500 training images"),
        ("detection", ["data.labeled=2000"], "data.labeled: 2000 of scenes.train=1500"),
        ("detection", ["data.val=test"], "data.root: missing; without it data.train=train2017 and data.val=test name"),
        ("detection", ["student.channels=40"], "student.channels: must be a multiple of 32"),
        ("detection", ["data.mean=0.1,0.2"], "data.mean, data.std: one per channel, 1"),
        ("detection", ["teacher.steps=0"], "teacher.weights: give a file, or teacher.steps > 0"),
        ("detection", ["teacher.weights=nowhere.pth"], "teacher.weights: there is no file nowhere.pth"),
        ("detection", ["student.name=deformable-detr"], "data.channels: deformable-detr takes images of 3 channels"),
        ("detection", ["data.channels=3", "data.mean=0,0,0", "data.std=1,1,1"], "data.root: missing"),
        ("generation", ["data.root=photos"], "data.root: photos has no effect on the bundled digits; leave it out"),
        (
            "generation",
            ["data.classes=7"],
            "data.classes: 7 has no effect on the bundled digits; leave it out, or name",
        ),
        ("generation", ["augment.policy=color"], "augment.policy: unknown 'color'"),
        ("generation", ["metric.features=inception"], "metric.features: inception needs images of three channels"),
        ("generation", ["data.size=24"], "data.size: the networks make images of 8, 16, 32, ... pixels; got 24"),
        ("generation", ["data.name=folder", "data.root=nowhere"], "data.root=nowhere data.name=folder: "),
        ("generation", ["teacher.name=resnet10t"], "teacher.weights: give a file"),
        ("generation", ["teacher.name=resnt10t", "teacher.pretrained=true"], "did you mean 'resnet10t'?"),
        ("generation", ["distill.eps=2"], "distill.eps: must be less than 1"),
        ("generation", [f"teacher.weights={__file__}"], "teacher.weights: it has no effect on the classifier"),
        ("generation", ["teacher.features=head"], "teacher.features: it has no effect on the classifier"),
        ("generation", ["teacher.pretrained=true"], "teacher.pretrained: it has no effect on the classifier"),
        ("generation", [f"metric.weights={__file__}"], "has no effect without metric.features=inception"),
    ],
)
def test_bad_values_name_their_option_before_anything_is_trained(name, words, message, tmp_path, capsys):
    load(name)
    assert cli.main(["distill", name, "--output", str(tmp_path / "run"), "--quiet", *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_path_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = {
        "classification": ("data.root", "teacher.weights", "student.weights"),
        "detection": ("data.root", "teacher.weights", "student.backbone_weights"),
        "generation": ("data.root", "teacher.weights", "metric.weights"),
    }
    for name, keys in paths.items():
        other = [] if name == "detection" else ["data.name=folder"]
        values = configs.flatten(configured(name, *other, *(f"{key}=~/x" for key in keys)))
        assert {values[key] for key in keys} == {"/home/me/x"}


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("classification", ["optim.batch_size=33"], "optim.batch_size: 33 images for 2 equal ranks"),
        ("classification", ["teacher.batch_size=33"], "teacher.batch_size: 33 images for 2 equal ranks"),
        ("classification", ["data.labeled_share=0.05"], "data.labeled_share: 3 images for 2 equal ranks"),
        ("detection", ["teacher.batch_size=5"], "teacher.batch_size: 5 images for 2 equal ranks"),
    ],
)
def test_batches_that_the_ranks_cannot_share_name_their_option(name, words, message, tmp_path, monkeypatch, capsys):
    load(name)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cli.main(["distill", name, "--output", str(tmp_path / "run"), "--quiet", *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["optim.batch_size", "teacher.batch_size"])
@pytest.mark.parametrize(("size", "ranks"), [("9", "1"), ("6", "2")])
def test_mixing_needs_pairs_on_every_rank(key, size, ranks, folder, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", ranks)
    values = {"optim__batch_size": "8", "teacher__batch_size": "8", "augment__mixup": 0.8, "distill__logit_weight": 0}
    values |= {"student__patch": 8, "teacher__pools": "1,2,3"}
    check = load("classification").check
    check(of_folder(folder, **values))
    with pytest.raises(OptionError, match=f"{key}: augment.mixup and augment.cutmix mix pairs, but {size} images"):
        check(of_folder(folder, **values | {key.replace(".", "__"): size}))


def torchrun_commands():
    for page in sorted(DOCS.glob("*.md")):
        joined = page.read_text().replace("\\\n", " ")
        for ranks, name, words in re.findall(
            r"^torchrun --nproc-per-node=(\d+) -m vkd_kernels.cli distill (\w+) (.*)", joined, re.M
        ):
            yield pytest.param(int(ranks), name, words.split(), id=f"{page.stem}: {name}")


@pytest.mark.parametrize(("ranks", "name", "words"), list(torchrun_commands()))
def test_the_ranks_of_a_documented_command_share_its_batches(ranks, name, words):
    typed = dict(word.split("=", 1) for word in words if "=" in word)
    values = recipe(name, words[words.index("--recipe") + 1], **{k.replace(".", "__"): v for k, v in typed.items()})
    assert values.optim.batch_size % ranks == 0


# ---- the loops of the pages ------------------------------------------------------------------------------------------


def run_code(page, names, number=0):
    code = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)[number]
    exec(code.replace("pretrained=True", "pretrained=False"), names)
    return names


def test_the_loop_of_the_classification_page():
    names = run_code("classification.md", {"images": torch.randn(2, 3, 224, 224)})
    assert names["output"].shape == (2, 1000) and {"logits", "total"} <= names["losses"].keys()


def test_the_loop_of_the_detection_page():
    maps = {"stride8": torch.randn(2, 4, 4, 96), "stride16": torch.randn(2, 2, 2, 192)}
    targets = {"stride8": torch.randn(2, 4, 4, 256), "stride16": torch.randn(2, 2, 2, 256)}
    names = {"detector": lambda images, boxes: (torch.tensor(0.0), maps), "teacher": lambda images: targets, "vk": vk}
    names |= {"images": None, "boxes": None}
    names["inside"] = {name: torch.ones(x.shape[:3], dtype=torch.bool) for name, x in maps.items()}
    assert run_code("detection.md", names, number=1)["loss"].isfinite()


def test_the_loop_of_the_generation_page():
    names = {"training_features": torch.randn(600, 512), "teacher": lambda images: torch.randn(8, 512), "vk": vk}
    names |= {"images": None, "labels": None, "weight": 1.0}
    names["discriminator"] = lambda images, labels: (torch.randn(8, 256, requires_grad=True), torch.randn(8))
    assert run_code("generation.md", names)["loss"].isfinite()
