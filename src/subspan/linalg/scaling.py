"""The power of two that thin factors are multiplied by, so that products with A neither over- nor underflow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subspan.linalg.operator import MatrixOperator

__all__ = ["finite_amax", "inverse_scale"]


def inverse_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """1/amax rounded to a power of two, shape (..., 1, 1), such that N(0,1)·scale is finite in ``dtype``; 1 for 0.

    A power of two changes no digit, so loss scaling does not change a basis. The exponent stays within three quarters
    of the range of ``dtype``: a subnormal amax has no finite inverse, and what is left is enough for the products.
    """
    limit = 3 * math.frexp(torch.finfo(dtype).max)[1] // 4
    wide = torch.promote_types(amax.dtype, torch.float32)
    exponent = torch.frexp(amax.to(wide)).exponent.clamp(-limit, limit)
    return torch.ldexp(torch.ones_like(amax, dtype=wide), -exponent)[..., None, None]


def finite_amax(operator: MatrixOperator) -> Tensor:
    """Largest |entry| of each matrix (or its bound), shape (...).

    Raises:
        ValueError: if an entry is NaN or infinite.
    """
    amax = operator.amax()
    if not bool(torch.isfinite(amax).all()):
        raise ValueError(
            f"A of shape {tuple(operator.shape)} has a NaN or infinite entry, which has no singular directions:"
            " skip the matrix, or repair it first"
        )
    return amax
