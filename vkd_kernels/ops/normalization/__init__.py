"""Task-specific normalisation of features: api.py (start here), reference.py, all_reduce.py."""

from .api import Whitening, standardize, whiten

__all__ = ["Whitening", "standardize", "whiten"]
