"""OrthoProjLoss in the training stacks people have, one process (ranks: test_integrations_ranks.py).

docs/integrations.md is the table of these tests.
"""

import copy
import io
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

import vkd_kernels as vk
from tests.helpers.stacks import assert_same, orthogonality_error
from vkd_kernels.ops.ortho_proj_loss import api, dispatch

S, T = 6, 10
OPTIONS = {
    **{name: {"normalization": name} for name in api.NORMALIZATIONS},
    "squared error": {"loss": "mse", "affine": False},  # with an orthonormal weight: a form of its own
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


class Distiller(nn.Module):
    """A student with its loss, as users put them together."""

    def __init__(self, **options):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(5, 12), nn.GELU(), nn.Linear(12, S))
        self.loss = vk.OrthoProjLoss(S, T, **{"scale": "learned", "affine": True, "eps": 1e-2, **options})

    def forward(self, x, y, mask=None):
        return self.loss(self.student(x), y, mask)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["reference", "chunked"])
def path(request, monkeypatch):
    """Both ways PyTorch takes: the definition, and the operators of large problems."""
    if request.param == "chunked":
        monkeypatch.setattr(dispatch, "CHUNKED_FROM", -1)
    return request.param


def batch(n=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator), torch.randn(n, T, generator=generator) * 2 + 0.5


def gradients(module, *arguments):
    value = module(*arguments)
    return [value.detach(), *torch.autograd.grad(value, list(module.parameters()))]


# ------------------------------------------------------------------------------------------------------ torch.compile


@pytest.fixture
def dynamo():
    """What other tests compiled of the same functions is forgotten, so that no limit of recompilations is met."""
    torch._dynamo.reset()
    return torch._dynamo


@pytest.mark.parametrize(  # every option, the kinds of graphs by both ways: a compilation takes more than a second
    ("path", "option", "masked"),
    [
        ("chunked", "layer_norm", False),
        ("chunked", "batch_norm", True),
        ("chunked", "none", True),
        ("chunked", "l2", False),
        ("chunked", "squared error", True),
        ("reference", "layer_norm", True),
        ("reference", "batch_norm", False),
        ("reference", "whiten", True),
    ],
    indirect=["path"],
)
def test_compile_full_graph(dynamo, path, option, masked):
    module = Distiller(**OPTIONS[option])
    counter = dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for n in (24, 9):
        x, y = batch(n)
        arguments = (x, y, torch.arange(n) % 4 > 0) if masked else (x, y)
        assert_same(gradients(compiled, *arguments), gradients(module, *arguments))
        counts.append(counter.frame_count)
    assert 0 < counts[0] == counts[1]  # one graph for any number of rows


def test_compile_a_training_step_by_inductor(dynamo):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("needs a C++ compiler: inductor compiles for the CPU with one")
    module = Distiller()
    compiled = torch.compile(module, fullgraph=True)
    assert_same(gradients(compiled, *batch()), gradients(module, *batch()))


def test_compile_under_autocast(dynamo):
    module = Distiller()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(gradients(compiled, *batch()), gradients(module, *batch()), rtol=2e-2, atol=1e-4)


# --------------------------------------------------------------------------------------------- autocast and GradScaler


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_option
def test_autocast_with_gradscaler(path, options, dtype):
    """A run in 16 bit with scaled gradients, one batch of them overflowing, ends near the run in float32."""
    torch.manual_seed(0)
    modules = [Distiller(**options)]
    modules.append(copy.deepcopy(modules[0]))
    x, y = batch()
    ends = []
    for module, enabled in zip(modules, (False, True), strict=True):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**12)
        for step in range(20):
            broken = enabled and step == 7
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                loss = module(torch.full_like(x, torch.inf) if broken else x, y)
            assert loss.dtype == torch.float32
            before, scale = [p.detach().clone() for p in module.parameters()], scaler.get_scale()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if broken:  # the overflow is noticed: no step, and a smaller scale
                assert not loss.isfinite() and scaler.get_scale() == scale / 2
                assert_same([p.detach() for p in module.parameters()], before, rtol=0, atol=0)
        assert orthogonality_error(module.loss.projection.weight) <= 1e-5
        ends.append(module(x, y).item())
    assert ends[1] == pytest.approx(ends[0], rel=0.1)


