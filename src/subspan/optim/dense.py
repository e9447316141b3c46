"""The inner rule without projection, for biases, norms, embeddings and heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subspan.optim.method import Inner, State
from subspan.optim.tiling import tiles


def state_dtype(parameter: Tensor) -> torch.dtype:
    """Dtype in which the state of a parameter is held: float64 for float64, else float32."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def step_dense(
    inner: Inner, W: Tensor, G: Tensor, state: State, age: int, group: dict[str, Any], *, beta: float, alpha: float
) -> None:
    """W <- beta·W + alpha·U in place, U the inner rule's direction for the whole gradient.

    One fused kernel where there is one; else row tiles, computed in float32 and rounded once.

    Args:
        inner: the rule.
        W, G: a parameter of any shape and its gradient.
        state: the parameter's state, updated in place.
        age: number of gradients that the moments have seen, this one included.
        group: the parameter's group.
        beta: decay factor.
        alpha: minus the learning rate.
    """
    if inner.step_dense(W, G, state, age, group, beta=beta, alpha=alpha):
        return
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
