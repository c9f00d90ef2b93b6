"""FeatureDistiller's teacher where it must not be moved, and what moves between devices; validation on one rank."""

import contextlib
import copy
import datetime
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vkd_kernels as vk
from tests.helpers import processes
from vkd_kernels.pooling import Rows, compared, pooled

FEATURES = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
PAIR = {"student": "2", "teacher": "2", "dims": (8, 16), "name": "x"}


def layers(width):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width))


def distill(teacher, pair=PAIR):
    torch.manual_seed(0)
    return vk.FeatureDistiller(layers(8), teacher, [pair])


def prepared(distiller):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate (the extra integrations)")
    return accelerate.Accelerator(cpu=True).prepare(distiller)


MOVES = {
    "nothing": lambda distiller: distiller,
    "to the device where all is": lambda distiller: distiller.to("cpu"),
    "to another dtype and back": lambda distiller: distiller.double().float(),
    "to channels last": lambda distiller: distiller.to(memory_format=torch.channels_last),
    "a copy": copy.deepcopy,
    "prepared by accelerate": lambda distiller: (
        pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(distiller)
    ),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("placed", ["disk offload", "cpu offload", "dispatched"])
def test_a_teacher_that_accelerate_places_stays_where_it_is(placed, move, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate (the extra integrations)")
    torch.manual_seed(1)
    teacher = layers(16)
    expected = distill(copy.deepcopy(teacher))(FEATURES)[1]["total"]
    cpu = torch.device("cpu")
    if placed == "disk offload":
        accelerate.disk_offload(teacher, str(tmp_path), execution_device=cpu)
    elif placed == "cpu offload":
        accelerate.cpu_offload(teacher, execution_device=cpu)
    else:
        devices = {"0": "cpu", "1": "cpu", "2": "disk"}
        teacher = accelerate.dispatch_model(
            teacher, devices, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
        )
    distiller = MOVES[move](distill(teacher))
    torch.testing.assert_close(distiller(FEATURES)[1]["total"], expected)


@pytest.mark.parametrize("device", ["cpu", "meta"])  # which stands for a GPU
def test_a_teacher_that_accelerate_loads_to_one_device_is_moved_like_any_other(device):
    """As ``device_map={"": 1}`` of transformers does: accelerate puts no hooks on such a model."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate (the extra integrations)")
    teacher = accelerate.dispatch_model(layers(16), {"": device})
    assert teacher.hf_device_map
    distiller = distill(teacher)
    if device == "meta":
        with pytest.raises(ValueError, match="teacher is on the meta device"):  # so that is where inputs would go
            distiller(FEATURES)
    target = "meta" if device == "cpu" else "cpu"
    distiller.to_empty(device=target)
    assert all(p.device.type == target for p in teacher.parameters())


class Quantized(nn.Module):
    """As bitsandbytes' models: their weights are where they are."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)

    def to(self, *args, **kwargs):
        raise ValueError("`.to` is not supported for `4-bit` or `8-bit` bitsandbytes models")


@pytest.mark.parametrize("move", MOVES)
def test_a_quantized_teacher_is_not_moved_to_where_it_is(move):
    torch.manual_seed(1)
    teacher = layers(16)
    expected = distill(copy.deepcopy(teacher))(FEATURES)[1]["total"]
    distiller = MOVES[move](distill(Quantized(teacher), {**PAIR, "teacher": "model.2"}))
    torch.testing.assert_close(distiller(FEATURES)[1]["total"], expected)


def test_a_teacher_that_cannot_be_moved_stays_and_says_so():
    distiller = distill(Quantized(layers(16)), {**PAIR, "teacher": "model.2"})
    with pytest.warns(
        UserWarning, match=r"the teacher stays on cpu: it can't be moved to meta \(`.to` is not supported"
    ):
        distiller.to("meta")
    assert all(p.is_meta for p in distiller.parameters())
    assert not any(p.is_meta for p in distiller.teacher.parameters())


def test_a_teacher_on_two_devices_is_left_alone():
    teacher = layers(16)
    teacher[0].to("meta")  # stands for a second GPU
    distiller = distill(teacher)
    for move in (lambda: distiller.float(), lambda: distiller.to("meta"), lambda: distiller.to_empty(device="cpu")):
        move()
        assert teacher[0].weight.is_meta and not teacher[2].weight.is_meta


def on_another_gpu(width):
    model = layers(width)
    with FakeTensorMode():
        for module in model:
            for name, parameter in [*module.named_parameters()]:
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, device="cuda:1")))
    return model


