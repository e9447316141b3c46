"""Rounding to fewer bits."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

_LOW_BITS = 16
_MASK = (1 << _LOW_BITS) - 1


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
    return _words(key, index >> 2) >> ((index & 3) << 4) & _MASK


def random_bits_of_runs(key: Tensor, first: Tensor, count: int, *, aligned: bool) -> Tensor:
    """`random_bits` of ``count`` elements that follow each other from each of the numbers ``first`` on, in less time.

    Args:
        key: int64, broadcasts against ``first``.
        first: int64 (..., 1).
        count: elements of each run.
        aligned: whether all of ``first`` are multiples of 4: a word of 64 bits is four numbers.

    Returns:
        (..., count).

    Example:
        >>> runs = random_bits_of_runs(torch.tensor(5), torch.tensor([[0], [40]]), 6, aligned=True)
        >>> bool(runs[1].eq(random_bits(torch.tensor(5), torch.arange(40, 46))).all())
        True
    """
    if not aligned or sys.byteorder != "little":
        return random_bits(key, first + torch.arange(count, device=first.device))
    words = _words(key, (first >> 2) + torch.arange(math.ceil(count / 4), device=first.device))
    return words.view(torch.int16).to(torch.int32).bitwise_and_(_MASK)[..., :count]


def _words(key: Tensor, index: Tensor) -> Tensor:
    x = key + index * -0x61C8864680B583EB  # products of int64 wrap around
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = x.bitwise_xor_(x >> shift & (1 << 64 - shift) - 1).mul_(factor)
    return x.bitwise_xor_(x >> 31 & (1 << 33) - 1)
