"""Layers and a small network with LoQT, and steps of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from subspan.nn.lowrank import LoQT, LoQTLinear
from subspan.optim import AdamW

SHAPES = {"wide": (16, 24), "tall": (24, 16), "square": (16, 16)}
FLOAT: dict[str, Any] = {"weight_bits": None, "projection_bits": None}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "float": FLOAT,
    "double": {"double_quantization": True},
    "float P": {"projection_bits": None},
    "exact": {"svd": "exact"},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer_of(shape: tuple[int, int] = (24, 16), *, seed: int = 0, **settings: Any) -> tuple[LoQTLinear, Tensor]:
    """A layer with a factor that is not zero, and the weight that it was made from."""
    torch.manual_seed(seed)
    linear = nn.Linear(shape[1], shape[0])
    W = linear.weight.detach().clone()
    model = nn.Sequential(linear)
    LoQT(**{"rank": 4, **settings}).apply(model, seed=seed)
    layer: Any = model[0]
    with torch.no_grad():
        layer.factor.add_(torch.randn(layer.factor.shape, generator=generator(seed)) * 0.1)
    return layer, W


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tall, self.wide = nn.Linear(12, 24), nn.Linear(24, 16, bias=False)
        self.square, self.conv1d = nn.Linear(16, 16), Conv1D(20, 16)
        nn.init.normal_(self.conv1d.weight, std=0.3)
        self.norm = nn.LayerNorm(20)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.wide(torch.tanh(self.tall(x))))
        return self.norm(self.conv1d(torch.tanh(self.square(x))))


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    draws = generator(1000 + step)
    return torch.randn(size, 3, 12, generator=draws), torch.randn(size, 3, 20, generator=draws)


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def built(kind: str = "nf4", optimizer: Any = AdamW, **settings: Any) -> tuple[Network, Any, Any]:
    model = Network()
    weights = LoQT(**{"rank": 4, "first_gap": 5, **KINDS[kind], **settings}).apply(model)
    return model, weights, optimizer(trainable(model), lr=1e-2)


def train(model: nn.Module, weights: Any, optimizer: Any, steps: range, pieces: int = 1) -> list[tuple[int, str]]:
    said = []
    for step in steps:
        weights.begin_step(step)
        x, y = batch(step)
        for part, target in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            ((model(part) - target).square().mean() / pieces).backward()
        optimizer.step()
        said += [(step, line) for line in weights.end_step(step, optimizer)]
        optimizer.zero_grad()
    return said
