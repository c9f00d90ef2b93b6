"""`vkd distill detection`: COCO data, the composed scenes, losses against formulas, AP, both detectors, the run."""

import csv
import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn", reason="needs the extra [recipes]: scikit-learn")
pytest.importorskip("lightning_fabric", reason="needs the extra [recipes]: lightning-fabric")
pytest.importorskip("pycocotools", reason="needs the extra [detection]: pycocotools")
pytest.importorskip("torchvision", reason="needs the extra [detection]: torchvision")
pytest.importorskip("transformers", reason="needs the extra [detection]: transformers")

import safetensors.torch
from PIL import Image
from pycocotools.coco import COCO
from torchvision.ops import generalized_box_iou

import vkd_kernels as vk
from tests.helpers import processes
from vkd_kernels import cli
from vkd_kernels.recipes import config, detection, devices, engine, runs, tasks
from vkd_kernels.recipes.config import OptionError
from vkd_kernels.recipes.detection import coco, fcos, losses, metrics, models, scenes
from vkd_kernels.recipes.detection.models import Detections
from vkd_kernels.recipes.detection.options import AugmentConfig, Config, DataConfig, DistillConfig
from vkd_kernels.recipes.runs import RunError

# One seed, three arms, in seconds.
TINY = ["optim.steps=12", "teacher.steps=8", "scenes.train=24", "scenes.val=9", "data.labelled=20"]
TINY += ["optim.batch_size=8", "teacher.batch_size=8", "run.save_every=5", "run.eval_every=6", "run.log_every=3"]
TINY += ["student.widths=4,6,8", "student.channels=8", "teacher.widths=6,8,8", "teacher.channels=12"]
ARMS = ("alone", "linear", "vkd")
RUN = ["--seeds", "1", "--arms", *ARMS, "--quiet", "--jobs", "0"]
SMALL_DETR = {"dim": 64, "heads": 2, "queries": 7, "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def context(folder, c=None):
    c = c or Config()
    return engine.Context(devices.make_fabric(c.run, c.optim), folder, 0, runs.Worker())


def configured(**values):
    return config.replace(Config(), {name.replace("__", "."): value for name, value in values.items()})


def boxes_of(*images):
    """(boxes (N, M, 4), labels (N, M)) of lists of (label, x0, y0, x1, y1)."""
    most = max(1, *map(len, images))
    boxes, labels = torch.zeros(len(images), most, 4), torch.full((len(images), most), -1)
    for n, objects in enumerate(images):
        for m, (label, *box) in enumerate(objects):
            boxes[n, m], labels[n, m] = torch.tensor(box), label
    return boxes, labels


def batch_of(*images, size=(32, 48), channels=1, widths=None):
    """A batch of random images, those of smaller `widths` padded at the right."""
    n = len(images)
    inside = torch.ones(n, *size, dtype=torch.bool)
    for row, width in enumerate(widths or ()):
        inside[row, :, width:] = False
    return coco.Batch(torch.randn(n, channels, *size), inside, *boxes_of(*images), torch.arange(n), None)


# ---- the scenes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composed():
    return scenes.composed(3, 40, 20)


def test_boxes_are_inside_and_hardly_overlap(composed):
    counts = set()
    for scene in composed[0]:
        counts.add(len(scene.labels))
        assert scene.image.shape == (64, 64) and scene.image.dtype == torch.uint8
        for number, (x, y, w, h) in enumerate(scene.boxes):
            assert 0 <= x < x + w <= 64 and 0 <= y < y + h <= 64 and max(w, h) <= 28 and h >= 8
            for other in scene.boxes[:number]:
                assert scenes.overlap([x, y, w, h], other) <= 2
    assert counts == {1, 2, 3, 4}


def test_boxes_are_tight(monkeypatch):
    """Without noise, clutter and neighbours: every side of the box has ink, and there is none outside."""
    for name, value in {"NOISE": 0.0, "FRAGMENTS": 0, "DIGITS": (1, 1)}.items():
        monkeypatch.setattr(scenes, name, value)
    background = round(255 * scenes.BLACK)
    for scene in scenes.composed(5, 30, 1)[0]:
        x, y, w, h = scene.boxes[0]
        ink = scene.image.float() - background
        inked = ink > scenes.INK * ink.max() - 1  # rounding
        rows, columns = inked.any(dim=1).nonzero().flatten(), inked.any(dim=0).nonzero().flatten()
        assert [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] == [x, y, x + w, y + h]
        ink[y : y + h, x : x + w] = 0
        assert ink.abs().max() == 0


def test_scenes_depend_on_the_seed_alone(composed):
    again, other = scenes.composed(3, 10, 20), scenes.composed(4, 10, 20)
    for ours, theirs in zip(again, composed, strict=True):
        for a, b in zip(ours, theirs, strict=False):  # the first ones are the same, however many there are
            assert torch.equal(a.image, b.image) and (a.boxes, a.labels) == (b.boxes, b.labels)
    assert not any(torch.equal(a.image, b.image) for a, b in zip(again[0], other[0], strict=True))


def test_evaluation_digits_are_not_in_training_scenes():
    (train, train_labels), (held_out, _) = scenes.split_digits(0)
    assert (len(train), len(held_out)) == (1300, 497) and train.min() == 0 and train.max() == 1
    assert len(train_labels) == 1300
    together = torch.cat([train, held_out]).flatten(1)
    assert len(together.unique(dim=0)) == len(together)  # no image twice, so none in both parts


def test_contrast_and_noise(composed):
    pixels = torch.stack([scene.image for scene in composed[0]]).float() / 255
    empty = pixels[pixels < scenes.BLACK]  # half of the background's noise
    assert abs(empty.pow(2).mean() - 2 * scenes.BLACK * empty.mean() + scenes.BLACK**2 - 0.075**2) < 5e-4
    assert pixels.max() < 1 and pixels.min() < 0.05


# ---- COCO's format ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scenes of seed 3 as COCO folders, by the command that docs/detection.md names."""
    root = tmp_path_factory.mktemp("coco")
    scenes.main([str(root), "--seed", "3", "--train", "40", "--val", "20"])
    return root


def opened(folder, part="train"):
    return coco.open_coco(str(folder / part / "images"), str(folder / part / "annotations.json"), "data.train", "error")


def test_written_scenes_are_read_back(folder, composed):
    ours, theirs = opened(folder), scenes.in_memory(composed[0], "memory")
    assert ours.ids == theirs.ids and ours.sizes == theirs.sizes and ours.names == theirs.names
    for index in range(len(ours)):
        assert numpy.array_equal(ours.boxes[index], theirs.boxes[index])
        assert ours.labels[index].tolist() == theirs.labels[index].tolist() == composed[0][index].labels
        views = [coco.Views(d, DataConfig(), AugmentConfig(), images=40, train=True) for d in (ours, theirs)]
        assert torch.equal(views[0].read(index), views[1].read(index))
        assert torch.equal(views[0].read(index)[0], composed[0][index].image)


def test_written_scenes_are_cocos(folder, capsys):
    found = COCO(str(folder / "val" / "annotations.json"))
    assert len(found.imgs) == 20 and len(found.cats) == 10
    assert all(a["area"] == a["bbox"][2] * a["bbox"][3] for a in found.anns.values())


def own_data(folder, **values):
    data = {
        f"data.{part}{suffix}": str(folder / part / name)
        for part in ("train", "val")
        for suffix, name in (("", "images"), ("_annotations", "annotations.json"))
    }
    return config.replace(Config(), data | {n.replace("__", "."): v for n, v in values.items()})


def test_own_data_give_the_bundled_batches(folder):
    """The scenes of seed 3 read from folders are those that the bundled run composes."""
    fabric = context(None).fabric
    batches = []
    for c in (own_data(folder), configured(scenes__train=40, scenes__val=20, data__labelled=16)):
        data = detection.Data(c, 3, labelled=16)
        loader = coco.Loader(data.train, c, fabric, images=data.images, train=True)
        batches.append(next(loader.training(8, 3, 5)))
    for field in ("images", "inside", "boxes", "labels", "index"):
        assert torch.equal(*(getattr(batch, field) for batch in batches))
    assert batches[0].index.max() < 16


def annotated(**changes):
    """A small annotation file, with changes."""
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 30}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 2, 10, 20]}],
        "categories": [{"id": 5, "name": "five"}, {"id": 2, "name": "two"}],
    }
    for name, value in changes.items():
        content[name] = value
    return content


