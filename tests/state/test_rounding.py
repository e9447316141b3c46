"""Stochastic rounding to bfloat16, and random numbers that depend on nothing but their key and index."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from subspan.state import random_bits, round_stochastically


def bits(shape: tuple[int, ...], key: int = 0) -> Tensor:
    return random_bits(torch.tensor(key), torch.arange(math.prod(shape)).view(shape))


def test_the_mean_is_kept_and_only_neighbours_are_drawn() -> None:
    X = torch.linspace(1.0, 1.0 + 2**-7, 33).expand(20000, 33).contiguous()
    drawn = round_stochastically(X, bits((20000, 33))).float()
    assert set(drawn.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert (drawn.mean(dim=0) - X[0]).abs().max() < 5 * 2**-7 / 2 / math.sqrt(20000)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_bfloat16_can_hold_stays(sign: float) -> None:
    exact = torch.tensor([0.0, 1.0, 1.5, 2.0**-126, 2.0**-133, 3.0e38, math.inf, math.nan]) * sign
    exact = exact.bfloat16().float()
    for key in range(20):
        drawn = round_stochastically(exact, bits((8,), key))
        assert torch.equal(drawn.float().nan_to_num(7.0), exact.nan_to_num(7.0))
    # All bits of a NaN set: adding to them must not make a number of it.
    worst = torch.full((100,), -1, dtype=torch.int32).view(torch.float32)
    assert round_stochastically(worst, bits((100,))).isnan().all()


def test_bits_are_uniform_and_independent() -> None:
    count = 1 << 18
    for key in (0, 1, -(2**62)):
        drawn = bits((count,), key)
        assert drawn.min() >= 0 and drawn.max() < 1 << 16
        counts = torch.bincount(drawn >> 8, minlength=256).double()
        assert (counts - count / 256).square().sum() / (count / 256) < 256 + 6 * math.sqrt(2 * 256)  # chi-squared
        share = drawn.double() / (1 << 16) - 0.5
        for lag in (1, 2, 256, 1024):
            assert abs(float((share[lag:] * share[:-lag]).mean()) * 12) < 6 / math.sqrt(count)
    other = bits((count,), 1).double() / (1 << 16) - 0.5
    own = bits((count,), 0).double() / (1 << 16) - 0.5
    assert abs(float((own * other).mean()) * 12) < 6 / math.sqrt(count)


def test_the_layout_does_not_matter() -> None:
    X = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        round_stochastically(X, bits((30, 40))), round_stochastically(X.T.contiguous().T, bits((30, 40)))
    )
