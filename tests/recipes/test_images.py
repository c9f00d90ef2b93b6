"""Real images: batches, fixed views, few labels, evaluation, what cannot be read, data sets of torchvision."""

import contextlib
import struct
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout
from PIL import Image

from tests.recipes import setups
from tests.recipes.setups import image_data, picture, recipe, same, take
from vkd_kernels.recipes import digits, images
from vkd_kernels.recipes.config import OptionError
from vkd_kernels.recipes.runs import RunError


def test_image_batches_depend_on_seed_and_step_alone(folder):
    whole = take(image_data(folder), "distilled", 0, 3)
    assert whole[0][0].shape == (8, 3, 32, 32) and whole[0][2] is None
    assert same(take(image_data(folder, run__workers=2), "distilled", 0, 3), whole)
    assert same(take(image_data(folder), "distilled", 2, 1), whole[2:])
    assert not same(take(image_data(folder, seed=1), "distilled", 0, 1), whole[:1])
    assert not same(take(image_data(folder, augment__mixup=0.8), "distilled", 0, 1), whole[:1])
    for rank in (0, 1):
        part = take(image_data(folder), "distilled", 0, 3, rank, 2)
        assert same(part, [(x[rank::2], t[rank::2]) for x, t, _ in whole])


def test_downloads_of_several_processes_come_one_after_another(tmp_path, monkeypatch):
    """The first one fetches; whoever comes later finds the files, and waits until they are whole."""
    held = []

    class Fetched(list):
        classes = ("a", "b")

        def __init__(self, root, *, train, download):
            other = FileLock(Path(root) / ".download.lock", timeout=0)
            with contextlib.suppress(Timeout), other:
                held.append(False)
            held.append(True)

    monkeypatch.setattr(images.torchvision.datasets, "Fetched", Fetched, raising=False)
    source = images.Source(name="Fetched", root=str(tmp_path / "new"), download=True)
    assert images.open_images(source, 0)[2] == 2 and held == [True, True]