# ---------------------------------------------------------------- gradient accumulation and activation checkpointing


@pytest.mark.parametrize("normalization", ["layer_norm", "none"])
def test_gradient_accumulation(path, normalization):
    """Four micro-batches make the gradient of one large batch (normalized by rows, not by batch statistics)."""
    module = Distiller(normalization=normalization)
    x, y = batch()
    for part_x, part_y in zip(x.chunk(4), y.chunk(4), strict=True):
        (module(part_x, part_y) / 4).backward()
    assert_same([p.grad for p in module.parameters()], gradients(module, x, y)[1:])


@pytest.mark.parametrize("normalization", ["batch_norm", "whiten"])
def test_gradient_accumulation_with_batch_statistics(path, normalization):
    """There it is the mean of the micro-batches' own gradients, as with any batch norm."""
    module = Distiller(normalization=normalization)
    parts = [(x, y) for x, y in zip(*(v.chunk(2) for v in batch()), strict=True)]
    for x, y in parts:
        (module(x, y) / 2).backward()
    expected = [(a + b) / 2 for a, b in zip(*(gradients(module, *part)[1:] for part in parts), strict=True)]
    assert_same([p.grad for p in module.parameters()], expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("around", ["student", "loss", "both"])
@every_option
def test_activation_checkpointing(path, options, around, use_reentrant):
    module = Distiller(**options)
    x, y = batch()
    expected = gradients(module, x, y)
    x.requires_grad_()  # the reentrant kind asks for an input with a gradient

    def run(function, *arguments):
        return checkpoint(function, *arguments, use_reentrant=use_reentrant)

    if around == "both":
        value = run(module, x, y)
    elif around == "student":
        value = module.loss(run(module.student, x), y)
    else:
        value = run(module.loss, module.student(x), y)
    value.backward()
    assert_same([value.detach(), *(p.grad for p in module.parameters())], expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", [vk.Standardization, vk.Whitening])
def test_activation_checkpointing_counts_a_batch_once(kind, use_reentrant):
    """The backward pass computes the loss again, by the running statistics of the forward pass."""
    module = Distiller(normalization=kind(T, momentum=0.1))
    twin = copy.deepcopy(module)
    for seed in range(3):
        x, y = batch(seed=seed)
        expected = gradients(twin, x, y)
        module.zero_grad()
        value = checkpoint(module, x.requires_grad_(), y, use_reentrant=use_reentrant)
        value.backward()
        assert_same([value.detach(), *(p.grad for p in module.parameters())], expected)
        assert_same(module.buffers(), twin.buffers(), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------- torch.func


def test_functional_call(path):
    module, other = Distiller(), Distiller()
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    x, y = batch()
    assert torch.equal(torch.func.functional_call(module, state, (x, y)), other(x, y))
    assert not torch.equal(module(x, y), other(x, y))


@every_option
def test_func_grad(path, options):
    module = Distiller(**options)
    names = [name for name, _ in module.named_parameters()]
    arguments = batch()

    def value(parameters):
        return torch.func.functional_call(module, parameters, arguments)

    grads = torch.func.grad(value)(dict(module.named_parameters()))
    assert_same([grads[name] for name in names], gradients(module, *arguments)[1:])


@every_option
def test_func_vmap_over_an_ensemble(path, options):
    """Several distillations at once: stacked parameters, a batch of data each."""
    modules = [Distiller(**options) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    data = [batch(seed=i) for i in range(3)]

    def value(parameters, buffers, x, y):
        return torch.func.functional_call(modules[0], (parameters, buffers), (x, y))

    stacked = [torch.stack(v) for v in zip(*data, strict=True)]
    grads, values = torch.func.vmap(torch.func.grad_and_value(value))(parameters, buffers, *stacked)
    for i, module in enumerate(modules):
        expected = gradients(module, *data[i])
        ours = [values[i], *(grads[name][i] for name, _ in module.named_parameters())]
        assert_same(ours, expected, rtol=1e-4, atol=1e-6)


def test_func_hessian_vector_product(path):
    """Second order, through torch.func; plain autograd says what to ask for instead (test_ortho_proj_loss_chunked)."""
    module = vk.OrthoProjLoss(S, T, loss="mse", normalization="none", dtype=torch.float64)
    x, y, v = (torch.randn(4, n, dtype=torch.float64) for n in (S, T, S))
    product = torch.func.jvp(torch.func.grad(lambda x: module(x, y)), (x,), (v,))[1]
    torch.testing.assert_close(product, 2 * v / (4 * T))  # of ‖X Pᵀ - T‖² / NT with PᵀP = I


# --------------------------------------------------------------------------------------------------------- EMA, copies


def averaged_by_torch(module):
    return torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))


def averaged_by_torch_with_buffers(module):
    return torch.optim.swa_utils.AveragedModel(module, use_buffers=True)


def averaged_by_timm(module):
    return pytest.importorskip("timm.utils", reason="needs timm").ModelEmaV3(module, decay=0.9)


def averaged_by_timm_state_dict(module):
    return pytest.importorskip("timm.utils", reason="needs timm").ModelEmaV2(module, decay=0.9)


@pytest.mark.parametrize(
    "averaged",
    [averaged_by_torch, averaged_by_torch_with_buffers, averaged_by_timm, averaged_by_timm_state_dict],
    ids=lambda f: f.__name__,
)
def test_ema(averaged):
    """An average of copies has an orthonormal projection too: what is averaged is the unconstrained parameter."""
    module = Distiller()
    average = averaged(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    update = getattr(average, "update_parameters", None) or average.update
    for _ in range(30):
        optimizer.zero_grad()
        module(*batch()).backward()
        optimizer.step()
        update(module)
    p, q = average.module.loss.projection.weight, module.loss.projection.weight
    assert orthogonality_error(p) <= 1e-6 and not torch.equal(p, q)
    assert average(*batch()).isfinite()


def test_ema_with_accumulation_saved_resumed_and_evaluated(tmp_path):
    """Two micro-batches a step, one update of the average; a resumed run's average has the same bits."""

    def train(run, steps):
        module, average, optimizer = run
        for _ in range(steps):
            optimizer.zero_grad()
            for x, y in zip(*(part.chunk(2) for part in batch()), strict=True):
                (module.train()(x, y) / 2).backward()
            optimizer.step()
            average.update_parameters(module)

    def fresh():
        torch.manual_seed(0)
        module = Distiller()
        return module, averaged_by_torch(module), torch.optim.AdamW(module.parameters(), lr=0.05)

    run, resumed = fresh(), fresh()
    before = run[1].eval()(*batch())
    train(run, 3)
    torch.save([part.state_dict() for part in run], tmp_path / "run.pt")
    for part, state in zip(resumed, torch.load(tmp_path / "run.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    train(run, 3)
    train(resumed, 3)
    assert_same(run[1].state_dict().values(), resumed[1].state_dict().values(), rtol=0, atol=0)
    assert orthogonality_error(run[1].module.loss.projection.weight) <= 1e-6
    with torch.no_grad():
        assert run[1].eval()(*batch()) < before


def test_deepcopy_is_independent(path):
    module = Distiller()
    module(*batch()).backward()
    twin = copy.deepcopy(module)
    before = gradients(module, *batch())
    assert_same(gradients(twin, *batch()), before, rtol=0, atol=0)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert_same(gradients(module, *batch()), before, rtol=0, atol=0)


@pytest.mark.parametrize("orthogonal_map", ["cayley", "matrix_exp", "householder"])
def test_save_and_load(tmp_path, orthogonal_map):
    """A resumed run (model, optimizer, by weights_only) goes on bit for bit; a whole pickled module does too."""
    module = Distiller(orthogonal_map=orthogonal_map)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)

    def train(module, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            module(*batch()).backward()
            optimizer.step()
        return [p.detach() for p in module.parameters()]

    train(module, optimizer, 3)
    torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    torch.save(module, tmp_path / "module.pt")
    resumed = Distiller(orthogonal_map=orthogonal_map)
    again = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed.load_state_dict(saved["module"])
    again.load_state_dict(saved["optimizer"])
    whole = torch.load(tmp_path / "module.pt", weights_only=False)
    assert torch.equal(whole(*batch()), module(*batch()))
    assert_same(train(resumed, again, 3), train(module, optimizer, 3), rtol=0, atol=0)


class Rows(torch.utils.data.Dataset):
    """A dataset that holds a loss and a FeatureDistiller, as one that ranks samples by them would."""

    def __init__(self, x, y):
        self.x, self.y = x, y
        self.loss = Distiller(normalization="layer_norm")
        pair = {"student": "0", "teacher": "0"}
        models = nn.Sequential(nn.Linear(5, S)), nn.Sequential(nn.Linear(5, T))
        self.distiller = vk.FeatureDistiller(*models, [pair], example_input=x)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        x = self.x[i : i + 1]
        with torch.no_grad():
            return i, torch.stack([self.loss(x, self.y[i : i + 1]), self.distiller(x)[1]["total"]])


def test_pickled_to_dataloader_workers():
    data = Rows(*batch(6))
    assert torch.equal(pickle.loads(pickle.dumps(data))[3][1], data[3][1])
    loader = torch.utils.data.DataLoader(data, batch_size=3, num_workers=1, multiprocessing_context="spawn")
    for i, values in loader:
        torch.testing.assert_close(values, torch.stack([data[j][1] for j in i.tolist()]))


# -------------------------------------------------------------------------------------------------------- torch.export


def test_export_the_student_alone(path):
    """What is deployed after distillation knows nothing of it."""
    module = Distiller()
    module(*batch()).backward()
    exported = torch.export.export(module.student.eval(), (batch()[0],))
    assert "vkd" not in str(exported.graph)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    x, _ = batch()
    torch.testing.assert_close(torch.export.load(buffer).module()(x), module.student(x))


def test_export_a_student_with_an_orthogonal_layer():
    """The map is folded away first, as any parametrization."""
    layer = vk.orthogonal(nn.Linear(5, 9))
    expected = layer(batch()[0])
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    exported = torch.export.export(layer, (batch()[0],))
    assert "vkd" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(batch()[0]), expected)


# -------------------------------------------------------------------------------------------------- the documentation


NOT_IN_THE_TABLE = {
    "test_ranks",
    "test_the_table_in_the_docs_names_tests_that_exist",
    "test_every_example_is_tested",
    "test_the_example_runs_as_it_is",
}


def test_the_table_in_the_docs_names_tests_that_exist():
    tests = Path(__file__).parents[1]
    page = (tests.parent / "docs" / "integrations.md").read_text()
    sources = "".join(path.read_text() for path in tests.rglob("test_*.py"))
    named = set(re.findall(r"`((?:test|ddp|fsdp)_\w+)`", page))
    assert len(named) > 30
    assert not [name for name in named if f"def {name}(" not in sources]
    sources = "".join(path.read_text() for path in tests.rglob("test_integrations*.py"))
    tested = set(re.findall(r"^def (test_\w+|ddp_\w+|fsdp_\w+)", sources, re.MULTILINE))
    assert not tested - named - NOT_IN_THE_TABLE
