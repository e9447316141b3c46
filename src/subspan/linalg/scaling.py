"""The power of two that thin factors are multiplied by, so that products with A neither over- nor underflow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subspan.linalg.operator import MatrixOperator

__all__ = ["finite_amax", "inverse_scale"]


def inverse_scale(amax: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1/amax rounded to a power of two, shape (..., 1, 1), such that N(0,1)·scale is finite in ``dtype``; 1 for 0.

    A power of two changes no digit, so loss scaling does not change a basis. The exponent stays within three quarters
    of the range of ``dtype``: a subnormal amax has no finite inverse, and what is left is enough for the products.
    The result is float32, or float64 for ``dtype=torch.float64``.
    """
    limit = 3 * math.frexp(torch.finfo(dtype).max)[1] // 4
    # One number for each matrix: Python's ldexp is exact, and takes less time than five kernels.
    powers = [math.ldexp(1.0, -max(-limit, min(limit, math.frexp(x)[1]))) for x in amax.flatten().tolist()]
    wide = torch.promote_types(dtype, torch.float32)
    return torch.tensor(powers, dtype=wide, device=device).view(*amax.shape, 1, 1)


def finite_amax(operator: MatrixOperator) -> Tensor:
    """Largest |entry| of each matrix (or its bound), shape (...), on the CPU.

    Raises:
        ValueError: if an entry is NaN or infinite.
    """
    amax = operator.amax().cpu()  # the one time that the host waits for a device
    if not all(map(math.isfinite, amax.flatten().tolist())):
        raise ValueError(
            f"A of shape {tuple(operator.shape)} has a NaN or infinite entry, which has no singular directions:"
            " skip the matrix, or repair it first"
        )
    return amax
