"""A model whose weights are of low rank: its layers, and what happens to them between two steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from subspan.linalg import seeded_generator
from subspan.nn.lowrank.layer import LowRankLayer, merge_layers, replace_module
from subspan.nn.lowrank.limits import Limit
from subspan.nn.lowrank.select import select_layers

__all__ = ["LowRankWeights", "WeightRecipe"]

#: The learning rate at a step, as a share of the peak.
Rate = Callable[[int], float]


class LowRankWeights:
    """Holds the low-rank layers of a model and does to them what their recipe says, between the steps.

    It has no state of its own: what it does follows from the number of the step, what it draws from the seed, the name
    of a layer and the step, and what lasts is in the layers, so that a model that is saved in the middle of a cycle
    continues bit by bit.

    A training loop::

        for step in range(steps):
            weights.begin_step(step)
            loss(model, batch).backward()
            weights.before_step(step)
            optimizer.step()
            weights.end_step(step, optimizer)
            optimizer.zero_grad()

    Args:
        model: the model.
        layers: its low-rank layers by name.
        seed: of all that is drawn.
    """

    def __init__(self, model: nn.Module, layers: dict[str, LowRankLayer], seed: int = 0) -> None:
        self.model, self.layers, self.seed = model, layers, seed

    def install(self, name: str, layer: LowRankLayer) -> None:
        """Put a layer in the place of the module ``name`` of the model, with its first factors."""
        layer.reset_(self.generator(name, -1))
        replace_module(self.model, name, layer)
        self.layers[name] = layer

    def factors(self) -> dict[str, nn.Parameter]:
        """What is trained in place of the matrices, by name in the model."""
        return {
            f"{name}.{key}" if name else key: parameter
            for name, layer in self.layers.items()
            for key, parameter in layer.factors().items()
        }

    def begin_step(self, step: int) -> None:
        """Before the forward pass of step ``step`` (0 is the first one)."""

    def before_step(self, step: int) -> None:
        """When the gradients of step ``step`` are there and summed up, before they are clipped."""

    def end_step(self, step: int, optimizer: torch.optim.Optimizer) -> list[str]:
        """After the optimizer has done step ``step``, before gradients are forgotten.

        Returns:
            What was done, in words, for the log; nothing in most steps.

        Raises:
            ValueError: a factor that is not in the optimizer, which is looked at in step 0.
        """
        if step == 0:
            self.check_held(optimizer)
        return []

    def check_held(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that lacks a factor, such as one that was built before the layers were replaced.

        Raises:
            ValueError: naming the factor.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, factor in self.factors().items():
            if id(factor) not in held and factor.requires_grad:
                raise ValueError(f"{name} is trained, but it is not in the optimizer; build the optimizer afterwards")

    @property
    def divided(self) -> bool:
        """Whether each process trains parameters of its own, so that no gradients are averaged between them."""
        return False

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradients of all that is trained by their norm, which is returned as it was before."""
        trained = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        return nn.utils.clip_grad_norm_(trained, max_norm)

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the model or of its optimizer (``PARAMETER/KEY``), of all processes where these are `divided`."""
        return dict(tensors)

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this process holds of tensors that were collected."""
        return dict(tensors)

    def rate(self, step: int, schedule: Rate) -> float:
        """The learning rate at a step, where ``schedule`` gives it without regard to what happens to the weights."""
        return schedule(step)

    def merge(self) -> list[str]:
        """Turn the model into an ordinary one that computes the same; returns the names of the layers."""
        return merge_layers(self.model)

    def generator(self, name: str, step: int) -> torch.Generator:
        """What is drawn for a layer at a step (-1: before the first one) comes from here."""
        return seeded_generator(self.seed, "weights", name, step)


@dataclass(frozen=True)
class WeightRecipe(ABC):
    """The settings of a way to hold weights in low rank; a recipe is a frozen dataclass with the paper's defaults.

    It says what it is (``name`` to ``summary``), which values its settings may have (``limits``), and how the chosen
    layers of a model become layers of low rank (`build`).

    Raises:
        ValueError: a value that is not allowed.
    """

    #: Registry name, the paper's title of it, its arXiv number, and one line.
    name: ClassVar[str]
    title: ClassVar[str]
    arxiv: ClassVar[str]
    summary: ClassVar[str]
    #: Whether several processes can train it, each with a copy (DistributedDataParallel).
    ddp: ClassVar[bool] = True
    #: What each setting may be, by its name.
    limits: ClassVar[Mapping[str, Limit]] = {}

    def __post_init__(self) -> None:
        for name, limit in self.limits.items():
            limit.check(name, getattr(self, name))

    @property
    def unshardable(self) -> str | None:
        """Why it cannot train what `fully_shard` has divided, with these settings; None where it can."""
        return "whole matrices take up the factors between steps"

    def apply(
        self,
        model: nn.Module,
        *,
        target_modules: str | Sequence[str] = "all-linear",
        exclude: str | Sequence[str] = (),
        steps: int | None = None,
        seed: int = 0,
    ) -> LowRankWeights:
        """Replace linear layers of a model, in place.

        On the meta device nothing is drawn.

        Args:
            model: the model.
            target_modules, exclude: which layers, see `select_layers`.
            steps: of the whole run, where a default depends on it.
            seed: of all that is drawn.

        Raises:
            ValueError: settings that do not fit the model or the number of steps, or no such layer.
        """
        return self.build(model, select_layers(model, target_modules, exclude), steps=steps, seed=seed)

    @abstractmethod
    def build(self, model: nn.Module, chosen: dict[str, nn.Module], *, steps: int | None, seed: int) -> LowRankWeights:
        """Put layers of low rank in the place of those that were chosen, in place; all else is that of `apply`.

        What does not fit is refused before anything is changed.

        Args:
            model: the model.
            chosen: linear layers by name; whoever takes them out one by one lets go of one dense matrix after another.
            steps, seed: see `apply`.
        """

    def check_run(self, *, processes: int, steps: int, eval_every: int) -> None:  # noqa: B027
        """Refuse a run that the recipe cannot have, before there is a model.

        Args:
            processes: that train together.
            steps: of the run.
            eval_every: steps between evaluations; 0: at the end.

        Raises:
            ValueError: naming the setting.
        """

    def shares(self, processes: int) -> int:
        """Equal shares that each process divides every batch into: its sequences have to be a multiple of them."""
        return 1
