"""The stateless functions, gathered."""

from .cayley import cayley, cayley_inverse
from .normalization import standardize, whiten
from .ortho_proj_loss import ortho_proj_loss

__all__ = ["cayley", "cayley_inverse", "ortho_proj_loss", "standardize", "whiten"]
