"""Norms of the columns of a large matrix."""

from __future__ import annotations

import torch
from torch import Tensor

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
