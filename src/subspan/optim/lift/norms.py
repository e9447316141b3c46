"""Norms of columns and their ratios."""

from __future__ import annotations

import torch
from torch import Tensor

from subspan.optim.shards import WHOLE, Shards
from subspan.optim.tiling import tiles


def column_norms_squared(G: Tensor) -> Tensor:
    """‖G_j‖² for every column of ``G`` (..., m, n), as (..., 1, n) in float32 (float64 for float64).

    Worked off in row tiles: the temporary stays in the cache, and low-precision gradients are never cast as a whole.
    """
    dtype = torch.float64 if G.dtype == torch.float64 else torch.float32
    if G.stride(-1) != 1:
        # A column lies contiguously in memory: torch reduces it in one pass.
        return torch.linalg.vector_norm(G, dim=-2, keepdim=True, dtype=dtype).square()
    total = G.new_zeros(*G.shape[:-2], 1, G.shape[-1], dtype=dtype)
    for tile in tiles(G):
        total += tile.of(G).to(dtype).square().sum(-2, keepdim=True)
    return total


def norm_ratio(U: Tensor, R: Tensor, dim: int | tuple[int, int], shards: Shards = WHOLE) -> Tensor:
    """‖U‖/‖R‖ along ``dim``, kept as a dimension, and 0 where R is zero; of whole U and R where they are divided.

    The reference codes add 1e-8 to the denominator, which is not small against the columns of a real gradient.
    """
    denominator = shards.norms(R, dim)
    ratio = shards.norms(U, dim) / denominator
    return torch.where(denominator > 0, ratio, torch.zeros_like(ratio))
