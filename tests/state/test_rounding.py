"""Stochastic rounding to bfloat16."""

from __future__ import annotations

import math

import pytest
import torch

from subspan.state import round_stochastically


def test_the_mean_is_kept_and_only_neighbours_are_drawn() -> None:
    X = torch.linspace(1.0, 1.0 + 2**-7, 33).expand(20000, 33).contiguous()
    drawn = round_stochastically(X, torch.Generator().manual_seed(0)).float()
    assert set(drawn.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert (drawn.mean(dim=0) - X[0]).abs().max() < 5 * 2**-7 / 2 / math.sqrt(20000)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_bfloat16_can_hold_stays(sign: float) -> None:
    exact = torch.tensor([0.0, 1.0, 1.5, 2.0**-126, 2.0**-133, 3.0e38, math.inf, math.nan]) * sign
    exact = exact.bfloat16().float()
    for seed in range(20):
        drawn = round_stochastically(exact, torch.Generator().manual_seed(seed))
        assert torch.equal(drawn.float().nan_to_num(7.0), exact.nan_to_num(7.0))
    # All bits of a NaN set: adding to them must not make a number of it.
    worst = torch.full((100,), -1, dtype=torch.int32).view(torch.float32)
    assert round_stochastically(worst, torch.Generator().manual_seed(0)).isnan().all()


def test_the_layout_does_not_matter() -> None:
    X = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    one = round_stochastically(X, torch.Generator().manual_seed(1))
    other = round_stochastically(X.T.contiguous().T, torch.Generator().manual_seed(1))
    assert torch.equal(one, other)
