"""What the tests of runs with weights of low rank share: small settings, and a run that is built and planned."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspan.memory.plan import PeakPlan
from subspan.memory.training import trace_training
from subspan.nn.lowrank import LowRankWeights, weight_recipe_class
from subspan.optim import LowRankOptimizer
from subspan.train.config import PretrainConfig
from subspan.train.optimizer import build_optimizer, check_settings, resolve
from subspan.train.plan import _between_steps, plan_recipe, prepare
from subspan.train.plan_settings import PlanSettings
from subspan.train.presets import build_model
from subspan.train.weights import build_weights

#: Values for a model of width 32, with a cycle that ends at step 4 of 8.
SMALL = {
    "rank": 4, "heads": 2, "alpha": 8.0, "merge_every": 4, "restart_every": 4, "first_gap": 4, "rewarm": 2,
    "rebalance_gap": 4, "product_decay": 0.01, "unload_every": 4,
}  # fmt: skip


#: A checkpoint in the middle of the first cycle, and one in that of the second.
SHORT = {"steps": 8, "save_every": 3, "eval_every": 8, "log_every": 2, "optimizer": {}, "lr": 1e-3}


def small(name: str) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(weight_recipe_class(name))}
    return {key: value for key, value in SMALL.items() if key in known}


def low_rank(name: str, **changes: Any) -> dict[str, Any]:
    """Settings of a short run with a recipe."""
    return {**SHORT, "weights": name, "weight_settings": small(name), "rank": None} | changes


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(24).remainder(300).view(2, 12)
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids).logits
    return found


def built(folder: Path, **changes: Any) -> tuple[Any, LowRankWeights, LowRankOptimizer]:
    """Model, weights and optimizer of a run."""
    config = PretrainConfig(model=str(folder / "model.json"), seq_len=16, **changes)
    check_settings(config)
    config = resolve(config, 32)
    model = build_model(config.model, seq_len=16, dtype=getattr(torch, config.dtype))
    prepare(model, False)
    trained, weights = build_weights(model, config)
    assert weights is not None
    return trained, weights, build_optimizer(trained, config)


def assert_planned(folder: Path, **changes: Any) -> None:
    """The plan is what two steps take; each layer learns, and the merged model computes the same."""
    model, weights, optimizer = built(folder, **changes)
    tokens = torch.arange(64).remainder(300).view(4, 16)
    loss, _ = _between_steps(weights, optimizer, lambda: model(input_ids=tokens, labels=tokens).loss, 1)
    learnt: set[str] = set()
    steps = itertools.count()

    def step() -> None:
        now = next(steps)
        weights.before_step(now)
        for name, factor in weights.factors().items():
            if factor.grad is not None and factor.grad.any():
                learnt.add(name.rpartition(".")[0].partition("_proj")[0])
        optimizer.step()
        weights.end_step(now, optimizer)

    real = PeakPlan.of(trace_training(model, optimizer, loss, step=step, logits_size=300))
    given = {"model": str(folder / "model.json"), "batch_size": 4, "seq_len": 16, "device": "cpu", **changes}
    plan = plan_recipe(PlanSettings(**given)).bytes
    assert plan.most == real.most and plan.peak == real.peak
    assert len(learnt) == 7 or "vblora" in str(changes)
    before = logits(model)
    weights.merge()
    close = 0.05 if changes.get("dtype") == "bfloat16" else 1e-4
    torch.testing.assert_close(logits(weights.model), before, rtol=close, atol=close)
