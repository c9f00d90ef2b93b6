"""FixedViews, and a FeatureStore of several views of every image."""

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, StackDataset

from tests.helpers.stored_teachers import SAMPLES, Images, Teacher, build, live_tokens
from vkd_kernels.store import FixedViews


def test_data_of_another_view_at_every_visit_are_refused(tmp_path):
    data = Images(transform=lambda image: image + torch.rand(()))
    with pytest.raises(ValueError, match=r"another view of a sample at every visit.*FixedViews"):
        build(tmp_path, data=data)
    assert [*tmp_path.iterdir()] == []


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
