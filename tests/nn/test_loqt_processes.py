"""LoQT by two processes under DDP: one subspace, and the training of one process on the joint batch."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.runs import Network, batch, in_processes
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from subspan.nn.lowrank import LoQT
from subspan.optim import AdamW

FLOAT: dict[str, Any] = {"weight_bits": None, "projection_bits": None}
RUNS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "float": FLOAT,
    "exact": {"svd": "exact", **FLOAT},
    "accumulated": FLOAT,
    "poisoned": FLOAT,
}


def train(rank: int, world: int, name: str) -> dict[str, Any]:
    model = Network()
    weights = LoQT(rank=4, first_gap=3, **RUNS[name]).apply(model)
    optimizer = AdamW([(key, p) for key, p in model.named_parameters() if p.requires_grad], lr=1e-2)
    call: Any = DistributedDataParallel(model) if world > 1 else model
    pieces, said = 2 if name == "accumulated" else 1, []
    for step in range(9):
        weights.begin_step(step)
        x, y = (tensor.chunk(world)[rank] for tensor in batch(step, 32))
        for number, (part, target) in enumerate(zip(x.chunk(pieces), y.chunk(pieces), strict=True)):
            with call.no_sync() if world > 1 and number < pieces - 1 else nullcontext():
                loss = (call(part) - target).square().mean() / pieces
                poisoned = name == "poisoned" and step == 2 and rank == world - 1
                (loss * (torch.nan if poisoned else 1.0)).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.step()
        said += weights.end_step(step, optimizer)
        optimizer.zero_grad()
    held: dict[str, Tensor] = dict(model.state_dict())
    return {"held": held, "said": [line.partition(",")[0] for line in said]}


def train_all(rank: int, world: int) -> dict[str, Any]:
    return {name: train(rank, world, name) for name in RUNS}


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    one, other = in_processes(2, tmp_path, train_all)
    for name in RUNS:
        for key, value in one[name]["held"].items():
            assert torch.equal(value, other[name]["held"][key]), (name, key)  # no process has a subspace of its own
        assert len(one[name]["said"]) == 3 + (name == "poisoned")
        alone = train(0, 1, name)
        assert alone["said"] == one[name]["said"] == other[name]["said"]
        if RUNS[name]:  # what is rounded may fall on the other side of a bound
            for key, value in alone["held"].items():
                assert torch.allclose(value, one[name]["held"][key], atol=1e-4), (name, key)
