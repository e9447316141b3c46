"""Ranks that change: in the metrics, in the summary and as a picture."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from subspan.train.config import PretrainConfig
from subspan.train.optimizer import resolve
from subspan.train.pretrain import RunSummary, pretrain
from subspan.train.ranks import mean_rank, plot_ranks
from tests.train.micro import metrics, settings

TOLERANCE = {"rank_policy": "tolerance", "rtol": 0.1, "update_proj_gap": 3}


def run(folder: Path, **changes: Any) -> tuple[RunSummary, str]:
    console = Console(file=io.StringIO(), width=200)
    summary = pretrain(PretrainConfig(**settings(folder, **changes)), console=console)
    assert isinstance(console.file, io.StringIO)
    return summary, console.file.getvalue()


def test_a_run_writes_its_ranks(tmp_path: Path) -> None:
    summary, printed = run(tmp_path, rank=30, optimizer=TOLERANCE)
    lines = metrics(tmp_path / "run")
    changes = [line for line in lines if "ranks" in line]
    first = changes[0]
    assert first["step"] == 1
    assert len(first["ranks"]) == 14  # all matrices of two layers
    assert all(8 <= rank <= 30 for line in changes for rank in line["ranks"].values())
    ranks: dict[str, int] = {}
    sums = {name: 0 for name in first["ranks"]}
    by_step = {line["step"]: line["ranks"] for line in changes}
    for step in range(1, 13):
        ranks |= by_step.get(step, {})
        sums = {name: total + ranks[name] for name, total in sums.items()}
    assert summary.mean_rank == pytest.approx(sum(sums.values()) / len(sums) / 12)
    assert lines[-1]["mean_rank"] == summary.mean_rank
    logged = [line for line in lines if "loss" in line]
    assert all(8 <= line["mean_rank"] <= 30 for line in logged)
    assert "mean rank" in printed
    assert summary.state_bytes <= summary.planned_state_bytes
    picture = tmp_path / "run" / "ranks.png"
    assert picture.exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_fixed_ranks_are_not_written(tmp_path: Path) -> None:
    summary, printed = run(tmp_path)
    assert summary.mean_rank is None
    assert not any("ranks" in line or ("mean_rank" in line and line["mean_rank"]) for line in metrics(tmp_path / "run"))
    assert not (tmp_path / "run" / "ranks.png").exists()
    assert "mean rank" not in printed


def test_the_default_cap_is_half_of_the_width() -> None:
    assert resolve(PretrainConfig(optimizer={"rank_policy": "tolerance"}), 256).rank == 128
    assert resolve(PretrainConfig(optimizer={"rank_policy": "fixed"}), 256).rank == 64
    assert resolve(PretrainConfig(rank=40, optimizer={"rank_policy": "tolerance"}), 256).rank == 40


def test_mean_rank_of_nothing_is_none() -> None:
    assert mean_rank([{"step": 1, "loss": 3.0}], 10) is None


def test_a_picture_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot_ranks([{"step": 1, "ranks": {"a": 8}}], 10, tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_picture_of_a_long_run_is_drawn_in_columns(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = [{"step": 1 + 500 * i, "ranks": {f"layers.{j}.weight": 8 + i + j for j in range(5)}} for i in range(20)]
    assert plot_ranks(lines, 10_000, tmp_path) == tmp_path / "ranks.png"
    assert [path.name for path in tmp_path.iterdir()] == ["ranks.png"]
