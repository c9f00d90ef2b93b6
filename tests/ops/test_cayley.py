"""The Cayley transform: invariants, parity with the literal formula, gradients, scales, contract with torch.library."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import vkd_kernels as vk
from tests.helpers import processes
from vkd_kernels.functional import cayley_inverse
from vkd_kernels.ops import implementations
from vkd_kernels.ops.cayley import reference

BACKENDS = [
    "torch",
    pytest.param(
        "extension", marks=pytest.mark.skipif(implementations.extension()[0] is None, reason="no extension here")
    ),
]
SHAPES = [(5, 3), (4, 4), (1, 1), (9, 1), (3, 7), (1, 6), (2, 6, 4), (2, 3, 4, 4), (3, 2, 5), (150, 130)]


def orthogonality_error(q):
    q = q.double()
    q = q if q.shape[-2] >= q.shape[-1] else q.mT
    return (q.mT @ q - torch.eye(q.shape[-1], dtype=torch.float64)).abs().max().item()


def literal_cayley(weight):  # (T, S), T >= S: the first S columns of (I + K)^-1 (I - K)
    t, s = weight.shape
    u, v = weight[:s], weight[s:]
    k = torch.zeros(t, t, dtype=weight.dtype)
    k[:s, :s], k[:s, s:], k[s:, :s] = u - u.T, -v.T, v
    eye = torch.eye(t, dtype=weight.dtype)
    return torch.linalg.solve(eye + k, eye - k)[:, :s]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5, 3), (4, 4), (1, 1), (9, 1), (150, 130)])
def test_equals_the_literal_formula(shape, backend):
    weight = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(vk.cayley(weight, backend=backend), literal_cayley(weight), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_orthonormal_and_differentiable(shape, backend):
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    q = vk.cayley(weight, backend=backend)
    assert q.shape == weight.shape and q.dtype == weight.dtype
    assert orthogonality_error(q.detach()) < 1e-13
    if weight.numel() < 100:
        assert torch.autograd.gradcheck(lambda w: vk.cayley(w, backend=backend), (weight,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (3, 4, 4), (0, 5, 3), (1, 6, 2), (2, 300, 257)])
def test_a_batch_equals_a_loop(shape, backend):
    weight = torch.randn(shape, requires_grad=True)
    q = vk.cayley(weight, backend=backend)
    upstream = torch.randn(shape)
    (grad,) = torch.autograd.grad(q, weight, upstream)
    flat, upstream = weight.detach().flatten(0, -3).requires_grad_(), upstream.flatten(0, -3)
    for i in range(flat.shape[0]):
        one = vk.cayley(flat[i], backend=backend)
        torch.testing.assert_close(q.flatten(0, -3)[i], one)
        torch.testing.assert_close(grad.flatten(0, -3)[i], torch.autograd.grad(one, flat, upstream[i])[0][i])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 9, 14), (3, 120, 1400)])
def test_strided_weights_and_gradients(backend, dtype, shape):
    base = torch.randn(shape, dtype=dtype) / shape[1] ** 0.5
    weight = base.transpose(-1, -2)[:, ::2, ::2].requires_grad_()  # (2, 7, 5) and (3, 700, 60), no unit stride
    before = base.clone()
    q = vk.cayley(weight, backend=backend)
    grad = torch.autograd.grad(q, weight, torch.ones((), dtype=dtype).expand_as(q))[0]
    copy = weight.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    expected = vk.cayley(copy, backend=backend)
    torch.testing.assert_close(q, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, copy, torch.ones_like(copy))[0])
    assert torch.equal(base, before)


@pytest.fixture
def threads():
    """threads(n) sets the number of PyTorch's threads; what it was before comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def value_and_grad(weight, upstream, backend):
    leaf = weight.detach().clone().requires_grad_()
    q = vk.cayley(leaf, backend=backend)
    return q.detach(), torch.autograd.grad(q, leaf, upstream)[0]


# csrc/cayley/cpu/cayley.cpp chooses by these: tiny; a batch of one size of tile and of several; V in parts; LAPACK for
# one large matrix when there are several threads, and each thread with a large one of its own.
@pytest.mark.skipif(implementations.extension()[0] is None, reason="no extension here")
@pytest.mark.parametrize(
    "shape", [(5, 3), (9, 20, 7), (6, 32, 32), (7, 90, 80), (1300, 100), (3, 1200, 33), (1, 300, 257), (3, 300, 257)]
)
@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_threads_against_float64(shape, count, threads):
    threads(count)
    for dtype, limits in ((torch.float32, (1e-7, 1e-6)), (torch.float64, (1e-13, 1e-13))):
        weight, upstream = torch.randn(2, *shape, dtype=dtype) / shape[-1] ** 0.5
        truth = value_and_grad(weight.double(), upstream.double(), "torch")
        for got, expected, limit in zip(value_and_grad(weight, upstream, "extension"), truth, limits, strict=True):
            assert (got - expected).norm() <= limit * expected.norm()


