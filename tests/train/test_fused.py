"""Runs whose gradients are taken in backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from subspan.optim import method_info
from subspan.train.config import PretrainConfig
from subspan.train.optimizer import check_settings
from tests.train.micro import metrics, run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint-12" / "model.safetensors")


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_a_fused_run_equals_one_with_late_refreshes(tmp_path: Path, max_grad_norm: float) -> None:
    late = {"update_proj_gap": 5, "refresh": "late"}
    run(tmp_path, output=str(tmp_path / "full"), optimizer=late, max_grad_norm=max_grad_norm)
    run(tmp_path, output=str(tmp_path / "fused"), optimizer=late, max_grad_norm=max_grad_norm, gradient="fused")
    one, other = weights(tmp_path / "full"), weights(tmp_path / "fused")
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-5
    logged = [
        [line["grad_norm"] for line in metrics(tmp_path / name) if "grad_norm" in line] for name in ("full", "fused")
    ]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)
    assert all(line["grad_norm_exact"] for line in metrics(tmp_path / "fused") if "grad_norm" in line)


def test_a_projected_run_equals_a_fused_one(tmp_path: Path) -> None:
    for gradient in ("fused", "projected"):
        run(tmp_path, output=str(tmp_path / gradient), gradient=gradient, max_grad_norm=0.0)
    one, other = weights(tmp_path / "fused"), weights(tmp_path / "projected")
    assert one.keys() == other.keys()
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-4


def test_methods_that_need_gradients_cannot_project_them() -> None:
    with pytest.raises(ValueError, match="gradient is 'projected', but the method 'apollo' needs"):
        check_settings(PretrainConfig(method="apollo", gradient="projected", max_grad_norm=0))


def test_accumulated_norms_are_said_to_be_those_of_projections(tmp_path: Path) -> None:
    run(tmp_path, gradient="fused", grad_accumulation=2)
    lines = [line for line in metrics(tmp_path / "run") if "grad_norm" in line]
    assert lines
    assert not any(line["grad_norm_exact"] for line in lines)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16", "rank": 4},
        {"method": "golore", "optimizer": {"golore_after": 6, "update_proj_gap": 5}},
        {"gradient": "projected"},
        {"gradient": "projected", "dtype": "bfloat16", "grad_accumulation": 2, "rank": 2},
        {"gradient": "projected", "share_inputs": True, "dtype": "bfloat16"},
        {"method": "fira", "max_grad_norm": 0.0},
        {"method": "adamw", "rank": None, "optimizer": {}, "max_grad_norm": 0.0},
        {"method": "scale", "rank": None, "optimizer": {}, "max_grad_norm": 0.0},
    ],
    ids=str,
)
def test_planned_gradients_are_those_that_are_measured(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr("subspan.train.pretrain.show_end", lambda *args: shown.extend(args[2:4]))
    run(tmp_path, **({"gradient": "fused"} | changes))
    planned, measured = shown
    assert planned == measured
    full = sum(tensor.numel() * tensor.itemsize for tensor in weights(tmp_path / "run").values())
    assert planned.gradients < 0.75 * full


@pytest.mark.parametrize("method", ["fira", "apollo", "frugal", "adamw", "scale"])
def test_updates_in_backward_cannot_be_clipped_or_accumulated(method: str) -> None:
    rank = 4 if method_info(method).size == "rank" else None
    with pytest.raises(ValueError, match=r"max_grad_norm is 1\.0, but with gradient 'fused'"):
        check_settings(PretrainConfig(method=method, rank=rank, gradient="fused"))
    with pytest.raises(ValueError, match="grad_accumulation is 2, but with gradient 'fused'"):
        check_settings(PretrainConfig(method=method, rank=rank, gradient="fused", max_grad_norm=0, grad_accumulation=2))
    check_settings(PretrainConfig(method=method, rank=rank, gradient="fused", max_grad_norm=0))


def test_a_refresh_at_once_cannot_be_had() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.refresh is 'now', but gradient 'projected'"):
        check_settings(PretrainConfig(gradient="projected", optimizer={"refresh": "now"}))


@pytest.mark.parametrize("method", ["adamw", "fira", "scale"])
def test_updates_in_backward_follow_the_schedule(tmp_path: Path, method: str) -> None:
    settings: dict[str, Any] = {"method": method, "max_grad_norm": 0.0}
    if method_info(method).size is None:
        settings |= {"rank": None, "optimizer": {}}
    for gradient in ("full", "fused"):
        run(tmp_path, output=str(tmp_path / gradient), gradient=gradient, **settings)
    one, other = weights(tmp_path / "full"), weights(tmp_path / "fused")
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-5


def test_an_unknown_gradient_is_an_error() -> None:
    with pytest.raises(ValueError, match="gradient is 'none'; it must be full, fused or projected"):
        PretrainConfig(gradient="none")  # type: ignore[arg-type]
