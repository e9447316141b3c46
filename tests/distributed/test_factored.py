"""Factored layers and SLTrain trained by two processes on halves of each batch, and by one on whole batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distributed.runs import in_processes
from subspan.nn.lowrank import weight_recipe
from subspan.optim import AdamW

RECIPES: dict[str, dict[str, Any]] = {
    "factored": {"rank": 8, "rebalance_gap": 2, "product_decay": 1e-3},
    "sltrain": {"rank": 4},
}


def trained(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name, settings in RECIPES.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        weights = weight_recipe(name, **settings).apply(model, seed=1)
        call = DistributedDataParallel(model) if world > 1 else model
        optimizer = AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.0)
        for step in range(5):
            x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
            call(x).square().mean().backward()
            weights.before_step(step)
            optimizer.step()
            weights.end_step(step, optimizer)
            optimizer.zero_grad()
        found[name] = dict(model.state_dict())
    return found


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    first, second = in_processes(2, tmp_path, trained)
    for recipe, alone in trained(0, 1).items():
        for name, tensor in alone.items():
            assert torch.equal(first[recipe][name], second[recipe][name]), (recipe, name)
            torch.testing.assert_close(first[recipe][name], tensor, rtol=1e-4, atol=1e-5)
