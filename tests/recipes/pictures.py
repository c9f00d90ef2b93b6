"""Configurations and small folders of images for the tests of classification."""

import itertools

import torch
from PIL import Image

from vkd_kernels.recipes import classification, engine, images, task, tasks
from vkd_kernels.recipes import config as configs
from vkd_kernels.recipes.classification import Classification


def configured(**values):
    return configs.replace(classification.Config(), {name.replace("__", "."): v for name, v in values.items()})


def recipe(name, **values):
    given, _ = tasks.read_recipe(Classification, name)
    given = {key: value for key, value in given.items() if "." in key}  # without the head
    return configured(**{**given, **{key.replace("__", "."): value for key, value in values.items()}})


def job(config, folder, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    return Classification(config, task.Context(engine.make_fabric(config.run, config.optim), folder, seed, folder))


def take(data, learner, start, count, rank=0, ranks=1):
    return list(itertools.islice(data.batches(learner, start, 8, rank, ranks), count))


def same(first, second):
    return all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x[:2], y[:2], strict=True))


def picture(path, seed, size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


def of_folder(root, **values):
    return configured(**{"data__name": "folder", "data__root": str(root), "data__size": 32, **values})


def image_data(root, seed=0, **values):
    return images.Images(of_folder(root, **values), seed)