def box(*values, **changes):
    return {"annotations": [{"id": 3, "image_id": 7, "category_id": 5, "bbox": [*values], **changes}]}


def checked(content, bad_boxes="error"):
    return coco.CocoImages(content, "some.json", lambda name: None, bad_boxes)


def test_labels_are_places_among_the_sorted_categories_and_crowds_are_no_objects():
    crowd = {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 40, 30], "iscrowd": 1}
    found = checked(annotated(annotations=[*annotated()["annotations"], crowd]))
    assert found.categories == [2, 5] and found.labels[0].tolist() == [1]
    assert found.boxes[0].tolist() == [[1, 2, 11, 22]] and len(found.annotations) == 2


def test_boxes_are_cut_off_at_the_border():
    found = checked(annotated(**box(-0.5, 0, 41, 30.2)))
    assert found.boxes[0].tolist() == [[0, 0, 40, 30]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "some.json: has no list 'images'"),
        ({"images": [], "annotations": []}, "some.json: has no list 'categories'"),
        (annotated(images=[]), "lists no images"),
        (annotated(images=annotated()["images"] * 2), "two of its images have the same id"),
        (annotated(images=[{"id": 7, "file_name": "a.png", "width": 40}]), "bad or missing in an image.*'height'"),
        (annotated(annotations=[{"id": 1, "image_id": 7}]), "no image_id, category_id or bbox"),
        (annotated(**box(1, 2, 3, 4, image_id=8)), "annotation 3 is of image 8, which is not listed"),
        (annotated(**box(1, 2, 3, 4, category_id=1)), "annotation 3 has the unknown category 1"),
        (annotated(**box(1, 2, -3, 4)), r"annotation 3 of image a.png \(40 x 30\): .*degenerate; in all 1 degenerate"),
        (annotated(**box(1, 2, 3, 0)), "is degenerate.*data.bad_boxes=drop leaves them out"),
        (annotated(**box(30, 2, 20, 5)), r"\[30, 2, 20, 5\] is outside its image"),
        (annotated(**box(-5, 2, 20, 5)), "is outside its image"),
        (annotated(**box(40.5, 2, 0.4, 5)), "is outside its image"),  # within the slack, and nothing of it inside
        (annotated(**box(1, 2, 3)), "is not four numbers"),
        (annotated(**box(1, 2, 3, float("nan"))), "is not four numbers"),
        (annotated(annotations=[]), "some.json: has no box"),
        (annotated(**box(1, 2, 3, 4, iscrowd=1)), "some.json: has no box"),
    ],
)
def test_bad_annotations_are_named(content, message):
    with pytest.raises(RunError, match=message):
        checked(content)


def test_categories_without_a_box_are_named(capsys):
    checked(annotated())
    assert "warning: some.json: no box of two; 1 of 2 categories" in capsys.readouterr().err


def test_bad_boxes_can_be_left_out(capsys):
    good, bad = annotated()["annotations"], box(1, 2, 3, 0)["annotations"] + box(60, 2, 3, 5)["annotations"]
    found = checked(annotated(annotations=bad + good), "drop")
    assert found.boxes[0].tolist() == [[1, 2, 11, 22]] and len(found.annotations) == 1
    assert "in all 1 degenerate, 1 outside its image; left out" in capsys.readouterr().err


def test_missing_files_are_named(folder, tmp_path):
    good = str(folder / "train" / "images"), str(folder / "train" / "annotations.json")
    with pytest.raises(OptionError, match="data.train: there is no folder nowhere"):
        coco.open_coco("nowhere", good[1], "data.train", "error")
    with pytest.raises(OptionError, match="data.val_annotations: cannot read nowhere.json"):
        coco.open_coco(good[0], "nowhere.json", "data.val", "error")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(RunError, match="text.json is not JSON"):
        coco.open_coco(good[0], str(tmp_path / "text.json"), "data.train", "error")
    with pytest.raises(RunError, match="40 of its 40 images are missing in .*; the first is 000001.png"):
        coco.open_coco(str(tmp_path), good[1], "data.train", "error")


def test_categories_and_numbers_of_classes_must_agree(folder, tmp_path):
    content = json.loads((folder / "val" / "annotations.json").read_text())
    content["categories"].append({"id": 10, "name": "ten"})
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"their categories differ, in 'ten' \(id 10\)"):
        detection.Data(own_data(folder, data__val_annotations=str(tmp_path / "other.json")), 0)
    with pytest.raises(RunError, match="data.classes is 80, but .* has 10 categories"):
        detection.Data(own_data(folder, data__classes=80), 0)
    with pytest.raises(OptionError, match="data.labelled: 41, but there are only 40"):
        detection.Data(own_data(folder), 0, labelled=41)


# ---- batches ---------------------------------------------------------------------------------------------------------


def coco_folder(root, sizes):
    """Images of those sizes (width, height), each with a bright box whose label is its number modulo 3."""
    generator = numpy.random.default_rng(0)
    content = {"images": [], "annotations": [], "categories": [{"id": n, "name": f"c{n}"} for n in range(3)]}
    (root / "images").mkdir()
    for n, (width, height) in enumerate(sizes):
        pixels = generator.integers(0, 60, (height, width, 3), dtype=numpy.uint8)
        x, y, w, h = width // 4, height // 3, width // 3, height // 2
        pixels[y : y + h, x : x + w] = 255
        Image.fromarray(pixels).save(root / "images" / f"{n}.png")
        content["images"].append({"id": 10 + n, "file_name": f"{n}.png", "width": width, "height": height})
        content["annotations"].append({"id": n, "image_id": 10 + n, "category_id": n % 3, "bbox": [x, y, w, h]})
    (root / "annotations.json").write_text(json.dumps(content))
    return coco.open_coco(str(root / "images"), str(root / "annotations.json"), "data.train", "error")


COLOUR = {"data.channels": 3, "data.mean": (0.0, 0.0, 0.0), "data.std": (1.0, 1.0, 1.0)}


def colour(**values):
    cache = {"teacher.cache": False}
    return config.replace(Config(), COLOUR | cache | {n.replace("__", "."): v for n, v in values.items()})


