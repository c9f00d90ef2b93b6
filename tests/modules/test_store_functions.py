"""Functions as teacher_pool of a FeatureStore: told apart, or refused."""

import functools
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vkd_kernels as vk

SAMPLES, TOKENS = 10, 5
DATA = torch.randn(SAMPLES, TOKENS, 4, generator=torch.Generator().manual_seed(0))
TEACHER = nn.Linear(4, 6)


def token(i):
    def pool(x):
        return x[:, i]

    return pool


def by_default(i):
    return lambda x, i=i: x[:, i]


def of_tensor(i):
    index = torch.tensor(i)
    return lambda x: x[:, index]


def after(function):
    return lambda x: function(x)


class Token:
    def __init__(self, i):
        self.i = i

    def __call__(self, x):
        return x[:, self.i]

    def pool(self, x):
        return x[:, self.i]


class Projected(nn.Module):
    def __init__(self, seed):
        super().__init__()
        weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return F.linear(x[:, 0], self.weight)


TOLD_APART = {
    "closures": token,
    "defaults": by_default,
    "partials": lambda i: functools.partial(torch.select, dim=1, index=i),
    "closures of functions": lambda i: after(token(i)),
    "objects": Token,
    "methods": lambda i: Token(i).pool,
    "modules": Projected,
    "functions in C": lambda i: operator.itemgetter((slice(None), i)),
}


def pairs_of(pools):
    return [
        vk.Pair("", "", student_pool="class_token", teacher_pool=pool, dims=(4, 6), name=f"pair {i}")
        for i, pool in enumerate(pools)
    ]


def build(folder, pairs, teacher=TEACHER):
    return vk.FeatureStore.build(folder, teacher, DATA, pairs, dtype=torch.float32, progress=False)


def losses(teacher, pairs, **options):
    torch.manual_seed(0)
    distiller = vk.FeatureDistiller(nn.Identity(), teacher, pairs).eval()
    return distiller(DATA, **options)[1]


def check_losses(store, pairs):
    expected = losses(TEACHER, pairs)
    for name, loss in losses(store, pairs, indices=range(SAMPLES)).items():
        torch.testing.assert_close(loss, expected[name])


@pytest.mark.parametrize("kind", TOLD_APART)
def test_functions_bound_to_other_values_are_other_features(tmp_path, kind):
    made = TOLD_APART[kind]
    pairs = pairs_of([made(0), made(1), made(2)])
    store = build(tmp_path / "a", pairs)
    assert len(store.taps) == 3
    check_losses(store, pairs)
    again = pairs_of([made(i) for i in (2, 1)])
    check_losses(vk.FeatureStore(tmp_path / "a"), again)  # as another process does
    build(tmp_path / "a", pairs_of([made(i) for i in range(3)]))
    build(tmp_path / "b", pairs_of([made(0)]))
    with pytest.raises(ValueError, match="pair 'pair 0': the store in .* has no features of"):
        vk.FeatureStore(tmp_path / "b").key_of(pairs_of([made(1)])[0])


def test_one_function_is_one_tap_whoever_made_it(tmp_path):
    first = token(0)
    pairs = pairs_of([first, first, token(0), after(first)])
    store = build(tmp_path, pairs)
    assert len(store.taps) == 2
    check_losses(store, pairs)
    check_losses(store, pairs_of([token(0), token(0), token(0), after(token(0))]))


def two_lambdas():
    return [lambda x, dim=1: x.sum(dim), lambda x, dim=1: x.mean(dim)]


NOT_TOLD_APART = {
    "lambdas": two_lambdas,
    "closures of tensors": lambda: [of_tensor(0), of_tensor(1)],
    "partials of lambdas": lambda: [functools.partial(f, dim=1) for f in two_lambdas()],
    "objects": lambda: [Token(torch.tensor(i)) for i in (0, 1)],
}


@pytest.mark.parametrize("kind", NOT_TOLD_APART)
def test_functions_that_a_name_does_not_tell_apart_are_refused(tmp_path, kind):
    pairs = pairs_of(NOT_TOLD_APART[kind]())
    message = r"pairs 'pair 0' and 'pair 1' have two functions as teacher_pool that a store can't tell apart, '.*a name"
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "a", pairs)
    assert not (tmp_path / "a" / "store.json").exists()
    taps = [{"teacher": pair.teacher, "teacher_pool": pair.teacher_pool} for pair in pairs]
    with pytest.raises(ValueError, match=r"pairs 'taps\[0\]' and 'taps\[1\]' have two functions"):
        build(tmp_path / "a", taps)
    build(tmp_path / "b", pairs[:1])
    with pytest.raises(ValueError, match=message):  # though each alone has the name of what is stored
        vk.FeatureDistiller(nn.Identity(), vk.FeatureStore(tmp_path / "b"), pairs)


def test_a_function_that_was_edited_since_the_build_is_refused(tmp_path):
    """As in a notebook whose cell was changed and run again."""
    store = build(tmp_path, pairs_of([eval("lambda x: x[:, 0]")]))
    check_losses(store, pairs_of([eval("lambda x: x[:, 0]")]))
    edited = pairs_of([eval("lambda x: x[:, 1]")])
    with pytest.raises(
        ValueError, match=r"pair 'pair 0': its teacher_pool '<lambda>' has the name of .* is another one"
    ):
        vk.FeatureDistiller(nn.Identity(), store, edited)
    with pytest.raises(ValueError, match="features of the same samples differ: another pool"):
        build(tmp_path, edited)
    pickle.loads(pickle.dumps(store)).key_of(edited[0])  # elsewhere nobody knows the function; the docs say so


def test_an_edited_function_among_some_of_the_taps_is_noticed(tmp_path):
    tokens = {"teacher": "", "teacher_pool": "tokens"}
    build(tmp_path, [tokens, *pairs_of([eval("lambda x: x[:, 0]")])])
    build(tmp_path, [tokens])
    with pytest.raises(ValueError, match="features of the same samples differ: another pool"):
        build(tmp_path, pairs_of([eval("lambda x: x[:, 1]")]))


def local_recursion():
    def flat(x, depth=2):
        return flat(x, depth - 1) if depth else x[:, 0]

    return flat


def test_functions_bound_to_themselves(tmp_path):
    pairs = pairs_of([local_recursion(), torch.no_grad()(token(1))])
    store = build(tmp_path, pairs)
    check_losses(store, pairs)
    vk.FeatureStore(tmp_path).key_of(pairs_of([local_recursion()])[0])
