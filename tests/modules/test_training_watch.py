"""What the training watch says once: features without a graph, a projection that no optimizer has."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import vkd_kernels as vk
from tests.helpers.distillers import FEATURES, distiller_of_layers, layers, messages
from vkd_kernels.training_watch import PATIENCE

# -------------------------------------------------------------------------------------------- features without a graph


def test_a_student_run_without_gradients_is_warned_of_once():
    student, loss = nn.Linear(6, 8), vk.OrthoProjLoss(8, 32)

    def train():
        for _ in range(3):
            with torch.no_grad():
                features = student(FEATURES)
            loss(features, torch.randn(5, 32)).backward()

    (message,) = messages(train)
    assert message.startswith("OrthoProjLoss: the student's features have no graph")


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 4)
        self.reentrant = reentrant

    def forward(self, x):
        return self.head(checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", ["reentrant checkpoint", "frozen", "healthy"])
def test_a_tap_without_a_graph_is_warned_of_once_by_name(case, compiled):
    if case == "reentrant checkpoint" and compiled:
        pytest.skip("torch.compile has no reentrant checkpoints")
    student = layers(8) if compiled else Checkpointed(reentrant=case == "reentrant checkpoint")
    student.requires_grad_(case != "frozen")
    pair = {"student": "0" if compiled else "block.0", "teacher": "0", "dims": (8, 32), "name": "x"}
    distiller = vk.FeatureDistiller(student, layers(32), [pair])
    torch._dynamo.reset()
    module = torch.compile(distiller.attach(), backend="eager", fullgraph=True) if compiled else distiller

    def train():
        for _ in range(3):
            module(FEATURES)[1]["total"].backward()

    said = messages(train)
    assert len(said) == (case != "healthy")
    assert all(message.startswith("pair 'x': the student's features have no graph") for message in said)


def test_validation_without_gradients_is_no_mistake():
    distiller, loss = distiller_of_layers(), vk.OrthoProjLoss(6, 8)

    @torch.no_grad()
    def validate():
        distiller(FEATURES)
        loss(FEATURES, torch.randn(5, 8))
        distiller.eval()

    assert messages(validate) == []
    assert messages(lambda: distiller(FEATURES)) == []


# --------------------------------------------------------------------------------- a projection that no optimizer has


def loop(parameters, loss_of, steps=3 * PATIENCE, accumulate=1, skip=lambda step: False, fused=False):
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=fused)
    for step in range(steps):
        loss_of().backward()
        if (step + 1) % accumulate == 0 and not skip(step):
            optimizer.step()
            optimizer.zero_grad()


def test_after_training_the_student_moves_where_pytorch_swaps_tensors(monkeypatch):
    """It refuses tensors that have weak references."""
    student, loss = torch.nn.Linear(4, 4), vk.OrthoProjLoss(4, 6)
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.1)
    for _ in range(3):
        loss(student(torch.randn(8, 4)), torch.randn(8, 6)).backward()
        optimizer.step()
        optimizer.zero_grad()
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    student.double()
    assert student.weight.dtype == torch.float64


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"fused": True, "accumulate": 3, "steps": 4 * PATIENCE}])
def test_a_projection_left_out_of_the_optimizer_is_warned_of_once(options):
    """Fused optimizers change no version counter."""
    student, loss, teacher = nn.Linear(6, 8), vk.OrthoProjLoss(8, 32), torch.randn(5, 32)
    (message,) = messages(lambda: loop(student.parameters(), lambda: loss(student(FEATURES), teacher), **options))
    assert message.startswith(f"OrthoProjLoss: in {PATIENCE} steps that changed the student its projection received")
    distiller = distiller_of_layers()
    (message,) = messages(
        lambda: loop(distiller.student.parameters(), lambda: distiller(FEATURES)[1]["total"], **options)
    )
    assert message.startswith("pair 'x': ") and "Give the optimizer the loss's parameters too" in message


def test_the_parameter_behind_a_student_of_many_paths_is_found():
    """30 residual additions: 61 nodes of the graph, and 2^30 paths through it."""
    given, loss, teacher = torch.randn(5, 8, requires_grad=True), vk.OrthoProjLoss(8, 32), torch.randn(5, 32)

    def loss_of():
        x = given * 1
        for _ in range(30):
            x = x + x.tanh()
        return loss(x / x.detach().norm(), teacher)

    (message,) = messages(lambda: loop([given], loss_of))
    assert message.startswith(f"OrthoProjLoss: in {PATIENCE} steps")


def test_a_projection_left_out_is_warned_of_where_the_whole_module_clears_its_gradients():
    distiller = distiller_of_layers()
    optimizer = torch.optim.AdamW(distiller.student.parameters(), lr=1e-3)

    def train():
        for _ in range(2 * PATIENCE):
            distiller.zero_grad()
            distiller(FEATURES)[1]["total"].backward()
            optimizer.step()
            distiller.zero_grad()

    (message,) = messages(train)
    assert message.startswith("pair 'x': in ")
    assert not distiller.pair_losses.of("x").projection.unconstrained._backward_hooks


@pytest.mark.parametrize("projection", ["identity", "orthogonal"])
def test_an_affine_loss_trains_whose_matrix_does_not(projection):
    student, loss = nn.Linear(6, 8), vk.OrthoProjLoss(8, 32, projection=projection, affine=True)
    if projection == "orthogonal":
        loss.projection.unconstrained.requires_grad_(False)
    trained = [p for p in loss.parameters() if p.requires_grad]
    teacher = torch.randn(5, 32)
    assert messages(lambda: loop([*student.parameters(), *trained], lambda: loss(student(FEATURES), teacher))) == []
    assert (loss.projection.gain != 1).any()


@pytest.mark.parametrize(
    "case", ["trained", "fused", "accumulation", "frozen", "skipped steps", "not in the loss", "through .data", "late"]
)
def test_loops_that_are_right_are_not_warned_of(case):
    distiller = distiller_of_layers()
    parameters = list(distiller.parameters())
    projection = distiller.pair_losses.of("x").projection.unconstrained
    options = {}
    if case == "fused":
        options = {"fused": True, "accumulate": 2}
    elif case == "accumulation":
        options = {"accumulate": 2 * PATIENCE, "steps": 6 * PATIENCE}
    elif case == "frozen":
        projection.requires_grad_(False)
        parameters = list(distiller.student.parameters())
    elif case == "skipped steps":
        options = {"skip": lambda step: step < 2 * PATIENCE}
    elif case == "late":  # the projection's optimizer starts after a few steps of the student's
        loop(distiller.student.parameters(), lambda: distiller(FEATURES)[1]["total"], steps=PATIENCE // 2)
    elif case == "through .data":
        parameters = list(distiller.student.parameters())

    def loss():
        output, losses = distiller(FEATURES)
        if case == "through .data" and projection.grad is not None:
            projection.data.sub_(projection.grad, alpha=1e-3)
        return output.sum() if case == "not in the loss" else losses["total"]

    if case == "not in the loss":
        parameters = list(distiller.student.parameters())
    assert messages(lambda: loop(parameters, loss, **options)) == []
