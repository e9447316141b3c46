"""Parameters as oriented matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PROJ_TYPES = ("std", "reverse_std", "left", "right")


def as_matrix(X: Tensor) -> Tensor:
    """``X`` as a matrix or a stack of matrices: a view, or a copy where its memory layout allows none (channels_last).

    Two dimensions are a matrix, three a stack of matrices (experts), more a convolution kernel (out, in, ...) that is
    flattened to (out, in·...).
    """
    return X if X.ndim <= 3 else X.flatten(1)


def matrix_shape(shape: torch.Size) -> tuple[int, ...]:
    """The shape of `as_matrix` of a tensor of ``shape``."""
    return tuple(shape) if len(shape) <= 3 else (shape[0], math.prod(shape[1:]))


def oriented_shape(shape: torch.Size, right: bool) -> tuple[int, ...]:
    """The shape of `oriented` of a tensor of ``shape``."""
    *batch, rows, columns = matrix_shape(shape)
    return (*batch, columns, rows) if right else (*batch, rows, columns)


def projects_right(rows: int, columns: int, proj_type: str) -> bool:
    """Whether the columns' side is projected (R = G Q) rather than the rows' side (R = Qᵀ G).

    ``std`` projects the short side and ``reverse_std`` the long one; a square matrix goes right under ``std`` and left
    under ``reverse_std``, as in GaLore's code.
    """
    if proj_type == "std":
        return rows >= columns
    if proj_type == "reverse_std":
        return rows < columns
    return proj_type == "right"


def oriented(X: Tensor, right: bool) -> Tensor:
    """``as_matrix(X)`` as (..., m, n) with the projected side first."""
    matrix = as_matrix(X)
    return matrix.mT if right else matrix


def write_back(matrix: Tensor, X: Tensor, right: bool) -> None:
    """Make ``X`` hold what ``matrix = oriented(X, right)`` holds now, where that was a copy."""
    if X.ndim > 3 and not X.is_contiguous():
        X.copy_((matrix.mT if right else matrix).reshape(X.shape))
