"""FixedViews, and a FeatureStore of several views of every image."""

import random

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, StackDataset

from tests.helpers.stored_teachers import SAMPLES, Images, Teacher, build, live_tokens
from vkd_kernels.store import FixedViews
from vkd_kernels.store.build import largest_difference


def test_data_of_another_view_at_every_visit_are_refused(tmp_path):
    data = Images(transform=lambda image: image + torch.rand(()))
    with pytest.raises(ValueError, match=r"another view of a sample at every visit.*FixedViews"):
        build(tmp_path, data=data)
    assert [*tmp_path.iterdir()] == []


def test_data_that_change_at_few_of_their_visits_are_refused(tmp_path):
    """A transform that does something one time in five: at one second visit of three samples it may do nothing."""
    draw = random.Random(0)
    data = Images(transform=lambda image: -image if draw.random() < 0.2 else image)
    for folder in "abcdefgh":
        with pytest.raises(ValueError, match="another view of a sample at every visit"):
            build(tmp_path / folder, data=data)


class Draws(nn.Module):
    """Dropout that does not know of eval mode."""

    def forward(self, images):
        return nn.functional.dropout(images, 0.5)


def test_a_teacher_that_draws_in_eval_mode_is_refused(tmp_path):
    teacher = nn.Sequential(Draws(), Teacher())
    with pytest.raises(ValueError, match="teacher gives other features of the same input at every call, in eval mode"):
        build(tmp_path, teacher, taps=[{"teacher": "1.2", "teacher_pool": "tokens"}])
    assert [*tmp_path.iterdir()] == []


class InPlace(nn.Module):
    def forward(self, images):
        return images.sub_(0.5).div_(2)


def test_a_teacher_may_change_its_own_batch(tmp_path):
    taps = [{"teacher": "1.2", "teacher_pool": "tokens"}]
    store = build(tmp_path, nn.Sequential(InPlace(), Teacher()), taps=taps)
    build(tmp_path, nn.Sequential(InPlace(), Teacher()), taps=taps)  # opens it
    expected = live_tokens(Teacher(), (Images().images[:3] - 0.5) / 2)
    assert torch.allclose(store[:3]["1.2"].float(), expected, atol=1e-2)


def test_a_mask_that_leaves_nothing_of_a_sample_is_refused(tmp_path):
    masks = torch.ones(SAMPLES, 5, dtype=torch.bool)
    masks[2] = False
    data = StackDataset(images=Images(), masks=masks)
    options = {"teacher_input": lambda batch: batch["images"][0], "mask": lambda batch: batch["masks"]}
    with pytest.raises(ValueError, match=r"mask leaves no position of sample 2, so that its mean in '2' would"):
        build(tmp_path / "a", data=data, taps=[{"teacher": "2", "teacher_pool": "mean_tokens"}], **options)
    build(tmp_path / "b", data=data, taps=[{"teacher": "2", "teacher_pool": "tokens"}], **options)


def test_views_by_any_index(tmp_path):
    views = FixedViews(Images(), lambda image: image + torch.rand(()), views=2)
    for index in (torch.tensor(3), numpy.int64(3)):
        assert torch.equal(views[index][0], views[3][0])
    with pytest.raises(ValueError, match="seed must be at least 0; got -1"):
        FixedViews(Images(), torch.abs, views=2, seed=-1)
    with pytest.raises(ValueError, match="num_workers must be an int of at least 0; got -1"):
        build(tmp_path, num_workers=-1)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("entry", [float("nan"), -float("inf"), float("inf")])
def test_views_beside_entries_that_are_not_finite_are_compared(tmp_path, entry):
    """Such as -Inf of an additive mask: the same entries everywhere, another view beside them."""

    def augment(image):
        return torch.cat([image + torch.rand(()), torch.full((5, 1), entry)], 1)

    options = {"teacher_input": lambda batch: batch[0]}
    teacher = nn.Sequential(Columns(), Teacher())
    taps = [{"teacher": "1.2", "teacher_pool": "tokens"}]
    with pytest.raises(ValueError, match="another view of a sample at every visit"):
        build(tmp_path / "a", teacher, Images(transform=augment), taps, **options)
    build(tmp_path / "b", teacher, FixedViews(Images(), augment, views=1), taps, **options)
    build(tmp_path / "b", teacher, FixedViews(Images(), augment, views=1), taps, **options)


