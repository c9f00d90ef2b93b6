"""Normalization of features: api.py (start here), reference.py (the definition), modules.py, all_reduce.py."""

from .api import standardize, whiten
from .modules import Standardization, Whitening

__all__ = ["Standardization", "Whitening", "standardize", "whiten"]