def test_smaller_images_are_padded(tmp_path):
    data = coco_folder(tmp_path, [(40, 30), (24, 36)])
    batch = next(coco.Loader(data, colour(), context(None).fabric, images=2, train=False).in_order([0, 1]))
    assert batch.images.shape == (2, 3, 36, 40) and batch.labels.tolist() == [[0], [1]]
    assert fcos.image_sizes(batch.inside).tolist() == [[40, 30], [24, 36]]
    assert batch.images[~batch.inside[:, None].expand_as(batch.images)].abs().max() == 0
    for image, (x0, y0, x1, y1) in zip(batch.images, batch.boxes[:, 0].int().tolist(), strict=True):
        assert (image[:, y0:y1, x0:x1] == 1).all() and (image == 1).sum() == 3 * (y1 - y0) * (x1 - x0)


def test_augmented_boxes_stay_on_their_objects(tmp_path):
    data = coco_folder(tmp_path, [(90, 60)] * 12)
    c = colour(
        augment__flip=0.5, augment__crop=0.7, augment__crop_short_sides=(80, 100), augment__crop_sizes=(50, 70),
        augment__short_sides=(64, 80, 96), augment__longest=130,
    )  # fmt: skip
    loader = coco.Loader(data, c, context(None).fabric, images=12, train=True)
    seen = set()
    for batch in (next(loader.training(6, seed, 0)) for seed in range(4)):
        for image, boxes, labels in zip(batch.images, batch.boxes, batch.labels, strict=True):
            bright = image.mean(0) > 0.6
            rows, columns = bright.any(dim=1).nonzero().flatten(), bright.any(dim=0).nonzero().flatten()
            if labels[0] < 0:  # cropped away
                assert len(rows) <= 2 or len(columns) <= 2
                continue
            found = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert (found - boxes[0]).abs().max() <= 2
            seen.add(tuple(found.tolist()))
        short, long = batch.images.shape[-2:]
        assert min(short, long) >= 60 and max(short, long) <= 130
    assert len(seen) > 12


def test_batches_depend_on_seed_step_and_ranks_alone(folder):
    data, c = opened(folder), configured(augment__flip=0.5, teacher__cache=False)
    fabric = context(None).fabric
    loader = coco.Loader(data, c, fabric, images=20, train=True)
    stream = loader.training(8, 1, 0)
    first = [next(stream) for _ in range(6)]
    again = next(coco.Loader(data, c, fabric, images=20, train=True).training(8, 1, 4))
    assert torch.equal(first[4].images, again.images) and torch.equal(first[4].boxes, again.boxes)
    assert sorted(torch.cat([first[0].index, first[1].index]).unique().tolist())[-1] < 20
    assert len(torch.cat([first[0].index, first[1].index]).unique()) == 16  # no image twice in an epoch
    assert not torch.equal(next(loader.training(8, 2, 4)).images, again.images)


def test_loader_processes_give_the_same_batches(folder):
    data, fabric = opened(folder), context(None).fabric
    c = configured(augment__flip=0.5, teacher__cache=False)
    batches = []
    for workers in (0, 1):
        c = config.replace(c, {"run.workers": workers})
        stream = coco.Loader(data, c, fabric, images=40, train=True).training(8, 1, 0)
        batches.append([next(stream) for _ in range(2)][-1])
        stream.close()
    assert torch.equal(batches[0].images, batches[1].images) and torch.equal(batches[0].boxes, batches[1].boxes)


@pytest.fixture
def damaged(tmp_path):
    """Six images, of which one is cut short, one is not an image, and one has another size than the file says."""
    coco_folder(tmp_path, [(40, 30)] * 6)
    path = tmp_path / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:1500])
    (tmp_path / "images" / "2.png").write_text("no image")
    Image.new("RGB", (30, 40)).save(tmp_path / "images" / "4.png")
    return tmp_path


def test_unreadable_images_are_counted_and_replaced(damaged, capsys):
    data = coco.open_coco(str(damaged / "images"), str(damaged / "annotations.json"), "data.train", "error")
    fabric = context(None).fabric
    loader = coco.Loader(data, colour(), fabric, images=6, train=True)
    stream = loader.training(6, 0, 0)
    for batch in (next(stream), next(stream)):
        assert sorted(batch.index.tolist()) == [0, 3, 3, 3, 5, 5] and batch.unreadable is None
    assert loader.unreadable == {"1.png", "2.png", "4.png"}
    text = capsys.readouterr().err
    assert text.count("another one takes its place") == 3 and "3 so far" in text and "says (40, 30)" in text
    held_out = coco.Loader(data, colour(), fabric, images=6, train=False)
    assert torch.cat([batch.index for batch in held_out.in_order([*range(6)])]).tolist() == [0, 3, 5]
    assert "left out; 3 so far" in capsys.readouterr().err


def test_a_folder_of_unreadable_images_is_an_error(damaged):
    for path in (damaged / "images").iterdir():
        path.write_text("no image")
    data = coco.open_coco(str(damaged / "images"), str(damaged / "annotations.json"), "data.train", "error")
    with pytest.raises(RunError, match="20 images in a row cannot be read: .*png"):
        next(coco.Loader(data, colour(), context(None).fabric, images=6, train=True).training(6, 0, 0))


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_a_location_answers_for_the_smallest_object_near_whose_centre_it_is():
    points = torch.tensor([[20.0, 20.0], [8.0, 20.0], [24.0, 22.0], [60.0, 60.0]])
    boxes, labels = boxes_of([(0, 0, 0, 40, 40), (1, 17, 17, 27, 27)], [])
    assert fcos.assigned(points, boxes, labels).tolist() == [[1, -1, 1, -1], [-1] * 4]


