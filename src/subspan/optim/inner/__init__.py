"""Optimizers that run inside the subspace."""

from subspan.optim.inner.adam import Adam
from subspan.optim.inner.normalised import Normalised
from subspan.optim.inner.sgd import SGD

__all__ = ["SGD", "Adam", "Normalised"]