def test_calls_from_two_threads_at_once(threads):
    threads(2)
    cases = [torch.randn(2, *shape) for shape in ((3, 70, 60), (300, 257), (5, 3))]
    expected = [value_and_grad(*case, None) for case in cases]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda i: value_and_grad(*cases[i % 3], None), range(6)))
    for i, got in enumerate(results):
        for a, b in zip(got, expected[i % 3], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("shape", [(3024, 192), (6, 256, 256), (257, 256), (1024, 130)])
def test_orthonormal_at_every_scale_in_float32(shape, scale, backend):
    assert orthogonality_error(vk.cayley(torch.randn(shape) * scale, backend=backend)) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["columns", "low rank", "one row"])
def test_orthonormal_for_badly_scaled_weights(kind, backend):
    weight = torch.randn(768, 192)
    if kind == "columns":
        weight *= torch.logspace(-3, 3, 192)
    elif kind == "low rank":
        weight[192:] = 0.1 * weight[192:] + 1e3 * torch.randn(576, 4) @ torch.randn(4, 192)
    else:
        weight[0] *= 1e3
    assert orthogonality_error(vk.cayley(weight, backend=backend)) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_float32_gradient_is_as_good_as_the_composition(backend, scale):
    """Three sides: float64 truth, the float32 composition a user would write, and ours: at most 1.5x its error."""
    weight, upstream = torch.randn(700, 190) * scale, torch.randn(700, 190)

    def composition(w):
        s = w.shape[1]
        u, v, eye = w[:s], w[s:], torch.eye(s, dtype=w.dtype)
        r = torch.linalg.inv(eye + u - u.T + v.T @ v)
        return torch.cat([2 * r - eye, -2 * v @ r])

    def gradient(f, w):
        w = w.clone().requires_grad_()
        return torch.autograd.grad(f(w), w, upstream.to(w.dtype))[0].double()

    truth = gradient(composition, weight.double())
    error = (gradient(lambda w: vk.cayley(w, backend=backend), weight) - truth).norm() / truth.norm()
    allowed = (gradient(composition, weight) - truth).norm() / truth.norm()
    assert error <= 1.5 * allowed + 1e-7


# What docs/method.md says of larger entries: float64 rounds VᵀV by 1e-16 of its norm, and where V is nearly of rank
# one, that falls on directions in which R is of size one.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rank", "largest", "limit"),
    [(192, 1e5, 1e-6), (192, 1e6, 1e-4), (1, 1e3, 3e-6), (1, 1e4, 3e-4)],
)
def test_how_orthonormality_ends_with_growing_entries(rank, largest, limit, backend):
    for t in (3024, 200):
        weight = torch.randn(t, rank) @ torch.randn(rank, 192) if rank < 192 else torch.randn(t, 192)
        weight *= largest / weight.abs().max()
        assert orthogonality_error(vk.cayley(weight, backend=backend)) <= limit


def test_zero_weight_gives_the_identity():
    assert torch.equal(vk.cayley(torch.zeros(5, 3)), torch.eye(5, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_gives_the_same_bits(backend):
    weight = torch.randn(40, 20, requires_grad=True)
    q = vk.cayley(weight, backend=backend)
    upstream = torch.randn_like(q)
    first, second = (torch.autograd.grad(q, weight, upstream, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3)])
def test_second_order_and_forward_mode(shape):
    def function(w):
        return vk.cayley(w, backend="torch")

    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (weight,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, (weight,), check_fwd_over_rev=True)


@pytest.mark.parametrize("outer", [torch.func.jacfwd, torch.func.jacrev])
@pytest.mark.parametrize("inner", [torch.func.jacfwd, torch.func.jacrev])
@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3)])
def test_second_derivatives_in_every_mode(shape, inner, outer):
    weight = torch.randn(shape, dtype=torch.float64)
    expected = torch.autograd.functional.hessian(lambda w: vk.cayley(w, backend="torch").pow(3).sum(), weight)
    torch.testing.assert_close(outer(inner(lambda w: vk.cayley(w).pow(3).sum()))(weight), expected)


def test_second_derivatives_under_vmap():
    weights = torch.randn(2, 4, 3, dtype=torch.float64)

    def value(w):
        return vk.cayley(w).pow(3).sum()

    expected = torch.stack([torch.func.hessian(value)(w) for w in weights])
    torch.testing.assert_close(torch.vmap(torch.func.hessian(value))(weights), expected)
    with pytest.raises(NotImplementedError, match=r"use torch.func.hessian \(forward over reverse\)"):
        torch.vmap(torch.func.jacfwd(torch.func.jacfwd(value)))(weights)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3)])
