"""What to look at while distilling: orthogonality error, effective rank and CKA of features, as 0-d tensors.

Everything is float64 inside, without gradients, and costs a few covariances: nothing is N x N for N rows beyond C.
"""

import torch
from torch.distributed import ProcessGroup

from .ops import checks
from .ops.float64 import as_float64
from .ops.normalization.all_reduce import all_reduce, check_group
from .ops.normalization.reference import in_float64, mean, sum_of_weights, without_masked_rows

__all__ = ["cka", "effective_rank", "metrics", "orthogonality_error"]
MOST_ROWS = 4096  # of a batch that ``metrics`` looks at: enough for features, and a cap on its memory and time


@torch.no_grad()
def orthogonality_error(weight: torch.Tensor) -> torch.Tensor:  # (..., T, S) -> ()
    """max |PᵀP - I| of a projection ``(..., T, S)``, or of its transpose where it is wide; float64.

    Raises:
        TypeError, ValueError: naming the argument, with what came.

    Example:
        >>> import torch, vkd_kernels as vk
        >>> vk.diagnostics.orthogonality_error(2 * torch.eye(7, 3)).item()
        3.0
    """
    checks.check_tensor("weight", weight)
    if weight.dim() < 2 or weight.numel() == 0:
        raise ValueError(f"weight must have the shape (..., T, S) and not be empty; got {tuple(weight.shape)}")
    tall = as_float64(weight if weight.shape[-2] >= weight.shape[-1] else weight.mT)
    eye = torch.eye(tall.shape[-1], dtype=tall.dtype, device=tall.device)
    return (tall.mT @ tall - eye).abs().amax()


@torch.no_grad()
def effective_rank(
    features: torch.Tensor,  # (..., C)
    *,
    mask: torch.Tensor | None = None,  # (...)
    process_group: ProcessGroup | None = None,
) -> torch.Tensor:  # ()
    r"""How many directions features use: exp of the entropy of their normalized singular values (Roy & Vetterli 2007).

    ::

        p_i = σ_i / Σ σ        effective rank = exp(-Σ p_i log p_i)        σ: singular values of the centered rows

    Between 1 (all rows on a line) and the smaller of C and N - 1 (no direction preferred); 0 for equal rows. A student
    whose rank falls while its loss does has collapsed. On a GPU this is the one diagnostic that waits for its result:
    PyTorch checks on the host that the eigenvalues converged.

    Args:
        features: ``(..., C)`` float32, float64, bfloat16 or float16; rows are all dimensions but the last.
        mask: ``(...)`` bool or float: rows of weight 0 are left out, all others count alike.
        process_group: over the rows of all its ranks; ``None``: of this process alone.

    Returns:
        float64, 0-d. NaN if a counted row holds NaN or Inf.

    Raises:
        TypeError, ValueError: naming the argument, with what came; ValueError also for no rows.

    Example:
        >>> import torch, vkd_kernels as vk
        >>> x = torch.randn(100, 1) @ torch.randn(1, 8)  # all on one line
        >>> round(vk.diagnostics.effective_rank(x).item(), 3)
        1.0
    """
    rows, kept = _rows("features", features, mask, process_group)
    scatter = _scatter(_centered(rows, kept, process_group), process_group)
    finite = scatter.isfinite().all()
    squares = torch.linalg.eigvalsh(torch.where(finite, scatter, 0.0))  # σ²
    # Below this an eigenvalue is rounding, whose root would count.
    floor = squares[-1] * squares.shape[0] * torch.finfo(squares.dtype).eps
    singular = torch.where(squares > floor, squares, 0.0).sqrt()
    total = singular.sum()
    rank = torch.special.entr(singular / torch.where(total > 0, total, 1.0)).sum().exp() * (total > 0)
    return torch.where(finite, rank, torch.nan)


