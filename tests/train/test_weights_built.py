from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from subspan.train.config import PretrainConfig
from subspan.train.plan import prepare
from subspan.train.presets import build_model
from subspan.train.weights import build_weights
from tests.train.low_rank_runs import built

pytestmark = pytest.mark.usefixtures("one_layer")


@pytest.mark.parametrize(
    "given",
    [
        {"weights": "mhlora", "weight_settings": {"rank": 4}},
        {"adapter": "lora"},
        {"adapter": "lora", "weights": "relora", "weight_settings": {"restart_every": 9}},
    ],
)
def test_what_is_drawn_follows_from_the_seed_of_the_run(tmp_path: Path, given: dict[str, Any]) -> None:
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(drawn))
        base = build_model(str(tmp_path / "model.json"), seq_len=16)
        weights = build_weights(base, PretrainConfig(seed=seed, **given))[1]
        assert weights is not None and weights.seed == seed
        drawn.append(next(factor for name, factor in weights.factors().items() if "lora_A" in name))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_restarts_know_the_length_of_the_run(tmp_path: Path, adapter: Any) -> None:
    base = build_model(str(tmp_path / "model.json"), seq_len=16)
    own = {} if adapter else {"weight_settings": {"rank": 4}}
    weights: Any = build_weights(base, PretrainConfig(weights="relora", adapter=adapter, steps=40, **own))[1]
    assert weights.steps == 40 and [step for step in range(40) if weights.due(step)] == [9, 19, 29]


def test_an_adapter_is_added_to_bfloat16_weights_with_one_rounding(tmp_path: Path) -> None:
    model, weights, _ = built(tmp_path, adapter="lora", dtype="bfloat16")
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(B, std=0.01)
    expected = (layer.weight.float() + B.float() @ A.float()).bfloat16()  # alpha is r
    weights.merge()
    merged: Any = weights.model
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, expected)


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_adapters_learn_under_activation_checkpointing(tmp_path: Path, adapter: str) -> None:
    """Although the embeddings are frozen, and so nothing that the first layer is given has a gradient."""
    base = build_model(str(tmp_path / "model.json"), seq_len=16)
    prepare(base, True)
    model, weights = build_weights(base, PretrainConfig(adapter=adapter, activation_checkpointing=True))
    assert weights is not None
    model.train()
    ids = torch.arange(32).view(2, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(factor.grad is not None for factor in weights.factors().values())
