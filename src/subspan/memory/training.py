"""The memory of training steps, real or simulated: forward, backward and the optimizer's step under one trace."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from subspan.memory.trace import MemoryTrace, Timeline
from subspan.optim import LowRankOptimizer
from subspan.optim.shards import local

__all__ = ["TrainingTrace", "trace_training"]


class TrainingTrace:
    """A trace that knows what a model and its optimizer hold.

    Storages are ``weights`` (parameters and buffers), ``gradients`` (whole ones, and what was folded of them),
    ``state:KEY``, ``logits`` (with the loss and its gradient), ``workspace`` (what else an optimizer takes, in `step`
    and in its hooks), ``buffers`` (of `fully_shard`) and ``activations``, all other.

    Args:
        model: on the device that is to be counted.
        optimizer: its optimizer.
        logits_size: size of the vocabulary; None counts logits as activations.

    Attributes:
        trace: enter it around the steps.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, logits_size: int | None = None) -> None:
        self.model, self.optimizer = model, optimizer
        device = next(model.parameters()).device
        self.trace = MemoryTrace(logits_size, device)
        self.trace.label(map(local, [*model.parameters(), *model.buffers()]), "weights")
        self.end()
        self._handles = [
            handle
            for parameter in model.parameters()
            if parameter.requires_grad
            for handle in (
                parameter.register_hook(self._gradient_is_there),
                parameter.register_post_accumulate_grad_hook(self._gradient_is_taken),
            )
        ]

    def begin(self, name: str) -> None:
        """A phase begins; the one before ends."""
        self.end()
        self.trace.phase, self.trace.category = name, "workspace" if name.endswith("step") else "activations"

    def end(self) -> None:
        """A phase ends: what it leaves behind is known now."""
        optimizer = self.optimizer
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self.trace.label(map(local, gradients), "gradients")
        if isinstance(optimizer, LowRankOptimizer):
            self.trace.label(optimizer.folded_tensors(), "gradients")
        self._label_state()

    def close(self) -> Timeline:
        """Remove the hooks from the model.

        Returns:
            The peaks of all phases.
        """
        for handle in self._handles:
            handle.remove()
        return self.trace.timeline()

    def _label_state(self) -> None:
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    self.trace.label([local(value)], f"state:{key}")

    def _gradient_is_there(self, gradient: Tensor) -> None:
        # A hook of the optimizer may follow, and what it allocates is its own.
        self.trace.label([gradient], "gradients")
        self.trace.category = "workspace"

    def _gradient_is_taken(self, parameter: Tensor) -> None:
        self.trace.category = "activations"


def trace_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    *,
    grad_accumulation: int = 1,
    steps: int = 2,
    logits_size: int | None = None,
    step: Callable[[], object] | None = None,
) -> Timeline:
    """Train some steps and follow the memory; in `simulated` surroundings nothing is computed.

    The first step of a low-rank optimizer refreshes all subspaces, the second one is a plain step. Phases are named
    ``forward``, ``backward`` and ``step``, in the first step with ``first `` before.

    Args:
        model: the model.
        optimizer: its optimizer.
        loss: runs the model on a batch.
        grad_accumulation: forward and backward passes in a step. Memory repeats after the second one.
        steps: how many.
        logits_size: see `TrainingTrace`.
        step: in place of ``optimizer.step``.

    Example:
        >>> from subspan.optim import GaLore
        >>> model = nn.Linear(64, 32, bias=False)
        >>> x = torch.randn(8, 64)
        >>> timeline = trace_training(model, GaLore(model, rank=4), lambda: model(x).square().mean())
        >>> timeline.most["weights"], timeline.most["gradients"], timeline.most["state:exp_avg"]
        (8192, 8192, 1024)
    """
    training = TrainingTrace(model, optimizer, logits_size)
    with training.trace:
        for number in range(steps):
            first = "first " if number == 0 else ""
            for _ in range(min(grad_accumulation, 2)):
                training.begin(f"{first}forward")
                value = loss()
                training.begin(f"{first}backward")
                value.backward()
                del value
            training.begin(f"{first}step")
            (step or optimizer.step)()
            training.end()
            optimizer.zero_grad()
    return training.close()
