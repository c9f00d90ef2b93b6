"""FeatureDistiller with a FeatureStore in the teacher's place."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, StackDataset, TensorDataset

import vkd_kernels as vk
from tests.helpers.distillers import CNN, ViT

SAMPLES, BATCH = 24, 8
PAIRS = [
    {
        "student": "norm",
        "teacher": "relu",
        "student_pool": "mean_tokens",
        "student_skip": 1,
        "teacher_pool": "spatial_mean",
    },
    {
        "student": "blocks.0",
        "teacher": "conv",
        "student_pool": "tokens",
        "student_skip": 1,
        "teacher_pool": "spatial",
        "resample": "teacher",
        "weight": 0.5,
    },
    {
        "student": "norm",
        "teacher": "conv",
        "student_pool": "class_token",
        "teacher_pool": lambda x: x.amax((2, 3)),
        "name": "largest",
    },
]
VIT_PAIRS = [
    {"student": "relu", "teacher": "norm", "student_pool": "spatial", "teacher_pool": "tokens", "teacher_skip": 2},
    {
        "student": "relu",
        "teacher": "norm",
        "student_pool": "spatial_mean",
        "teacher_pool": "class_token",
        "name": "class",
    },
]
OUTPUT = [{"teacher": ""}]


@pytest.fixture
def images():
    return torch.randn(SAMPLES, 3, 8, 8)


def trained_teacher(teacher, images):
    """With running statistics that are not those of the start."""
    with torch.no_grad():
        teacher(3 * images + 1)
    return teacher.eval()


def pair_of_distillers(folder, images, pairs, student, teacher, dtype=torch.float32, **options):
    store = vk.FeatureStore.build(
        folder, teacher, images, [*pairs, *OUTPUT], dtype=dtype, batch_size=5, shard_samples=7, progress=False
    )
    example = {"example_input": images[:2], **options}
    live = vk.FeatureDistiller(copy.deepcopy(student), teacher, pairs, **example)
    stored = vk.FeatureDistiller(copy.deepcopy(student), store, pairs, **example)
    stored.load_state_dict(live.state_dict())
    return live, stored


def losses_and_gradients(distiller, *args, **kwargs):
    distiller.zero_grad()
    _, losses = distiller(*args, **kwargs)
    losses["total"].backward()
    return losses, {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["a ViT from a CNN", "a CNN from a ViT"])
@pytest.mark.parametrize("masked", [False, True])
def test_stored_features_teach_as_the_teacher_does(tmp_path, images, architecture, masked):
    if architecture == "a ViT from a CNN":
        pairs, student, teacher = PAIRS, ViT(), trained_teacher(CNN(stride=1), images)
        masks = {"blocks.0->conv": (None, torch.rand(BATCH, 8, 8) < 0.7), "largest": torch.rand(BATCH) < 0.7}
    else:
        pairs, student, teacher = VIT_PAIRS, CNN(), ViT(width=12, prefix=2)
        masks = {"relu->norm": (None, torch.rand(BATCH, 18) < 0.7), "class": (None, torch.rand(BATCH, 18) < 0.7)}
    live, stored = pair_of_distillers(tmp_path, images, pairs, student, teacher, logit_weight=0.7)
    indices = torch.randint(SAMPLES, (BATCH,))
    options = {"masks": {**masks, "logits": torch.rand(BATCH) < 0.7}} if masked else {}
    expected = losses_and_gradients(live, images[indices], **options)
    for given in ({"indices": indices}, {"indices": indices.tolist()}, {"teacher_input": stored.teacher[indices]}):
        for side, of_live in zip(
            losses_and_gradients(stored, images[indices], **given, **options), expected, strict=True
        ):
            assert side.keys() == of_live.keys()
            for name, value in of_live.items():
                torch.testing.assert_close(side[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_16_bit(tmp_path, images, dtype, autocast):
    teacher = trained_teacher(CNN(stride=1), images)
    live, stored = pair_of_distillers(tmp_path, images, PAIRS, ViT(), teacher, dtype=dtype, logit_weight=1.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, expected = live(images)
        _, losses = stored(images, indices=range(SAMPLES))
    for name, value in expected.items():
        # Rounded targets move a loss of about 1 by about their rounding; autocast rounds the live teacher's, too.
        tolerance = 20 * torch.finfo(torch.bfloat16 if autocast else dtype).eps
        torch.testing.assert_close(losses[name], value, rtol=tolerance, atol=tolerance)


def loop(distiller, optimizer, loader, way):
    distiller.train()
    losses = []
    for (batch, index), features in loader:
        _, step = distiller(batch, **({"indices": index} if way == "indices" else {"teacher_input": features}))
        optimizer.zero_grad()
        step["total"].backward()
        optimizer.step()
        losses.append(step["total"].item())
    return losses


def loader_of(images, store, seed, workers=0):
    data = StackDataset(TensorDataset(images, torch.arange(SAMPLES)), store)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, BATCH, shuffle=True, num_workers=workers, generator=generator)


@pytest.mark.parametrize("way", ["indices", "features from workers"])
def test_training_comes_down_and_resumes_bit_for_bit(tmp_path, images, way):
    _, distiller = pair_of_distillers(tmp_path, images, PAIRS, ViT(), trained_teacher(CNN(stride=1), images))
    other = copy.deepcopy(distiller)
    workers = 2 if way == "features from workers" else 0
    optimizer = torch.optim.AdamW(distiller.parameter_groups(weight_decay=0.05), lr=3e-3)
    first = [
        loop(distiller, optimizer, loader_of(images, distiller.teacher, epoch, workers), way) for epoch in range(3)
    ]
    saved = pickle.dumps({"distiller": distiller.state_dict(), "optimizer": optimizer.state_dict()})
    assert not any("teacher" in name or "store" in name for name in distiller.state_dict())
    after = [
        loop(distiller, optimizer, loader_of(images, distiller.teacher, epoch, workers), way) for epoch in range(3, 12)
    ]
    assert sum(after[-1]) < 0.8 * sum(first[0])

    state = pickle.loads(saved)
    other.load_state_dict(state["distiller"])
    optimizer = torch.optim.AdamW(other.parameter_groups(weight_decay=0.05), lr=3e-3)
    optimizer.load_state_dict(state["optimizer"])
    store = vk.FeatureStore(tmp_path)
    again = [loop(other, optimizer, loader_of(images, store, epoch, workers), way) for epoch in range(3, 12)]
    assert again == after


def test_evaluation_leaves_everything_as_it_is(tmp_path, images):
    _, distiller = pair_of_distillers(tmp_path, images, VIT_PAIRS, CNN(), ViT(width=12, prefix=2))
    distiller.eval()
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    with torch.no_grad():
        output, losses = distiller(images[[3, 1]], indices=[3, 1])
    assert torch.equal(output, distiller.student(images[[3, 1]])) and losses["total"] > 0
    assert all(torch.equal(value, before[name]) for name, value in distiller.state_dict().items())


def test_copies_and_pickles(tmp_path, images):
    _, distiller = pair_of_distillers(tmp_path, images, VIT_PAIRS, CNN(), ViT(width=12, prefix=2))
    expected = distiller(images, indices=range(SAMPLES))[1]["total"]
    for other in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller)), distiller.to("cpu").float()):
        assert torch.allclose(other(images, indices=range(SAMPLES))[1]["total"], expected, rtol=1e-4)


def test_compiled(tmp_path, images):
    _, distiller = pair_of_distillers(tmp_path, images, VIT_PAIRS, CNN(), ViT(width=12, prefix=2))
    distiller.eval()
    indices = torch.tensor([5, 0, 5])
    expected = distiller(images[indices], indices=indices)[1]["total"]
    compiled = torch.compile(distiller, backend="eager")
    assert torch.allclose(compiled(images[indices], indices=indices)[1]["total"], expected)
    with distiller:  # one graph, with features that a worker has read
        whole = torch.compile(distiller, backend="eager", fullgraph=True)
        features = distiller.teacher[indices]
        assert torch.allclose(whole(images[indices], teacher_input=features)[1]["total"], expected)


def test_what_a_user_got_wrong_is_said(tmp_path, images):
    teacher = ViT(width=12, prefix=2)
    live, distiller = pair_of_distillers(tmp_path / "a", images, VIT_PAIRS, CNN(), teacher)
    store = distiller.teacher
    with pytest.raises(TypeError, match=r"forward needs indices=.*got neither"):
        distiller(images)
    with pytest.raises(TypeError, match="got both"):
        distiller(images, indices=range(SAMPLES), teacher_input=store[:])
    with pytest.raises(TypeError, match=r"features by name, as store\[indices\] gives them"):
        distiller(images, teacher_input=images)
    with pytest.raises(TypeError, match="indices are for stored features"):
        live(images, indices=range(SAMPLES))
    with pytest.raises(ValueError, match="must have the same positions"):
        distiller(images, indices=range(SAMPLES - 1))
    with pytest.raises(IndexError, match=f"index {SAMPLES} is not in the store"):
        distiller(images[:1], indices=[SAMPLES])
    unknown = [{"student": "relu", "teacher": "blocks.1", "student_pool": "spatial", "teacher_pool": "tokens"}]
    with pytest.raises(ValueError, match=r"no features of teacher module 'blocks.1'.*it has 'norm' with"):
        vk.FeatureDistiller(CNN(), store, unknown, example_input=images)
    without = vk.FeatureStore.build(tmp_path / "b", teacher, images, VIT_PAIRS, progress=False)
    for example in ([], {"scale": 2.0}, torch.zeros(())):
        with pytest.raises(ValueError, match=r"example_input must hold a batch in tensors; .*dims=\(S, T\)"):
            vk.FeatureDistiller(CNN(), store, VIT_PAIRS, example_input=example)
    distiller = vk.FeatureDistiller(CNN(), without, VIT_PAIRS, example_input=images, logit_weight=1.0)
    with pytest.raises(ValueError, match=r"no outputs of the teacher, which logit_weight needs"):
        distiller(images, indices=range(SAMPLES))
    live, stored = pair_of_distillers(tmp_path / "c", images, PAIRS, ViT(), trained_teacher(CNN(stride=1), images))
    with pytest.raises(
        ValueError, match=r"means were taken when the store was built.*Give mask= to FeatureStore.build"
    ):
        stored(
            images, indices=range(SAMPLES), masks={"norm->relu": (None, torch.ones(SAMPLES, 8, 8, dtype=torch.bool))}
        )


@pytest.mark.parametrize("mask", [torch.tensor(True), torch.ones(SAMPLES + 1), torch.ones(SAMPLES + 1, 18)])
def test_a_mask_of_other_samples_is_named(tmp_path, images, mask):
    _, distiller = pair_of_distillers(tmp_path, images, VIT_PAIRS, CNN(), ViT(width=12, prefix=2))
    for name in ("relu->norm", "class"):
        expected = rf"masks\['{name}'\] must have the shape \({SAMPLES},\) or that of the teacher's positions"
        with pytest.raises(ValueError, match=expected):
            distiller(images, indices=range(SAMPLES), masks={name: (None, mask)})


@pytest.mark.parametrize("stored", [("a", "b"), ("b",)])
def test_several_teachers_of_which_some_are_stored(tmp_path, images, stored):
    teachers = {"a": trained_teacher(CNN(), images), "b": ViT(width=12, prefix=2)}
    of_a = {"student": "norm", "teacher": "conv", "student_pool": "class_token", "teacher_pool": "spatial_mean"}
    of_b = {"student": "norm", "teacher": "norm", "student_pool": "mean_tokens", "teacher_pool": "class_token"}
    sources = dict(teachers)
    for name, pair in (("a", of_a), ("b", of_b)):
        if name in stored:
            options = {"dtype": torch.float32, "progress": False}
            taps = [pair, *OUTPUT]
            sources[name] = vk.FeatureStore.build(tmp_path / name, teachers[name], images, taps, **options)
    pairs = [{**of_a, "teacher": "a:conv"}, {**of_b, "teacher": "b:norm"}]
    student = ViT()
    live = vk.FeatureDistiller(
        copy.deepcopy(student), teachers, pairs, example_input=images, logit_weight={"a": 0.5, "b": 0.2}
    )
    mixed = vk.FeatureDistiller(
        copy.deepcopy(student), sources, pairs, example_input=images, logit_weight={"a": 0.5, "b": 0.2}
    )
    mixed.load_state_dict(live.state_dict())
    expected = losses_and_gradients(live, images[[4, 1]])
    inputs = {name: source[[4, 1]] for name, source in sources.items() if name in stored}
    for given in ({"indices": [4, 1]}, {"teacher_input": inputs}):
        for side, of_live in zip(losses_and_gradients(mixed, images[[4, 1]], **given), expected, strict=True):
            assert side.keys() == of_live.keys()
            for name, value in of_live.items():
                torch.testing.assert_close(side[name], value, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="teacher_input must map 'a', 'b' to inputs or features"):
        mixed(images, teacher_input=images)
    with pytest.raises(TypeError, match=r"indices=.*, or teacher_input\['[ab]'\].*got neither"):
        mixed(images[[4, 1]])
    with pytest.raises(TypeError, match="teacher_input has those of every store"):
        mixed(images[[4, 1]], indices=[4, 1], teacher_input=inputs)
    for given in (None, {name: source[:2] for name, source in sources.items() if name in stored}):
        vk.FeatureDistiller(student, sources, pairs, example_input=images[:2], example_teacher_input=given)


def test_a_live_teacher_beside_a_stored_one_is_not_given_what_the_student_changed(tmp_path):
    class ChangesItsInput(nn.Linear):
        def forward(self, batch):
            return super().forward(batch.mul_(0.5))

    live, data = nn.Linear(4, 3), torch.randn(SAMPLES, 4)
    store = vk.FeatureStore.build(tmp_path, nn.Linear(4, 3), data, OUTPUT, progress=False)
    weights = {"a": 1.0, "b": 1.0}
    distiller = vk.FeatureDistiller(ChangesItsInput(4, 3), {"a": store, "b": live}, [], logit_weight=weights)
    with pytest.raises(RuntimeError, match="the batch was changed in place before teacher 'b' saw it"):
        distiller(data[:2], indices=[0, 1])


def test_every_call_of_a_module_is_a_feature_of_its_own(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    teacher, data = Twice(), torch.randn(SAMPLES, 4)
    pairs = [{"student": "", "teacher": "layer", "teacher_call": call, "name": str(call)} for call in (0, 1)]
    store = vk.FeatureStore.build(tmp_path, teacher, data, pairs, dtype=torch.float32, progress=False)
    with torch.no_grad():
        first = teacher.layer(data)
        expected = [first, teacher.layer(first)]
    for pair, features in zip(vk.distiller.as_pairs(pairs), expected, strict=True):
        torch.testing.assert_close(store[:][store.key_of(pair)], features)


def test_a_map_is_stored_in_its_layout(tmp_path):
    pair = {"student": "", "teacher": "", "teacher_pool": "spatial"}
    data = torch.randn(SAMPLES, 2, 3, 4)
    store = vk.FeatureStore.build(tmp_path, nn.Identity(), data, [{**pair, "teacher_layout": "NHWC"}], progress=False)
    assert store.key_of(vk.Pair(**pair, teacher_layout="NHWC")) in store[:]
    with pytest.raises(ValueError, match="no features of teacher module '' with teacher_pool='spatial'; it has"):
        store.key_of(vk.Pair(**pair))


def test_an_hf_like_output_by_name(tmp_path, images):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ViT(width=12)

        def forward(self, images):
            return {"loss": None, "logits": self.inner(images)}

    teacher = Model()
    pairs = [
        {"student": "relu", "teacher": "inner.norm", "student_pool": "spatial_mean", "teacher_pool": "class_token"}
    ]
    taps = [*pairs, {"teacher": "", "teacher_output": "logits"}]
    store = vk.FeatureStore.build(tmp_path, teacher, images, taps, dtype=torch.float32, progress=False)
    student = CNN()
    stored = vk.FeatureDistiller(student, store, pairs, example_input=images, logit_weight=1.0)
    live = vk.FeatureDistiller(student, teacher, pairs, example_input=images, logit_weight=1.0)
    live.load_state_dict(stored.state_dict())
    expected = live.eval()(images)[1]
    losses = stored.eval()(images, indices=range(SAMPLES))[1]
    assert torch.allclose(losses["logits"], expected["logits"]) and torch.allclose(losses["total"], expected["total"])


@pytest.mark.parametrize("key", [1, 2, ("named", "more")])
def test_logits_are_the_stored_output_of_that_key_and_no_other(tmp_path, images, key):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 3))

        def forward(self, images):
            logits = self.inner(images)
            return {"x": images, "y": logits, "z": 2 * logits, "named": {"more": 3 * logits}}

    teacher, student = Three(), CNN()
    taps = [{"teacher": "", "teacher_output": k} for k in (1, 2, ("named", "more"))]
    store = vk.FeatureStore.build(tmp_path, teacher, images, taps, progress=False)

    def loss(source, **given):
        distiller = vk.FeatureDistiller(student, source, [], teacher_logits=key, logit_weight=1.0).eval()
        return distiller(images, **given)[1]["logits"]

    assert torch.allclose(loss(store, indices=range(SAMPLES)), loss(teacher), rtol=1e-2)
    for wrong in (0, -1, "y"):
        distiller = vk.FeatureDistiller(student, store, [], teacher_logits=wrong, logit_weight=1.0).eval()
        with pytest.raises(
            TypeError, match=r"has no entry .*teacher_logits.* has the entries 1, 2, \('named', 'more'\)"
        ):
            distiller(images, indices=range(SAMPLES))


@pytest.mark.parametrize("output_first", [True, False])
def test_logits_are_the_unpooled_output_whatever_else_is_made_of_it(tmp_path, images, output_first):
    teacher, student = CNN(), CNN()
    pair = {"student": "", "teacher": "", "teacher_pool": lambda logits: 3 * logits, "name": "tripled"}
    taps = [*OUTPUT, pair] if output_first else [pair, *OUTPUT]
    store = vk.FeatureStore.build(tmp_path / "a", teacher, images, taps, dtype=torch.float32, progress=False)
    live, stored = (
        vk.FeatureDistiller(student, source, [pair], example_input=images, logit_weight=1.0).eval()
        for source in (teacher, store)
    )
    assert torch.allclose(stored(images, indices=range(SAMPLES))[1]["logits"], live(images)[1]["logits"], rtol=1e-4)
    without = vk.FeatureStore.build(tmp_path / "b", teacher, images, [pair], progress=False)
    distiller = vk.FeatureDistiller(student, without, [pair], example_input=images, logit_weight=1.0)
    with pytest.raises(ValueError, match="no outputs of the teacher, which logit_weight needs"):
        distiller(images, indices=range(SAMPLES))


def test_logits_of_every_position(tmp_path):
    teacher, student, data = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(SAMPLES, 5, 4)
    taps = [{"teacher": "", "teacher_pool": "tokens"}]
    pairs = [{"student": "", "student_pool": "tokens", **taps[0]}]
    store = vk.FeatureStore.build(tmp_path, teacher, data, taps, dtype=torch.float32, progress=False)
    live, stored = (
        vk.FeatureDistiller(student, source, pairs, example_input=data, logit_weight=1.0).eval()
        for source in (teacher, store)
    )
    assert torch.allclose(stored(data, indices=range(SAMPLES))[1]["logits"], live(data)[1]["logits"], rtol=1e-4)
