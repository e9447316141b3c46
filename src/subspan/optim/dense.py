"""The inner rule without projection, for biases, norms, embeddings and heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subspan.optim.apply import read, store_span
from subspan.optim.method import Group, Inner, Method, State
from subspan.optim.outputs import step_rows
from subspan.optim.tiling import WIDE, Tile, tiles
from subspan.state import Int8Weight, StateSpec
from subspan.state.host import on_host

DenseWork = tuple[Tensor, Tensor, State, Tensor | None]

# Elements of a piece of a tensor whose moments are decoded and encoded, about; pieces are whole blocks of all codecs.
_CPU_PIECE = 1 << 18
_DEVICE_PIECE = 1 << 22
_BLOCK = 256


def state_dtype(parameter: Tensor) -> torch.dtype:
    """Dtype in which the state of a parameter is held: float64 for float64, else float32."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def step_dense(method: Method, works: list[DenseWork], age: int, group: Group, *, beta: float, alpha: float) -> None:
    """W <- beta·W + alpha·U in place, U the inner rule's direction for the whole gradient.

    All tensors that a fused kernel can take go through one call; the others go through row tiles, computed in float32
    and rounded once, and those with quantised moments through pieces of whole blocks. Rules that need whole rows have
    tiles of them.

    Args:
        method: whose inner rule is stepped, and which knows how its moments are held.
        works: (parameter of any shape, its gradient, its state, its key where it is rounded stochastically) with one
            group and one age.
        age: number of gradients that the moments have seen, this one included.
        group: the parameters' group.
        beta: decay factor.
        alpha: minus the learning rate.
    """
    fused: dict[tuple[torch.dtype, torch.device], list[DenseWork]] = {}
    for work in works:
        W, G, state, key = work
        inner = method.inner.at(W.ndim, group)
        moments = method.dense_moments(tuple(W.shape), state_dtype(W), group)
        if inner.whole_rows:
            step_rows(inner, work, moments, age, group, dtype=state_dtype(W), beta=beta, alpha=alpha)
        elif any(spec.codec is not None for spec in moments.values()):
            _step_coded(inner, work, moments, age, group, beta=beta, alpha=alpha)
        elif inner.fuses and _in_one_kernel(W, G):
            fused.setdefault((W.dtype, W.device), []).append(work)
        else:
            own = {key: state[key] for key in moments}
            _step_tiles(inner, (W, G, own, key), age, group, beta=beta, alpha=alpha)
    for same in fused.values():
        Ws, Gs, states, _ = (list(column) for column in zip(*same, strict=True))
        # All that a group gives to a kernel takes one rule.
        method.inner.at(Ws[0].ndim, group).step_fused(Ws, Gs, states, age, group, beta=beta, alpha=alpha)


def _in_one_kernel(W: Tensor, G: Tensor) -> bool:
    # The kernel walks memory: its tensors must have one dtype and one layout.
    alike = W.dtype == G.dtype == state_dtype(W) and W.is_contiguous() and G.is_contiguous()
    return alike and not isinstance(W, Int8Weight)


def _step_tiles(inner: Inner, work: DenseWork, age: int, group: Group, *, beta: float, alpha: float) -> None:
    W, G, moments, key = work
    dtype = state_dtype(W)
    if not W.is_contiguous():
        U = inner.direction(G.to(dtype).contiguous(), moments, age, group)
        store_span(W, Tile(-1, 0, W.shape[-1]), W.to(dtype).mul(beta).add_(U, alpha=alpha), key, 0)
        return
    columns = W.shape[-1] if W.ndim > 1 else 1
    W, G = W if isinstance(W, Int8Weight) else W.view(-1, columns), G.reshape(-1, columns)
    moments = {name: tensor.view(-1, columns) for name, tensor in moments.items()}
    for tile in tiles(W, wide=key is not None):
        part = {name: tile.of(tensor) for name, tensor in moments.items()}
        U = inner.direction(tile.of(G).to(dtype).contiguous(), part, age, group)
        w = read(W, tile, dtype).mul(beta).add_(U, alpha=alpha)
        store_span(W, tile, w, key, tile.start * columns)


def _step_coded(
    inner: Inner, work: DenseWork, specs: dict[str, StateSpec], age: int, group: Group, *, beta: float, alpha: float
) -> None:
    """Decode, step and encode piece by piece, so that no whole moment is ever there."""
    W, G, state, seed = work
    dtype = state_dtype(W)
    # Blocks are counted anew for each matrix of a stack. Weights in another memory layout are copied.
    flat = W if isinstance(W, Int8Weight) else W.reshape(W.shape[0] if W.ndim == 3 else 1, -1)
    matrices, row = ([W], W.shape[1]) if isinstance(W, Int8Weight) else (list(flat), 1)
    unit = math.lcm(row, _BLOCK)
    piece = (_CPU_PIECE if on_host(W.device) else _DEVICE_PIECE) // (WIDE if seed is not None else 1)
    piece = math.ceil(piece / unit) * unit
    for index, (weight, gradient) in enumerate(zip(matrices, G.reshape(len(matrices), -1), strict=True)):
        own = {key: _matrix(spec, key, state, index) for key, spec in specs.items()}
        for start in range(0, weight.numel(), piece):
            stop = min(start + piece, weight.numel())
            tile = Tile(0, start // row, (stop - start) // row)
            parts, moments = {}, {}
            for key, spec in specs.items():
                assert spec.codec is not None
                parts[key] = spec.codec.part(own[key], start, stop)
                moments[key] = spec.codec.decode(parts[key], (stop - start,)).to(dtype)
            U = inner.direction(gradient[start:stop].to(dtype), moments, age, group)
            for key, spec in specs.items():
                assert spec.codec is not None
                for suffix, tensor in spec.codec.encode(moments[key]).items():
                    parts[key][suffix].copy_(tensor)
            w = read(weight, tile, dtype)
            w = w.mul(beta).add_(U.view(w.shape), alpha=alpha)
            store_span(weight, tile, w, seed, index * weight.numel() + start)
    if not W.is_contiguous():
        W.copy_(flat.view(W.shape))


def _matrix(spec: StateSpec, key: str, state: State, index: int) -> State:
    """What holds one matrix of a stack, by suffix of the state key."""
    stacked = len(spec.shape) == 3
    return {name.removeprefix(key): state[name][index] if stacked else state[name] for name in spec.stored(key)}
