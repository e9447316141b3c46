"""The inner rule without projection, for biases, norms, embeddings and heads."""

from __future__ import annotations

import torch
from torch import Tensor

from subspan.optim.method import Group, Inner, State
from subspan.optim.tiling import tiles

DenseWork = tuple[Tensor, Tensor, State]


def state_dtype(parameter: Tensor) -> torch.dtype:
    """Dtype in which the state of a parameter is held: float64 for float64, else float32."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def step_dense(inner: Inner, works: list[DenseWork], age: int, group: Group, *, beta: float, alpha: float) -> None:
    """W <- beta·W + alpha·U in place, U the inner rule's direction for the whole gradient.

    All tensors that a fused kernel can take go through one call; the others go through row tiles, computed in float32
    and rounded once.

    Args:
        inner: the rule.
        works: (parameter of any shape, its gradient, its state) with one group and one age.
        age: number of gradients that the moments have seen, this one included.
        group: the parameters' group.
        beta: decay factor.
        alpha: minus the learning rate.
    """
    fused: dict[tuple[torch.dtype, torch.device], list[DenseWork]] = {}
    for work in works:
        W, G, _ = work
        # The kernel walks memory: its tensors must have one dtype and one layout.
        if inner.fuses and W.dtype == G.dtype == state_dtype(W) and W.is_contiguous() and G.is_contiguous():
            fused.setdefault((W.dtype, W.device), []).append(work)
        else:
            _step_tiles(inner, work, age, group, beta=beta, alpha=alpha)
    for same in fused.values():
        Ws, Gs, states = (list(column) for column in zip(*same, strict=True))
        inner.step_fused(Ws, Gs, states, age, group, beta=beta, alpha=alpha)


def _step_tiles(inner: Inner, work: DenseWork, age: int, group: Group, *, beta: float, alpha: float) -> None:
    W, G, state = work
    dtype = state_dtype(W)
    moments = {key: state[key] for key in inner.specs(tuple(W.shape), dtype, group)}
    if not W.is_contiguous():
        U = inner.direction(G.to(dtype).contiguous(), moments, age, group)
        W.copy_(W.to(dtype).mul(beta).add_(U, alpha=alpha))
        return
    columns = W.shape[-1] if W.ndim > 1 else 1
    W, G = W.view(-1, columns), G.reshape(-1, columns)
    moments = {key: tensor.view(-1, columns) for key, tensor in moments.items()}
    for tile in tiles(W):
        out = tile.of(W)
        part = {key: tile.of(tensor) for key, tensor in moments.items()}
        U = inner.direction(tile.of(G).to(dtype).contiguous(), part, age, group)
        out.copy_(out.to(dtype).mul(beta).add_(U, alpha=alpha))