class Columns(nn.Module):
    """The first four columns of its input: the image without what stands beside it."""

    def forward(self, x):
        return x[..., :4]


def test_the_difference_where_entries_are_not_finite():
    nan, inf = float("nan"), float("inf")
    for now, then, expected in [
        ([nan, 1.0], [nan, 1.0], 0.0),
        ([nan, 3.0], [nan, 2.0], 0.5),
        ([-inf, 3.0], [-inf, 2.0], 0.5),
        ([inf, 1.0], [-inf, 1.0], inf),
        ([nan, 1.0], [1.0, 1.0], inf),
        ([1.0, 1.0], [1.0, nan], inf),
        ([1.0, 1.0], [inf, 1.0], inf),
    ]:
        assert largest_difference([torch.tensor(now)], [torch.tensor(then)]) == expected


class OfArrays(nn.Module):
    """A teacher that is given a list of arrays, as one with a processor inside is."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, arrays, mask=None):
        return self.linear(torch.from_numpy(numpy.stack(arrays)))


@pytest.mark.parametrize("beside", [{}, {"mask": torch.ones(3)}])
def test_views_that_are_no_tensors_are_compared_by_their_features(tmp_path, beside):
    def loader(augment):
        arrays = [image.numpy() for image in Images().images]
        return DataLoader(Augmented(arrays, augment), 8, collate_fn=list)

    taps = [{"teacher": "linear", "teacher_pool": "tokens"}]
    options = {"taps": taps, "teacher_input": lambda arrays: {"arrays": arrays, **beside}}
    with pytest.raises(ValueError, match="another view of a sample at every visit"):
        build(tmp_path / "a", OfArrays(), loader(lambda x: x + numpy.random.rand(4).astype("float32")), **options)
    store = build(tmp_path / "b", OfArrays(), loader(lambda x: x), **options)
    assert len(store) == SAMPLES


class Augmented(Dataset):
    """What the function makes of the images, at every visit anew."""

    def __init__(self, images, augment):
        self.images, self.augment = images, augment

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.augment(self.images[index])


def test_fixed_views_are_the_same_at_every_visit_and_in_workers(tmp_path):
    def augment(image):
        return image + torch.rand(()) + numpy.random.rand()

    views = FixedViews(Images(), augment, views=3)
    teacher = Teacher()
    states = torch.get_rng_state(), numpy.random.get_state()[1]
    store = build(tmp_path, teacher, views, dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), states[0]) and numpy.array_equal(numpy.random.get_state()[1], states[1])
    assert len(store) == 3 * SAMPLES
    for (image, label, index), features in DataLoader(StackDataset(views, store), 16, shuffle=True, num_workers=2):
        assert torch.equal(label, index % 3)
        assert torch.allclose(features["2"], live_tokens(teacher, image.float()), atol=1e-5)
    assert not torch.equal(views[4][0], views[4 + SAMPLES][0])
    assert not torch.equal(views[4][0], FixedViews(Images(), augment, views=3, seed=1)[4][0])


def test_fixed_views_go_through_all_images_view_by_view():
    views = FixedViews(torch.arange(10.0), lambda image: image, views=3)
    assert [int(views[item]) for item in range(30)] == [*range(10)] * 3


def test_fixed_views_leave_pythons_generator_as_it_was():
    views = FixedViews(torch.zeros(4), lambda image: image + random.random(), views=2)
    state = random.getstate()
    assert views[5] == views[5] and views[5] != views[1]
    assert random.getstate() == state


def test_fixed_views_of_another_seed_are_other_data(tmp_path):
    def views(seed):
        return FixedViews(Images().images, lambda image: image + 1e-3 * torch.rand(()), views=2, seed=seed)

    build(tmp_path, data=views(0))
    build(tmp_path, data=views(0))
    with pytest.raises(ValueError, match=r"transform: .* views of seed 0 there, .* views of seed 1 now"):
        build(tmp_path, data=views(1))


def test_fixed_views_leave_the_generators_of_gpus_alone(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    views = FixedViews(torch.zeros(4, 3), lambda image: image + torch.rand(3), views=2)
    assert torch.equal(views[5], views[5]) and not torch.equal(views[1], views[5])
    assert seeds == []
