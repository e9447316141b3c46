"""Apply a weight step in place, moving as few bytes as possible."""

from __future__ import annotations

import torch
from torch import Tensor

from subspan.optim.method import Update
from subspan.optim.projection import Projection
from subspan.optim.tiling import Tile, tiles
from subspan.state import Int8Weight, random_bits_of_runs, round_stochastically


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
    Other dtypes, weights of 8 bits, and a non-linear residual go through row tiles: computed in float32, rounded once.

    Args:
        W, G: (..., m, n), oriented views; G may be None where neither gain nor residual is asked for.
        projection: P.
        update: what a lift rule returned.
        beta: decay factor.
        alpha: minus the learning rate.
        keys: int64 keys of random numbers, one for each parameter in W: (), or (count,) for a stack of several. With
            them bfloat16 weights and those of 8 bits are rounded stochastically.
    """
    whole = W.dtype in (torch.float32, torch.float64) and not isinstance(W, Int8Weight)
    if whole and update.residual is None:
        if update.low_rank is not None:
            projection.add_back_(W, update.low_rank, beta=beta, alpha=alpha * update.factor)
        elif beta != 1.0:
            W.mul_(beta)
        if update.gain is not None:
            assert G is not None
            W.addcmul_(update.gain, G, value=alpha)
        return
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    for tile in tiles(W, wide=keys is not None):
        w = read(W, tile, dtype)
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
        store(W, tile, w, _bits(W, tile, keys) if keys is not None and _rounds(W) else None)


def read(W: Tensor, tile: Tile, dtype: torch.dtype) -> Tensor:
    """A tile of weights, however they are held; not to be written to."""
    if not isinstance(W, Int8Weight):
        return tile.of(W).to(dtype)
    w = W.rows(tile.start, tile.start + tile.length, dtype)
    return w.mT if W.transposed else w


def store(W: Tensor, tile: Tile, w: Tensor, bits: Tensor | None) -> None:
    """Write a tile of weights, rounded to nearest, or stochastically by random bits, one number for each element."""
    if isinstance(W, Int8Weight):
        turned = [None if X is None else X.mT.contiguous() if W.transposed else X for X in (w, bits)]
        W.round_rows_(tile.start, *turned)  # type: ignore[arg-type]
    else:
        tile.of(W).copy_(w if bits is None else round_stochastically(w, bits))


def store_span(W: Tensor, tile: Tile, w: Tensor, key: Tensor | None, first: int) -> None:
    """`store` for elements that follow each other in their parameter, from the one with the number ``first`` on.

    With a ``key`` of random numbers weights of 8 bits and bfloat16 ones are rounded stochastically.
    """
    bits = None
    if key is not None and _rounds(W):
        start = torch.full((1,), first, device=w.device)
        bits = random_bits_of_runs(key.to(w.device), start, w.numel(), aligned=first % 4 == 0).view(w.shape)
    store(W, tile, w, bits)


def _rounds(W: Tensor) -> bool:
    return W.dtype == torch.bfloat16 or isinstance(W, Int8Weight)


def _bits(W: Tensor, tile: Tile, keys: Tensor) -> Tensor:
    """Random bits of each element of a tile; W is one parameter, or a stack of several matrices with a key for each."""
    *batch, m, n = W.shape
    sizes = {-2: (0, m), -1: (0, n)} | {tile.dim: (tile.start, tile.start + tile.length)}
    (start, stop), rows = sizes[-1], torch.arange(*sizes[-2], device=W.device)
    first = rows[:, None] * n + start
    if batch and not keys.ndim:
        first = torch.arange(batch[0], device=W.device)[:, None, None] * (m * n) + first
    keys = keys.to(W.device)
    key = keys[:, None, None] if keys.ndim else keys
    return random_bits_of_runs(key, first, stop - start, aligned=n % 4 == 0 and start % 4 == 0)
