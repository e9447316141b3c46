"""Bytes of weights, gradients and optimizer state, before the first step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from subspan.optim import LowRankOptimizer


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by role.

    Args:
        weights: parameters and buffers, tied ones once.
        gradients: as they exist at the end of the first backward pass: whole ones, or what was folded of them.
        state: optimizer state by key (``exp_avg``, ``basis``, ...).
    """

    weights: int
    gradients: int
    state: dict[str, int]

    @property
    def state_bytes(self) -> int:
        """All optimizer state."""
        return sum(self.state.values())

    @property
    def total(self) -> int:
        """Weights, gradients and optimizer state; activations are not in it."""
        return self.weights + self.gradients + self.state_bytes


def plan(model: nn.Module, optimizer: LowRankOptimizer) -> MemoryPlan:
    """Plan the memory that training ``model`` with ``optimizer`` holds, from shapes and declarations alone.

    Args:
        model: the model.
        optimizer: its optimizer; its state need not exist yet.

    Example:
        >>> from subspan.optim import GaLore
        >>> model = nn.Linear(64, 32, bias=False)
        >>> plan(model, GaLore(model, rank=4)).state["exp_avg"]  # 4 × 64 float32
        1024
    """
    tensors = [*model.parameters(), *model.buffers()]
    return MemoryPlan(
        weights=sum(tensor.numel() * tensor.itemsize for tensor in tensors),
        gradients=optimizer.planned_gradient_bytes(),
        state=optimizer.planned_state_bytes(),
    )
