"""What goes wrong in training and around it: bad arguments, absurd learning rates, degenerate and NaN batches, leaks,
threads.

A stale extension: test_backend.py. Faults on one of several ranks: test_integrations_ranks.py.
"""

import concurrent.futures
import copy
import gc
import itertools
import math
import os
import re
import resource

import pytest
import torch
from torch import nn

import vkd_kernels as vk
from tests.helpers import processes
from vkd_kernels.ops.ortho_proj_loss import api, dispatch

OPTIONS = {
    **{name: {"normalization": name} for name in api.NORMALIZATIONS},
    "squared error": {"loss": "mse", "affine": False},  # with an orthonormal weight: a form of its own
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
S, T = 6, 16


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["reference", "chunked"])
def path(request, monkeypatch):
    """Both ways PyTorch takes: the definition, and the operators of large problems."""
    monkeypatch.setattr(dispatch, "CHUNKED_FROM", -1 if request.param == "chunked" else math.inf)
    return request.param


class Distiller(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.student = nn.Linear(8, S)
        self.loss = vk.OrthoProjLoss(S, T, **{"affine": True, "scale": "learned", **options})

    def forward(self, x, y, mask=None):
        return self.loss(self.student(x), y, mask)


def train(module, optimizer, batches, steps):
    """Steps of the optimizer over the batches in turn; yields every loss."""
    for step in range(steps):
        loss = module(*batches[step % len(batches)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()


def orthogonality_error(p):
    p = p.detach().double()
    return (p.T @ p - torch.eye(p.shape[1])).abs().max().item()


# -------------------------------------------------------------------------------------------------------- bad arguments


def test_every_bad_argument_is_named(capsys):
    """In a process of its own, so that a crash or a hang is a failure of this test alone."""
    result = processes.run_python("-m", "tests.helpers.fuzz_arguments", seconds=900)
    with capsys.disabled():
        print("\nfuzz:", result.stdout.splitlines()[0] if result.stdout else result)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert int(re.match(r"(\d+) distinct bad calls", result.stdout)[1]) >= 500


# ----------------------------------------------------------------------------------------------- absurd learning rates

OPTIMIZERS = {
    "SGD 1e3": lambda p: torch.optim.SGD(p, lr=1e3, momentum=0.9),
    "SGD 1e6": lambda p: torch.optim.SGD(p, lr=1e6, momentum=0.9),
    "SGD 1e12": lambda p: torch.optim.SGD(p, lr=1e12, momentum=0.9),
    "AdamW 10, decay 0.05": lambda p: torch.optim.AdamW(p, lr=10, weight_decay=0.05),
    "AdamW 1e3": lambda p: torch.optim.AdamW(p, lr=1e3, weight_decay=0),
    "AdamW 1e5": lambda p: torch.optim.AdamW(p, lr=1e5, weight_decay=0),
    "RMSprop 100": lambda p: torch.optim.RMSprop(p, lr=100),
    "SGD 0": lambda p: torch.optim.SGD(p, lr=0.0),
    "Rprop 1": lambda p: torch.optim.Rprop(p, lr=1.0, step_sizes=(1e-6, 1e6)),
}


@pytest.mark.parametrize("shape", [(S, T), (T, S), (S, S)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_orthonormal_at_any_learning_rate(optimizer, shape):
    """Hundreds of steps, thousands in all: weights grow up to 1e10, the projection stays a projection."""
    s, t = shape
    module = vk.OrthoProjLoss(s, t)
    batches = [(torch.randn(12, s), torch.randn(12, t)) for _ in range(4)]
    for step, loss in enumerate(train(module, optimizer(module.parameters()), batches, 200)):
        assert loss.isfinite()
        if step % 10 == 0:
            p = module.projection.weight
            assert orthogonality_error(p if t >= s else p.T) <= 1e-5, module.projection.unconstrained.abs().max()


# --------------------------------------------------------------------------------------------------- degenerate batches

DEGENERATE = {
    "zero student": lambda: (torch.zeros(9, 8), torch.randn(9, T), None),
    "zero teacher": lambda: (torch.randn(9, 8), torch.zeros(9, T), None),
    "constant teacher rows": lambda: (torch.randn(9, 8), torch.randn(9, 1).expand(9, T), None),
    "equal teacher rows": lambda: (torch.randn(9, 8), torch.randn(1, T).expand(9, T), None),
    "one row": lambda: (torch.randn(1, 8), torch.randn(1, T), None),
    "one row left": lambda: (torch.randn(9, 8), torch.randn(9, T), torch.arange(9) == 4),
    "none left": lambda: (torch.randn(9, 8), torch.randn(9, T), torch.zeros(9, dtype=torch.bool)),
    "tiny weights": lambda: (torch.randn(9, 8), torch.randn(9, T), torch.full((9,), 1e-30)),
    "huge weights": lambda: (torch.randn(9, 8), torch.randn(9, T), torch.full((9,), 1e30)),
    "tiny features": lambda: (torch.randn(9, 8), torch.randn(9, T) * 1e-30, None),
    "large features": lambda: (torch.randn(9, 8), torch.randn(9, T) * 1e6 + 1e6, None),
}


@pytest.mark.parametrize("batch", DEGENERATE.values(), ids=DEGENERATE)
@every_option
def test_degenerate_batches_do_no_harm(path, options, batch):
    """Steps on nothing else, then steps on good batches: finite throughout, and what follows still learns."""
    module = Distiller(**options)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.05)
    for loss in train(module, optimizer, [batch() for _ in range(3)], 10):
        assert loss.isfinite()
    assert all(p.isfinite().all() for p in module.parameters())
    assert orthogonality_error(module.loss.projection.weight) <= 1e-5
    x = torch.randn(32, 8)
    good = [(x, x @ torch.randn(8, T))]
    losses = list(train(module, torch.optim.AdamW(module.parameters(), lr=2e-2), good, 25))
    assert losses[-1] < 0.95 * losses[0]


@every_option
def test_a_nan_batch_shows_and_harms_nobody_who_skips_it(path, options):
    """One in five batches has a NaN or an Inf: the loss tells, GradScaler skips, and those steps leave no trace.

    (An infinite teacher that is not normalized has an infinite loss whose gradient, smooth L1's, is ±1 all the same.)
    """
    clean = Distiller(**options)
    spoilt = copy.deepcopy(clean)
    batches = [(torch.randn(9, 8), torch.randn(9, T)) for _ in range(60)]
    reached = []
    for module in (clean, spoilt):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=10**6, backoff_factor=0.999)
        for step, (x, y) in enumerate(batches):
            if step % 5 == 3:
                if module is clean:
                    continue
                x, y = x.clone(), y.clone()
                where, poison = [(x, math.nan), (y, math.nan), (x, math.inf)][step // 5 % 3]
                where[4, 3] = poison
            before = [p.detach().clone() for p in module.parameters()]
            loss = module(x, y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            unchanged = all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
            assert bool(loss.isfinite()) == (step % 5 != 3) and unchanged == (step % 5 == 3)
        reached.append(module(*batches[0]).item())
    assert reached[1] == pytest.approx(reached[0], rel=1e-3)


def test_a_nan_parameter_is_not_hidden():
    """A caller who does not skip such a step sees it from then on."""
    module = Distiller()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x, y = torch.randn(9, 8), torch.randn(9, T)
    for _ in train(module, optimizer, [(x * math.nan, y)], 1):
        pass
    assert module(x, y).isnan() and module.loss.projection.weight.isnan().any()


# ------------------------------------------------------------------------------------------------------ memory, threads


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc to tell the memory in use")
def test_memory_does_not_grow_over_thousands_of_steps(monkeypatch):
    """Both paths, every option, and errors on the way: 3000 steps after the first hundreds add nothing.

    In five parts, of which the one that grew least is judged: a leak grows in each, an allocator's whim in one.
    """
    modules = [Distiller(**options) for options in OPTIONS.values()]
    optimizers = [torch.optim.SGD(module.parameters(), lr=1e-3) for module in modules]
    x, y = torch.randn(64, 8), torch.randn(64, T)  # one tensor of a step that stayed would show: 2 kB and more

    def run(steps):
        for step in range(steps):
            i = step % len(modules)
            dispatch.CHUNKED_FROM = -1 if step % 2 else math.inf
            for _ in train(modules[i], optimizers[i], [(x, y)], 1):
                pass
            if step % 50 == 0:
                with pytest.raises(ValueError, match="student"):
                    modules[i].loss(x[:, :3], y)
        gc.collect()
        return resident_bytes(), sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    monkeypatch.setattr(dispatch, "CHUNKED_FROM", dispatch.CHUNKED_FROM)  # put back at the end
    run(500)
    seen = [run(100), *(run(600) for _ in range(5))]
    (growth, tensors) = (min(b - a for a, b in itertools.pairwise(column)) for column in zip(*seen, strict=True))
    assert tensors <= 0
    assert growth < 1 << 20, f"{growth / 600:.0f} bytes a step"


def test_threads_give_the_bits_of_one_thread(path):
    """Eight threads over the same modules, forward and backward, in different modes."""
    modules = [Distiller(**options) for options in OPTIONS.values()]
    data = [(torch.randn(33, 8), torch.randn(33, T)) for _ in range(8)]

    def work(job):
        module, (x, y) = modules[job % len(modules)], data[job % len(data)]
        # Threads share autocast's cache of cast weights: one without a graph may come from a thread without gradients.
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=job % 3 == 0, cache_enabled=False)
        with autocast, torch.set_grad_enabled(job % 4 > 0):
            value = module(x, y)
        return [value.detach(), *(torch.autograd.grad(value, list(module.parameters())) if job % 4 else ())]

    jobs = range(240)
    alone = [work(job) for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(work, jobs))
    for ours, theirs in zip(at_once, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


FIRST_USE = """
import threading, torch
torch.set_num_threads(1)
barrier, results = threading.Barrier(8), []
def work():
    barrier.wait()
    import vkd_kernels as vk
    torch_generator = torch.Generator().manual_seed(0)
    w, x, y = (torch.randn(n, generator=torch_generator) for n in ((9, 4), (5, 4), (5, 9)))
    results.append(vk.functional.ortho_proj_loss(x, y, vk.cayley(w.requires_grad_())))
    results[-1].backward()
threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
assert len(results) == 8 and len({r.item() for r in results}) == 1, results
"""


def test_first_use_from_several_threads_at_once():
    """The extension is loaded and its operators are registered once, whoever comes first."""
    result = processes.run_python("-c", FIRST_USE, seconds=600)
    assert result.returncode == 0 and "Error" not in result.stderr, result.stderr


@pytest.mark.gpu
def test_streams_give_the_bits_of_one_stream():
    module = Distiller().cuda()
    data = [(torch.randn(513, 8, device="cuda"), torch.randn(513, T, device="cuda")) for _ in range(4)]

    def work(x, y):
        value = module(x, y)
        return [value.detach(), *torch.autograd.grad(value, list(module.parameters()))]

    alone = [work(*batch) for batch in data]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in data]
    for _ in range(20):
        at_once = []
        for stream, batch in zip(streams, data, strict=True):
            with torch.cuda.stream(stream):
                at_once.append(work(*batch))
        torch.cuda.synchronize()
        for ours, theirs in zip(at_once, alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
