"""Runs whose loss is computed in chunks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.micro import metrics, run, settings


@pytest.mark.parametrize(
    "changes", [{}, {"grad_accumulation": 2}, {"dtype": "amp"}, {"gradient": "projected"}], ids=str
)
def test_a_chunked_loss_is_the_same_loss(tmp_path: Path, changes: dict[str, Any]) -> None:
    losses = []
    for chunked in (False, True):
        folder = tmp_path / str(chunked)
        run(tmp_path, output=str(folder), chunked_loss=chunked, **changes)
        lines = metrics(folder)
        losses.append([line.get("loss", line.get("eval_loss")) for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3 if changes.get("dtype") == "amp" else 1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "granite", "logits_scaling": 4.0}, "GraniteForCausalLM computes"),
        ({"model_type": "gemma2", "head_dim": 16, "final_logit_softcapping": 30.0}, "Gemma2ForCausalLM computes"),
        ({"model_type": "phi"}, "PhiForCausalLM: its head has a bias"),
    ],
    ids=["scaled", "soft-capped", "biased"],
)
def test_a_model_with_another_loss_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    changes = settings(tmp_path)
    config = json.loads((tmp_path / "model.json").read_text())
    del config["architectures"]
    (tmp_path / "model.json").write_text(json.dumps(config | changed))
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes, chunked_loss=True)