def test_a_traced_graph_of_the_reference_can_be_saved(shape, tmp_path):
    weight = torch.randn(shape)
    path = tmp_path / "traced.pt"
    torch.jit.trace(lambda w: vk.cayley(w, backend="torch"), weight).save(str(path))
    torch.testing.assert_close(torch.jit.load(str(path))(weight), vk.cayley(weight, backend="torch"))


VMAP_OF_LARGE_MATRICES = """
import torch, vkd_kernels as vk
torch.set_num_threads(2)
inv_ex = torch.linalg.inv_ex
def of_one_matrix(m):
    assert m.dim() == 2 and not torch._C._functorch.is_batchedtensor(m), m.shape
    return inv_ex(m)
torch.linalg.inv_ex = of_one_matrix
weights = torch.randn(4, 384, 192) / 14
for _ in range(6):
    mapped = torch.func.vmap(vk.cayley)(weights)
torch.testing.assert_close(mapped, torch.stack([vk.cayley(w, backend="torch") for w in weights]))
"""


def test_vmap_with_several_threads_ends():
    """PyTorch's batched LU does not always; the processes of `make test` have one thread each."""
    result = processes.run_python("-c", VMAP_OF_LARGE_MATRICES, seconds=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_keeps_its_precision_under_autocast(backend):
    weight = torch.randn(200, 150, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = vk.cayley(weight, backend=backend)
    assert q.dtype == torch.float32 and orthogonality_error(q.detach()) <= 1e-6
    upstream = torch.randn_like(q)
    (grad,) = torch.autograd.grad(q, weight, upstream, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (under_autocast,) = torch.autograd.grad(q, weight, upstream)
    assert torch.equal(grad, under_autocast)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [(15, 3), (2, 3), (2, 2)], ids=["V", "U", "diagonal of U"])
def test_nan_reaches_the_result(place, backend):
    weight = torch.randn(20, 10, requires_grad=True)
    with torch.no_grad():
        weight[place] = torch.nan
    q = vk.cayley(weight, backend=backend)
    assert q.isnan().any()
    assert torch.autograd.grad(q.sum(), weight)[0].isnan().any()


@pytest.mark.parametrize("shape", [(7, 4), (4, 4), (1, 1), (4, 7), (2, 3, 8, 5), (2, 5, 5)])
def test_inverse_restores_every_orthonormal_matrix(shape):
    wide = shape[-2] < shape[-1]
    q = torch.linalg.qr(torch.randn(*shape[:-2], *sorted(shape[-2:], reverse=True), dtype=torch.float64)).Q
    q = q.mT if wide else q
    for matrix in (q, -q, torch.eye(*shape[-2:], dtype=torch.float64).expand(shape) * -1):
        weight, signs = cayley_inverse(matrix)
        assert weight.shape == matrix.shape and bool((signs.abs() == 1).all())
        torch.testing.assert_close(vk.cayley(weight) * signs, matrix.contiguous(), rtol=0, atol=1e-12)


def test_inverse_is_well_conditioned_for_large_matrices():
    q = torch.linalg.qr(torch.randn(600, 300)).Q
    weight, signs = cayley_inverse(q)
    assert (vk.cayley(weight) * signs - q).abs().max() < 2e-6
    assert weight.abs().max() < 100


def hard_to_invert(n, x):
    """(n, n), orthogonal: in its own order pivots are 1 + x and the factors' inverses grow like 1.3^n."""
    q = torch.ones(1, 1, dtype=torch.float64)
    for k in range(1, n):
        row = torch.zeros(1, k, dtype=torch.float64)
        row[0, : min(4, k)] = -(((1 - x * x) / min(4, k)) ** 0.5)
        column = -q @ row.T
        q = torch.cat(
            [
                torch.cat([torch.full((1, 1), x, dtype=q.dtype), row], 1),
                torch.cat([column, q + column @ row / (1 + x)], 1),
            ]
        )
    return q


def test_inverse_eliminates_in_the_order_of_the_diagonal():
    q = torch.stack([hard_to_invert(96, 0.1), hard_to_invert(96, 0.01), torch.eye(96, dtype=torch.float64)])
    assert orthogonality_error(q) < 1e-12
    weight, signs = cayley_inverse(q)
    assert (vk.cayley(weight) * signs - q).abs().max() < 1e-13 and weight.abs().max() < 1


def test_inverse_says_if_it_has_found_no_weight(monkeypatch):
    monkeypatch.setattr(reference, "cayley_inverse", lambda q: (torch.zeros_like(q), torch.ones(q.shape[-1])))
    cayley_inverse(torch.eye(5, 3))
    with pytest.raises(ValueError, match="no weight was found for matrix: the best gives one that is off by 1"):
        cayley_inverse(torch.eye(5, 3).flip(0))


def test_inverse_refuses_a_matrix_that_is_not_orthonormal():
    with pytest.raises(ValueError, match=r"matrix must be semi-orthogonal; max .* is"):
        cayley_inverse(torch.randn(5, 3))


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([[1.0]], TypeError, "weight must be a tensor; got list"),
        (
            torch.randn(5, 3).bfloat16(),
            TypeError,
            r"weight .*float32, float64.*bfloat16 .*\(5, 3\).*keep the weight in",
        ),
        (torch.ones(5, 3, dtype=torch.long), TypeError, "weight .* got a int64"),
        (torch.randn(5, 3, dtype=torch.complex64), TypeError, "weight .* got a complex64"),
        (torch.randn(5), ValueError, r"weight must have the shape .*; got \(5,\)"),
        (torch.randn(5, 0), ValueError, r"weight must have the shape .*; got \(5, 0\)"),
        (torch.randn(5, 3).to_sparse(), TypeError, "weight must be a dense tensor"),
    ],
)
def test_bad_weights(weight, error, message):
    with pytest.raises(error, match=message):
        vk.cayley(weight)


