"""The projected, normalized feature loss: api.py (start here), dispatch.py, reference.py, chunked.py, triton/."""

from .api import ortho_proj_loss, ortho_proj_losses

__all__ = ["ortho_proj_loss", "ortho_proj_losses"]
