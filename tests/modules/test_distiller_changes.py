"""What changes after a FeatureDistiller was made (weights, layers wrapped, replaced), or in a step; own types."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import vkd_kernels as vk

FEATURES = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
PAIR = {"student": "0", "teacher": "0", "dims": (8, 32), "name": "x"}


class LowRank(nn.Module):
    """A layer with a trained correction, as LoRA puts it in the layer's place."""

    def __init__(self, layer):
        super().__init__()
        self.base = layer
        self.down, self.up = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def layers(width):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 4))


@pytest.fixture
def distiller():
    return vk.FeatureDistiller(layers(8), layers(32), [PAIR], logit_weight=1.0)


@pytest.mark.parametrize("attached", [False, True])
def test_a_layer_wrapped_afterwards_is_tapped_where_its_name_is(distiller, attached):
    """The features are those of the wrapper, not of the layer inside, also where the hooks were on already."""
    if attached:
        distiller.attach()
    distiller.student[0] = wrapped = LowRank(distiller.student[0])
    losses = distiller(FEATURES)[1]
    expected = distiller.pair_losses.of("x")(wrapped(FEATURES), distiller.teacher[0](FEATURES))
    torch.testing.assert_close(losses["x"], expected)
    losses["x"].backward()
    assert wrapped.up.weight.grad.abs().sum() > 0
    distiller.remove()
    assert not any(module._forward_hooks for module in distiller.student.modules())


def test_a_copy_with_its_hooks_on_follows_its_own_modules(distiller):
    distiller.attach()
    other = copy.deepcopy(distiller)
    other.student[0] = LowRank(other.student[0])
    other(FEATURES)[1]["x"].backward()
    assert other.student[0].up.weight.grad.abs().sum() > 0
    expected = distiller.pair_losses.of("x")(distiller.student[0](FEATURES), distiller.teacher[0](FEATURES))
    torch.testing.assert_close(distiller(FEATURES)[1]["x"], expected)


def test_a_layer_of_the_teacher_replaced_afterwards_is_in_eval_mode(distiller):
    """New modules are in training mode: a dropout must not drop, and a batch norm's statistics must stay."""
    norm = nn.BatchNorm1d(32)
    distiller.teacher[1] = nn.Sequential(norm, nn.ReLU(), nn.Dropout(0.5))
    first, second = (distiller(FEATURES)[1]["logits"] for _ in range(2))
    assert torch.equal(first, second)
    assert norm.num_batches_tracked == 0 and not distiller.teacher[1][2].training
    distiller.train()
    assert not any(module.training for module in distiller.teacher.modules())
    (first + second).backward()
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())


# ------------------------------------------------------------------------------------------------- scheduled weights


def total_of(losses, weights):
    return sum(weight * losses[name] for name, weight in weights.items())


