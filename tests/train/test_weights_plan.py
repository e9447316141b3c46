"""Plans, groups and projections of runs with weights of low rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from subspan.nn.lowrank import list_weights
from subspan.train.config import PretrainConfig
from subspan.train.optimizer import resolve
from subspan.train.plan import prepare
from subspan.train.presets import build_model
from subspan.train.weights import build_weights
from tests.train.low_rank_runs import assert_planned, built, small
from tests.train.micro import write_model

pytestmark = pytest.mark.usefixtures("one_layer")


@pytest.mark.parametrize(("name", "dtype"), [("mhlora", "bfloat16"), *((name, "float32") for name in list_weights())])
def test_planned_bytes_are_those_of_a_run(tmp_path: Path, name: str, dtype: str) -> None:
    assert_planned(tmp_path, weights=name, weight_settings=small(name), dtype=dtype)


#: Of adapters whose defaults are too large for the model.
ADAPTER_SETTINGS: dict[str, dict[str, Any]] = {
    "randlora": {"r": 4},
    "vera": {"r": 4},
    "boft": {"boft_block_size": 4},
    "oft": {"oft_block_size": 4},
    "fourierft": {"n_frequency": 20},
    "vblora": {"num_vectors": 20, "vector_length": 16},
}


@pytest.mark.parametrize(
    "name",
    ["lora", "rslora", "dora", "pissa", "olora", "loha", "lokr", "vera", "randlora", "hra", "oft", "boft", "ia3",
     "fourierft", "vblora", "hira"],
)  # fmt: skip
def test_adapters_are_planned_and_merged(tmp_path: Path, name: str) -> None:
    assert_planned(tmp_path, adapter=name, adapter_settings=ADAPTER_SETTINGS.get(name, {}))


@pytest.mark.parametrize("project", ["factors", "others", "merged"])
def test_projected_gradients(tmp_path: Path, project: Any) -> None:
    chosen = {"weights": "mhlora", "weight_settings": small("mhlora"), "method": "galore", "rank": 3}
    assert_planned(tmp_path, project=project, **chosen)
    _, _, optimizer = built(tmp_path, project=project, **chosen)
    projected = [row.name for row in optimizer.rows() if row.rank is not None]
    parts = {"factors": "lora_", "others": ("embed", "lm_head"), "merged": "proj.weight"}[project]
    expected = [
        row.name
        for row in optimizer.rows()
        if any(part in row.name for part in ([parts], parts)[isinstance(parts, tuple)])
    ]
    assert projected == expected and len(projected) == {"factors": 14, "others": 2, "merged": 7}[project]


def test_groups(tmp_path: Path) -> None:
    scales = {"lr": 1.0, "lr_scale": 0.5, "other_lr_scale": 2.0, "weight_decay": 0.1}
    *_, optimizer = built(tmp_path, adapter="lora", adapter_settings={"lora_plus_ratio": 16}, **scales)
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {
        "factors": (0.5, 0.1),
        "factors, B": (8.0, 0.1),
    }
    assert {(row.name.rpartition("lora_")[2][0], row.lr) for row in optimizer.rows()} == {("A", 0.5), ("B", 8.0)}
    *_, optimizer = built(tmp_path, adapter="dora", **scales)
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {
        "factors": (0.5, 0.1),
        "factor vectors": (0.5, 0.0),
    }
    merged = {"method": "galore", "rank": 3, "project": "merged"}
    *_, optimizer = built(tmp_path, weights="mhlora", weight_settings=small("mhlora"), **merged, **scales)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups}["merged"] == 0.5
    *_, optimizer = built(tmp_path, weights="mhlora", weight_settings=small("mhlora"), **scales)
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {
        "factors": (0.5, 0.1),
        "others": (2.0, 0.1),
        "vectors": (2.0, 0.0),
    }


def test_first_values_that_freeze_a_factor_are_planned(tmp_path: Path) -> None:
    from peft.tuners.lora import LoraLayer

    if not hasattr(LoraLayer, "mica_init"):
        pytest.skip("needs a newer peft")
    assert_planned(tmp_path, adapter="lora", adapter_settings={"r": 4, "init_lora_weights": "mica"})


def test_the_rank_of_projections_by_default() -> None:
    def rank(project: Any, **given: Any) -> int | None:
        return resolve(PretrainConfig(method="galore", project=project, **given), 64).rank

    heads = {"weights": "mhlora", "weight_settings": {"rank": 12}}
    assert [rank(project, **heads) for project in ("factors", "others", "merged")] == [3, 16, 16]
    assert rank("factors", adapter="lora") == 2
    assert rank("factors", adapter="lora", adapter_settings={"r": 20}) == 5


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
    config = PretrainConfig(weights="relora", weight_settings={"rank": 4}, adapter=adapter, steps=40)
    weights: Any = build_weights(base, config)[1]
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


def test_biases_of_parallel_heads_are_vectors(tmp_path: Path) -> None:
    write_model(tmp_path, num_hidden_layers=1, attention_bias=True)
    *_, optimizer = built(tmp_path, weights="lte", weight_settings=small("lte"), weight_decay=0.1)
    decayed = {row.name for row in optimizer.rows() if row.weight_decay}
    assert not [name for name in decayed if name.endswith("bias")]
    assert any(name.endswith("lora_A") for name in decayed)
