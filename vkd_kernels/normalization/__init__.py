"""Task-specific normalisation of features: interface.py (start here), reference.py, synchronised.py."""

from .interface import Whitening, standardize, whiten

__all__ = ["Whitening", "standardize", "whiten"]
