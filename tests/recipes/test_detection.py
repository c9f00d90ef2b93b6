"""Detection: scenes, COCO's format, detectors, losses, average precision, the recipe."""

import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.ops import sigmoid_focal_loss

from tests.recipes import setups
from vkd_kernels import cli
from vkd_kernels.recipes import coco, detection, detectors, scenes
from vkd_kernels.recipes import config as configs
from vkd_kernels.recipes.config import OptionError
from vkd_kernels.recipes.detection import Detection, DistilledDetector
from vkd_kernels.recipes.runs import RunError

pytest.importorskip("pycocotools", reason="needs the extra [detection]")

ROOT = Path(__file__).parents[2]


configured = partial(setups.configured, "detection")
job = partial(setups.job, "detection")


@pytest.fixture(scope="module")
def composed():
    return scenes.composed(0, 30, 6)


@pytest.fixture(scope="module")
def written(tmp_path_factory, composed):
    """Bundled scenes as COCO folders: the options that name them."""
    root, options = tmp_path_factory.mktemp("coco"), {}
    for name, part in zip(("train", "val"), composed, strict=True):
        (root / name).mkdir()
        images = [{"id": n, "file_name": f"{n}.png"} for n in range(len(part))]
        objects = [
            {"image_id": n, "category_id": label, "bbox": box}
            for n, (image, boxes, labels) in enumerate(part)
            for box, label in zip(boxes, labels, strict=True)
        ]
        for n, (image, *_) in enumerate(part):
            Image.fromarray(image.numpy()).save(root / name / f"{n}.png")
        content = {"images": images, "annotations": objects}
        content["categories"] = [{"id": digit, "name": str(digit)} for digit in range(10)]
        (root / f"{name}.json").write_text(json.dumps(content))
        options |= {f"data__{name}": str(root / name), f"data__{name}_annotations": str(root / f"{name}.json")}
    return options


# ---- scenes and the bundled run --------------------------------------------------------------------------------------


def test_boxes_are_tight_inside_and_hardly_overlap(composed):
    for image, boxes, labels in composed[0]:
        assert 1 <= len(boxes) == len(labels) <= 4 and image.shape == (64, 64)
        for x, y, w, h in boxes:
            assert x >= 0 and y >= 0 and x + w <= 64 and y + h <= 64 and 4 <= max(w, h) <= 28
        pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
        assert all(scenes.overlap(a, b) <= scenes.OVERLAP for a, b in pairs)
    again = scenes.composed(0, 2, 1)
    assert torch.equal(again[0][1][0], composed[0][1][0]) and again[0][1][1:] == composed[0][1][1:]


def test_own_data_give_the_bundled_batches(written, tmp_path):
    small = {"scenes__train": 30, "scenes__val": 6, "data__labeled": 0, "optim__batch_size": 8, "distill__weight": 0}
    bundled, own = job(configured(**small), tmp_path), job(configured(**small, **written), tmp_path)
    workers = job(configured(**small, **written, run__workers=1, augment__flip=0.5), tmp_path)
    alone = job(configured(**small, **written, augment__flip=0.5), tmp_path)
    for one, two in ((bundled, own), (workers, alone)):
        streams = one.batches(1), two.batches(1)
        for _ in range(4):  # into the second epoch
            a, b = map(next, streams)
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- COCO's format ---------------------------------------------------------------------------------------------------

IMAGE = {"id": 7, "file_name": "a.png"}
BOX = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 10, 10]}


def opened(images=(IMAGE,), annotations=(BOX,), categories=({"id": 3, "name": "x"}, {"id": 1, "name": "y"})):
    data = {"images": [*images], "annotations": [*annotations], "categories": [*categories]}
    return coco.CocoImages(data, "f.json", lambda name: Image.new("L", (64, 48)), channels=1)


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
def test_annotations_that_contradict_themselves_are_errors(bad):
    with pytest.raises(RunError, match=r"f\.json is no annotation file in COCO's format: "):
        opened(**bad)


def test_boxes_are_cut_at_the_border_and_crowds_are_set_apart():
    bad = {**BOX, "bbox": [0, 0, -1, 3]}
    outside, crowd = {**BOX, "bbox": [60, 40, 10, 10]}, {**BOX, "category_id": 1, "iscrowd": 1}
    item = opened(annotations=[BOX, bad, outside, crowd])[0]
    assert item["boxes"].tolist() == [[1, 2, 11, 12], [60, 40, 64, 48], [1, 2, 11, 12]]
    assert item["labels"].tolist() == [1, 1, -1] and item["crowds"].tolist() == [-1, -1, 0]


