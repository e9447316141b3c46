"""Dense steps of rules that need whole rows of the gradient, such as all that leads to one output of a layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subspan.optim.apply import read, store_span
from subspan.optim.matrix import oriented, write_back
from subspan.optim.method import Group, Inner, State
from subspan.optim.tiling import Tile, row_tiles
from subspan.state import Int8Weight, StateSpec


def step_rows(
    inner: Inner,
    work: tuple[Tensor, Tensor, State, Tensor | None],
    specs: dict[str, StateSpec],
    age: int,
    group: Group,
    *,
    dtype: torch.dtype,
    beta: float,
    alpha: float,
) -> None:
    """W <- beta·W + alpha·U for one matrix or stack of matrices, in tiles of whole outputs.

    Parts see it with its outputs as rows; the transpose is a view. Tiles are computed in ``dtype`` and rounded once.

    Args:
        inner: a rule that works on whole rows.
        work: parameter, gradient, state, and the parameter's key where it is rounded stochastically.
        specs: the moments that the rule has declared; with a codec they are decoded and encoded tile by tile.
        age: number of gradients that the moments have seen, this one included.
        group: says with ``outputs`` whether the outputs are rows or columns of a matrix.
        dtype: float32, or float64 for float64 parameters.
        beta: decay factor.
        alpha: minus the learning rate.
    """
    W, G, state, seed = work
    right = group["outputs"] == "columns"
    whole, gradient = oriented(W, right), oriented(G, right)
    coded = any(spec.codec is not None for spec in specs.values())
    if isinstance(whole, Int8Weight):
        shape = (1, *whole.shape)
    elif whole.is_contiguous() and gradient.is_contiguous() and not coded:
        # Outputs do not know of each other, so a stack is one matrix. Only blocks of codes count anew for each.
        shape = (1, math.prod(whole.shape[:-1]), whole.shape[-1])
    else:
        shape = (math.prod(whole.shape[:-2]), *whole.shape[-2:])
    weights = [whole] if isinstance(whole, Int8Weight) else whole.view(shape)
    for index, (w, g) in enumerate(zip(weights, gradient.view(shape), strict=True)):
        columns = shape[-1]
        blocks = [math.lcm(spec.codec.block, columns) // columns for spec in specs.values() if spec.codec is not None]
        # The groups of weights of 8 bits run along their own rows: where those are inputs, all is one tile.
        across = isinstance(w, Int8Weight) and w.transposed
        for tile in [Tile(-1, 0, columns)] if across else row_tiles(w, max(blocks, default=1), wide=seed is not None):
            first, last = (0, w.numel()) if across else (tile.start * columns, (tile.start + tile.length) * columns)
            parts, moments = {}, {}
            for key, spec in specs.items():
                if spec.codec is None:
                    moments[key] = tile.of(state[key].view(shape)[index])
                    continue
                held = {name.removeprefix(key): state[name] for name in spec.stored(key)}
                if len(spec.shape) == 3:
                    held = {suffix: tensor[index] for suffix, tensor in held.items()}
                parts[key] = spec.codec.part(held, first, last)
                moments[key] = spec.codec.decode(parts[key], (last - first,)).to(dtype).view(-1, columns)
            U = inner.direction(tile.of(g).to(dtype), moments, age, group)
            for key, part in parts.items():
                codec = specs[key].codec
                assert codec is not None
                for suffix, tensor in codec.encode(moments[key].flatten()).items():
                    part[suffix].copy_(tensor)
            new = read(w, tile, dtype).mul(beta).add_(U, alpha=alpha)
            store_span(w, tile, new, seed, index * w.numel() + first)
    write_back(whole, W, right)
