"""The stateless functions, gathered."""

from .ops.cayley import cayley, cayley_inverse
from .ops.normalization import standardize, whiten
from .ops.ortho_proj_loss import ortho_proj_loss, ortho_proj_losses

__all__ = ["cayley", "cayley_inverse", "ortho_proj_loss", "ortho_proj_losses", "standardize", "whiten"]