def test_detection_losses_are_the_formulas():
    torch.manual_seed(1)
    model = fcos.FCOS((4, 6), 8, classes=3, image_channels=1).eval()
    batch = batch_of([(2, 4, 3, 25, 28), (0, 24, 8, 40, 30)], [], [(1, 1, 1, 31, 31)], widths=(48, 48, 32))
    found = model.predict(batch.images, batch.inside, batch.boxes, batch.labels)
    height, width = 8, 12
    focal, sides, objects = torch.zeros(()), torch.zeros(()), 0
    for n in range(3):
        for place in range(height * width):
            x, y = 4 * (place % width) + 2, 4 * (place // width) + 2
            if n == 2 and x > 32:
                continue  # padding
            target, chosen = torch.zeros(3), None
            for box, label in sorted(
                zip(batch.boxes[n], batch.labels[n], strict=True), key=lambda o: -float((o[0][2:] - o[0][:2]).prod())
            ):
                x0, y0, x1, y1 = box.tolist()
                near = abs(x - (x0 + x1) / 2) <= 6 and abs(y - (y0 + y1) / 2) <= 6
                if label >= 0 and x0 < x < x1 and y0 < y < y1 and near:
                    target, chosen = F.one_hot(label, 3).float(), box
            p = found.logits[n, place].sigmoid()
            focal += torch.where(
                target > 0, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()
            ).sum()  # fmt: skip
            if chosen is not None:
                objects += 1
                sides += 1 - generalized_box_iou(found.boxes[n, place : place + 1], chosen[None])[0, 0]
    assert found.objects == objects > 10
    torch.testing.assert_close(found.losses["classes"], focal, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.losses["boxes"], sides, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["boxes", "image"])
def test_compared_locations(where):
    batch = batch_of([(0, 8, 4, 20, 13), (2, 24, 20, 40, 32)], [], widths=(36, 48))
    found = losses.rows(batch, (8, 12), where)
    for n in range(2):
        for row in range(8):
            for column in range(12):
                x, y = 4 * column + 2, 4 * row + 2
                inside = n == 0 and ((8 < x < 20 and 4 < y < 13) or (24 < x < 40 and 20 < y < 32))
                expected = (inside or where == "image") and (n == 1 or x < 36)
                assert found[n, row, column] == expected, (n, x, y)


def standardised(x):
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


def feature_batch(student, teacher):
    batch = batch_of([(0, 8, 4, 20, 13)], [(1, 1, 1, 30, 30)])
    batch.teacher = {name: torch.randn(2, *shape) for name, shape in teacher.items()}
    return batch, {name: torch.randn(2, *shape, requires_grad=True) for name, shape in student.items()}


@pytest.mark.parametrize("projection", ["orthogonal", "linear", "none"])
def test_feature_losses_are_the_formulas(projection):
    """A map, queries, and all layers of the decoder; two shapes of projections."""
    dims = {"map": (6, 9), "queries": (6, 9), "decoder": (5, 4)}
    sizes = {"map": (8, 12), "queries": (7,), "decoder": (3, 7)}
    batch, student = feature_batch(
        {n: (*sizes[n], dims[n][0]) for n in dims}, {n: (*sizes[n], dims[n][1]) for n in dims}
    )
    distill = DistillConfig(projection=projection, beta=0.5)
    loss = losses.FeatureLoss(distill, *({n: d[i] for n, d in dims.items()} for i in (0, 1)))
    assert sorted(loss.projections) == ["4x5", "9x6"]
    found = loss(student, batch)
    weights = dict(zip(("map", "queries"), loss.projections["9x6"].weight, strict=True))
    weights["decoder"] = loss.projections["4x5"].weight[0]
    for name, value in zip(loss.names, found, strict=True):
        weight = weights[name]
        gram = weight.T @ weight if name != "decoder" else weight @ weight.T
        if projection == "orthogonal":
            assert (gram - torch.eye(len(gram))).abs().max() < 1e-6
        kept = losses.rows(batch, (8, 12), "boxes") if name == "map" else torch.ones(student[name].shape[:-1]).bool()
        x, y = student[name][kept] @ weight.T, batch.teacher[name][kept]
        expected = F.smooth_l1_loss(standardised(x), standardised(y), beta=0.5)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
    trained = {name for name, _ in loss.named_parameters()}
    spared = {f"projections.{key}.{n}" for key, p in loss.projections.items() for n in p.no_weight_decay()}
    assert trained == spared and len(trained) == (0 if projection == "none" else 2)


def test_masked_features_do_not_influence_the_loss():
    batch, student = feature_batch({"map": (8, 12, 6)}, {"map": (8, 12, 9)})
    loss = losses.FeatureLoss(DistillConfig(), {"map": 6}, {"map": 9})
    before = loss(student, batch)
    before.sum().backward()
    outside = ~losses.rows(batch, (8, 12), "boxes")
    assert 0 < outside.sum() < outside.numel()
    assert student["map"].grad[outside].abs().max() == 0 and (student["map"].grad[~outside] != 0).all()
    with torch.no_grad():
        student["map"][outside] = float("nan")
        batch.teacher["map"][outside] = float("inf")
    assert torch.equal(loss(student, batch), before)


def test_padding_and_its_features_do_not_influence_a_student():
    """A batch in which an image is padded: same loss and features as when it is alone, all locations compared."""
    torch.manual_seed(2)
    student = fcos.FCOS((4, 6), 8, classes=3, image_channels=1).eval()
    model = losses.DistilledDetector(student, DistillConfig(where="image"), {"map": 12})
    small = batch_of([(1, 2, 2, 20, 28)], size=(32, 32))
    large = batch_of([(1, 2, 2, 20, 28)], size=(32, 64), widths=(32,))
    large.images[...] = 0
    large.images[..., :32] = small.images
    large.teacher = {"map": torch.randn(1, 8, 16, 12)}
    small.teacher = {"map": large.teacher["map"][:, :, :8]}
    with torch.no_grad():
        alone, padded = model(small), model(large)
        large.teacher["map"][:, :, 8:] = 1e6
        for name, value in model(large).items():
            assert torch.equal(value, padded[name])
    assert abs(alone["classes"] - padded["classes"]) < 1e-3 * alone["classes"]
    assert abs(alone["boxes"] - padded["boxes"]) < 1e-3 * alone["boxes"]


def test_total_is_the_sum_of_the_losses_and_alone_has_no_feature_loss():
    student = fcos.FCOS((4,), 8, classes=3, image_channels=1)
    batch = batch_of([(0, 8, 4, 20, 13)], [(1, 1, 1, 30, 30)])
    batch.teacher = {"map": torch.randn(2, 8, 12, 12)}
    found = losses.DistilledDetector(student, DistillConfig(weight=3.0), {"map": 12})(batch)
    torch.testing.assert_close(found["total"], found["classes"] + found["boxes"] + 3 * found["features"])
    alone = losses.DistilledDetector(student, DistillConfig(weight=0.0), {})
    assert alone(batch).keys() == {"classes", "boxes", "total"}
    assert len([*alone.parameters()]) == len([*student.parameters()])


def test_features_must_match():
    with pytest.raises(OptionError, match="map of the teacher, queries of the student"):
        losses.FeatureLoss(DistillConfig(), {"queries": 4}, {"map": 4})
    loss = losses.FeatureLoss(DistillConfig(), {"queries": 4}, {"queries": 4})
    batch, student = feature_batch({"queries": (7, 4)}, {"queries": (9, 4)})
    with pytest.raises(RunError, match=r"queries is \(2, 9, 4\) of the teacher and \(2, 7, 4\) of the student"):
        loss(student, batch)


# ---- average precision -----------------------------------------------------------------------------------------------


def perfect(data, index, scale=1.0):
    boxes, labels = torch.from_numpy(data.boxes[index]), torch.from_numpy(data.labels[index])
    return Detections(boxes * scale, torch.ones(len(labels)), labels)


def precision(data, found, size=(64, 64)):
    rows = [row for index, each in enumerate(found) for row in metrics.coco_rows(data, index, each, size)]
    return metrics.average_precision(data, [*range(len(found))], rows)


def test_average_precision_of_perfect_and_of_no_detections(composed, capsys):
    data = scenes.in_memory(composed[1], "memory")
    everything = [perfect(data, index) for index in range(len(data))]
    assert precision(data, everything) == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})
    resized = [perfect(data, index, scale=2.5) for index in range(len(data))]
    assert precision(data, resized, size=(160, 160))["AP"] == pytest.approx(100)
    nothing = [Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))] * len(data)
    assert precision(data, nothing) == {"AP": 0, "AP50": 0, "AP75": 0}
    wrong = [Detections(d.boxes, d.scores, (d.labels + 1) % 10) for d in everything]
    assert precision(data, wrong)["AP"] < 20
    loose = [d._replace(boxes=d.boxes + torch.tensor([-2.0, -2.0, 2.0, 2.0])) for d in everything]
    found = precision(data, loose)
    assert found["AP75"] < found["AP50"] and 0 < found["AP"] < 60
    assert capsys.readouterr().out == ""


def test_average_precision_is_over_the_images_that_were_read(composed):
    data = scenes.in_memory(composed[1], "memory")
    assert precision(data, [perfect(data, index) for index in range(3)])["AP"] == pytest.approx(100)


