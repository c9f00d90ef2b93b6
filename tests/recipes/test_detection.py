"""Detection: scenes, COCO's format, detectors, losses, average precision, the recipe."""

import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from tests.helpers import processes
from tests.recipes import setups
from vkd_kernels import cli
from vkd_kernels.recipes import coco, detection, detectors, runs, scenes
from vkd_kernels.recipes import config as configs
from vkd_kernels.recipes.config import OptionError
from vkd_kernels.recipes.detection import Detection, DistilledDetector
from vkd_kernels.recipes.images import Source
from vkd_kernels.recipes.loading import Key
from vkd_kernels.recipes.runs import RunError

pytest.importorskip("pycocotools", reason="needs the extra [detection]")

ROOT = Path(__file__).parents[2]


configured = partial(setups.configured, "detection")
job = partial(setups.job, "detection")
DIGITS = Source()


@pytest.fixture(scope="module")
def composed():
    return scenes.Scenes(DIGITS, 0, 30, training=True), scenes.Scenes(DIGITS, 0, 6, training=False)


@pytest.fixture(scope="module")
def written(tmp_path_factory, composed):
    """Bundled scenes in COCO's layout: the option that names them."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    for name, part in zip(("train2017", "val2017"), composed, strict=True):
        (root / name).mkdir()
        images = [{"id": n, "file_name": f"{n}.png"} for n in range(len(part))]
        objects = []
        for n, item in enumerate(part):
            Image.fromarray(item["image"][0].numpy()).save(root / name / f"{n}.png")
            for (x0, y0, x1, y1), label in zip(item["boxes"].tolist(), item["labels"].tolist(), strict=True):
                objects.append({"image_id": n, "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0]})
        content = {"images": images, "annotations": objects}
        content["categories"] = [{"id": digit, "name": str(digit)} for digit in range(10)]
        coco.annotation_file(root, name).write_text(json.dumps(content))
    return {"data__root": str(root)}


# ---- scenes and the bundled run --------------------------------------------------------------------------------------


def test_boxes_are_tight_inside_and_hardly_overlap(composed):
    for item in composed[0]:
        boxes = item["boxes"]
        sides = boxes[:, 2:] - boxes[:, :2]
        assert 1 <= len(boxes) == len(item["labels"]) <= 4 and item["image"].shape == (1, 64, 64)
        assert boxes.min() >= 0 and boxes.max() <= 64 and sides.amax(1).min() >= 4 and sides.max() <= 28
        assert (box_iou(boxes, boxes).fill_diagonal_(0) <= scenes.OVERLAP).all()
        assert all(torch.equal(value, coco.cleaned(item)[name]) for name, value in item.items())
    again, other = scenes.Scenes(DIGITS, 0, 2, training=True)[1], scenes.Scenes(DIGITS, 1, 2, training=True)[1]
    assert torch.equal(again["image"], composed[0][1]["image"]) and torch.equal(again["boxes"], composed[0][1]["boxes"])
    assert not torch.equal(other["image"], again["image"])


def test_scenes_of_any_pictures_with_classes(folder, tmp_path):
    """Evaluation scenes show held-out pictures: white ones, where those for training are black with a white corner."""
    for split, corner in (("train", 20), ("val", 0)):
        for path in (folder / split).rglob("*.png"):
            pixels = torch.zeros(40, 40, dtype=torch.uint8)
            pixels[corner:, corner:] = 255
            Image.fromarray(pixels.numpy()).save(path)
    task = job(configured(scenes__name="folder", scenes__root=str(folder), distill__weight=0.0), tmp_path / "run")
    train, val = task.data
    assert train.names == {0: "class-0", 1: "class-1"} and task.classes == 2
    assert {*torch.cat([item["labels"] for item in train]).tolist()} == {0, 1}
    sides = [torch.cat([item["boxes"][:, 2:] - item["boxes"][:, :2] for item in part]) for part in (train, val)]
    assert sides[0].max() <= 15 < 25 < sides[1].max() <= 28  # a quarter of a picture of at most 28 pixels, or all of it
    with pytest.raises(OptionError, match=r"scenes.name: there is no 'FashionMnist'.*'FashionMNIST'"):
        Detection.check(configured(scenes__name="FashionMnist"))


def test_scenes_of_pictures_whose_classes_have_no_names(monkeypatch):
    pictures = [(Image.new("L", (28, 28), 255), 1)] * 3  # as SVHN, without `classes`
    monkeypatch.setattr(scenes.images, "open_images", lambda *_: (pictures, pictures, 2))
    assert scenes.Scenes(DIGITS, 0, 1, training=True).names == {0: 0, 1: 1}


def test_black_pictures_are_in_no_scene(monkeypatch):
    pictures = [(Image.new("L", (28, 28), gray), gray % 2) for gray in (0, 255)]
    monkeypatch.setattr(scenes.images, "open_images", lambda *_: (pictures, pictures, 2))
    labels = [scene["labels"] for scene in scenes.Scenes(DIGITS, 0, 20, training=True)]
    assert {*torch.cat(labels).tolist()} == {1} and min(map(len, labels)) == 0


def test_own_data_give_the_bundled_batches(written, tmp_path):
    small = {"data__labeled": 0, "optim__batch_size": 8, "distill__weight": 0}
    bundled = job(configured(**small, scenes__train=30, scenes__val=6), tmp_path)
    own = job(configured(**small, **written), tmp_path)
    workers = job(configured(**small, **written, run__workers=1, augment__flip=0.5), tmp_path)
    alone = job(configured(**small, **written, augment__flip=0.5), tmp_path)
    for one, two in ((bundled, own), (workers, alone)):
        streams = one.batches(1), two.batches(1)
        for _ in range(4):  # into the second epoch
            a, b = map(next, streams)
            assert a.keys() == b.keys() and torch.equal(a["images"], b["images"])
            for one_of, other_of in zip(a["targets"], b["targets"], strict=True):
                assert all(torch.equal(one_of[name], other_of[name]) for name in ("boxes", "labels", "iscrowd"))


# ---- COCO's format ---------------------------------------------------------------------------------------------------

IMAGE = {"id": 7, "file_name": "a.png"}
BOX = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 10, 10]}


def opened(folder, images=(IMAGE,), annotations=(BOX,), categories=({"id": 3, "name": "x"}, {"id": 1, "name": "y"})):
    content = {"images": [*images], "annotations": [*annotations], "categories": [*categories]}
    for name in ("annotations", "some"):
        (folder / name).mkdir(parents=True)
    coco.annotation_file(folder, "some").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    Image.new("L", (64, 48)).save(folder / "some" / "a.png")
    return coco.CocoImages(folder, "some", channels=1)


@pytest.mark.parametrize(
    "bad",
    [
        {"images": [{"id": 7}]},
        {"annotations": [{**BOX, "bbox": [1]}]},
        {"annotations": [{**BOX, "bbox": None}]},
        {"annotations": [{**BOX, "bbox": [1, 2, "wide", 4]}]},
        {"annotations": [{**BOX, "image_id": 8}]},
        {"annotations": [{**BOX, "category_id": 4}]},
        {"categories": [None]},
    ],
)
def test_annotations_that_contradict_themselves_are_errors(bad, tmp_path):
    with pytest.raises(RunError, match=r"instances_some\.json is no annotation file in COCO's format: "):
        opened(tmp_path, **bad)


def test_ids_and_names_of_annotations(tmp_path):
    with pytest.raises(RunError, match="two images have the id 7"):
        opened(tmp_path / "twice", images=[IMAGE, {**IMAGE, "file_name": "b.png"}])
    plain = Path.read_text
    with pytest.MonkeyPatch.context() as patch:  # where another encoding is the system's
        patch.setattr(Path, "read_text", lambda path, encoding="ascii": plain(path, encoding=encoding))
        assert opened(tmp_path / "names", categories=[{"id": 3, "name": "Vögel"}]).names == {3: "Vögel"}


def test_boxes_are_cut_at_the_border_and_crowds_are_set_apart(tmp_path):
    bad = {**BOX, "bbox": [0, 0, -1, 3]}
    outside, crowd = {**BOX, "bbox": [60, 40, 10, 10]}, {**BOX, "category_id": 1, "iscrowd": 1}
    item = opened(tmp_path, annotations=[BOX, bad, outside, crowd])[0]
    assert item["boxes"].tolist() == [[1, 2, 11, 12], [60, 40, 64, 48], [1, 2, 11, 12]]
    assert item["labels"].tolist() == [1, 1, 0] and item["iscrowd"].tolist() == [0, 0, 1]
    assert detection.without_crowds(item)["labels"].tolist() == [1, 1]


def test_of_ones_own_images_the_student_sees_all_or_as_many_as_there_are(written, tmp_path):
    few = {"optim__batch_size": 8, "distill__weight": 0}
    for labeled, seen in (("auto", 30), (0, 30), (12, 12)):
        config = configured(**written, **few, data__labeled=labeled)
        Detection.check(config)
        assert job(config, tmp_path).images == seen
    with pytest.raises(OptionError, match=r"^data\.labeled: 31, but there are only 30 training images"):
        Detection.check(configured(**written, **few, data__labeled=31))
    assert job(configured(), tmp_path).labeled == 300 and configured(data__labeled="300").data.labeled == 300
    with pytest.raises(OptionError, match=r"^data\.labeled: must be"):
        configured(data__labeled=-1)


def test_files_that_are_missing_are_named(written, tmp_path):
    with pytest.raises(OptionError, match=r"data\.root: there is no .*/annotations/instances_no\.json"):
        Detection.check(configured(**written, data__val="no"))
    with pytest.raises(RunError, match=r"data\.classes: the categories differ: 10 in .*data\.classes=3"):
        _ = job(configured(**written, data__classes=3), tmp_path).data


def test_weights_and_objects_that_are_missing_are_said_before_the_teacher_is_trained(written, tmp_path):
    runs.save_safetensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(RunError, match=r"^student\.weights: .*x\.safetensors is of another architecture"):
        Detection.check(configured(student__weights=str(tmp_path / "x.safetensors")))
    root = Path(shutil.copytree(written["data__root"], tmp_path / "coco"))
    path = coco.annotation_file(root, "val2017")
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    with pytest.raises(RunError, match=r"instances_val2017\.json: without any object there is no average precision"):
        Detection.check(configured(data__root=str(root), optim__batch_size=8, distill__weight=0))


def test_augmented_boxes_stay_on_their_objects(monkeypatch, tmp_path):
    """A white rectangle on black, flipped, cropped and resized: its box stays on it."""
    torch.manual_seed(0)
    for name, value in (("CROP_SHORT_SIDES", (60, 80)), ("CROP_SIZES", (40, 60)), ("LONGEST", 120)):
        monkeypatch.setattr(coco, name, value)
    image = Image.new("L", (90, 60))
    image.paste(255, (30, 20, 60, 45))
    data = opened(tmp_path, annotations=[{**BOX, "bbox": [30, 20, 30, 25]}])
    image.save(tmp_path / "some" / "a.png")
    augment = configured(augment__flip=0.5, augment__crop=0.7, augment__short_sides="48,64,96").augment
    transform, sizes = coco.training_transform(augment), set()
    for _ in range(30):
        sample = transform(data[0])
        pixels = sample["image"][0]
        sizes.add(tuple(pixels.shape))
        assert len(sample["boxes"]) == len(sample["labels"]) == len(sample["iscrowd"])
        for x0, y0, x1, y1 in sample["boxes"].tolist():
            rows, columns = (pixels > 127).any(1).nonzero().flatten(), (pixels > 127).any(0).nonzero().flatten()
            assert abs(int(columns[0]) - x0) <= 2 and abs(int(columns[-1]) + 1 - x1) <= 2
            assert abs(int(rows[0]) - y0) <= 2 and abs(int(rows[-1]) + 1 - y1) <= 2
    assert len(sizes) > 3


# ---- detectors and losses --------------------------------------------------------------------------------------------


def fcos(classes):
    return detectors.FCOS(detectors.convolutions(1, (4, 32)), 32, classes)


PARTS = (slice(0, 3, 2), slice(0, 1), slice(2, 3))


def arguments(batch):
    return batch["images"], batch["inside"], [detection.without_crowds(target) for target in batch["targets"]]


def batch_of(n=3, side=32, teacher_dim=7):
    torch.manual_seed(1)
    inside = torch.zeros(n, side, side, dtype=torch.bool)
    for i in range(n):
        inside[i, : side - 4 * i, : side - 8 * i] = True
    boxes = torch.tensor([[2.0, 3, 14, 17], [8, 8, 12, 12]])
    targets = [{"boxes": boxes[:count], "labels": torch.tensor([1, 0])[:count]} for count in (2, 1, 0)[:n]]
    targets = [{**t, "iscrowd": torch.zeros_like(t["labels"])} for t in targets]
    images = torch.randn(n, 1, side, side) * inside[:, None]
    teacher = {"map": torch.randn(n, side // 4, side // 4, teacher_dim)}
    return {"images": images, "inside": inside, "targets": targets, "teacher": teacher}


def test_ranks_average_to_the_whole_also_where_one_has_no_object(monkeypatch):
    """Two ranks of one image each, the second without an object; all_reduce adds what the other has."""
    model = DistilledDetector(fcos(3).eval(), configured(distill__weight=0).distill, {})
    batch = batch_of()
    whole, *halves = ({**{k: batch[k][part] for k in ("images", "inside", "targets")}} for part in PARTS)
    expected, counts = model(whole), [model.student.predict(*arguments(half)).objects for half in halves]
    assert int(counts[0]) > 0 == int(counts[1])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total, group: total.copy_(sum(counts).float()))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    model.group = "two ranks"
    for name, value in expected.items():
        torch.testing.assert_close(sum(model(half)[name] for half in halves) / 2, value)


@pytest.mark.parametrize("projection", ["orthogonal", "linear", "identity"])
def test_feature_losses_are_the_formulas(projection):
    """Standardized on both sides over the compared locations; what is outside has no influence."""
    config = configured(distill__projection=projection, distill__where="image").distill
    model = DistilledDetector(fcos(3).eval(), config, {"map": 7})
    batch = batch_of()
    losses = model(batch)
    prediction = model.student.predict(batch["images"], batch["inside"])
    rows = coco.at_map(batch["inside"], 8, 8)
    z = (prediction.features["map"][rows] @ model.feature_losses["map"].projection.weight.T).double()
    y = batch["teacher"]["map"][rows].double()
    z, y = ((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() for x in (z, y))
    expected = torch.nn.functional.smooth_l1_loss(z, y)
    torch.testing.assert_close(losses["features"].double(), expected, atol=1e-4, rtol=1e-4)
    of_boxes = sum(losses[name] for name in ("classification", "bbox_regression", "bbox_ctrness"))
    torch.testing.assert_close(losses["total"], of_boxes + 4 * losses["features"])
    batch["teacher"]["map"][~rows] = 99.0
    torch.testing.assert_close(model(batch)["features"], losses["features"])


def test_compared_locations_are_those_inside_boxes():
    batch = batch_of()
    boxes = [target["boxes"] for target in batch["targets"]]
    rows = detection.in_boxes(boxes, batch["inside"], torch.zeros(3, 8, 8))
    for image in rows[:2]:
        assert image.nonzero().min(0).values.tolist() == [1, 1] and image.nonzero().max(0).values.tolist() == [3, 2]
    assert not rows[2].any()


def test_features_must_match():
    config = configured().distill
    with pytest.raises(OptionError, match=r"teacher\.name, student\.name: their features differ"):
        DistilledDetector(fcos(3), config, {"other": 7})
    model, batch = DistilledDetector(fcos(3), config, {"map": 7}), batch_of()
    batch["teacher"]["map"] = torch.randn(3, 4, 4, 7)
    with pytest.raises(ValueError, match="student and teacher"):
        model(batch)


class Perfect(torch.nn.Module):
    """Detects what a list says, image after image."""

    def __init__(self, answers):
        super().__init__()
        self.answers = iter(answers)

    def predict(self, images, inside):
        return len(images)

    def detections(self, count, inside):
        return [next(self.answers) for _ in range(count)]


def test_average_precision_of_perfect_and_of_no_detections_and_without_any_object(tmp_path, monkeypatch):
    training = job(configured(*setups.TINY["detection"]), tmp_path)
    items = [training.data[1][i] for i in range(8)]
    truth = [{"boxes": i["boxes"], "scores": torch.ones(len(i["labels"])), "labels": i["labels"]} for i in items]
    assert training.evaluate(Perfect(truth)) == {"AP": 100, "AP50": 100, "AP75": 100}
    nothing = [{name: value[:0] for name, value in answer.items()} for answer in truth]
    assert training.evaluate(Perfect(nothing)) == {"AP": 0, "AP50": 0, "AP75": 0}
    val = training.data[1]
    val.items = [(image, objects[:0]) for image, objects in val.items]
    with pytest.raises(RunError, match="without any object there is no average precision"):
        training.evaluate(Perfect(nothing))


def test_evaluation_keeps_no_tensor_that_loader_processes_have_sent(tmp_path, monkeypatch):
    """Each is an open file for as long as it is kept, and a process may have a thousand."""
    training = job(configured(*setups.TINY["detection"], "run.workers=1"), tmp_path)
    items, kept = [training.data[1][i] for i in range(8)], []
    truth = [{"boxes": i["boxes"], "scores": torch.ones(len(i["labels"])), "labels": i["labels"]} for i in items]
    monkeypatch.setattr(detection, "gathered", lambda answers, ranks: kept.extend(answers) or answers)
    training.evaluate(Perfect(truth))
    assert len(kept) == 8 and not any(x.is_shared() for pair in kept for image in pair for x in image.values())


def test_batches_hold_copies_because_loader_processes_share_what_they_send(composed):
    item = composed[0][0]
    (target,) = coco.collate([(item, Key(0))], torch.zeros(1, 1, 1), torch.ones(1, 1, 1))["targets"]
    assert all(torch.equal(x, item[name]) and x.data_ptr() != item[name].data_ptr() for name, x in target.items())


def evaluate_three_images_on_two_ranks(rank, folder):
    """Two images and one; of an image all objects are missed. The ranks agree with one process."""
    training = job(configured(*setups.TINY["detection"], "scenes.val=3"), folder / f"{rank}")
    items = [training.data[1][i] for i in range(3)]
    answers = [{"boxes": i["boxes"], "scores": torch.ones(len(i["labels"])), "labels": i["labels"]} for i in items]
    answers[2] = {name: value[:0] for name, value in answers[2].items()}
    whole = training.evaluate(Perfect(answers))
    training.fabric = SimpleNamespace(world_size=2, to_device=lambda batch: batch)
    training.mine = slice(rank, None, 2)
    assert training.evaluate(Perfect(answers[rank::2])) == whole and 0 < whole["AP"] < 100


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_average_precision_of_ranks_that_have_different_numbers_of_images(tmp_path):
    processes.run_ranks(evaluate_three_images_on_two_ranks, tmp_path, tmp_path)


def test_detections_are_the_best_of_their_place_and_inside_the_image():
    model = fcos(2).eval()
    images, inside = torch.zeros(1, 1, 16, 16), torch.ones(1, 16, 16, dtype=torch.bool)
    inside[:, :, 12:] = False
    outputs, anchors = model.predict(images, inside).outputs
    outputs["cls_logits"] = torch.full((1, 16, 2), -9.0)
    outputs["cls_logits"][0, 5, 1], outputs["cls_logits"][0, 6, 1], outputs["cls_logits"][0, 0, 0] = 3.0, 2.0, 1.0
    corners = torch.tensor([2.0, 2, 10, 10]).repeat(16, 1)  # 5 and 6 are of the same object
    corners[0] = torch.tensor([-4.0, 8, 20, 30])
    outputs["bbox_regression"] = model.net.box_coder.encode(anchors[0], corners)[None]
    (detections,) = model.detections(detectors.Prediction((outputs, anchors), {}), inside)
    assert detections["labels"].tolist() == [1, 0]
    torch.testing.assert_close(detections["boxes"], torch.tensor([[2.0, 2, 10, 10], [0, 8, 12, 16]]))


@pytest.mark.parametrize("side", [64, 65, 66, 67, 478])
def test_locations_are_a_stride_apart_whatever_the_side_of_the_images(side):
    model, images = fcos(2).eval(), torch.zeros(1, 1, side, 64)
    corner = {"boxes": torch.tensor([[56.0, side - 9, 64, side]]), "labels": torch.tensor([1])}
    prediction = model.predict(images, torch.ones(1, side, 64, dtype=torch.bool), [corner])
    centers = prediction.outputs[1][0].view(-1, 16, 2, 2).mean(2)  # of every row and column: x, y
    assert centers[-1, -1].tolist() == [60, (side - 1) // 4 * 4] and int(prediction.objects) > 0


# ---- the recipe ------------------------------------------------------------------------------------------------------


def test_recipe_has_the_papers_values():
    values = configs.flatten(setups.recipe("detection", "vkd-deformable-detr-coco"))
    expected = {"student.backbone": "swin-nano", "teacher.backbone": "swin-base", "distill.weight": 4.0}
    expected |= {"distill.normalization": "batch_norm", "distill.projection": "orthogonal", "distill.scale": 1.0}
    expected |= {"optim.lr": 1e-4, "optim.min_lr": 1e-7, "optim.weight_decay": 1e-4, "optim.clip_norm": 0.1}
    expected |= {"optim.epochs": 50.0, "optim.batch_size": 12, "data.classes": 80, "distill.beta": 1.0}
    assert {key: values[key] for key in expected} == expected
    with pytest.raises(OptionError, match=r"teacher\.weights: give a file"):
        Detection.check(setups.recipe("detection", "vkd-deformable-detr-coco"))


@pytest.fixture(scope="module")
def detr(tmp_path_factory):
    """A small Deformable DETR of 3 classes in a folder of transformers; and a Swin backbone in another."""
    transformers = pytest.importorskip("transformers", reason="needs the extra [detection]")
    from vkd_kernels.recipes import deformable

    torch.manual_seed(0)
    net = deformable.new_net(configured(student__name="deformable-detr").student, 3)
    root = tmp_path_factory.mktemp("detr")
    described = net.config
    described.d_model, described.num_queries, described.encoder_layers, described.decoder_layers = 64, 5, 1, 2
    described.encoder_attention_heads = described.decoder_attention_heads = 4
    transformers.DeformableDetrForObjectDetection(described).save_pretrained(root / "detr")
    swin = transformers.SwinBackbone(described.backbone_config)
    swin.save_pretrained(root / "swin")
    return root, swin


def detr_batch(n=2, side=64):
    batch = batch_of(n, side)
    return {**batch, "images": torch.randn(n, 3, side, side) * batch["inside"][:, None]}


def test_detr_losses_features_and_a_batch_without_any_object(detr):
    config = configured(student__name=str(detr[0] / "detr"))
    model = Detection.detector(config.student, 3, 3)
    assert model.net.config.class_cost == 2
    batch = detr_batch()
    prediction = model.predict(*arguments(batch))
    assert {*prediction.features} == {"map0", "map1", "map2", "map3", "queries", "decoder"} == {*model.dims}
    assert prediction.features["decoder"].shape == (2, 2, 5, 64)
    student = DistilledDetector(model, config.distill, model.dims)
    batch["teacher"] = {name: torch.randn_like(x) for name, x in prediction.features.items()}
    nothing = [{name: value[:0] for name, value in target.items()} for target in batch["targets"]]
    for targets in (batch["targets"], nothing):
        losses = student({**batch, "targets": targets})
        assert all(loss.isfinite() for loss in losses.values()) and len(losses) == 4 + 6
        losses["total"].backward()
    for detections in model.detections(prediction, batch["inside"]):
        assert detections["boxes"].shape == (15, 4) and len(detections["labels"]) == len(detections["scores"])
    assert Detection.detector(config.student, 4, 3).classes == 4  # with a new class head


def test_weights_of_a_backbone_and_what_is_no_deformable_detr(detr):
    root, swin = detr
    config = configured(student__name="deformable-detr", student__backbone_weights=str(root / "swin")).student
    backbone = Detection.detector(config, 3, 3).net.model.backbone.model
    loaded = backbone.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in swin.state_dict().items())
    with pytest.raises(
        RunError, match=r"^student\.name, student\.backbone_weights: cannot make deformable-detr nowhere"
    ):
        wrong = configured(student__name="deformable-detr", student__backbone_weights="nowhere").student
        Detection.detector(wrong, 3, 3, empty=True)
    for name in ("swin", "nowhere"):
        with pytest.raises(RunError, match=f"cannot make .*{name}"):
            Detection.detector(configured(student__name=str(root / name)).student, 3, 3)


def test_one_step_of_the_recipe_at_full_size():
    pytest.importorskip("transformers", reason="needs the extra [detection]")
    config = setups.recipe("detection", "vkd-deformable-detr-coco")
    student, teacher = (Detection.detector(c, 80, 3) for c in (config.student, config.teacher))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (student, teacher.eval().requires_grad_(False))]
    assert sizes == pytest.approx([19.5e6, 101e6], rel=0.01)
    c = student.net.config
    assert (c.num_queries, c.d_model, c.encoder_layers, c.decoder_layers, c.dropout) == (100, 256, 6, 6, 0.1)
    assert c.encoder_attention_heads == c.decoder_attention_heads == 8 and c.with_box_refine
    assert (c.class_cost, c.bbox_cost, c.giou_cost) == (2, 5, 2)
    ones = {f"loss_{name}{layer}": torch.ones(()) for name in ("ce", "bbox", "giou") for layer in ("", "_0")}
    assert student.losses(ones) == {"classes": 2 * 2, "boxes": 2 * (5 + 2)}
    rates = [detector.net.config.backbone_config.drop_path_rate for detector in (student, teacher)]
    assert rates == [0.0, 0.3]
    model = DistilledDetector(student, config.distill, teacher.dims)
    batch = detr_batch(1, 480)
    with torch.no_grad():
        prediction = teacher.predict(batch["images"], batch["inside"])
    assert float(prediction.outputs.logits.sigmoid().mean()) < 0.05  # it begins sure of background
    losses = model({**batch, "teacher": prediction.features})
    losses["total"].backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert losses["total"].isfinite() and not missing


# ---- the documentation -----------------------------------------------------------------------------------------------


def test_detector_of_the_documentation(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "detection.md").read_text(), re.DOTALL)
    (tmp_path / "my_detectors.py").write_text(blocks[0])
    monkeypatch.syspath_prepend(tmp_path)
    words = ["distill", "my_detectors:OnTimm", "student.backbone=resnet10t", "teacher.backbone=resnet18"]
    words += ["--arms", "alone", "vkd", "--seeds", "1", "--jobs", "0", "--quiet", "--output", str(tmp_path / "run")]
    words += [*setups.TINY["detection"], "optim.steps=2"]
    assert cli.main(words) == 0
    monkeypatch.delitem(sys.modules, "my_detectors")
