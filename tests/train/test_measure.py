"""The memory of a run's first steps is what was planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from subspan.memory import PeakPlan
from tests.train.micro import repeatable, run


@pytest.mark.parametrize(("method", "gradient"), [("galore", "full"), ("galore", "projected")])
def test_measured_is_planned(method: str, gradient: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[PeakPlan] = []
    monkeypatch.setattr("subspan.train.pretrain.show_peaks", lambda console, *peaks: shown.extend(peaks))
    same = {"method": method, "gradient": gradient, "steps": 4}
    run(tmp_path, **same, measure_memory=True)
    planned, measured = shown
    for name in ("weights", "gradients", "moments", "bases", "other state"):
        assert planned.most[name] == measured.most[name], name
    assert planned.peak == pytest.approx(measured.peak, rel=0.02)
    before = repeatable(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "measured")
    run(tmp_path, **same)
    assert repeatable(tmp_path / "run") == before
