"""Parameters as oriented matrices."""

from __future__ import annotations

import torch
from torch import Tensor

PROJ_TYPES = ("std", "reverse_std", "left", "right")


def as_matrix(X: Tensor) -> Tensor:
    """``X`` as a matrix or a stack of matrices, a view.

    Two dimensions are a matrix, three a stack of matrices (experts), more a convolution kernel (out, in, ...) that is
    flattened to (out, in·...).

    Raises:
        ValueError: the kernel's memory layout allows no such view.
    """
    if X.ndim <= 3:
        return X
    if X.is_contiguous():
        return X.flatten(1)
    if X.ndim == 4 and X.is_contiguous(memory_format=torch.channels_last):
        return X.permute(0, 2, 3, 1).flatten(1)
    raise ValueError(
        f"a convolution weight of shape {tuple(X.shape)} with strides {X.stride()} cannot be seen as a matrix; "
        "make it contiguous or channels_last before the optimizer is built"
    )


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
    """``X`` as (..., m, n) with the projected side first, a view."""
    matrix = as_matrix(X)
    return matrix.mT if right else matrix


def gradient_like(G: Tensor, W: Tensor) -> Tensor:
    """``G`` in the memory layout of ``W``, so that both have the same matrix view; itself where they agree already."""
    if W.ndim <= 3 or G.stride() == W.stride():
        return G
    return torch.empty_like(W).copy_(G)