def test_fixed_views_are_the_images_of_the_batches(folder):
    data = image_data(folder, augment__views=3)
    everything = data.every_view()
    assert len(everything) == 12 * 3
    batches = take(data, "distilled", 0, 4)
    assert all(torch.equal(everything[int(row)], x) for xs, _, rows in batches for x, row in zip(xs, rows, strict=True))
    assert len({int(row) // 12 for _, _, rows in batches for row in rows}) == 3


def test_a_share_of_the_labels(folder):
    data = image_data(folder, data__labels=1 / 3, augment__views=2, augment__pad=2)
    assert len(data.labeled) == 4 and [data.opened[0].targets[i] for i in data.labeled] == [0, 0, 1, 1]
    (x, targets, rows), (alone, labels, _) = take(data, "distilled", 3, 1)[0], take(data, "alone", 3, 1)[0]
    torch.testing.assert_close(targets.sum(1), torch.tensor([1.0] * 4 + [0.0] * 4))
    assert torch.equal(alone, x[:4]) and torch.equal(labels, targets[:4])
    assert torch.isin(rows[:4] % 12, data.labeled).all() and not torch.isin(rows[4:] % 12, data.labeled).any()
    assert take(data, "teacher", 0, 1)[0][1].sum() == pytest.approx(8)
    with pytest.raises(OptionError, match=r"augment\.mixup.*0 with .* data\.labels below 1"):
        image_data(folder, data__labels=0.5, augment__mixup=0.8)


def test_digits_are_split_by_the_seed_and_have_fixed_views_and_few_labels():
    config = setups.configured("classification", digits__views=3)
    data = images.Images(config, 3)
    train, test, _ = data.opened
    assert len(train) == 1000 and len(test) == 797 and 95 <= len(data.labeled) <= 105
    pixels = [part.pixels.flatten(1).unique(dim=0) for part in (train, test, images.Images(config, 4).opened[0])]
    assert len(torch.cat(pixels[:2]).unique(dim=0)) == len(pixels[0]) + len(pixels[1])
    assert len(torch.cat(pixels[::2]).unique(dim=0)) > 1000, "another seed has another split"
    everything = data.every_view()
    (x, targets, rows), (alone, labels, _) = take(data, "distilled", 5, 1)[0], take(data, "alone", 5, 1)[0]
    assert all(torch.equal(everything[int(row)], image) for row, image in zip(rows, x, strict=True))
    assert torch.equal(alone, x[:4]) and torch.equal(labels, targets[:4])
    torch.testing.assert_close(targets.sum(1), torch.tensor([1.0] * 4 + [0.0] * 4))
    pictures, truth = next(data.held_out(0, 1))
    assert truth.tolist() == test.targets[: len(truth)]
    torch.testing.assert_close(pictures[0] * digits.STD + digits.MEAN, test.pixels[0])


def test_labels_of_data_sets_that_call_them_otherwise(folder):
    class Other(list):
        pass

    pairs = [(None, 2), (None, 0)]
    other = Other(pairs)
    assert images.labels_of(other).tolist() == [2, 0]
    other.labels = torch.tensor([1, 1]).numpy()  # as SVHN has them
    assert images.labels_of(other).tolist() == [1, 1]


def test_too_few_classes_for_the_labels_are_refused(monkeypatch):
    class Nameless(list):
        targets = (0, 4, 2)

        def __init__(self, root, *, train, download):
            pass

    monkeypatch.setattr(images.torchvision.datasets, "Nameless", Nameless, raising=False)
    assert images.open_images(images.Source(name="Nameless", classes=5), 0)[2] == 5
    with pytest.raises(OptionError, match=r"^data\.classes: 3, but there are labels up to 4; give 5"):
        images.open_images(images.Source(name="Nameless", classes=3), 0)


def test_evaluation_sees_the_center(folder):
    data = image_data(folder, data__size=28, data__crop=0.7, data__mean="0,0,0", data__std="1,1,1")
    ((pictures, labels),) = data.held_out(0, 1)
    source = Image.open(sorted((folder / "val" / "class-0").iterdir())[0])
    expected = source.resize((40, 44), Image.Resampling.BICUBIC).crop((6, 8, 34, 36))
    truth = torch.frombuffer(bytearray(expected.tobytes()), dtype=torch.uint8).view(28, 28, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(pictures[0], truth)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_an_image_that_cannot_be_read_is_named(folder):
    """A damaged file, and a text."""
    first, *_ = sorted((folder / "train" / "class-0").iterdir())
    first.write_bytes(first.read_bytes()[:200])
    with pytest.raises(RunError, match=f"cannot read {first}"):
        _ = image_data(folder, augment__views=1).every_view()[0]
    (folder / "val" / "class-1" / "1.png").write_text("no image")
    with pytest.raises(RunError, match=r"cannot read .*1\.png"):
        list(image_data(folder).held_out(0, 1))


def test_what_is_wrong_with_folders_is_named(folder):
    with pytest.raises(OptionError, match=r"optim\.batch_size: 13, but there are only 12 training images"):
        next(image_data(folder).batches("alone", 0, 13, 0, 1))
    with pytest.raises(RunError, match=r"data\.root=.*nowhere data\.name=folder: .*No such file"):
        _ = image_data(folder / "nowhere").images
    with pytest.raises(RunError, match=r"data\.classes is 3, but .* has 2 classes"):
        _ = image_data(folder, data__classes=3).images
    picture(folder / "train" / "other" / "0.png", 0)
    with pytest.raises(RunError, match="only in one of train and val: other"):
        _ = image_data(folder).images


def test_torchvision_by_name(tmp_path):
    for name, count in (("train", 5), ("t10k", 3)):
        raw = tmp_path / "FashionMNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        pixels = bytes(i % 251 for i in range(count * 28 * 28))
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(range(count)))
    data = images.Images(recipe("classification", "fashion-mnist", data__root=str(tmp_path)), 0)
    assert data.classes == 10 and data.images == 5 and len(data.every_view()) == 10
    ((pictures, labels),) = data.held_out(0, 1)
    assert pictures.shape == (3, 1, 28, 28) and labels.tolist() == [0, 1, 2]
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"data\.root=.*empty data\.name=MNIST: .*data\.download=true fetches it"):
        _ = image_data(tmp_path / "empty", data__name="MNIST").images
    with pytest.raises(OptionError, match=r"data\.name: there is no 'CIFAR1000' .*; did you mean 'CIFAR100'"):
        _ = image_data(tmp_path, data__name="CIFAR1000").images
