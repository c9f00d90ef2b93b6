"""The projected, normalised feature loss: interface.py (start here), reference.py, triton_op.py, triton_kernels.py."""

from .interface import ortho_proj_loss, ortho_proj_losses

__all__ = ["ortho_proj_loss", "ortho_proj_losses"]
