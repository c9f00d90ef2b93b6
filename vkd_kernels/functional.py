"""The stateless functions, gathered."""

from .cayley import cayley, cayley_inverse
from .normalization import standardize, whiten
from .ortho_proj_loss import ortho_proj_loss, ortho_proj_losses

__all__ = ["cayley", "cayley_inverse", "ortho_proj_loss", "ortho_proj_losses", "standardize", "whiten"]
