"""Feature distillation with an orthogonal projection (V_kD): the public names."""

from . import diagnostics, functional
from ._info import info
from ._version import __version__
from .distiller import FeatureDistiller
from .images import renormalize
from .loss import OrthoProjLoss
from .ops.cayley import cayley
from .ops.normalization import Standardization, Whitening
from .pairs import Pair
from .parametrization import orthogonal
from .projection import OrthogonalLinear
from .store import FeatureStore

__all__ = [
    "FeatureDistiller",
    "FeatureStore",
    "OrthoProjLoss",
    "OrthogonalLinear",
    "Pair",
    "Standardization",
    "Whitening",
    "__version__",
    "cayley",
    "diagnostics",
    "functional",
    "info",
    "orthogonal",
    "renormalize",
]