def test_changed_weights_take_effect(distiller):
    assert distiller.weights == {"x": 1.0, "logits": 1.0}
    for weights in ({"x": 3.0, "logits": 0.5}, {"x": 0, "logits": 2.0}):
        distiller.weights.update(weights)
        for run in (distiller, copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
            losses = run(FEATURES)[1]
            torch.testing.assert_close(losses["total"], total_of(losses, weights))
            assert f"x: weight={weights['x']:g}" in repr(run)
    other = copy.deepcopy(distiller)
    other.weights["x"] = 7.0
    assert distiller.weights["x"] == 0


def test_changed_weights_take_effect_in_a_compiled_distiller(distiller):
    """In every step of a schedule, without a graph for each of its values."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    with distiller:
        compiled = torch.compile(distiller, backend=backend, fullgraph=True)
        for step in range(12):
            distiller.weights["x"], distiller.temperature = 1 - step / 12, 4 - step / 12
            losses = compiled(FEATURES)[1]
            torch.testing.assert_close(losses, distiller(FEATURES)[1])
            losses["total"].backward()
    assert len(graphs) <= 4
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({"x": 1.0, "logits": 1.0, "y": 1.0}, ValueError, "a key of weights must be one of 'x', 'logits'; got 'y'"),
        ({"x": 1.0}, ValueError, "weights must have every loss, 'x', 'logits'; got {'x': 1.0}"),
        ({"x": 1.0, "logits": "1"}, TypeError, r"weights\['logits'\] must be a number; got str '1'"),
        ({"x": float("nan"), "logits": 1.0}, ValueError, r"weights\['x'\] must be a finite number; got nan"),
        (2.0, TypeError, "weights must map losses' names to numbers; got float 2.0"),
    ],
)
def test_bad_weights(distiller, weights, error, message):
    distiller.weights = weights
    with pytest.raises(error, match=message):
        distiller(FEATURES)


def test_a_bad_temperature_is_refused_later_too(distiller):
    distiller.temperature = 0
    with pytest.raises(ValueError, match="temperature must be a finite number > 0; got 0"):
        distiller(FEATURES)


@pytest.mark.parametrize("name", ["pairs", "logit_weight", "teacher_weights", "teacher", "reduction", "drop_best"])
def test_what_could_not_take_effect_is_refused(distiller, name):
    """As an attribute of its own, or as a submodule, it would be ignored."""
    value = layers(32) if name == "teacher" else [PAIR]
    with pytest.raises(AttributeError, match=f"{name} of a distiller is fixed when it is made.*weights\\['x'\\] = "):
        setattr(distiller, name, value)
    assert "teacher" not in dict(distiller.named_children())


# ------------------------------------------------------------------------------------------ what people's models return


@dataclass
class Answer:
    features: torch.Tensor
    logits: torch.Tensor


class Answering(nn.Module):
    """A model that returns an object of its own, as people write them; ``spoil`` changes the features afterwards."""

    def __init__(self, width, kind, spoil=False):
        super().__init__()
        self.body = nn.Linear(6, width)
        self.answer, self.head = Returning(kind), nn.Linear(width, 4)
        self.spoil = spoil

    def forward(self, x):
        answer = self.answer(self.body(x), self.head(self.body(x)))
        if self.spoil:
            (answer[0] if isinstance(answer, dict) else answer.features).mul_(2)
        return answer


class Returning(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, features, logits):
        return Answer(features, logits) if self.kind == "dataclass" else {0: features, "logits": logits}


ENTRIES = {"dataclass": ("features", lambda answer: answer.features), "dict": (0, lambda answer: answer[0])}


@pytest.mark.parametrize("kind", ENTRIES)
def test_entries_of_dataclasses_and_of_dicts_by_number(kind):
    student, teacher = Answering(8, kind), Answering(32, kind)
    entry, function = ENTRIES[kind]
    expected = vk.OrthoProjLoss(8, 32)
    for options in ({"output": entry}, {"pool": function}):
        pair = {f"{side}_{name}": value for side in ("student", "teacher") for name, value in options.items()}
        distiller = vk.FeatureDistiller(
            student,
            teacher,
            [{"student": "answer", "teacher": "answer", "name": "x", **pair}],
            example_input=FEATURES,
            logit_weight=1.0,
        )
        expected.load_state_dict(distiller.pair_losses.of("x").state_dict())
        for run in (distiller, torch.compile(distiller, backend="eager")):
            losses = run(FEATURES)[1]
            torch.testing.assert_close(losses["x"], expected(student.body(FEATURES), teacher.body(FEATURES)))
            assert losses["logits"] > 0
        student.spoil = True
        with pytest.raises(RuntimeError, match="was changed in place afterwards"):
            distiller(FEATURES)
        student.spoil = False


class ChangesItsInput(nn.Linear):
    """As models do that normalize images themselves, or that begin with a layer in place."""

    def forward(self, input):
        return super().forward(input.mul_(0.5))


@pytest.mark.parametrize("logits_alone", [True, False])
def test_a_student_that_changes_what_the_teacher_is_given_is_an_error(logits_alone):
    pairs = [] if logits_alone else [{"student": "", "teacher": "", "dims": (8, 8)}]
    distiller = vk.FeatureDistiller(ChangesItsInput(6, 8), nn.Linear(6, 8), pairs, logit_weight=1.0)
    with pytest.raises(RuntimeError, match="the batch was changed in place before teacher saw it, by the student or"):
        distiller(FEATURES.clone())
    with pytest.raises(RuntimeError, match="the batch was changed in place before teacher saw it"):
        distiller(input=FEATURES.clone())
    with pytest.raises(RuntimeError, match="changed in place"):
        x = FEATURES.clone()
        distiller(x, teacher_input=x)
    with pytest.raises(RuntimeError, match="changed in place"):
        x = FEATURES.clone()
        distiller(x, teacher_input=x[2:])
    distiller(FEATURES.clone(), teacher_input=FEATURES)
    crops = torch.stack([FEATURES, FEATURES])
    distiller(crops[0], teacher_input=crops[1])  # views, which count their changes together
    rows = crops.flatten(0, 1)
    for one, other in ((crops[:, 0], crops[:, 1]), (rows[::2], rows[1::2])):  # interleaved
        distiller(one, teacher_input=other)
    with pytest.raises(RuntimeError, match="changed in place"):
        distiller(crops[0, ::2], teacher_input=crops[0, ::4])
    with pytest.raises(RuntimeError, match="changed in place"):
        distiller(crops[0], teacher_input=crops[0, :1].expand(4, -1))


def test_a_teacher_that_changes_what_the_next_one_is_given_is_an_error():
    teachers = {"a": ChangesItsInput(6, 8), "b": nn.Linear(6, 8)}
    distiller = vk.FeatureDistiller(nn.Linear(6, 8), teachers, [], logit_weight={"a": 1.0, "b": 1.0})
    with pytest.raises(RuntimeError, match="the batch was changed in place before teacher 'b' saw it"):
        distiller(FEATURES.clone())
    distiller(FEATURES, teacher_input={"a": FEATURES.clone()})
    with pytest.raises(RuntimeError, match="the batch was changed in place before teacher 'b' saw it"):
        shared = FEATURES.clone()
        distiller(FEATURES, teacher_input={"a": shared, "b": shared})
    crops = torch.stack([FEATURES, FEATURES])
    distiller(FEATURES, teacher_input={"a": crops[0], "b": crops[1]})