@pytest.mark.skipif(implementations.extension()[0] is None, reason="no extension here")
class TestExtensionOps:
    @pytest.mark.parametrize("shape", [(5, 3), (2, 4, 4), (2, 3, 5, 1)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_opcheck(self, shape, dtype):
        weight = torch.randn(shape, dtype=dtype, requires_grad=True)
        torch.library.opcheck(torch.ops.vkd_kernels.cayley_forward.default, (weight,))
        q, r = torch.ops.vkd_kernels.cayley_forward(weight.detach())
        torch.library.opcheck(torch.ops.vkd_kernels.cayley_backward.default, (q, weight.detach(), r))

    def test_second_order_gradient_is_refused_with_advice(self):
        weight = torch.randn(5, 3, requires_grad=True)
        (grad,) = torch.autograd.grad(vk.cayley(weight, backend="extension").sum(), weight, create_graph=True)
        with pytest.raises(RuntimeError, match='backend="torch"'):
            grad.sum().backward()

    def test_schema_checks(self):
        with pytest.raises(ValueError, match="T >= S"):
            torch.ops.vkd_kernels.cayley_forward(torch.randn(3, 5))
        with pytest.raises(TypeError, match="float32 or float64"):
            torch.ops.vkd_kernels.cayley_forward(torch.randn(5, 3).half())
        with pytest.raises(ValueError, match="at most 1073741824 rows"):
            torch.ops.vkd_kernels.cayley_forward(torch.zeros(1, 1).expand(2**30 + 1, 1))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda q, r: (q[:4], r), ValueError, r"grad_q must have the weight's shape \[5, 3\]; got \[4, 3\]"),
            (lambda q, r: (q, r[:2]), ValueError, r"r must have the shape \[3, 3\]; got \[2, 3\]"),
            (lambda q, r: (q.double(), r), TypeError, "grad_q must be Float as the weight is; got Double"),
            (lambda q, r: (q, r.float()), TypeError, "r must be float64; got Float"),
        ],
    )
    def test_schema_checks_of_the_gradient(self, change, error, message):
        weight = torch.randn(5, 3)
        grad_q, r = change(*torch.ops.vkd_kernels.cayley_forward(weight))
        with pytest.raises(error, match=message):
            torch.ops.vkd_kernels.cayley_backward(grad_q, weight, r)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend):
    def step(w):
        return (vk.cayley(w, backend=backend) ** 3).sum()

    weight = torch.randn(9, 4, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(step(weight), weight)
    torch.testing.assert_close(torch.autograd.grad(compiled(weight), weight)[0], expected)


def test_meta_tensors():
    assert vk.cayley(torch.empty(7, 3, device="meta"), backend="torch").shape == (7, 3)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (2, 5, 5)])
def test_forward_mode_derivative(shape):
    weight, tangent = torch.randn(2, *shape, dtype=torch.float64).unbind(0)
    _, expected = torch.func.jvp(lambda w: vk.functional.cayley(w, backend="torch"), (weight,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, tangent)
        for backend in (None, "torch"):
            value = torch.autograd.forward_ad.unpack_dual(vk.functional.cayley(dual, backend=backend))
            torch.testing.assert_close(value.tangent, expected)
        if implementations.extension()[0] is not None:
            with pytest.raises(RuntimeError, match='no forward-mode derivative of cayley: use backend="torch"'):
                vk.functional.cayley(dual, backend="extension")
