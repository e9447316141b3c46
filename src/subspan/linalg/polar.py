"""Orthonormalisation by repeated projection: Gram-Schmidt twice, and the Newton-Schulz iteration for the polar factor.

Neither is safe on its own: :func:`subspan.linalg.orthonormalize` checks what they return.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gram_schmidt_twice", "newton_schulz"]

# The smallest singular value grows by 3/2 in each iteration until it is near one: 1e-5 in 30, and some to converge.
_ITERATIONS = 36


def gram_schmidt_twice(Y: Tensor, *, passes: int = 2) -> Tensor:
    """Classical Gram-Schmidt, column by column; the second projection of each column makes it orthogonal to rounding.

    Args:
        Y: (..., m, r).
        passes: projections of each column; 1 is the plain method, which loses u·κ² of the orthogonality.

    Returns:
        Q of shape (..., m, r); a column in the span of earlier ones is not orthogonal to them.
    """
    Q = torch.zeros_like(Y)
    for j in range(Y.shape[-1]):
        column = torch.nn.functional.normalize(_scaled(Y[..., j : j + 1]), dim=-2, eps=0.0)
        for _ in range(passes):
            column = column - Q[..., :j] @ (Q[..., :j].mT @ column)
            column = torch.nn.functional.normalize(column, dim=-2, eps=torch.finfo(Y.dtype).tiny)
        Q[..., j : j + 1] = column
    return Q


def newton_schulz(Y: Tensor) -> Tensor:
    """Polar factor Y(YᵀY)^(-1/2), the nearest orthonormal matrix: X ← X(3I − XᵀX)/2 from X = Y/‖Y‖_F.

    Args:
        Y: (..., m, r).

    Returns:
        Q of shape (..., m, r); what has a condition number above 1e5 has not converged.
    """
    X = _scaled(Y)
    X = X / torch.linalg.matrix_norm(X, keepdim=True)
    for _ in range(_ITERATIONS):
        X = 1.5 * X - 0.5 * (X @ (X.mT @ X))
    return X


def _scaled(Y: Tensor) -> Tensor:
    largest = Y.abs().amax(dim=(-2, -1), keepdim=True)
    return Y / torch.where(largest > 0, largest, torch.ones_like(largest))