@torch.no_grad()
def cka(
    student: torch.Tensor,  # (..., S)
    teacher: torch.Tensor,  # (..., T)
    *,
    mask: torch.Tensor | None = None,  # (...)
    debiased: bool = True,
    process_group: ProcessGroup | None = None,
) -> torch.Tensor:  # ()
    r"""Linear centered kernel alignment: how alike two sets of features are, up to rotation and scale.

    ::

        CKA = HSIC(X, Y) / √(HSIC(X, X) HSIC(Y, Y))

    With ``debiased=False`` HSIC(X, Y) = ‖XᵀY‖² for centered columns (Kornblith et al. 2019). That estimate is biased:
    it tends to 1 for any features of more channels than rows. ``debiased`` takes the unbiased one of Song et al.
    (2012), of K = XXᵀ and L = YYᵀ without their diagonals, which for centered X and Y comes to

    ::

        HSIC ∝ ‖XᵀY‖² - n/(n-2) Σ a_i b_i + Σ a_i Σ b_i / ((n-1)(n-2))        a_i = ‖x_i‖², b_i = ‖y_i‖²

    so that independent features give 0 on average. 1 for features that are equal up to rotation, scale and offset: a
    semi-orthogonal projection, to as many channels or more, changes nothing.

    Args:
        student: ``(..., S)`` float32, float64, bfloat16 or float16; rows are all dimensions but the last.
        teacher: ``(..., T)`` with the same rows.
        mask: ``(...)`` bool or float: rows of weight 0 are left out, all others count alike.
        debiased: see above; needs four rows.
        process_group: over the rows of all its ranks; ``None``: of this process alone.

    Returns:
        float64, 0-d, at most 1. NaN where there is nothing to tell: no variance, too few rows, rows all equally far
        apart (for ``debiased``), NaN or Inf in one.

    Raises:
        TypeError, ValueError: naming the argument, with what came; ValueError also for no rows.

    Example:
        >>> import torch, vkd_kernels as vk
        >>> x = torch.randn(100, 8)
        >>> round(vk.diagnostics.cka(x, x @ vk.cayley(torch.randn(12, 8)).T).item(), 3)
        1.0
    """
    if not isinstance(debiased, bool):
        raise TypeError(f"debiased must be True or False; got {checks.describe(debiased)}")
    x, y, kept = _pair(student, teacher, mask, process_group)
    x, y = _centered(x, kept, process_group), _centered(y, kept, process_group)
    n = sum_of_weights(x[:, :0], in_float64(kept), process_group)

    def hsic(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # () and its rounding error
        product = _scatter(x, process_group) if x is y else all_reduce(x.mT @ y, process_group)
        product = product.square().sum()
        if not debiased:
            return product, 0.0 * product
        a, b = x.square().sum(1), y.square().sum(1)
        ab, a, b = all_reduce(torch.stack([(a * b).sum(), a.sum(), b.sum()]), process_group)
        diagonal, rest = n / (n - 2) * ab, a * b / ((n - 1) * (n - 2))
        return product - diagonal + rest, 1e-12 * (product + diagonal + rest).abs()

    (xx, xx_error), (yy, yy_error) = hsic(x, x), hsic(y, y)
    value = hsic(x, y)[0] / xx.sqrt() / yy.sqrt()
    # Features without variance, or whose debiased HSIC is 0 or less, are like nothing, themselves included.
    told = (xx > xx_error) & (yy > yy_error)
    return torch.where((told & (n > 3)) if debiased else told, value, torch.nan)


@torch.no_grad()
def metrics(
    student: torch.Tensor,  # (..., S)
    teacher: torch.Tensor,  # (..., T)
    weight: torch.Tensor,  # (T, S)
    *,
    mask: torch.Tensor | None = None,  # (...)
    process_group: ProcessGroup | None = None,
) -> dict[str, torch.Tensor]:
    """Orthogonality error, effective rank of both sides and CKA, of one pair of features and its projection.

    For a logger; the functions below explain each. Of more than 4096 rows at most as many are used, evenly spaced.
    With a process group every rank must call.

    Returns:
        0-d tensors by name: ``orthogonality_error``, ``effective_rank_student``, ``effective_rank_teacher``, ``cka``
        (debiased).

    Example:
        >>> import torch, vkd_kernels as vk
        >>> distill = vk.OrthoProjLoss(192, 1024)
        >>> student, teacher = torch.randn(32, 192), torch.randn(32, 1024)
        >>> report = vk.diagnostics.metrics(student, teacher, distill.projection.weight)
        >>> bool(report["orthogonality_error"] < 1e-5 and 1 < report["effective_rank_student"] < 32)
        True
    """
    x, y, kept = _pair(student, teacher, mask, process_group)
    checks.check_tensor("weight", weight)
    if tuple(weight.shape) != (y.shape[1], x.shape[1]):
        raise ValueError(f"weight must have the shape (T, S) = {(y.shape[1], x.shape[1])}; got {tuple(weight.shape)}")
    if x.shape[0] > MOST_ROWS:
        step = -(-x.shape[0] // MOST_ROWS)
        x, y, kept = x[::step], y[::step], None if kept is None else kept[::step]
    return {
        "orthogonality_error": orthogonality_error(weight),
        "effective_rank_student": effective_rank(x, mask=kept, process_group=process_group),
        "effective_rank_teacher": effective_rank(y, mask=kept, process_group=process_group),
        "cka": cka(x, y, mask=kept, process_group=process_group),
    }


def _rows(
    name: str,
    features: torch.Tensor,  # (..., C)
    mask: torch.Tensor | None,  # (...)
    group: ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # (N, C), (N,)
    """Features as 2-D rows in their own dtype; which of them count, as bools."""
    checks.check_tensor(name, features)
    check_group(group)
    if features.dim() < 2 or features.shape[-1] < 1:
        raise ValueError(
            f"{name} must have the shape (..., C) with at least one row dimension; got {tuple(features.shape)}"
        )
    if features.numel() == 0 and group is None:
        raise ValueError(f"{name} has no rows: its shape is {tuple(features.shape)}")
    dtype = mask.dtype if isinstance(mask, torch.Tensor) else torch.float32  # its own, in which no weight becomes 0
    weight = checks.row_weights("mask", mask, features.shape[:-1], features, dtype)
    return features.reshape(-1, features.shape[-1]), None if weight is None else weight > 0


def _pair(
    student: torch.Tensor,  # (..., S)
    teacher: torch.Tensor,  # (..., T)
    mask: torch.Tensor | None,  # (...)
    group: ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # (N, S), (N, T), (N,)
    """The rows of both, and which of them count."""
    x, kept = _rows("student", student, mask, group)
    y, _ = _rows("teacher", teacher, None, group)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student and teacher must have the same rows; got student of shape "
            f"{tuple(student.shape)} and teacher of shape {tuple(teacher.shape)}"
        )
    checks.check_same_device("teacher", teacher, "student", student)
    return x, y, kept


def _centered(
    rows: torch.Tensor,  # (N, C)
    kept: torch.Tensor | None,  # (N,)
    group: ProcessGroup | None,
) -> torch.Tensor:  # (N, C) float64
    """Rows minus their mean; 0 where that is rounding: a channel whose values are all the same has no variance."""
    weight = in_float64(kept)
    rows = without_masked_rows(as_float64(rows), weight)
    mu = mean(rows, weight, group)
    centered = without_masked_rows(rows - mu, weight)
    rounding = 32 * torch.finfo(rows.dtype).eps * mu.abs()
    return torch.where(centered.abs() <= rounding, 0.0, centered)


def _scatter(rows: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:  # (N, C) -> (C, C), or (N, N)
    """XᵀX over all ranks; of fewer rows than channels XXᵀ, which has the same norm and eigenvalues (but zeros)."""
    few = group is None and rows.shape[0] < rows.shape[1]
    return rows @ rows.mT if few else all_reduce(rows.mT @ rows, group)
