"""`vkd distill classification`: models, data, losses, the stored teacher, and the bundled run in seconds."""

import copy
import csv
import dataclasses
import itertools
import json
import os
import re
import signal
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lightning", reason="needs lightning (the extra recipes)")
pytest.importorskip("sklearn", reason="needs scikit-learn (the extra recipes)")
pytest.importorskip("timm", reason="needs timm (the extra recipes)")
pytest.importorskip("torchvision", reason="needs torchvision (the extra recipes)")

import safetensors.torch
from PIL import Image

from vkd_kernels import cli
from vkd_kernels.recipes import classification, config, devices, engine, runs, tasks, workers
from vkd_kernels.recipes.classification import digits, images, losses, models, teachers
from vkd_kernels.recipes.config import OptionError
from vkd_kernels.recipes.runs import RunError

ROOT = Path(__file__).parents[2]

# Two seeds, three arms, in a second or two.
TINY = ["optim.steps=24", "teacher.steps=12", "digits.views=2", "teacher.widths=8,16", "student.width=16"]
TINY += ["student.depth=1", "run.save_every=7", "run.eval_every=12", "run.log_every=8", "run.tensorboard=false"]
ARMS = ("alone", "logits", "vkd")
RUN = ["--seeds", "2", "--arms", *ARMS, "--quiet"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def here(monkeypatch):
    """Trains in this process: worker processes and their signals are test_recipes_engine.py's."""
    monkeypatch.setattr(workers, "perform", lambda tasks, *, jobs, quiet: workers.perform_here(tasks, quiet=quiet))


def configured(**values):
    return config.replace(classification.Config(), {name.replace("__", "."): v for name, v in values.items()})


def recipe(name, **values):
    """Its configuration, with changes."""
    found, _ = config.read_yaml(tasks.recipes("classification")[name])
    return configured(**found, **values)


class Worker(runs.Worker):
    """Nobody to stop for."""

    def __init__(self):
        pass

    def should_stop(self):
        return False

    def report(self, *_):
        pass


def context(folder, config=None):
    config = config or classification.Config()
    folder.mkdir(parents=True, exist_ok=True)
    return engine.Context(devices.make_fabric(config.run, config.optim), folder, 0, Worker())


# ---- the bundled run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classification") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "perform", lambda tasks, *, jobs, quiet: workers.perform_here(tasks, quiet=quiet))
        assert cli.main(["distill", "classification", "--output", str(folder), *RUN, *TINY]) == 0
    return folder


def results(folder):
    """What must come out the same, bit for bit: everything but clocks."""
    clocks = {"seconds", "cpu_seconds", "images_per_second"}
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*/seed-*/result.json"))]
    return [{name: value for name, value in result.items() if name not in clocks} for result in found]


def weights(folder):
    return {path: safetensors.torch.load_file(path) for path in sorted(folder.glob("*/seed-*/*.safetensors"))}


def test_run_writes_its_files(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["config"]["optim.steps"] == 24 and metrics["machine"]["torch"] == torch.__version__
    assert [(r["seed"], r["arm"]) for r in metrics["runs"]] == [(s, a) for s in (0, 1) for a in ARMS]
    assert all(r["curve"][-1][0] == 24 and 0 <= r["accuracy"] <= 100 for r in metrics["runs"])
    assert [t["seed"] for t in metrics["teachers"]] == [0, 1] and all(10 < t["accuracy"] for t in metrics["teachers"])
    with open(finished / "results.csv", newline="") as file:
        assert [float(row["accuracy"]) for row in csv.DictReader(file)] == [r["accuracy"] for r in metrics["runs"]]
    assert (finished / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for pattern in ("cache*", "checkpoint*", "*.partial-*") for path in finished.rglob(pattern)]
    losses = json.loads((finished / "vkd" / "seed-00" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"train/labels", "train/logits", "train/features", "train/total"} <= losses.keys()


def test_table_and_words(finished):
    text = (finished / "table.txt").read_text()
    for column in ("accuracy %", "minus logit distillation", "max |PᵀP - I|", "steps", "CPU s"):
        assert column in text.splitlines()[0]
    for arm in ARMS:
        assert any(line.startswith(classification.ARMS[arm].label) for line in text.splitlines())
    assert "V_kD as published (scale 1) is on average" in text and "significant at 0.05" in text


def test_projection_is_orthonormal_and_reported_only_where_there_is_one(finished):
    for result in results(finished):
        if result.get("arm") == "vkd":
            assert result["diagnostics"]["max |PᵀP - I|"] < 1e-5
        else:
            assert result["diagnostics"] == {}


def test_students_are_stored_without_projection_and_evaluate_to_what_was_reported(finished, tmp_path):
    tensors = safetensors.torch.load_file(finished / "vkd" / "seed-01" / "student.safetensors")
    assert "head.weight" in tensors and not any("projection" in name for name in tensors)
    values, _ = config.read_yaml(finished / "vkd" / "seed-01" / "config.yaml")
    known = {key.name for key in config.keys(classification.Config)}
    c = config.replace(classification.Config(), {name: v for name, v in values.items() if name in known})
    training = classification.build(c, 1, None, context(tmp_path, c))
    training.student.load_state_dict(tensors)
    result = json.loads((finished / "vkd" / "seed-01" / "result.json").read_text())
    assert training.evaluate(training.student.eval())["accuracy"] == result["accuracy"]


def test_a_stopped_run_continues_with_the_same_bits(finished, tmp_path, here, monkeypatch, capsys):
    """Stopped within the teacher's training, then within a student's that reads stored answers."""
    folder = tmp_path / "run"
    command = ["distill", "classification", "--output", str(folder)]

    def stop_at(learner, step):
        original = digits.Digits.batches

        def batches(self, who, start, *rest):
            for number, samples in enumerate(original(self, who, start, *rest), start):
                if (who, number) == (learner, step):
                    os.kill(os.getpid(), signal.SIGINT)
                yield samples

        patch = pytest.MonkeyPatch()
        patch.setattr(digits.Digits, "batches", batches)
        return patch

    patch = stop_at("teacher", 9)
    assert cli.main([*command, *RUN, *TINY]) == 130
    assert f"--resume --output {folder}" in capsys.readouterr().err
    assert [path.parent.parent.name for path in folder.rglob("checkpoint.pt")] == ["teacher"]
    patch.undo()
    patch = stop_at("distilled", 17)
    assert cli.main([*command, *RUN, "--resume"]) == 130
    patch.undo()
    assert [path.parent.parent.name for path in folder.rglob("checkpoint.pt")] == ["logits"]
    assert cli.main([*command, *RUN, "--resume"]) == 0
    assert results(folder) == results(finished)
    for ours, theirs in zip(weights(folder).values(), weights(finished).values(), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---- the digits ------------------------------------------------------------------------------------------------------


def test_split_keeps_test_images_out_of_the_pool():
    data = digits.Digits(classification.Config(), 3)
    assert len(data.pool) == 1000 and len(data.test) == 797 and data.labelled == 100
    assert torch.bincount(data.pool_labels[:100]).tolist() == [10] * 10
    everything = torch.cat([data.pool, data.test]).flatten(1).unique(dim=0)
    assert len(everything) == len(data.pool.flatten(1).unique(dim=0)) + len(data.test.flatten(1).unique(dim=0))
    assert not torch.equal(data.pool, digits.Digits(classification.Config(), 4).pool)


def test_random_affine():
    limits = SimpleNamespace(rotation=0, scaling=0, shift=0, shear=0)
    pictures = torch.randn(5, 1, 8, 8)
    still = digits.random_affine(pictures, torch.Generator().manual_seed(0), limits)
    torch.testing.assert_close(still, pictures, rtol=0, atol=1e-5)
    limits.shift = 2.0
    moved = digits.random_affine(torch.zeros(64, 1, 8, 8), torch.Generator().manual_seed(0), limits)
    background = -digits.PIXEL_MEAN / digits.PIXEL_STD
    assert moved.min() >= background - 1e-6 and torch.isclose(moved, torch.tensor(background)).any()


def test_digits_batches():
    data = digits.Digits(configured(digits__views=3), 0)
    views = torch.cat(list(data.every_view()))
    for learner in ("distilled", "alone", "teacher"):
        whole = take(data, learner, 0, 3)
        (late,) = take(data, learner, 2, 1)
        assert torch.equal(late.images, whole[2].images) and not torch.equal(whole[0].images, whole[1].images)
        for batch, *parts in zip(whole, take(data, learner, 0, 3, 0, 2), take(data, learner, 0, 3, 1, 2), strict=True):
            for rank, part in enumerate(parts):
                assert torch.equal(part.images, batch.images[rank::2]) and torch.equal(
                    part.targets, batch.targets[rank::2]
                )
        if learner != "teacher":
            assert all(torch.equal(views[batch.rows], batch.images) for batch in whole)
    with pytest.raises(OptionError, match=r"digits\.labelled_share: 4 labelled images are not equal parts for 8 ranks"):
        take(data, "alone", 0, 1, 0, 8)
    distilled, alone = take(data, "distilled", 5, 1)[0], take(data, "alone", 5, 1)[0]
    assert torch.equal(alone.images, distilled.images[:4]) and torch.equal(alone.targets, distilled.targets[:4])
    torch.testing.assert_close(distilled.targets.sum(1), torch.tensor([1.0] * 4 + [0.0] * 4))


def take(data, learner, start, count, rank=0, ranks=1, batch_size=8):
    return list(itertools.islice(data.batches(learner, start, batch_size, rank, ranks), count))


# ---- real images -----------------------------------------------------------------------------------------------------


def picture(path, seed, size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, six and three images of each."""
    for split, count in (("train", 6), ("val", 3)):
        for seed in range(2 * count):
            picture(tmp_path / split / f"class-{seed % 2}" / f"{seed}.png", seed)
    return tmp_path


def image_data(root, seed=0, **values):
    values = {"data__name": "folder", "data__root": str(root), "data__size": 32, **values}
    return images.ImageData(configured(**values), seed)


def test_image_batches_depend_on_seed_step_and_ranks_alone(folder):
    whole = take(image_data(folder), "distilled", 0, 3)
    assert whole[0].images.shape == (8, 3, 32, 32) and whole[0].rows is None
    for other in (take(image_data(folder, run__workers=2), "distilled", 0, 3), take(image_data(folder), "alone", 0, 3)):
        assert all(torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) for a, b in same(whole, other))
    (late,) = take(image_data(folder), "distilled", 2, 1)
    assert torch.equal(late.images, whole[2].images)
    (other,) = take(image_data(folder, seed=1), "distilled", 0, 1)
    assert not torch.equal(other.images, whole[0].images)


def same(*sequences):
    return zip(*sequences, strict=True)


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_two_ranks_share_the_batch_of_one_process(folder, mixup):
    """With mixing too: the partners of a pair are on the same rank."""
    data = image_data(folder, augment__mixup=mixup, augment__cutmix=mixup)
    places = [images.pairs(8, rank, 2) if mixup else list(range(rank, 8, 2)) for rank in (0, 1)]
    assert sorted(places[0] + places[1]) == list(range(8))
    for batch, *parts in same(*(take(data, "distilled", 0, 4, *rank) for rank in ((0, 1), (0, 2), (1, 2)))):
        for part, place in same(parts, places):
            assert torch.equal(part.images, batch.images[place]) and torch.equal(part.targets, batch.targets[place])
        assert bool(((batch.targets > 0.06) & (batch.targets < 0.94)).any()) <= bool(mixup)


def test_epochs_are_permutations(folder):
    data = image_data(folder, augment__enabled=False)
    order = iter(images.Order(data, 0, 4, [0, 1, 2, 3]))
    epochs = [[key[0] for _ in range(3) for key in next(order)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12)) and epochs[0] != epochs[1]


def test_fixed_views_are_the_images_of_the_batches(folder):
    for views, values in [(3, {"augment__views": 3, "augment__mixup": 0, "augment__cutmix": 0}),
                          (1, {"augment__enabled": False})]:  # fmt: skip
        data = image_data(folder, **values)
        everything = torch.cat(list(data.every_view()))
        assert data.fresh == "" and len(everything) == 12 * views
        batches = take(data, "distilled", 0, 4)
        assert all(torch.equal(everything[batch.rows], batch.images) for batch in batches)
        assert len({int(row) // 12 for batch in batches for row in batch.rows}) == views
    assert image_data(folder).fresh == "augment.views=0 and augment.mixup=0.8 and augment.cutmix=1"


def test_evaluation_sees_the_centre(folder):
    data = image_data(folder, data__size=28, data__crop=0.7, data__mean="0,0,0", data__std="1,1,1")
    ((pictures, labels),) = data.held_out(0, 1)
    source = Image.open(sorted((folder / "val" / "class-0").iterdir())[0])
    expected = source.resize((40, 44), Image.Resampling.BICUBIC).crop((6, 8, 34, 36))
    truth = torch.frombuffer(bytearray(expected.tobytes()), dtype=torch.uint8).view(28, 28, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(pictures[0], truth)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_unreadable_images_are_counted_and_replaced(folder, capsys):
    first = sorted((folder / "train" / "class-0").iterdir())[0]
    clean = take(image_data(folder, augment__enabled=False), "distilled", 0, 1, batch_size=12)[0]
    first.write_bytes(first.read_bytes()[:200])
    (folder / "val" / "class-1" / "1.png").write_text("no image")
    data = image_data(folder, augment__enabled=False)
    broken = take(data, "distilled", 0, 2, batch_size=12)[0]
    place = clean.rows.tolist().index(0)
    assert torch.equal(broken.images[place], clean.images[clean.rows.tolist().index(1)])
    others = [i for i in range(12) if i != place]
    assert torch.equal(broken.images[others], clean.images[others])
    ((_, labels),) = data.held_out(0, 1)
    assert labels.tolist() == [0, 0, 0, -1, 1, 1]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and f"cannot read {first}" in warnings[0] and "2 so far" in warnings[1]

    def always_right(pictures):
        return F.one_hot(torch.tensor([0, 0, 0, 0, 1, 1]), 2).float()

    assert classification.accuracy(always_right, data, context(folder / "run").fabric) == {"accuracy": 100.0}


def test_a_folder_of_unreadable_images_is_an_error(folder):
    for path in (folder / "train").rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(RunError, match=r"images in a row cannot be read, the last is .*\.png"):
        take(image_data(folder), "distilled", 0, 1)


# ---- what is wrong with data -----------------------------------------------------------------------------------------


def test_missing_and_empty_folders(folder):
    for root in ("", folder / "nowhere"):
        with pytest.raises(OptionError, match=r"data\.root: there is no folder .*train"):
            len(image_data(root).train)
    (folder / "train" / "empty").mkdir()
    with pytest.raises(RunError, match="empty"):
        len(image_data(folder).train)
    (folder / "bare" / "train").mkdir(parents=True)
    with pytest.raises(RunError, match="find any class folder"):
        len(image_data(folder / "bare").train)


def test_numbers_of_classes_must_agree(folder):
    with pytest.raises(RunError, match=r"data\.classes is 3, but .* has 2 classes"):
        len(image_data(folder, data__classes=3).train)
    picture(folder / "val" / "class-2" / "0.png", 0)
    with pytest.raises(RunError, match="2 classes to train and 3 to test on; only in one of them: class-2"):
        len(image_data(folder).train)


def test_batches_must_fit(folder):
    with pytest.raises(OptionError, match=r"optim\.batch_size: 13, but there are only 12 training images"):
        take(image_data(folder), "distilled", 0, 1, batch_size=13)
    with pytest.raises(OptionError, match=r"optim\.batch_size: 6 images are not equal numbers of pairs for 2 rank"):
        take(image_data(folder), "distilled", 0, 1, 0, 2, batch_size=6)


def test_torchvision_by_name(tmp_path):
    for name, count in (("train", 5), ("t10k", 3)):
        raw = tmp_path / "MNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        pixels = bytes(i % 251 for i in range(count * 28 * 28))
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(range(count)))
    data = image_data(tmp_path, data__name="MNIST")
    assert data.classes == 10 and data.images == 5
    (batch,) = take(data, "distilled", 0, 1, batch_size=4)
    assert batch.images.shape == (4, 3, 32, 32)  # gray images get three channels
    ((pictures, labels),) = data.held_out(0, 1)
    assert pictures.shape == (3, 3, 32, 32) and labels.tolist() == [0, 1, 2]
    with pytest.raises(RunError, match=r"data\.root=.*nowhere data\.name=MNIST: .*data\.download=true fetches it"):
        len(image_data(tmp_path / "nowhere", data__name="MNIST").train)
    with pytest.raises(OptionError, match=r"data\.name: 'CIFAR1000' is not .*nearest: CIFAR100, CIFAR10"):
        len(image_data(tmp_path, data__name="CIFAR1000").train)
    with pytest.raises(OptionError, match="not digits, folder, or a data set"):
        len(image_data(tmp_path, data__name="ImageFolder").train)


# ---- models ----------------------------------------------------------------------------------------------------------

TINY_SHAPE = models.Shape(classes=5, size=32, channels=3)


def student_of(name, shape=TINY_SHAPE, **values):
    return models.make_student(configured(student__name=name, **values).student, shape)


@pytest.mark.parametrize(("name", "width", "heads", "millions"), [("tiny", 192, 3, 6.6), ("small", 384, 6, 23.8)])
def test_the_papers_students(name, width, heads, millions):
    model = models.make_student(
        configured(student__name=f"vkd_deit_{name}").student, models.Shape(1000, 224, 3), empty=True
    )
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.01)
    assert (
        model.pos_embed.shape == (1, 198, width) and len(model.blocks) == 12 and model.blocks[0].attn.num_heads == heads
    )
    stem = [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0]) for m in model.patch_embed.modules()
            if isinstance(m, torch.nn.Conv2d)]  # fmt: skip
    assert stem == [(3, 64, 7, 2), (64, 64, 3, 1), (64, 64, 3, 1), (64, width, 8, 8)]
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == 3
    assert sum(isinstance(m, torch.nn.ReLU) for m in model.modules()) == 3
    out = models.run(model, torch.empty(2, 3, 224, 224, device="meta"))
    assert out.tokens.shape == (2, 196, width) and out.logits.shape == out.distilled.shape == (2, 1000)
    assert {"cls_token", "pos_embed"} <= model.no_weight_decay()


def test_distillation_token_is_the_mean_of_the_patches_and_evaluation_averages_the_heads():
    model = student_of("vkd_deit_tiny")
    assert not any("dist_token" in name for name, _ in model.named_parameters())
    pictures = torch.randn(2, 3, 32, 32)
    patches = model.patch_embed(pictures)
    tokens = model._pos_embed(patches) - model.pos_embed
    torch.testing.assert_close(tokens[:, 1], patches.mean(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens[:, 2:], patches, atol=1e-5, rtol=0)
    first, second = model.train()(pictures)
    assert first.shape == second.shape == (2, 5)
    model.eval()
    tokens = model.forward_features(pictures)
    both = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2
    torch.testing.assert_close(model(pictures), both)
    torch.testing.assert_close(models.run(model, pictures).tokens, tokens[:, 2:])


@pytest.mark.parametrize(
    ("name", "positions", "width"),
    [
        ("resnet18", 49, 512), ("regnety_160.deit_in1k", 49, 3024), ("vit_tiny_patch16_224", 196, 192),
        ("deit_tiny_distilled_patch16_224", 196, 192), ("vit_small_patch14_reg4_dinov2", 256, 384),
        ("swin_tiny_patch4_window7_224", 49, 768), ("mobilenetv3_small_100", 49, 576), ("mixer_s32_224", 49, 512),
    ],
)  # fmt: skip
def test_features_of_timms_models(name, positions, width):
    """Maps with channels first and last, tokens behind none, one, two and five others."""
    shape = models.Shape(7, 224, 3)
    for side, make in (("student", models.make_student), ("teacher", models.make_teacher)):
        model = make(getattr(configured(**{f"{side}__name": name}), side), shape, empty=True).eval()
        out = models.run(model, torch.empty(2, 3, 224, 224, device="meta"))
        assert out.tokens.shape == (2, positions, width) and out.logits.shape == (2, 7) and model.num_features == width


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["vkd_deit_tiny", "regnety_002", "resnet10t"])
def test_batch_norms_of_ranks_are_those_of_one_device(name, one_rank):
    """timm's hold their activation: it must not get lost."""
    model = student_of(name).train()
    ranked = copy.deepcopy(model)
    devices.synchronise_batch_norm(ranked, torch.device("cpu"))
    assert any(isinstance(module, devices.BatchNorm) for module in ranked.modules())
    pictures = torch.randn(4, 3, 32, 32)
    for mode in (True, False):
        ours, theirs = (models.run(m.train(mode), pictures) for m in (ranked, model))
        torch.testing.assert_close(ours.tokens, theirs.tokens, atol=1e-3, rtol=1e-3)
    for (key, ours), theirs in zip(ranked.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=key)


def test_unknown_models_name_the_nearest():
    with pytest.raises(OptionError, match=r"student\.name: unknown 'vkd_deit_tini'; nearest: vkd_deit_tiny"):
        student_of("vkd_deit_tini")
    with pytest.raises(OptionError, match=r"teacher\.name: unknown 'regnety_161'; nearest: regnety_16"):
        models.make_teacher(configured(teacher__name="regnety_161").teacher, TINY_SHAPE)
    with pytest.raises(
        OptionError, match=r"teacher\.pretrained: resnet18 has 1000 classes, not 5; teacher\.classes=1000"
    ):
        models.make_teacher(configured(teacher__name="resnet18", teacher__pretrained=True).teacher, TINY_SHAPE)
    with pytest.raises(OptionError, match=r"data\.size: .*patches of 16 pixels, got 33"):
        student_of("vkd_deit_tiny", TINY_SHAPE._replace(size=33))
    with pytest.raises(OptionError, match=r"student\.heads: 5 does not divide student\.width 48"):
        student_of("digits_vit", student__heads=5)
    with pytest.raises(OptionError, match=r"student\.patch: 3 does not divide"):
        student_of("digits_vit", student__patch=3)


def test_weights_from_files(tmp_path):
    model = student_of("digits_vit", student__patch=8)
    state = model.state_dict()
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}, tmp_path / "b.pth")
    for name in ("a.safetensors", "b.pth"):
        other = student_of("digits_vit", student__patch=8, student__weights=str(tmp_path / name))
        assert all(torch.equal(other.state_dict()[key], state[key]) for key in state)
    for values, message in [
        (
            {"student__patch": 4},
            r"of another architecture than VisionTransformer with 5 classes: .*pos_embed is \(1, 18",
        ),
        ({"student__patch": 8, "student__depth": 1}, r"blocks\.1\.\w+\.bias is not in the model; .*; and \d+ more"),
        ({"student__patch": 8, "student__depth": 4}, r"blocks\.3\.\w+\.bias is missing there"),
    ]:
        with pytest.raises(RunError, match=message):
            student_of("digits_vit", student__weights=str(tmp_path / "a.safetensors"), **values)
    with pytest.raises(RunError, match=r"head\.weight is \(5, 48\) there and \(6, 48\) in the model"):
        student_of(
            "digits_vit",
            TINY_SHAPE._replace(classes=6),
            student__patch=8,
            student__weights=str(tmp_path / "a.safetensors"),
        )


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pth", "text.pth", "objects.pth", "empty.pth"])
def test_unreadable_weights_are_named(tmp_path, name):
    path = tmp_path / name
    if name == "cut.safetensors":
        safetensors.torch.save_file({"x": torch.zeros(100)}, path)
        path.write_bytes(path.read_bytes()[:200])
    elif name == "cut.pth":
        torch.save({"x": torch.zeros(100)}, path)
        path.write_bytes(path.read_bytes()[:200])
    elif name == "objects.pth":
        torch.save({"model": SimpleNamespace()}, path)  # code that weights_only refuses to run
    else:
        path.write_text("" if name == "empty.pth" else "no tensors")
    with pytest.raises(RunError, match=rf"teacher\.weights: cannot read tensors from {path}"):
        models.load_weights(torch.nn.Linear(1, 1), str(path), "teacher.weights")
    with pytest.raises(OptionError, match=r"teacher\.weights: there is no file"):
        models.load_weights(torch.nn.Linear(1, 1), str(path) + "x", "teacher.weights")


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


def batch_of(count=8, labelled=8, positions=9, teacher_positions=None, logits=True, features=True):
    targets = torch.randn(count, 3).softmax(1)
    targets[labelled:] = 0
    places = () if teacher_positions is None else (teacher_positions,)
    return losses.Batch(
        torch.randn(count, positions, 4), targets, torch.randn(count, 3) if logits else None,
        torch.randn(count, *places, 10) * 3 + 1 if features else None,
    )  # fmt: skip


@pytest.mark.parametrize("projection", ["orthogonal", "linear", "none"])
def test_losses_are_the_formulas(projection):
    distill = configured(
        distill__projection=projection, distill__scale=0.7, distill__temperature=2, distill__beta=0.5
    ).distill
    model = losses.DistilledStudent(Heads(2), distill, 10, labelled_share=0.5)
    batch = batch_of(labelled=4)
    found = model(batch)
    tokens = model.student.embed(batch.images).double()
    first, second = (h.double() for h in model.student.forward_head(tokens.float()))
    labels = -(batch.targets.double() * first.log_softmax(1)).sum() / 4  # mean over the four that have labels
    soft, hard = (batch.teacher_logits.double() / 2).softmax(1), (second / 2).log_softmax(1)
    logits = 4 * (soft * (soft.log() - hard)).sum() / 8
    y = batch.teacher_features.double()
    target = (y - y.mean(1, keepdim=True)) / (y.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    difference = 0.7 * tokens.mean(1) @ model.feature_loss.projection.weight.double().T - target
    large = difference.abs() > 0.5
    features = torch.where(large, difference.abs() - 0.25, difference**2).mean()  # smooth L1, beta 0.5
    truth = {"labels": labels, "logits": logits, "features": features, "total": labels + logits + 10 * features}
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        torch.testing.assert_close(found[name].double(), value, atol=1e-5, rtol=1e-5)
    trained = {"orthogonal": 1, "linear": 1, "none": 0}[projection]
    assert len(list(model.feature_loss.parameters())) == trained
    decayed, spared = (group["params"] for group in engine.parameter_groups(model, 0.05))
    assert all(any(p is q for q in spared) for p in model.feature_loss.parameters()) and len(decayed) == 3


def test_parts_of_a_batch_and_ranks_average_to_the_whole():
    """Also where one part has all the labels."""
    model = losses.DistilledStudent(Heads(), classification.Config().distill, 10, labelled_share=0.5)
    batch = batch_of(labelled=4)
    parts = [model(part) for part in engine.split(batch, 2)]
    for name, value in model(batch).items():
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, value)


def test_a_student_alone_trains_both_of_its_heads():
    distill = configured(distill__weight=0, distill__logit_weight=0).distill
    model = losses.DistilledStudent(Heads(2), distill, 0)
    batch = batch_of(logits=False, features=False)
    found = model(batch)
    assert model.feature_loss is None and found.keys() == {"labels", "total"}
    each = [
        F.cross_entropy(logits, batch.targets)
        for logits in model.student.forward_head(model.student.embed(batch.images))
    ]
    torch.testing.assert_close(found["total"], sum(each) / 2)
    found["total"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_tokens_are_compared_position_by_position():
    model = losses.DistilledStudent(Heads(), configured(distill__features="tokens").distill, 10)
    same, finer = batch_of(positions=4, teacher_positions=4), batch_of(positions=16, teacher_positions=4)
    tokens = model.student.embed(same.images)
    torch.testing.assert_close(model(same)["features"], model.feature_loss(tokens, same.teacher_features))
    tokens = model.student.embed(finer.images).unflatten(1, (4, 4)).unflatten(2, (2, 2)).unflatten(1, (2, 2))
    coarse = F.interpolate(
        model.student.embed(finer.images).transpose(1, 2).unflatten(2, (4, 4)), (2, 2), mode="bilinear", antialias=True
    )
    torch.testing.assert_close(
        model(finer)["features"], model.feature_loss(coarse.flatten(2).transpose(1, 2), finer.teacher_features)
    )
    constant = torch.full((1, 49, 3), 2.0)
    torch.testing.assert_close(losses.resampled(constant, 9), torch.full((1, 9, 3), 2.0))
    with pytest.raises(OptionError, match=r"distill\.features: .*square grids only, got 12 and 4"):
        losses.same_positions(torch.zeros(1, 12, 4), torch.zeros(1, 4, 10))


# ---- the teacher -----------------------------------------------------------------------------------------------------


def saved_teacher(folder, name="regnety_002", classes=2):
    model = models.make_teacher(configured(teacher__name=name).teacher, models.Shape(classes, 32, 3))
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), folder / "weights.safetensors")
    return {"teacher__name": name, "teacher__weights": str(folder / "weights.safetensors")}


def test_stored_answers_are_those_of_the_teacher(folder, monkeypatch):
    values = {"data__name": "folder", "data__root": str(folder), "data__size": 32, "augment__views": 2,
              "augment__mixup": 0, "augment__cutmix": 0, **saved_teacher(folder / "teacher")}  # fmt: skip
    for kind in ("pooled", "tokens"):
        c = configured(distill__features=kind, **values)
        data, run = images.ImageData(c, 0), context(folder / "run", c)
        teacher = teachers.Teacher(c, data, folder / "run", run)
        (batch,) = take(data, "distilled", 3, 1)
        live = teachers.Teacher(
            dataclasses.replace(c, teacher=dataclasses.replace(c.teacher, cache=None)), data, folder, run
        )
        for stored, computed in zip(teacher(batch), live(batch), strict=True):
            torch.testing.assert_close(stored, computed)
        assert teacher(batch)[1].shape == ((8, 368) if kind == "pooled" else (8, 1, 368))
    files = sorted((folder / "run").glob("cache-*.npy"))
    assert len(files) == 2 and not list((folder / "run").glob("*.partial*"))

    monkeypatch.setattr(teachers.Teacher, "answer", lambda *_: pytest.fail("what is stored must not be computed again"))
    teachers.Teacher(c, images.ImageData(c, 0), folder / "run", run)(batch)
    monkeypatch.undo()
    saved_teacher(folder / "teacher")  # other weights, then other images
    assert teachers.Teacher(c, data, folder / "run", run).fingerprint() not in str(files)
    before = data.fingerprint()
    picture(folder / "train" / "class-0" / "0.png", 99)
    assert images.ImageData(c, 0).fingerprint() != before


def test_answers_to_new_images_are_not_stored(folder):
    values = {"data__name": "folder", "data__root": str(folder), "data__size": 32, **saved_teacher(folder / "teacher")}
    c = configured(teacher__cache=str(folder / "cache"), **values)
    with pytest.raises(OptionError, match=r"teacher\.cache: .*other images than are shown: augment\.views=0"):
        teachers.Teacher(c, images.ImageData(c, 0), folder, context(folder / "run"))
    c = configured(**values)
    assert teachers.Teacher(c, images.ImageData(c, 0), folder, context(folder / "run")).cache is None


def test_a_damaged_cache_is_named(folder):
    c = configured(data__name="folder", data__root=str(folder), data__size=32, augment__enabled=False,
                   **saved_teacher(folder / "teacher"))  # fmt: skip
    data, run = images.ImageData(c, 0), context(folder / "run")
    path = folder / "run" / f"cache-{teachers.Teacher(c, data, folder / 'run', run).fingerprint()}.npy"
    path.write_bytes(b"cut")
    with pytest.raises(RunError, match="delete this file"):
        teachers.Teacher(c, data, folder / "run", run)(take(data, "distilled", 0, 1)[0])


def test_a_teacher_of_other_classes(folder):
    values = saved_teacher(folder / "teacher", classes=7)
    with pytest.raises(RunError, match=r"teacher\.weights: .*RegNet with 2 classes: .*head\.fc\.\w+ is \(7"):
        models.make_teacher(configured(**values).teacher, models.Shape(2, 32, 3), values["teacher__weights"])
    with pytest.raises(
        OptionError, match=r"teacher\.classes: logits of 7 classes teach only with distill\.logit_weight=0"
    ):
        configured(teacher__classes=7, **values)
    c = configured(teacher__classes=7, distill__logit_weight=0, data__name="folder", data__root=str(folder),
                   data__size=32, **values)  # fmt: skip
    data = images.ImageData(c, 0)
    logits, features = teachers.Teacher(c, data, folder, context(folder / "run"))(take(data, "distilled", 0, 1)[0])
    assert logits.shape == (8, 7) and features.shape == (8, 368)


def test_students_alone_need_no_teacher(folder):
    c = configured(data__name="folder", data__root=str(folder), data__size=32, student__name="resnet10t",
                   teacher__steps=0, distill__weight=0, distill__logit_weight=0, optim__batch_size=8)  # fmt: skip
    run = context(folder / "run", c)
    assert classification.train_teacher(c, 0, folder / "teacher", run) == {}
    training = classification.build(c, 0, folder / "teacher", run)
    batch = next(training.batches(0))
    assert batch.teacher_logits is None and batch.teacher_features is None and training.model.feature_loss is None
    with pytest.raises(OptionError, match=r"teacher\.weights: give a file"):
        classification.train_teacher(configured(**{**config.flatten(c), "distill.weight": 1.0}), 0, folder, run)


# ---- the paper's recipes ---------------------------------------------------------------------------------------------

PAPER = {  # docs/classification.md
    "teacher.name": "regnety_160.deit_in1k", "data.size": 224, "data.crop": 0.875, "data.classes": 1000,
    "augment.enabled": True, "augment.crop_min": 0.08, "augment.flip": 0.5, "augment.three_augment": True,
    "augment.color_jitter": 0.3, "augment.mixup": 0.8, "augment.cutmix": 1.0, "augment.mix_switch": 0.5,
    "distill.features": "pooled", "distill.projection": "orthogonal", "distill.normalization": "layer_norm",
    "distill.scale": 1.0, "distill.weight": 1.0, "distill.beta": 1.0, "distill.logit_weight": 1.0,
    "distill.temperature": 1.0, "distill.label_smoothing": 0.1, "student.drop_path": 0.0, "optim.lr": 5e-4,
    "optim.min_lr": 5e-6, "optim.betas": (0.9, 0.999), "optim.weight_decay": 0.05, "optim.warmup": 0.0,
    "optim.schedule": "cosine", "optim.epochs": 300.0, "optim.batch_size": 512, "optim.clip_norm": 0.0,
    "optim.ema": 0.0, "optim.precision": "bf16-mixed",
}  # fmt: skip
RECIPES = {"vkd-deit-ti-imagenet": "vkd_deit_tiny", "vkd-deit-s-imagenet": "vkd_deit_small"}


@pytest.mark.parametrize(("name", "student"), RECIPES.items())
def test_recipe_has_the_papers_values(name, student):
    values = config.flatten(recipe(name))
    assert {key: values[key] for key in PAPER} == PAPER and values["student.name"] == student
    changed = recipe(name, optim__lr=1e-3, data__name="CIFAR100", data__classes=100)
    assert (changed.optim.lr, changed.data.name) == (1e-3, "CIFAR100")
    with pytest.raises(OptionError, match=r"teacher\.weights: give a file .*, or teacher\.pretrained=true"):
        teachers.trained_here(recipe(name))


def test_dry_run_of_a_recipe_needs_no_data(capsys):
    assert cli.main(["distill", "classification", "--recipe", "vkd-deit-ti-imagenet", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for text in (
        "parameters: 6633104",
        "parameters: 83590140",
        "[49, 3024]",
        "[196, 192]",
        "[3024, 192]",
        "300 epochs",
    ):
        assert text in printed


@pytest.fixture(scope="module")
def regnet():
    return models.make_teacher(configured(teacher__name="regnety_160.deit_in1k").teacher, models.Shape(1000, 224, 3))


class RandomImages:
    """Two images of a thousand classes at full size."""

    classes, size, channels, images, views, labelled_share, fresh = 1000, 224, 3, 2, 0, 1.0, "new every time"

    def batches(self, learner, start, batch_size, rank, ranks):
        draw = torch.Generator().manual_seed(start)
        while True:
            pictures = torch.randn(batch_size, 3, 224, 224, generator=draw)
            yield images.Samples(pictures, torch.rand(batch_size, 1000, generator=draw).softmax(1))

    def held_out(self, rank, ranks):
        yield torch.randn(2, 3, 224, 224), torch.tensor([3, 4])


@pytest.mark.parametrize(("name", "student"), RECIPES.items())
def test_one_step_of_a_paper_recipe_at_full_size(name, student, regnet, tmp_path):
    c = recipe(name, optim__batch_size=2, optim__steps=1, optim__epochs=0, run__tensorboard=False, teacher__weights="-")
    run = context(tmp_path, c)
    teacher = teachers.Teacher(c, RandomImages(), tmp_path, run)
    teacher.model = regnet.eval()
    training = classification.Classification(c, RandomImages(), teacher, 1, run)
    before = {key: value.detach().clone() for key, value in training.model.named_parameters()}
    result = engine.fit(training, c.run, run)
    same = [key for key, value in training.model.named_parameters() if torch.equal(value, before[key])]
    assert not same
    assert result["diagnostics"]["max |PᵀP - I|"] < 1e-5 and {"accuracy", "accuracy_top5"} <= result.keys()
    assert not any("feature_loss" in key for key in runs.load_safetensors(tmp_path / "student.safetensors"))


# ---- export, docs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "torch-export"])
def test_export_of_a_paper_student_needs_neither_data_nor_teacher(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(models.STUDENTS["vkd_deit_tiny"], "depth", 1)  # tracing takes its time
    c = recipe("vkd-deit-ti-imagenet", data__size=32, data__classes=5)
    torch.manual_seed(0)
    student = models.make_student(c.student, TINY_SHAPE).eval()
    runs.save_safetensors(tmp_path / "student.safetensors", student.state_dict())
    (tmp_path / "config.yaml").write_text("task: classification\narm: vkd\nseed: 0\n" + config.to_yaml(c))
    assert cli.main(["export", str(tmp_path), "--format", kind]) == 0
    pictures = torch.randn(3, 3, 32, 32)
    if kind == "safetensors":
        tensors = safetensors.torch.load_file(tmp_path / "export.safetensors")
        assert tensors.keys() == student.state_dict().keys()
    else:
        found = torch.export.load(tmp_path / "export.pt2").module()(pictures[:2])
        torch.testing.assert_close(found, student(pictures[:2]))


def test_the_documented_loop_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "classification.md").read_text(), re.DOTALL)
    names = {"images": torch.randn(2, 3, 224, 224)}
    exec(code.replace("pretrained=True", "pretrained=False"), names)
    assert names["output"].shape == (2, 1000) and {"norm->layer4", "logits", "total"} == names["losses"].keys()


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "alone", "vdk"], "--arms: unknown 'vdk'; choose from alone"),
        (["optim.steps=0"], "optim.steps=0 and optim.epochs=0: exactly one must be above 0"),
        (["optim.lr=nan"], "optim.lr: must be a number"),
        (["digits.pool=1797"], "digits.pool: must be at most 1700"),
        (["digits.labels_per_class=100"], "digits.labels_per_class: 100 leave nothing unlabelled"),
        (["digits.labelled_share=0.3"], "digits.labelled_share: 19.2 of 64 images are no whole number"),
        (["distill.scale=matched"], "distill.scale"),
        (["student.widht=3"], "unknown key 'student.widht'; did you mean 'student.width'?"),
        (["data.name=folder", "data.root=nowhere"], "data.root: there is no folder nowhere"),
        (["student.heads=5"], "student.heads: 5 does not divide"),
        (["--recipe", "vkd-deit-xl"], "--recipe: unknown 'vkd-deit-xl'; classification has vkd-deit-s-imagenet"),
    ],
)
def test_bad_values_name_their_option(arguments, message, tmp_path, here, capsys):
    command = ["distill", "classification", "--output", str(tmp_path / "run"), "--quiet", *TINY, *arguments]
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err


def test_help_shows_every_value_with_its_source(capsys):
    assert cli.main(["distill", "classification", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for key in config.keys(classification.Config):
        assert f"{key.name}=" in text
    assert "teacher.widths=24,48,96,192" in text and "[released code]" in text and "vkd-deit-ti-imagenet" in text
