"""What the properties draw: shapes, strides, dtypes and masks; how many examples there were, which a run prints."""

import collections

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings

EXAMPLES = collections.Counter()
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
FULL, HALF = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)

dims = st.integers(1, 12)
dtypes = st.sampled_from(list(EPS))
layouts = st.sampled_from(["contiguous", "transposed", "sliced", "offset"])
masks = st.sampled_from([None, "bool", "weights", "ones", "empty"])
row_shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3)


def examples(n):
    """The same examples in every run: a property that fails today failed yesterday."""
    return settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture(autouse=True, scope="module")
def counted(request):
    """For a module of properties, which imports it: one thread, and the number of its examples at the end."""
    EXAMPLES.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nproperties: {dict(EXAMPLES)}, {EXAMPLES.total()} examples in all")


def count(name):
    EXAMPLES[name] += 1


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def laid_out(x, layout):
    """The same values with other strides; what lies between them is NaN, and must not be read."""
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "contiguous":
        return x
    step, start = (2, 1) if layout == "sliced" else (1, 3)
    room = x.new_full((*x.shape[:-1], start + step * x.shape[-1]), torch.nan)
    room[..., start : start + step * x.shape[-1] : step] = x
    view = room[..., start : start + step * x.shape[-1] : step]
    assert torch.equal(view, x)
    return view


def mask_of(kind, rows, seed):
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(rows, generator=generator)
    weights = {"bool": drawn > 0.4, "weights": torch.where(drawn > 0.3, 3 * drawn, 0.0), "ones": torch.ones(rows)}
    return torch.zeros(rows, dtype=torch.bool) if kind == "empty" else weights[kind]


def tall(x):
    return x if x.shape[-2] >= x.shape[-1] else x.mT


def orthogonality_error(q):
    q = tall(q.detach().double())
    return (q.mT @ q - torch.eye(q.shape[-1], dtype=torch.float64)).abs().max().item()


def drawn_rows(shape, channels, dtype, layout, power, seed):
    """Rows with an offset and unequal channels, rounded to dtype; and those very values in float64."""
    x = normal(*shape, channels, seed=seed) * (1 + torch.arange(channels) % 3) + normal(channels, seed=seed + 1)
    x = laid_out((x * 10.0**power).to(dtype), layout)
    return x, x.double().reshape(-1, channels)


def weights_of(mask, rows):
    return torch.ones(rows, dtype=torch.float64) if mask is None else mask.double().reshape(-1)