def test_average_precision_is_pycocotools(folder, composed, capsys):
    """Of detections with errors, against pycocotools on the file itself."""
    from pycocotools.cocoeval import COCOeval

    data, rng = opened(folder, "val"), numpy.random.default_rng(0)
    rows = []
    for index in range(len(data)):
        found = perfect(data, index)
        noise = torch.from_numpy(rng.normal(0, 1.5, found.boxes.shape)).float()
        found = found._replace(boxes=found.boxes + noise, scores=torch.from_numpy(rng.random(len(noise))).float())
        rows += metrics.coco_rows(data, index, found, (64, 64))
    ours = metrics.average_precision(data, [*range(len(data))], rows)
    truth = COCO(str(folder / "val" / "annotations.json"))
    results = [
        {"image_id": int(i), "bbox": box, "score": score, "category_id": int(category)}
        for i, *box, score, category in rows
    ]
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert 5 < ours["AP"] < 95
    assert [*ours.values()] == pytest.approx((100 * evaluation.stats[:3]).tolist())


def test_detections_of_fcos_are_the_best_of_their_place_and_inside_the_image():
    model = fcos.FCOS((4, 6), 8, classes=3, image_channels=1).eval()
    logits, boxes = torch.full((1, 96, 3), -9.0), torch.zeros(1, 96, 4)
    logits[0, 0, 1], boxes[0, 0] = 2.0, torch.tensor([-3.0, 1.0, 20.0, 25.0])
    logits[0, 1, 1], boxes[0, 1] = 1.0, torch.tensor([0.0, 1.0, 21.0, 25.0])  # the same object
    logits[0, 2, 2], boxes[0, 2] = 0.0, torch.tensor([0.0, 1.0, 60.0, 25.0])  # another class
    logits[0, 11, 0], boxes[0, 11] = 3.0, torch.tensor([0.0, 1.0, 9.0, 9.0])  # in the padding
    inside = torch.ones(1, 32, 48, dtype=torch.bool)
    inside[:, :, 40:] = False
    prediction = models.Prediction(logits, boxes, {"map": torch.zeros(1, 8, 12, 8)})
    found = model.detections(prediction, inside)[0]
    assert found.labels.tolist() == [1, 2] and found.boxes.tolist() == [[0, 1, 20, 25], [0, 1, 40, 25]]


# ---- Deformable DETR -------------------------------------------------------------------------------------------------


def recipe(**values):
    found, _ = config.read_yaml(tasks.recipes("detection")["vkd-deformable-detr-coco"])
    return config.replace(Config(), found | {name.replace("__", "."): value for name, value in values.items()})


def small_detr(classes=3, **values):
    torch.manual_seed(0)
    c = configured(**{f"student__{name}": v for name, v in ({"name": "deformable-detr"} | SMALL_DETR | values).items()})
    return models.make_detector(c.student, classes, 3)


@pytest.fixture(scope="module")
def detr():
    return small_detr()


def test_recipe_has_the_papers_values():
    c = recipe()
    assert (c.optim.lr, c.optim.min_lr, c.optim.weight_decay, c.optim.clip_norm) == (1e-4, 1e-7, 1e-4, 0.1)
    assert (c.optim.epochs, c.optim.batch_size, c.optim.schedule, c.distill.weight) == (50, 12, "cosine", 4.0)
    assert (c.distill.normalization, c.distill.projection, c.distill.where) == ("batch_norm", "orthogonal", "image")
    assert (c.student.queries, c.teacher.queries, c.student.decoder_layers, c.student.dim) == (100, 100, 6, 256)


def test_dry_run_of_the_recipe_needs_no_data(capsys, tmp_path):
    assert cli.main(["distill", "detection", "--recipe", "vkd-deformable-detr-coco", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "parameters: 19509236" in text and "parameters: 101101346" in text and "map3: [256, 256]" in text
    command = ["distill", "detection", "--recipe", "vkd-deformable-detr-coco", "--jobs", "0", "--output"]
    assert cli.main([*command, str(tmp_path / "run")]) == 2
    assert "data.train: missing" in capsys.readouterr().err


def test_one_step_of_the_recipe_at_full_size():
    """480 x 480, the smallest training size: 101 M parameters teach 19.5 M; six features of 256 channels."""
    c = recipe()
    student = models.make_detector(c.student, 80, 3)
    teacher = models.make_detector(c.teacher, 80, 3).eval().requires_grad_(False)
    model = losses.DistilledDetector(student, c.distill, teacher.dims)
    batch = batch_of([(3, 20, 30, 200, 300), (7, 90, 5, 300, 310)], size=(480, 480), channels=3, widths=(330,))
    with torch.no_grad():
        batch.teacher = teacher.predict(batch.images, batch.inside).features
    optimizer = torch.optim.AdamW(engine.parameter_groups(model, c.optim.weight_decay), lr=c.optim.lr)
    before = [p.detach().clone() for p in model.parameters()]
    found = model(batch)
    found["total"].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), c.optim.clip_norm)
    optimizer.step()
    shapes = {name: tuple(x.shape) for name, x in batch.teacher.items()}
    assert shapes == {
        "map0": (1, 60, 60, 256), "map1": (1, 30, 30, 256), "map2": (1, 15, 15, 256), "map3": (1, 8, 8, 256),
        "queries": (1, 100, 256), "decoder": (1, 6, 100, 256),
    }  # fmt: skip
    assert model.feature_loss.projections["256x256"].weight.shape == (6, 256, 256)
    each = torch.stack([found[f"features/{name}"] for name in shapes])
    assert (each > 0.3).all() and (each < 1.5).all()
    torch.testing.assert_close(found["features"], each.sum())
    torch.testing.assert_close(found["total"], found["classes"] + found["boxes"] + 4 * found["features"])
    # Every trained parameter has a gradient: data-parallel training needs no search for those without.
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    gram = model.feature_loss.projections["256x256"].weight
    assert (gram.mT @ gram - torch.eye(256)).abs().max() < 1e-5


