"""A teacher's features on disk: computed once, read at every step of training."""

from .reader import FeatureStore
from .samples import FixedViews

__all__ = ["FeatureStore", "FixedViews"]
