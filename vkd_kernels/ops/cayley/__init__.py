"""The Cayley transform on the Stiefel manifold: api.py (start here), reference.py, extension.py."""

from .api import cayley, cayley_inverse

__all__ = ["cayley", "cayley_inverse"]