def test_files_that_are_missing_are_named(written, tmp_path):
    with pytest.raises(OptionError, match=r"data\.train: there is no .*/no"):
        Detection.check(configured(**{**written, "data__train": str(tmp_path / "no")}))
    with pytest.raises(OptionError, match=r"data\.val: missing; own data need all of"):
        configured(data__train="x", data__train_annotations="y")
    with pytest.raises(RunError, match=r"data\.classes: the categories differ: 10 in .*data\.classes=3"):
        _ = job(configured(**written, data__classes=3), tmp_path).data


def test_augmented_boxes_stay_on_their_objects(monkeypatch):
    """A white rectangle on black, flipped, cropped and resized: its box stays on it."""
    torch.manual_seed(0)
    for name, value in (("CROP_SHORT_SIDES", (60, 80)), ("CROP_SIZES", (40, 60)), ("LONGEST", 120)):
        monkeypatch.setattr(coco, name, value)
    image = Image.new("L", (90, 60))
    image.paste(255, (30, 20, 60, 45))
    data = opened(annotations=[{**BOX, "bbox": [30, 20, 30, 25]}])
    data.open_image = lambda _: image.copy()
    transform, sizes = (
        coco.training_transform(
            configured(augment__flip=0.5, augment__crop=0.7, augment__short_sides="48,64,96").augment
        ),
        set(),
    )
    for _ in range(30):
        sample = transform(data[0])
        pixels = sample["image"][0]
        sizes.add(tuple(pixels.shape))
        assert len(sample["boxes"]) == len(sample["labels"]) == len(sample["crowds"])
        for x0, y0, x1, y1 in sample["boxes"].tolist():
            rows, columns = (pixels > 127).any(1).nonzero().flatten(), (pixels > 127).any(0).nonzero().flatten()
            assert abs(int(columns[0]) - x0) <= 2 and abs(int(columns[-1]) + 1 - x1) <= 2
            assert abs(int(rows[0]) - y0) <= 2 and abs(int(rows[-1]) + 1 - y1) <= 2
    assert len(sizes) > 3


# ---- detectors and losses --------------------------------------------------------------------------------------------


def test_a_location_answers_for_the_smallest_object_near_whose_center_it_is():
    points = torch.tensor([[10.0, 10.0], [30.0, 10.0], [50.0, 50.0]])
    boxes = torch.tensor([[[0.0, 0, 20, 20], [6, 6, 14, 14], [0, 0, 64, 64]]])
    assert detectors.assigned(points, boxes, torch.tensor([[1, 2, -1]])).tolist() == [[1, -1, -1]]


