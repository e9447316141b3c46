from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from subspan.train.config import PretrainConfig, differences, read_config, write_text
from subspan.train.shard import launch_settings


def test_yaml_and_back(tmp_path: Path) -> None:
    config = PretrainConfig(lr=1e-5, exclude=["a", "b"], optimizer={"betas": [0.9, 0.95]}, data="x.txt", rank=None)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert read_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("grad_accumulation", -1),
        ("lr", 0.0),
        ("lr_scale", -1.0),
        ("other_lr_scale", 0.0),
        ("seq_len", 1),
        ("rank", 0),
        ("validation", 1.0),
        ("warmup", 2.5),
        ("warmup", -0.1),
        ("weight_decay", -0.1),
        ("schedule", "sine"),
        ("dtype", "float16"),
        ("report_to", "mlflow"),
        ("keep_checkpoints", 0),
        ("eval_every", -1),
        ("log_every", 0),
        ("share_inputs", True),
    ],
)
def test_impossible_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} is {value!r}; it must be "):
        PretrainConfig(**{name: value})


def test_differences_that_change_the_training() -> None:
    base = PretrainConfig(optimizer={"scale": 0.5})
    assert differences(base, base) == []
    other = PretrainConfig(seed=1, output="x", resume="auto", log_every=1, optimizer={"eps": 1e-6})
    assert differences(base, other) == [
        "seed: 0 -> 1",
        "optimizer.scale: 0.5 -> None",
        "optimizer.eps: None -> 1e-06",
    ]


def test_an_unknown_setting_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("batchsize: 3\n")
    with pytest.raises(ValueError, match=r"config.yaml: unknown setting 'batchsize'; did you mean 'batch_size'\?"):
        read_config(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("- 3\n")
    with pytest.raises(ValueError, match="holds no settings"):
        read_config(tmp_path / "config.yaml")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "one")
    write_text(tmp_path / "new" / "a.txt", "two")
    assert (tmp_path / "new" / "a.txt").read_text() == "two"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "amp"), ("bfloat16", "bfloat16"), ("amp", "amp")])
def test_what_accelerate_asks_for_is_a_setting(monkeypatch: pytest.MonkeyPatch, dtype: Any, expected: str) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = launch_settings(PretrainConfig(dtype=dtype))
    assert (config.dtype, config.shard) == (expected, "full")
    # Nobody else reads them, in this run or the next.
    assert launch_settings(PretrainConfig(dtype=dtype)) == PretrainConfig(dtype=dtype)


def test_a_precision_of_accelerate_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="mixed_precision of accelerate is 'fp16', which subspan does not have"):
        launch_settings(PretrainConfig())
