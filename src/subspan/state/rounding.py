"""Rounding to fewer bits."""

from __future__ import annotations

import torch
from torch import Tensor


def round_stochastically(X: Tensor, generator: torch.Generator) -> Tensor:
    """``X`` in bfloat16, rounded up or down at random so that its mean is ``X``.

    Nearest rounding loses every step that is smaller than half a unit in the last place, which in bfloat16 is 1/512 of
    a weight; stochastic rounding keeps it in the mean.

    Args:
        X: (...) in float32.
        generator: of the CPU; one number is drawn for each element in the order of its indices, so that neither the
            device nor the memory layout changes the result.

    Returns:
        A bfloat16 tensor of the same shape; NaN, infinities and what bfloat16 can hold stay as they are.

    Example:
        >>> X = torch.full((10000,), 1 + 2**-10)  # an eighth of the way from 1 to the next number in bfloat16
        >>> rounded = round_stochastically(X, torch.Generator().manual_seed(0))
        >>> sorted(set(rounded.tolist())), round(float((rounded > 1).float().mean()), 2)
        ([1.0, 1.0078125], 0.12)

    Source: arXiv 2010.06192.
    """
    # bfloat16 is the upper half of float32: a random number is added to the lower half, which is then cut off.
    noise = torch.randint(0, 1 << 16, X.shape, generator=generator, dtype=torch.int32).to(X.device)
    bits = X.contiguous().view(torch.int32) + noise
    rounded = (bits & -(1 << 16)).view(torch.float32)
    return torch.where(X.isfinite(), rounded, X).to(torch.bfloat16)
