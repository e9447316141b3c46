from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from subspan.analysis.layers_bench import LAYERS, LayersResult, LayersRow, bench_layers
from subspan.analysis.study_pictures import draw_layers
from subspan.train import sweep
from subspan.train.config import PretrainConfig
from subspan.train.pretrain import pretrain
from tests.train.micro import Killed, settings, stop_after

HEADS = {"heads": 2, "rank": 3}


def study(
    folder: Path, layers: list[str], full: dict[str, Any] | None = None, **changes: Any
) -> tuple[LayersResult, str]:
    printed = io.StringIO()
    shared = {"output": str(folder / "study"), "weights": "mhlora", "weight_settings": HEADS, "method": "adamw"}
    shared |= {"rank": None, "optimizer": {}, "steps": 4, "save_every": 2, "eval_every": 0}
    config = PretrainConfig(**settings(folder, **shared | changes))
    return bench_layers(config, layers, full=full, console=Console(file=printed, width=120)), printed.getvalue()


@pytest.mark.slow
def test_a_study_is_stopped_continued_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def second_is_killed(config: PretrainConfig, **kwargs: Any) -> Any:
        begun.append(Path(str(config.output)).name)
        if len(begun) == 2:
            with monkeypatch.context() as patch:
                stop_after(patch, 3)
                return pretrain(config, **kwargs)
        return pretrain(config, **kwargs)

    monkeypatch.setattr(sweep, "pretrain", second_is_killed)
    with pytest.raises(Killed):
        study(tmp_path, ["full", "L+A"], full={"lr": 0.003})
    assert begun == ["A+L", "full"]
    result, printed = study(tmp_path, ["full", "L+A"], full={"lr": 0.003})
    assert begun == ["A+L", "full", "full"]
    assert "finished already" in printed and "continues at step 2" in printed

    heads, full = result.rows
    assert (heads.layers, full.layers) == ("A+L", "full")
    # Vocabulary 300, hidden width 32, two blocks of four square matrices of attention.
    frozen, factors = 2 * 4 * 32 * 32 + 300 * 32, 2 * 3 * (2 * 4 * (32 + 32) + 300 + 32)
    assert full.trained == 2 * (4 * 32 * 32 + 3 * 32 * 64) + 2 * 300 * 32 + 5 * 32
    assert heads.trained == full.trained - frozen + factors
    assert heads.tokens == full.tokens == 4 * 4 * 16
    assert heads.loss != full.loss and all(row.milliseconds and row.milliseconds > 0 for row in result.rows)
    # Two moments of four bytes and a counter of each tensor.
    assert full.state_bytes == 8 * full.trained + 4 * 21
    written = json.loads((tmp_path / "study" / "layers.json").read_text())
    assert [row["loss"] for row in written["rows"]] == [heads.loss, full.loss]
    assert written["full"] == {"lr": 0.003} and "torch" in written["versions"]
    rows = list(csv.DictReader((tmp_path / "study" / "layers.csv").open()))
    assert [row["trained"] for row in rows] == [str(heads.trained), str(full.trained)]
    assert (tmp_path / "study" / "layers.png").stat().st_size > 5000

    with pytest.raises(ValueError, match=r"holds a study with other settings \(lr: 0.003 -> 0.01\)"):
        study(tmp_path, ["full"], full={"lr": 0.01})
    with pytest.raises(ValueError, match=r"holds a study with other settings \(steps: 4 -> 5\)"):
        study(tmp_path, ["full"], full={"lr": 0.003}, steps=5)


@pytest.mark.parametrize(
    ("layers", "changes", "message"),
    [
        (["A", "B"], {}, "layers holds 'B', which is unknown; choose from A, M, L, A"),
        ([], {}, "layers is empty"),
        (["A"], {"weights": "dense", "weight_settings": {}}, "weights is 'dense'; it must be a recipe"),
        (["A"], {"full": {"heads": 3}}, "full holds 'heads'"),
        (["A"], {"full": {"weights": "mhlora"}}, "full holds 'weights'"),
    ],
)
def test_what_cannot_be_studied(tmp_path: Path, layers: list[str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study(tmp_path, layers, **changes)
    assert not (tmp_path / "study").exists()


def test_the_choices_are_those_of_the_study() -> None:
    assert list(LAYERS) == ["A", "M", "L", "A+M", "A+L", "M+L", "A+M+L", "full"]
    assert LAYERS["A+M+L"] == "attention+mlp+logit"


def test_a_run_that_diverged_is_left_out_of_the_picture(tmp_path: Path) -> None:
    diverged = LayersRow("A", None, None, None, None, 0, 0)
    assert not draw_layers([diverged], "model", tmp_path / "layers.png")
    good = LayersRow("full", 100, 3.0, 20.0, 1.0, 800, 64)
    assert draw_layers([diverged, good], "model", tmp_path / "layers.png")