def test_detr_losses_are_the_librarys(detr):
    batch = batch_of([(2, 4, 3, 25, 28), (0, 24, 8, 40, 30)], [], size=(64, 64), channels=3, widths=(48, 64))
    detr.eval()
    found = detr.predict(batch.images, batch.inside, batch.boxes, batch.labels)
    cxcywh = torch.tensor([[14.5 / 48, 15.5 / 64, 21 / 48, 25 / 64], [32 / 48, 19 / 64, 16 / 48, 22 / 64]])
    labels = [
        {"class_labels": torch.tensor([2, 0]), "boxes": cxcywh},
        {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
    ]
    theirs = detr.net(pixel_values=batch.images, pixel_mask=batch.inside.long(), labels=labels)
    torch.testing.assert_close(sum(found.losses.values()), 2 * theirs.loss)
    assert found.objects == 2
    boxes = theirs.pred_boxes * torch.tensor([[[48.0, 64, 48, 64]], [[64.0, 64, 64, 64]]])
    torch.testing.assert_close((found.boxes[..., :2] + found.boxes[..., 2:]) / 2, boxes[..., :2])
    torch.testing.assert_close(found.boxes[..., 2:] - found.boxes[..., :2], boxes[..., 2:])
    torch.testing.assert_close(found.features["decoder"], theirs.intermediate_hidden_states)
    torch.testing.assert_close(found.features["queries"], theirs.intermediate_hidden_states[:, 0])
    assert [found.features[f"map{i}"].shape[1:3] for i in range(4)] == [(8, 8), (4, 4), (2, 2), (1, 1)]
    plain = detr.predict(batch.images, batch.inside)
    assert plain.losses == {} and torch.equal(plain.logits, found.logits)
    logits, boxes = detr(batch.images, batch.inside)
    assert torch.equal(logits, found.logits) and torch.equal(boxes, found.boxes)


def test_detr_begins_sure_of_background_and_with_the_reference_points(detr):
    prediction = detr.eval().predict(torch.randn(1, 3, 64, 64), torch.ones(1, 64, 64, dtype=torch.bool))
    assert prediction.logits.sigmoid().mean() < 0.05
    sides = (prediction.boxes[..., 2:] - prediction.boxes[..., :2]) / 64
    torch.testing.assert_close(sides, torch.full_like(sides, torch.tensor(-2.0).sigmoid().item()))


def test_a_batch_without_any_object(detr):
    batch = batch_of([], [], size=(64, 64), channels=3)
    for model in (detr, fcos.FCOS((4,), 8, classes=3, image_channels=3)):
        found = losses.DistilledDetector(model, DistillConfig(weight=0.0), {})(batch)
        assert found["boxes"] == 0 and torch.isfinite(found["total"]) and found["total"] > 0


def test_detr_detections(detr):
    detr.eval()
    inside = torch.ones(2, 64, 64, dtype=torch.bool)
    inside[1, :, 40:] = False
    prediction = detr.predict(torch.randn(2, 3, 64, 64), inside)
    for n, found in enumerate(detr.detections(prediction, inside)):
        scores = prediction.logits[n].sigmoid().flatten()
        torch.testing.assert_close(found.scores, scores.sort(descending=True).values)
        assert found.boxes.shape == (21, 4)
        assert found.boxes[:, 2].max() <= (40 if n else 64) and found.boxes.min() >= 0


def test_a_run_of_the_recipe_on_small_images(tmp_path):
    """Colour images of several sizes, augmented, in two parts a batch; teacher and student trained; AP and pictures."""
    coco_folder(tmp_path, [(64, 48), (40, 64), (72, 64)] * 3)
    words = ["distill", "detection", "--recipe", "vkd-deformable-detr-coco", "--jobs", "0", "--quiet", "--output"]
    words += [str(tmp_path / "run"), "data.classes=3", "optim.epochs=0", "optim.steps=2", "optim.batch_size=4"]
    words += ["optim.accumulate=2", "teacher.steps=1", "teacher.batch_size=4", "teacher.backbone=swin-nano"]
    words += [f"data.{part}={tmp_path / 'images'}" for part in ("train", "val")]
    words += [f"data.{part}_annotations={tmp_path / 'annotations.json'}" for part in ("train", "val")]
    words += [f"{side}.{name}={value}" for side in ("teacher", "student") for name, value in SMALL_DETR.items()]
    words += ["augment.short_sides=32,48,64", "augment.crop_short_sides=40,56", "augment.crop_sizes=32,48"]
    words += ["augment.val_short_side=64", "augment.longest=96", "teacher.dim=96", "teacher.heads=3"]
    words += ["run.tensorboard=false", "run.workers=0"]
    assert cli.main(words) == 0
    run = tmp_path / "run" / "vkd" / "seed-00"
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert {f"train/features/{name}" for name in (*(f"map{i}" for i in range(4)), "queries", "decoder")} < logged.keys()
    assert (run / "figures" / "detections.png").exists() and json.loads((run / "result.json").read_text())["AP"] >= 0


def test_backbones_of_timm(capsys):
    model = small_detr(backbone="resnet10t")
    assert [*model.dims] == ["map0", "map1", "map2", "map3", "queries", "decoder"]
    found = model.eval().predict(torch.randn(1, 3, 64, 96), torch.ones(1, 64, 96, dtype=torch.bool))
    assert found.features["map0"].shape == (1, 8, 12, 64)
    with pytest.raises(OptionError, match="backbone: 'swan' is not swin-nano"):
        small_detr(backbone="swan")
    with pytest.raises(OptionError, match=r"must give maps \(N, C, H, W\)"):
        small_detr(backbone="swin_tiny_patch4_window7_224")


def test_weights_from_files(detr, tmp_path):
    safetensors.torch.save_file(
        {n: v.clone().contiguous() for n, v in detr.state_dict().items()}, tmp_path / "detr.safetensors"
    )
    other = small_detr()
    torch.nn.init.zeros_(other.net.model.level_embed)
    models.load_weights(other, tmp_path / "detr.safetensors", 3, "teacher.weights")
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), detr.state_dict().values(), strict=True))
    with pytest.raises(RunError, match=r"teacher.weights: .*detr.safetensors has 3 classes, and 5 are needed"):
        models.load_weights(small_detr(5), tmp_path / "detr.safetensors", 5, "teacher.weights")
    with pytest.raises(RunError, match="is of another architecture"):
        models.load_weights(small_detr(queries=9), tmp_path / "detr.safetensors", 3, "teacher.weights")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("text.pth", "nothing.pth", "nothing.safetensors"):
        with pytest.raises(RunError, match=f"cannot read .*{name}"):
            models.load_weights(detr, tmp_path / name, 3, "teacher.weights")


def test_detectors_and_backbones_from_local_folders(detr, tmp_path):
    detr.net.save_pretrained(tmp_path / "detr")
    found = models.make_detector(configured(student__name=str(tmp_path / "detr")).student, 3, 3)
    images, inside = torch.randn(1, 3, 64, 64), torch.ones(1, 64, 64, dtype=torch.bool)
    torch.testing.assert_close(found.eval()(images, inside)[0], detr.eval()(images, inside)[0])
    with pytest.raises(RunError, match="has 3 classes, and 4 are needed"):
        models.make_detector(configured(student__name=str(tmp_path / "detr")).student, 4, 3)
    with pytest.raises(RunError, match="no Deformable DETR of transformers"):
        models.make_detector(configured(student__name=str(tmp_path)).student, 3, 3)

    backbone = detr.net.model.backbone.model
    backbone.save_pretrained(tmp_path / "swin")
    torch.save(backbone.state_dict(), tmp_path / "swin.pth")
    for name in ("swin", "swin.pth"):
        loaded = small_detr(backbone_weights=str(tmp_path / name)).net.model.backbone.model
        assert all(torch.equal(v, loaded.state_dict()[n]) for n, v in backbone.state_dict().items())
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(RunError, match="is not of swin-nano; it lacks"):
        small_detr(backbone_weights=str(tmp_path / "linear.pth"))


# ---- the bundled run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detection") / "run"
    assert cli.main(["distill", "detection", "--output", str(folder), *RUN, *TINY]) == 0
    return folder


def results(folder):
    """What must come out the same, bit for bit: everything but clocks."""
    clocks = {"seconds", "cpu_seconds", "images_per_second"}
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*/seed-*/result.json"))]
    return [{name: value for name, value in result.items() if name not in clocks} for result in found]


def weights(folder):
    return {path.parent.parent.name: path.read_bytes() for path in sorted(folder.glob("*/seed-*/*.safetensors"))}


