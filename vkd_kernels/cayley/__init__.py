"""The Cayley transform on the Stiefel manifold: interface.py (start here), reference.py, cpp_op.py."""

from .interface import cayley, cayley_inverse

__all__ = ["cayley", "cayley_inverse"]
