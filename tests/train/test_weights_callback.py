from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import TrainerState

from subspan.nn.lowrank import weight_recipe
from subspan.optim import AdamW
from subspan.train.callbacks import MetricsFile
from subspan.train.weights import WeightsCallback


def test_layers_that_no_gradient_reaches_are_named(tmp_path: Path) -> None:
    class PastTheLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x) @ self.read.weight.mT

    model = PastTheLayer()
    weights = weight_recipe("mhlora", heads=1, rank=2).apply(model)
    optimizer = AdamW(list(model.named_parameters()), lr=1e-3)
    console, state = Console(file=io.StringIO(), width=200), TrainerState(global_step=0, max_steps=3)
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    callback = WeightsCallback(weights, optimizer, metrics, console)
    nothing: Any = (None, state, None)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    callback.on_optimizer_step(*nothing)
    assert "no gradient reached the factors of read (1 of 2 layers)" in console.file.getvalue()
    assert "read" in metrics.path.read_text()
    state.global_step = 1
    written = console.file.getvalue()
    callback.on_optimizer_step(*nothing)
    assert console.file.getvalue() == written
