"""Plans, groups and projections of runs with weights of low rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from subspan.nn.lowrank import list_weights
from subspan.train.config import PretrainConfig
from subspan.train.optimizer import resolve
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


def test_first_values_that_freeze_a_factor_are_planned(tmp_path: Path) -> None:
    from peft.tuners.lora import LoraLayer

    if not hasattr(LoraLayer, "mica_init"):
        pytest.skip("needs a newer peft")
    assert_planned(tmp_path, adapter="lora", adapter_settings={"r": 4, "init_lora_weights": "mica"})


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


def test_the_rank_of_projections_by_default() -> None:
    def rank(project: Any, **given: Any) -> int | None:
        return resolve(PretrainConfig(method="galore", project=project, **given), 64).rank

    heads = {"weights": "mhlora", "weight_settings": {"rank": 12}}
    assert [rank(project, **heads) for project in ("factors", "others", "merged")] == [3, 16, 16]
    assert rank("factors", adapter="lora") == 2
    assert rank("factors", adapter="lora", adapter_settings={"r": 20}) == 5


def test_biases_of_parallel_heads_are_vectors(tmp_path: Path) -> None:
    write_model(tmp_path, num_hidden_layers=1, attention_bias=True)
    *_, optimizer = built(tmp_path, weights="lte", weight_settings=small("lte"), weight_decay=0.1)
    decayed = {row.name for row in optimizer.rows() if row.weight_decay}
    assert not [name for name in decayed if name.endswith("bias")]
    assert any(name.endswith("lora_A") for name in decayed)