def batch_of(n=3, side=32, teacher_dim=7):
    torch.manual_seed(1)
    inside = torch.zeros(n, side, side, dtype=torch.bool)
    for i in range(n):
        inside[i, : side - 4 * i, : side - 8 * i] = True
    boxes = torch.tensor([[[2.0, 3, 14, 17], [8, 8, 12, 12]]]).repeat(n, 1, 1)
    labels = torch.tensor([[1, 0], [2, -1], [-1, -1]])[:n]
    images = torch.randn(n, 1, side, side) * inside[:, None]
    teacher = {"map": torch.randn(n, side // 4, side // 4, teacher_dim)}
    return {"images": images, "inside": inside, "boxes": boxes, "labels": labels, "teacher": teacher}


def test_detection_losses_are_the_formulas_and_padding_has_no_part():
    model, batch = detectors.FCOS((4,), 6, 3, 1).eval(), batch_of()
    prediction = model.predict(*(batch[name] for name in ("images", "inside", "boxes", "labels")))
    valid = coco.at_map(batch["inside"], 8, 8).flatten(1)
    index = detectors.assigned(detectors.locations(torch.zeros(1, 1, 8, 8)), batch["boxes"], batch["labels"])
    targets = torch.zeros(3, 64, 3)
    for n in range(3):
        for place in range(64):
            if index[n, place] >= 0 and valid[n, place]:
                targets[n, place, batch["labels"][n, index[n, place]]] = 1
    expected = (sigmoid_focal_loss(prediction.logits, targets) * valid[..., None]).sum()
    torch.testing.assert_close(prediction.losses["classes"], expected)
    assert int(prediction.objects) == int(targets.sum()) > 0


@pytest.mark.parametrize("projection", ["orthogonal", "linear", "identity"])
def test_feature_losses_are_the_formulas(projection):
    """Standardized on both sides over the compared locations; what is outside has no influence."""
    config = configured(distill__projection=projection, distill__where="image").distill
    model = DistilledDetector(detectors.FCOS((4,), 6, 3, 1).eval(), config, {"map": 7})
    batch = batch_of()
    losses = model(batch)
    prediction = model.student.predict(batch["images"], batch["inside"])
    rows = coco.at_map(batch["inside"], 8, 8)
    z = (prediction.features["map"][rows] @ model.feature_losses["map"].projection.weight.T).double()
    y = batch["teacher"]["map"][rows].double()
    z, y = ((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() for x in (z, y))
    expected = torch.nn.functional.smooth_l1_loss(z, y)
    torch.testing.assert_close(losses["features"].double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(losses["total"], losses["classes"] + losses["boxes"] + 4 * losses["features"])
    batch["teacher"]["map"][~rows] = 99.0
    torch.testing.assert_close(model(batch)["features"], losses["features"])


def test_compared_locations_are_those_inside_boxes():
    batch = batch_of(1)
    rows = detection.compared(batch, 8, 8, "boxes")
    assert rows[0].nonzero().min(0).values.tolist() == [1, 1] and rows[0].nonzero().max(0).values.tolist() == [3, 2]
    assert detection.compared(batch, 8, 8, "image").all()


def test_features_must_match():
    config = configured().distill
    with pytest.raises(OptionError, match=r"teacher\.name, student\.name: their features differ"):
        DistilledDetector(detectors.FCOS((4,), 6, 3, 1), config, {"other": 7})
    model, batch = DistilledDetector(detectors.FCOS((4,), 6, 3, 1), config, {"map": 7}), batch_of()
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
    training.data[1].objects = [x[:0] for x in training.data[1].objects]
    training.data[1].kept.clear()
    with pytest.raises(RunError, match="without any object there is no average precision"):
        training.evaluate(Perfect(nothing))


def test_detections_are_the_best_of_their_place_and_inside_the_image():
    model = detectors.FCOS((4,), 6, 2, 1)
    inside = torch.ones(1, 16, 16, dtype=torch.bool)
    inside[:, :, 12:] = False
    logits = torch.full((1, 16, 2), -9.0)
    logits[0, 5, 1], logits[0, 6, 1], logits[0, 0, 0] = 3.0, 2.0, 1.0  # the second is of the same object
    logits[0, 3, 0] = 4.0  # in the padding
    boxes = torch.tensor([[2.0, 2, 10, 10]]).repeat(1, 16, 1)
    boxes[0, 0] = torch.tensor([-4.0, 8, 20, 30])
    (detections,) = model.detections(detectors.Prediction(logits, boxes, {"map": torch.zeros(1, 4, 4, 6)}), inside)
    assert detections["labels"].tolist() == [1, 0]
    assert detections["boxes"].tolist() == [[2, 2, 10, 10], [0, 8, 12, 16]]


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
    batch = detr_batch()
    prediction = model.predict(*(batch[name] for name in ("images", "inside", "boxes", "labels")))
    assert {*prediction.features} == {"map0", "map1", "map2", "map3", "queries", "decoder"} == {*model.dims}
    assert prediction.features["decoder"].shape == (2, 2, 5, 64) and prediction.boxes.shape == (2, 5, 4)
    student = DistilledDetector(model, config.distill, model.dims)
    batch["teacher"] = {name: torch.randn_like(x) for name, x in prediction.features.items()}
    for labels in (batch["labels"], torch.full_like(batch["labels"], -1)):
        losses = student({**batch, "labels": labels})
        assert all(loss.isfinite() for loss in losses.values()) and len(losses) == 4 + 6
        losses["total"].backward()
    for detections in model.detections(prediction, batch["inside"]):
        assert (detections["boxes"] >= 0).all() and len(detections["labels"]) == len(detections["scores"])
    assert Detection.detector(config.student, 4, 3).classes == 4  # with a new class head


def test_weights_of_a_backbone_and_what_is_no_deformable_detr(detr):
    root, swin = detr
    config = configured(student__name="deformable-detr", student__backbone_weights=str(root / "swin")).student
    backbone = Detection.detector(config, 3, 3).net.model.backbone.model
    loaded = backbone.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in swin.state_dict().items())
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
    model = DistilledDetector(student, config.distill, teacher.dims)
    batch = detr_batch(1, 480)
    with torch.no_grad():
        prediction = teacher.predict(batch["images"], batch["inside"])
    assert float(prediction.logits.sigmoid().mean()) < 0.05  # it begins sure of background
    losses = model({**batch, "teacher": prediction.features})
    losses["total"].backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert losses["total"].isfinite() and not missing


# ---- the documentation -----------------------------------------------------------------------------------------------


def test_detector_of_the_documentation(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "detection.md").read_text(), re.DOTALL)
    (tmp_path / "my_detectors.py").write_text(blocks[0])
    monkeypatch.syspath_prepend(tmp_path)
    words = ["distill", "my_detectors:OnTimm", "student.backbone=resnet10t", "--arms", "alone", "--seeds", "1"]
    words += ["--jobs", "0", "--quiet", "--output", str(tmp_path / "run"), *setups.TINY["detection"], "optim.steps=2"]
    assert cli.main(words) == 0
    monkeypatch.delitem(sys.modules, "my_detectors")
