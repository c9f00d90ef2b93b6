"""The built-in tasks, small: configurations, trainings, folders of images."""

import itertools

import pytest
import torch
from PIL import Image

from vkd_kernels.recipes import config as configs
from vkd_kernels.recipes import engine, images, task, tasks

RUN = ["run.save_every=3", "run.eval_every=3"]
TINY = {
    "classification": ["optim.steps=6", "teacher.steps=6", "digits.views=2", "teacher.widths=8,16", "student.width=16"],
    "detection": ["scenes.train=40", "scenes.val=8", "data.labeled=32", "teacher.steps=3", "teacher.batch_size=8"],
    "generation": ["teacher.steps=4", "teacher.widths=4,4,8", "student.width=8"],
}
TINY["classification"] += ["student.depth=1", *RUN]
TINY["detection"] += ["optim.steps=6", "optim.batch_size=8", *RUN]
TINY["generation"] += ["optim.steps=6", "optim.batch_size=8", "metric.samples=60", *RUN]


def load(name):
    if name == "detection":
        pytest.importorskip("pycocotools", reason="needs the extra [detection]")
    return tasks.load(name)


def configured(name, *words, **values):
    typed = dict(word.split("=", 1) for word in words) | {k.replace("__", "."): v for k, v in values.items()}
    return configs.replace(load(name).Config(), typed)


def recipe(name, recipe_name, **values):
    given = tasks.read_recipe(load(name), recipe_name)
    given = {key.replace(".", "__"): value for key, value in given.items() if "." in key}  # without the head
    return configured(name, **given | values)


def job(name, config, folder, *, teacher=None):
    folder.mkdir(parents=True, exist_ok=True)
    context = task.Context(engine.make_fabric(config.run, config.optim), folder, 0, teacher or folder)
    return load(name)(config, context)


def take(data, learner, start, count, rank=0, ranks=1):
    return list(itertools.islice(data.batches(learner, start, 8, rank, ranks), count))


def same(first, second):
    return all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x[:2], y[:2], strict=True))


def picture(path, seed, size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


def of_folder(root, **values):
    own = {"data__name": "folder", "data__root": str(root), "data__size": 32}
    return configured("classification", **own | values)


def image_data(root, seed=0, **values):
    return images.Images(of_folder(root, **values), seed)