@pytest.mark.parametrize("several", [False, True])
def test_a_teacher_on_another_gpu_is_not_dragged_to_the_students_device(several):
    """Trainer, accelerate and Lightning call .to(device) wherever the student is."""
    teacher, other = on_another_gpu(16), layers(16)
    distiller = distill({"gpu": teacher, "cpu": other}, {**PAIR, "teacher": "cpu:2"}) if several else distill(teacher)
    for move in (lambda: distiller.to("cpu"), lambda: distiller.double(), lambda: distiller.to("meta")):
        move()
        assert {str(p.device) for p in teacher.parameters()} == {"cuda:1"}
    assert all(p.is_meta for p in distiller.parameters())
    assert all(p.is_meta == several for p in other.parameters())


def test_a_teacher_on_the_students_gpu_follows_the_student(monkeypatch):
    teacher = on_another_gpu(16)
    source = distill(teacher).source
    targets = []
    monkeypatch.setattr(teacher, "to", targets.append)
    with FakeTensorMode():
        source.move(lambda x: x.to("cuda:0"), {torch.device("cuda:0")})
        assert not targets
        source.move(lambda x: x.to("cuda:0"), {torch.device("cuda:1")})
    assert targets == [torch.device("cuda:0")]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_teacher_left_on_the_cpu_is_warned_of_once(compiled):
    """The meta device stands for the student's GPU; it is an error to copy anything from there, which comes after."""
    distiller = distill({"slow": layers(16)}, {**PAIR, "teacher": "slow:2"}).attach()
    for part in (distiller.student, distiller.pair_losses):
        part.to("meta")
    module = torch.compile(distiller, backend="eager", fullgraph=True) if compiled else distiller
    x = FEATURES.to("meta")
    # An error in a compiled graph's no_grad leaves gradients off.
    with warnings.catch_warnings(record=True) as said, torch.enable_grad():
        warnings.simplefilter("always")
        for _ in range(2):
            with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
                module(x)
    messages = [str(warning.message) for warning in said if "computes on the CPU" in str(warning.message)]
    assert len(messages) == 1 and messages[0].startswith("teacher 'slow'")
    assert "inputs come from meta" in messages[0] and "distiller.teacher['slow'].to(device)" in messages[0]


@pytest.mark.parametrize("why", ["refused to move", "without gradients", "input on the CPU"])
def test_a_teacher_meant_for_the_cpu_is_not_warned_of(why):
    distiller = distill(Quantized(layers(16)), {**PAIR, "teacher": "model.2"})
    if why == "refused to move":
        with pytest.warns(UserWarning, match="the teacher stays on cpu"):
            distiller.to("meta")
    for part in (distiller.student, distiller.pair_losses):
        part.to("meta")
    given = {"teacher_input": FEATURES} if why == "input on the CPU" else {}
    copied_out_of_meta = contextlib.nullcontext() if given else pytest.raises(NotImplementedError, match="Cannot copy")
    with warnings.catch_warnings(), torch.set_grad_enabled(why != "without gradients"), copied_out_of_meta:
        warnings.filterwarnings("error", message=".*computes on the CPU")
        distiller(FEATURES.to("meta"), **given)


@pytest.mark.filterwarnings("ignore:teacher computes on the CPU")
def test_inputs_go_to_the_teachers_device_and_features_come_back():
    """With the meta device as the second one: it is an error to copy anything from there."""
    places = []

    class Watched(nn.Module):
        def __init__(self, device):
            super().__init__()
            self.linear = nn.Linear(6, 16, device=device)

        def forward(self, batch):
            places.append((batch["x"].device.type, batch["x"].dtype))
            return self.linear(batch["x"])

    batch = {"x": FEATURES.double().to("meta")}
    features_come_back = distill(Watched("meta"), {**PAIR, "teacher": "linear"})
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        features_come_back(FEATURES, teacher_input=(batch,))
    assert places == [("meta", torch.float32)]
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # the mask goes there, too
        features_come_back(FEATURES, teacher_input=(batch,), masks={"x": torch.ones(len(FEATURES), dtype=torch.bool)})
    places.pop()
    inputs_go = distill(Watched("cpu"), {**PAIR, "teacher": "linear"})
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        inputs_go(FEATURES, teacher_input=(batch,))
    assert len(places) == 1