def test_run_writes_its_files(finished):
    found = json.loads((finished / "metrics.json").read_text())
    assert [(r["seed"], r["arm"]) for r in found["runs"]] == [(0, arm) for arm in ARMS]
    assert all({"AP", "AP50", "AP75"} <= r.keys() and 0 <= r["AP"] <= r["AP50"] <= 100 for r in found["runs"])
    assert [e["step"] for e in found["runs"][0]["evaluations"]] == [6, 12]
    assert found["teachers"][0].keys() >= {"AP", "AP50", "AP75", "seconds"}
    with open(finished / "results.csv", newline="") as file:
        assert [float(row["AP75"]) for row in csv.DictReader(file)] == [r["AP75"] for r in found["runs"]]
    for arm in (*ARMS, "teacher"):
        with Image.open(finished / arm / "seed-00" / "figures" / "detections.png") as picture:
            assert picture.size == (4 * 320 + 5 * 6, 4 * 320 + 5 * 6)
    assert not [path for pattern in ("checkpoint*", "*.partial-*") for path in finished.rglob(pattern)]
    lines = (finished / "vkd" / "seed-00" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    assert {"train/classes", "train/boxes", "train/features", "train/total"} <= logged[0].keys()
    features = [line["train/features"] for line in logged if "train/features" in line]
    assert features[-1] < features[0]
    text = (finished / "table.txt").read_text()
    assert "AP" in text.splitlines()[0] and "student alone" in text


def test_projection_is_orthonormal_and_students_are_stored_without_it(finished):
    for result in results(finished):
        error = result["diagnostics"].get("max |PᵀP - I|")
        assert {"alone": error is None, "vkd": (error or 0) < 1e-5, "linear": (error or 0) > 1e-2}.get(
            result.get("arm"), True
        )
    stored = safetensors.torch.load_file(finished / "vkd" / "seed-00" / "student.safetensors")
    assert "class_head.weight" in stored and not any("projection" in name for name in stored)


def test_a_stopped_run_continues_with_the_same_bits(finished, tmp_path, monkeypatch, capsys):
    """Stopped within the teacher's training, then within a student's."""
    folder = tmp_path / "run"
    command = ["distill", "detection", "--output", str(folder)]
    original = detection.Detection.batches

    def stop_at(learner, step):
        def batches(self, start):
            who = "student" if self.teacher else "alone" if self.data.images == 20 else "teacher"
            for number, batch in enumerate(original(self, start), start):
                if (who, number) == (learner, step):
                    os.kill(os.getpid(), signal.SIGINT)
                yield batch

        monkeypatch.setattr(detection.Detection, "batches", batches)

    stop_at("teacher", 6)
    assert cli.main([*command, *RUN, *TINY]) == 130
    assert f"--resume --output {folder}" in capsys.readouterr().err
    assert [path.parent.parent.name for path in folder.rglob("checkpoint.pt")] == ["teacher"]
    stop_at("student", 8)
    assert cli.main([*command, *RUN, "--resume"]) == 130
    assert [path.parent.parent.name for path in folder.rglob("checkpoint.pt")] == ["linear"]
    monkeypatch.undo()
    assert cli.main([*command, *RUN, "--resume"]) == 0
    assert results(folder) == results(finished) and weights(folder) == weights(finished)


def test_evaluate_and_export(finished, capsys):
    run = finished / "vkd" / "seed-00"
    assert cli.main(["evaluate", str(run)]) == 0
    reported = json.loads((run / "result.json").read_text())
    line = capsys.readouterr().out.splitlines()[2].split()
    assert float(line[3]) == pytest.approx(reported["AP"], rel=1e-3) and line[3] == line[4]
    for kind in ("safetensors", "torch-export"):
        assert cli.main(["export", str(run), "--format", kind]) == 0
        assert float(capsys.readouterr().out.split()[-1]) < 1e-5
    assert cli.main(["evaluate", str(run), "student.channels=9"]) == 2
    assert "student.safetensors is of another architecture" in capsys.readouterr().err
    assert cli.main(["inspect", str(finished)]) == 0
    shown = {tuple(line.split()[:2]) for line in capsys.readouterr().out.splitlines()}
    assert {("eval/AP", arm) for arm in ("alone", "linear", "vkd", "teacher")} <= shown


def test_dry_run_tells_the_sizes(capsys, tmp_path):
    assert cli.main(["distill", "detection", "--dry-run", "--output", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "parameters: 38050" in text and "map: [96, 32]" in text and "steps: 1020" in text  # of the longer arm
    assert not (tmp_path / "run").exists()


def test_ablation(tmp_path):
    few = [
        "optim.steps=2",
        "teacher.steps=2",
        "run.eval_every=0",
        "run.tensorboard=false",
        "--seeds",
        "1",
        "--jobs",
        "0",
        "--quiet",
    ]
    assert cli.main(["ablate", "detection", "--output", str(tmp_path / "run"), *TINY, *few]) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(found["runs"]) == 12 and found["baseline"] == "orthogonal-batch_norm"
    features = {}
    for arm in found["arms"]:
        lines = (tmp_path / "run" / arm / "seed-00" / "metrics.jsonl").read_text().splitlines()
        features[arm] = json.loads(lines[0])["train/features"]
    assert len(set(features.values())) == 12  # each arm compares other features


EMPTY = [
    "run.tensorboard=false",
    "optim.batch_size=4",
    "optim.steps=30",
    "run.eval_every=0",
    "teacher.steps=4",
    "data.labelled=16",
    "--arms",
    "vkd",
    "--seeds",
    "1",
]


def test_two_ranks_give_the_result_of_one(folder, tmp_path):
    """By torchrun, two images a rank, most of them without an object: some rank has none at some steps."""
    content = json.loads((folder / "train" / "annotations.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] % 3 == 1]
    (tmp_path / "few.json").write_text(json.dumps(content))
    values = {f"data.{part}": folder / part / "images" for part in ("train", "val")}
    values |= {"data.train_annotations": tmp_path / "few.json"}
    values |= {"data.val_annotations": folder / "val" / "annotations.json"}
    words = ["distill", "detection", *TINY, *EMPTY, *(f"{name}={value}" for name, value in values.items()), "--output"]
    one, two = tmp_path / "one", tmp_path / "two"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = processes.run([*launcher, "vkd_kernels.cli", *words, str(two)], seconds=200, env=environment)
    assert done.returncode == 0, done.stderr
    assert cli.main([*words, str(one), "--jobs", "0", "--quiet"]) == 0
    logged = [
        [json.loads(line) for line in (f / "vkd/seed-00/metrics.jsonl").read_text().splitlines()] for f in (one, two)
    ]
    for ours, theirs in zip(*logged, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() & {"train/classes", "train/boxes", "train/features", "train/total"}:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3)
    assert ours["eval/AP50"] > 0.5 and theirs["eval/AP50"] == pytest.approx(ours["eval/AP50"], abs=0.1)
    ours, theirs = (safetensors.torch.load_file(f / "vkd/seed-00/student.safetensors") for f in (one, two))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-2, atol=1e-3)


def code_of_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "detection.md").read_text()
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_detector_of_the_documentation(tmp_path, monkeypatch):
    """A student of one's own, by its name on the command line, taught by the bundled teacher."""
    (tmp_path / "my_detectors.py").write_text(code_of_the_documentation()[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["distill", "detection", *TINY, "student.name=my_detectors:OnTimm", "student.backbone=resnet10t"]
    command += ["--arms", "vkd", "--seeds", "1", "--jobs", "0", "--quiet", "--output", str(tmp_path / "run")]
    assert cli.main([*command, "optim.steps=2", "run.eval_every=0", "optim.precision=bf16-mixed"]) == 0
    stored = safetensors.torch.load_file(tmp_path / "run" / "vkd" / "seed-00" / "student.safetensors")
    assert stored["body.neck.0.weight"].shape == (8, 64, 3, 3)
    with pytest.raises(OptionError, match="name: cannot import my_detectors:Missing"):
        models.make_detector(configured(student__name="my_detectors:Missing").student, 3, 1)
    with pytest.raises(OptionError, match=r"timm:create_model must give a detection\.models\.Detector"):
        monkeypatch.setattr("timm.create_model", lambda *_: torch.nn.Identity())
        models.make_detector(configured(student__name="timm:create_model").student, 3, 1)


def test_loop_of_the_documentation():
    maps = torch.nn.ModuleDict({"stride8": torch.nn.Conv2d(3, 96, 8, 8), "stride16": torch.nn.Conv2d(3, 192, 16, 16)})
    wide = torch.nn.ModuleDict({name: torch.nn.Conv2d(3, 256, m.stride, m.stride) for name, m in maps.items()})
    names = {
        "detector": lambda images, _: (images.mean(), {n: m(images).permute(0, 2, 3, 1) for n, m in maps.items()}),
        "teacher": lambda images: {n: m(images).permute(0, 2, 3, 1) for n, m in wide.items()},
        "images": torch.randn(2, 3, 32, 48), "boxes": None,
        "inside": {"stride8": torch.rand(2, 4, 6) > 0.5, "stride16": torch.rand(2, 2, 3) > 0.5},
    }  # fmt: skip
    exec(code_of_the_documentation()[1] + "\nloss.backward()", names)
    assert all(m.weight.grad is not None for m in maps.values()) and wide["stride8"].weight.grad is None
    assert names["distill"]["stride8"].projection.weight.shape == (256, 96)


def test_pictures_show_boxes(tmp_path):
    image = torch.full((1, 64, 64), 100, dtype=torch.uint8)
    truth = Detections(torch.tensor([[10.0, 20.0, 30.0, 40.0]]), torch.ones(1), torch.tensor([1]))
    found = Detections(torch.tensor([[0.0, 0.0, 9.0, 9.0], [40.0, 40.0, 60.0, 60.0]]), torch.tensor([0.1, 0.9]),
                       torch.tensor([0, 1]))  # fmt: skip
    metrics.save_pictures(tmp_path / "picture.png", [(image, truth, found)], ["a", "b"])
    pixels = numpy.asarray(Image.open(tmp_path / "picture.png")).astype(int)
    left, right = pixels[6:326, 6:326], pixels[6:326, 332:652]
    green = (left[..., 1] - left[..., 0]) > 50
    assert green[100 + 40, 50] and green[100, 50 + 50] and not green[4:90].any()
    red = (right[..., 0] - right[..., 1]) > 50
    assert red[200 + 50, 200] and not red[:45, :45].any()  # the uncertain one is not drawn


def test_stored_teacher_features_are_those_of_the_batch(tmp_path):
    c = configured(scenes__train=24, scenes__val=2, data__labelled=20, student__channels=8, teacher__channels=12)
    data = detection.Data(c, 0, labelled=20)
    torch.manual_seed(0)
    teacher = models.make_detector(c.teacher, 10, 1)
    stored = detection.Teacher(teacher, c, data, context(tmp_path))
    fresh = detection.Teacher(teacher, config.replace(c, {"teacher.cache": False}), data, context(tmp_path))
    batch = next(coco.Loader(data.train, c, context(None).fabric, images=20, train=True).training(8, 0, 3))
    torch.testing.assert_close(stored(batch)["map"], fresh(batch)["map"])
    assert stored.stored["map"].shape == (20, 16, 16, 12) and not fresh.stored


def test_images_of_several_sizes_are_not_stored(tmp_path):
    data = coco_folder(tmp_path, [(40, 30), (24, 36)])
    c = colour(teacher__cache=True)
    held = type("Data", (), {"train": data, "images": 2})()
    with pytest.raises(OptionError, match="teacher.cache: the images have 2 sizes; teacher.cache=false"):
        detection.Teacher(models.make_detector(c.teacher, 3, 3), c, held, context(tmp_path))


def test_a_teacher_from_a_file(finished, tmp_path):
    values = [config.split_override(text) for text in TINY]
    file = finished / "teacher" / "seed-00" / "teacher.safetensors"
    c = config.replace(Config(), dict(values) | {"teacher.weights": str(file)})
    assert detection.train_teacher(c, 0, tmp_path, context(tmp_path, c)) == {}
    training = detection.build(c, 0, tmp_path, context(tmp_path, c))
    batch = next(training.batches(0))
    stored = safetensors.torch.load_file(file)
    expected = training.teacher.model.state_dict()
    assert all(torch.equal(stored[name], expected[name]) for name in stored)
    assert batch.teacher["map"].shape == (8, 16, 16, 12)
    wrong = config.replace(c, {"teacher.classes": 12})
    with pytest.raises(RunError, match="has 10 classes, and 12 are needed"):
        detection.train_teacher(wrong, 0, tmp_path, context(tmp_path, wrong))
    wrong = config.replace(c, {"teacher.channels": 16})
    with pytest.raises(RunError, match="teacher.weights: .* is of another architecture"):
        detection.train_teacher(wrong, 0, tmp_path, context(tmp_path, wrong))
    nothing = config.replace(c, {"teacher.weights": "", "teacher.steps": 0})
    needless = config.replace(nothing, {"distill.weight": 0.0})
    assert detection.train_teacher(needless, 0, tmp_path, context(tmp_path, needless)) == {}
    with pytest.raises(OptionError, match="teacher.weights: give a file, or teacher.steps > 0"):
        detection.train_teacher(nothing, 0, tmp_path, context(tmp_path, nothing))


# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.train=somewhere"], "data.train_annotations: missing; own data need all of train, train_annotations"),
        (["data.mean=0.1,0.2"], "data.mean: one per channel, 1; got (0.1, 0.2)"),
        (["augment.flip=0.5"], "teacher.cache: features of an image can't be kept"),
        (["augment.crop_sizes=600,384"], "augment.crop_sizes: must be smallest and largest"),
        (["data.labelled=2000"], "data.labelled: 2000 of scenes.train=1500"),
        (["distill.where=all"], "distill.where: must be one of boxes, image; got all"),
        (["student.dim=100"], "dim: 100 must be a multiple of 32"),
        (["student.name=deformable-detr"], "data.channels: deformable-detr takes colour images, 3; got 1"),
        (["student.nmae=fcos"], "unknown key 'student.nmae'"),
        (["optim.batch_size=400"], "optim.batch_size: 400, but there are only 300 training images"),
    ],
)
def test_bad_values_name_their_option(arguments, message, tmp_path, capsys):
    command = ["distill", "detection", "--output", str(tmp_path / "run"), "--jobs", "0", "--quiet", "--arms", "alone"]
    fast = ["teacher.steps=1", "scenes.train=320", "scenes.val=1"] if "batch_size" in arguments[0] else []
    fast = fast or (["teacher.steps=1", "scenes.train=300", "scenes.val=1"] if "deformable" in arguments[0] else [])
    assert cli.main([*command, *fast, "teacher.batch_size=16", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_shows_every_value(capsys):
    assert cli.main(["distill", "detection", "--help"]) == 0
    text = capsys.readouterr().out
    for key in config.keys(Config):
        assert f"{key.name}=" in text
    assert "vkd-deformable-detr-coco" in text


def test_the_core_does_not_need_the_extra():
    assert not any(name.startswith(("torchvision", "transformers", "pycocotools")) for name in vk.__dict__)
    assert Path(sys.modules["vkd_kernels.recipes.detection"].__file__).parent.name == "detection"
