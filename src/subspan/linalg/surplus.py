"""Directions beyond the rank of a matrix: what rounding would decide on is drawn from the seed instead."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from subspan.linalg.orthonormal import orthonormalize
from subspan.linalg.sketch import gaussian_sketch

__all__ = ["complete", "round_off_floor", "within_rank"]


def round_off_floor(m: int, dtype: torch.dtype, computed_in: torch.dtype) -> float:
    """Share of ‖QᵀA‖_F that rounding alone gives a row of QᵀA, for A with ``m`` rows in ``dtype``.

    It is what the accumulation leaves, √m·eps of the type it is ``computed_in``, or what rounding A to its dtype
    leaves in one direction out of m, 2·eps(dtype)/√m, whichever is larger.
    """
    root = math.sqrt(m)
    return max(torch.finfo(computed_in).eps * root, 2.0 * torch.finfo(dtype).eps / root)


def within_rank(norms: Tensor, m: int, dtype: torch.dtype) -> Tensor:
    """Which rows of QᵀA, with these ``norms`` (..., r), are more than rounding of A (m, n) in ``dtype``: (..., 1, r).

    All of a zero matrix, which has no rows that others could be measured by.
    """
    whole = torch.linalg.vector_norm(norms, dim=-1, keepdim=True)
    return ((norms > round_off_floor(m, dtype, norms.dtype) * whole) | (whole == 0)).unsqueeze(-2)


def complete(
    Q: Tensor,
    surplus: Tensor,
    *,
    m: int,
    generator: torch.Generator | None,
    rows: slice = slice(None),
    stack: tuple[tuple[int, ...], slice] = ((), slice(None)),
    orthonormalized: Callable[[Tensor], Tensor] = orthonormalize,
) -> Tensor:
    """Q with its ``surplus`` columns drawn anew: uniformly among the directions that are orthogonal to the others.

    QR leaves in them whatever rounding made of nothing, another machine or another order of summation something else.
    A later gradient is projected on them all the same.

    Args:
        Q: basis (..., m, r) with the surplus columns last, or the rows of it that this process has.
        surplus: (..., 1, r), True for these columns.
        m: rows of the whole basis.
        generator: of the draw.
        rows: that this process has.
        stack: `MatrixOperator.stack` of the matrix.
        orthonormalized: QR of the columns of a whole basis.
    """
    batch, part = stack
    scale = 1.0 / math.sqrt(m)
    drawn = gaussian_sketch(
        m, Q.shape[-1], generator=generator, batch_shape=batch, part=part, scale=scale, dtype=Q.dtype
    )
    fresh = drawn[..., rows, :].to(Q.device)
    return torch.where(surplus, orthonormalized(torch.where(surplus, fresh, Q)), Q)