@pytest.mark.parametrize("resample", ["student", "teacher"])
def test_rows_and_masks_of_a_teacher_elsewhere_are_resampled_where_the_student_is(resample):
    """With the meta device as the student's, which nothing comes back from."""
    pair = vk.Pair("a", "b", student_pool="spatial", teacher_pool="spatial", resample=resample)
    student = Rows(torch.randn(2, 4, 4, 6, device="meta"), torch.ones(2, 4, 4, device="meta"))
    teacher = pooled(pair.side("teacher"), torch.randn(2, 8, 7, 7), torch.ones(2, 7, 7, dtype=torch.bool))
    rows = compared(pair, student, teacher, one_mask=False)
    assert all(x.is_meta for x in (rows.student, rows.teacher, rows.mask))
    size = (7, 7) if resample == "student" else (4, 4)
    assert rows.mask.shape == (2, *size) and rows.teacher.shape == (2, *size, 8)


def validation_on_the_first_rank(rank):
    group = dist.new_group(timeout=datetime.timedelta(seconds=120))
    distiller = distill(layers(16))
    with_group = vk.FeatureDistiller(
        distiller.student,
        distiller.teacher,
        [{**PAIR, "normalization": "batch_norm"}],
        logit_weight=None,
        process_group=group,
    )
    loss = vk.OrthoProjLoss(6, 16, process_group=group)
    whitening = vk.Whitening(6, momentum=0.1, process_group=group)
    y = torch.randn(5, 16)
    for _ in range(2):
        with_group(FEATURES)[1]["total"].backward()
        loss(FEATURES.clone().requires_grad_(), y).backward()
        whitening(FEATURES)
    for module in (with_group, loss, whitening):
        module.eval()
    if rank == 0:  # a collective would wait for the other rank, and fail
        with torch.no_grad():
            _, losses, metrics = with_group(FEATURES, metrics=True)
            assert losses["total"].isfinite() and metrics["loss"].isfinite()
            assert loss(FEATURES, y).isfinite() and whitening(FEATURES).isfinite().all()
            loss.metrics(FEATURES, y)
    for module in (with_group, loss, whitening):
        module.train()
    with_group(FEATURES)[1]["total"].backward()  # and both together again


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_validation_on_one_rank_alone_does_not_hang(tmp_path):
    processes.run_ranks(validation_on_the_first_rank, tmp_path)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.dropped = nn.Linear(6, 6).double(), nn.Linear(6, 6).double(), False

    def forward(self, x):
        x = self.first(x)
        return x if self.dropped else self.second(x)


def a_layer_dropped_on_the_first_rank(rank):
    torch.manual_seed(0)
    pairs = [
        {
            "student": name,
            "teacher": "2",
            "dims": (6, 16),
            "name": name,
            "optional": True,
            "normalization": "batch_norm",
        }
        for name in ("first", "second")
    ]
    student, teacher = Dropping(), layers(16).double()
    alone = vk.FeatureDistiller(copy.deepcopy(student), teacher, pairs, balance="running_mean")
    over_ranks = vk.FeatureDistiller(student, teacher, pairs, balance="running_mean", process_group=dist.group.WORLD)
    over_ranks.load_state_dict(alone.state_dict())
    ranks = nn.parallel.DistributedDataParallel(over_ranks, find_unused_parameters=True)
    x = FEATURES.double()
    mine = x[:2] if rank == 0 else x[2:]
    student.dropped = rank == 0
    losses = ranks(mine)[1]
    losses["total"].backward()
    torch.testing.assert_close(losses["first"], alone(x)[1]["first"])
    torch.testing.assert_close(losses["second"], alone(x[2:])[1]["second"])  # the rows of the rank that ran it
    for parameter in over_ranks.parameters():
        both = [torch.empty_like(parameter) for _ in range(2)]
        dist.all_gather(both, parameter.grad)
        assert torch.equal(*both) and both[0].any()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_a_layer_that_one_rank_dropped_counts_the_rows_of_the_others(tmp_path):
    processes.run_ranks(a_layer_dropped_on_the_first_rank, tmp_path)
