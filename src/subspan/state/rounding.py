"""Rounding to fewer bits."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_BITS = 16


def round_stochastically(X: Tensor, bits: Tensor) -> Tensor:
    """``X`` in bfloat16, rounded up or down at random so that its mean is ``X``.

    Nearest rounding loses every step that is smaller than half a unit in the last place, which in bfloat16 is 1/512 of
    a weight; stochastic rounding keeps it in the mean.

    Args:
        X: (...) in float32.
        bits: (...) random integers from 0 to 2¹⁶ − 1.

    Returns:
        A bfloat16 tensor of the same shape; NaN, infinities and what bfloat16 can hold stay as they are.

    Example:
        >>> X = torch.full((10000,), 1 + 2**-10)  # an eighth of the way from 1 to the next number in bfloat16
        >>> rounded = round_stochastically(X, random_bits(torch.tensor(0), torch.arange(10000)))
        >>> sorted(set(rounded.tolist())), round(float((rounded > 1).float().mean()), 2)
        ([1.0, 1.0078125], 0.12)

    Source: arXiv 2010.06192.
    """
    # bfloat16 is the upper half of float32: a random number is added to the lower half, which is then cut off.
    rounded = X.contiguous().view(torch.int32).add(bits.to(torch.int32)).bitwise_and_(-(1 << _LOW_BITS))
    return torch.where(X.isfinite(), rounded.view(torch.float32), X).to(torch.bfloat16)


def random_bits(key: Tensor, index: Tensor) -> Tensor:
    """Random integers from 0 to 2¹⁶ − 1, each from a key and an index alone, whatever else is drawn on which device.

    Args:
        key: int64, broadcasts against ``index``.
        index: int64 numbers of the elements.

    Example:
        >>> key = torch.tensor(5)
        >>> bool(random_bits(key, torch.arange(9))[3:6].eq(random_bits(key, torch.arange(3, 6))).all())
        True

    Source: SplitMix64, doi 10.1145/2660193.2660195.
    """
    x = key + index * -0x61C8864680B583EB  # products of int64 wrap around
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = x.bitwise_xor_(x >> shift & (1 << 64 - shift) - 1).mul_(factor)
    return x.bitwise_xor_(x >> 31 & (1 << 33) - 1).bitwise_and_((1 << _LOW_BITS) - 1)
