"""The loss as Triton kernels: what spec.py says that an implementation offers."""

from .entry import (
    group_loss,
    loss,
    semi_orthogonal_group_loss,
    semi_orthogonal_loss,
)
from .statistics import column_square_sums, column_sums, student_scatters

__all__ = [
    "column_square_sums",
    "column_sums",
    "group_loss",
    "loss",
    "semi_orthogonal_group_loss",
    "semi_orthogonal_loss",
    "student_scatters",
]
