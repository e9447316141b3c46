"""Apply a weight step in place, moving as few bytes as possible."""

from __future__ import annotations

import torch
from torch import Tensor

from subspan.optim.method import Update
from subspan.optim.projection import Projection
from subspan.optim.tiling import tiles


def apply_update(
    W: Tensor, G: Tensor | None, projection: Projection, update: Update, *, beta: float, alpha: float
) -> None:
    """W <- beta·W + alpha·(factor·P·low_rank + gain∘G + residual(G − P·projected)), in place.

    Weights in float32 or float64 take decay and back-projection in one ``addmm_`` and the gain in one ``addcmul_``.
    Other dtypes, and a non-linear residual, go through row tiles: computed in float32, rounded once.

    Args:
        W, G: (..., m, n), oriented views; G may be None where neither gain nor residual is asked for.
        projection: P.
        update: what a lift rule returned.
        beta: decay factor.
        alpha: minus the learning rate.
    """
    if W.dtype in (torch.float32, torch.float64) and update.residual is None:
        if update.low_rank is not None:
            projection.add_back_(W, update.low_rank, beta=beta, alpha=alpha * update.factor)
        elif beta != 1.0:
            W.mul_(beta)
        if update.gain is not None:
            assert G is not None
            W.addcmul_(update.gain, G, value=alpha)
        return
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    for tile in tiles(W):
        out = tile.of(W)
        w = out.to(dtype)
        if beta != 1.0:
            w = w * beta
        if update.low_rank is not None:
            w = w.add(projection.back(update.low_rank, tile, W), alpha=alpha * update.factor)
        if update.gain is not None or update.residual is not None:
            assert G is not None
            g = tile.of(G).to(dtype)
            if update.gain is not None:
                w = w.addcmul(tile.of(update.gain), g, value=alpha)
            if update.residual is not None:
                assert update.projected is not None
                w = w.add(update.residual(g - projection.back(update.projected, tile, W)), alpha=alpha)
        out.copy_(w)
