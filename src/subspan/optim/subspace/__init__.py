"""Which subspace? One finder a file."""

from subspan.optim.subspace.blocks import Blocks
from subspan.optim.subspace.gaussian import Gaussian
from subspan.optim.subspace.rows import Rows
from subspan.optim.subspace.stiefel import Stiefel
from subspan.optim.subspace.svd import AdaptiveSVD, ExactSVD, RandomizedSVD, gradient_subspace, tolerance_keys
from subspan.optim.subspace.switch import Switch

__all__ = [
    "AdaptiveSVD",
    "Blocks",
    "ExactSVD",
    "Gaussian",
    "RandomizedSVD",
    "Rows",
    "Stiefel",
    "Switch",
    "gradient_subspace",
    "tolerance_keys",
]
