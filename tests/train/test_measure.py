"""The memory of a run's first steps is what was planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from subspan.memory import PeakPlan
from tests.train.micro import repeatable, run, settings, write_model


@pytest.mark.parametrize(
    ("method", "gradient", "changes"),
    [
        ("galore", "full", {}),
        ("galore", "projected", {"share_inputs": True}),
        ("galore", "full", {"weight_storage": "int8", "optimizer": {"rounding": "stochastic"}}),
        ("q_galore", "full", {"weight_storage": "float"}),
        ("q_apollo_mini", "fused", {"rank": None, "max_grad_norm": 0.0}),
    ],
    ids=str,
)
def test_measured_is_planned(
    method: str, gradient: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings(tmp_path)
    write_model(tmp_path, hidden_size=64, intermediate_size=128)
    shown: list[PeakPlan] = []
    monkeypatch.setattr("subspan.train.pretrain.show_peaks", lambda console, *peaks: shown.extend(peaks))
    same = {"method": method, "gradient": gradient, "steps": 4} | changes
    run(tmp_path, **same, measure_memory=True)
    planned, measured = shown
    for name in ("weights", "gradients", "moments", "bases", "other state"):
        assert planned.most[name] == measured.most[name], name
    assert planned.peak == pytest.approx(measured.peak, rel=0.02)
    before = repeatable(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "measured")
    run(tmp_path, **same)
    assert repeatable(tmp_path / "run") == before
