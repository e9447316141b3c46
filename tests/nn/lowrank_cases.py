"""What the tests of several low-rank layers share: layers, steps, and the bytes of real and simulated training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from subspan.memory import simulated, trace_training
from subspan.memory.simulate import materialise
from subspan.memory.trace import Timeline, tensors_in
from subspan.nn.lowrank import LowRankWeights, WeightRecipe
from subspan.optim import AdamW

SHAPES = {"wide": (24, 40), "tall": (40, 24), "square": (32, 32)}


def linear(kind: str, out: int, into: int, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    """``nn.Linear`` or Hugging Face's transposed layer, seeded."""
    torch.manual_seed(out)
    layer: Any = nn.Linear(into, out, bias=bias) if kind == "Linear" else Conv1D(out, into)
    layer.weight.data = torch.randn_like(layer.weight) / into**0.5
    if bias:
        layer.bias.data = torch.randn(out)
    return layer.to(dtype)  # type: ignore[no-any-return]


def network(width: int = 32, seed: int = 0, device: str | None = None) -> nn.Module:
    torch.manual_seed(seed)
    with torch.device(device or "cpu"):
        return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.LayerNorm(width))


def train(model: nn.Module, weights: LowRankWeights, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Losses of steps whose batches follow from their numbers."""
    losses = []
    for step in steps:
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
        weights.begin_step(step)
        loss = (model(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        weights.before_step(step)
        optimizer.step()
        weights.end_step(step, optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def resumes(recipe: WeightRecipe, make: Callable[[nn.Module], torch.optim.Optimizer], stop: int, steps: int) -> bool:
    """Whether a run that is stopped and continued by another model ends as one that is not, bit by bit."""
    model = network()
    weights, optimizer = recipe.apply(model, seed=1), make(model)
    train(model, weights, optimizer, range(stop))
    saved, saved_optimizer = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = network(seed=9)
    others = recipe.apply(other, seed=1)
    optimizer_of_other = make(other)
    other.load_state_dict(saved)
    optimizer_of_other.load_state_dict(saved_optimizer)
    train(model, weights, optimizer, range(stop, steps))
    train(other, others, optimizer_of_other, range(stop, steps))
    same = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in same)


def gradients_flow(model: nn.Module, weights: LowRankWeights, only: str = "") -> bool:
    """Whether some factor of every layer, or of one, has a gradient that is not zero."""
    model.zero_grad()
    model(torch.randn(16, 32, generator=torch.Generator().manual_seed(5))).cos().mean().backward()
    layers = [layer for name, layer in weights.layers.items() if name.startswith(only)]
    found = [any(p.grad is not None and p.grad.any() for p in layer.factors().values()) for layer in layers]
    model.zero_grad()
    return all(found)


class Largest(TorchDispatchMode):
    """Remembers the largest number of elements of a tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors_in(result))])
        return result


def traced(recipe: WeightRecipe, dtype: torch.dtype, *, simulate: bool, width: int = 128) -> Timeline:
    """Two training steps under a trace, real ones or simulated."""

    def steps(model: nn.Module) -> Timeline:
        optimizer = AdamW(model.named_parameters(), lr=1e-3)
        x = torch.zeros(4, width, dtype=dtype)

        def step() -> None:
            weights.before_step(0)
            optimizer.step()
            weights.end_step(0, optimizer)

        return trace_training(model, optimizer, lambda: model(x).square().mean(), step=step)

    model = network(width, device="meta" if simulate else None).to(dtype)
    weights = recipe.apply(model)
    if not simulate:
        return steps(model)
    with simulated("cpu"):
        materialise(model)
        return steps(model)


def output_and_gradients(layer: nn.Module, x: Tensor, dY: Tensor) -> list[Tensor]:
    """The output, then the gradients of the input and of all parameters."""
    x = x.detach().requires_grad_()
    parameters = list(layer.parameters())
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dY)]
