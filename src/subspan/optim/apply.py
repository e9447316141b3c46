"""Apply a weight step in place, moving as few bytes as possible."""

from __future__ import annotations

import torch
from torch import Tensor

from subspan.optim.method import Update
from subspan.optim.projection import Projection
from subspan.optim.tiling import Tile, tiles
from subspan.state import random_bits, round_stochastically


def apply_update(
    W: Tensor,
    G: Tensor | None,
    projection: Projection,
    update: Update,
    *,
    beta: float,
    alpha: float,
    keys: Tensor | None = None,
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
        keys: int64 keys of random numbers, one for each parameter in W: (), or (count,) for a stack of several. With
            them bfloat16 weights are rounded stochastically.
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
        store(out, w, keys, None if keys is None else _numbers(W, tile, keys.ndim == 0))


def store(out: Tensor, w: Tensor, keys: Tensor | None, numbers: Tensor | None) -> None:
    """Write ``w`` into the weights ``out``, rounded to nearest, or stochastically by keys and numbers of elements."""
    if keys is not None and numbers is not None and out.dtype == torch.bfloat16:
        keys = keys.to(out.device)
        bits = random_bits(keys[:, None, None] if keys.ndim else keys, numbers)
        w = round_stochastically(w, bits)
    out.copy_(w)


def store_span(out: Tensor, w: Tensor, key: Tensor | None, first: int) -> None:
    """`store` for elements that follow each other in their parameter, from the one with the number ``first`` on."""
    if key is None:
        store(out, w, None, None)
    else:
        store(out, w, key, torch.arange(first, first + out.numel(), device=out.device).view(out.shape))


def _numbers(W: Tensor, tile: Tile, one_parameter: bool) -> Tensor:
    """Number of each element of a tile within its parameter; W is one parameter, or a stack of several matrices."""
    *batch, m, n = W.shape
    sizes = {-2: (0, m), -1: (0, n)} | {tile.dim: (tile.start, tile.start + tile.length)}
    rows, columns = (torch.arange(*sizes[dim], device=W.device) for dim in (-2, -1))
    numbers = rows[:, None] * n + columns
    if batch and one_parameter:
        numbers = torch.arange(batch[0], device=W.device)[:, None, None] * (m * n) + numbers
    return numbers
