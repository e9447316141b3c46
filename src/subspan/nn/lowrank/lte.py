"""LoRA-the-Explorer: heads that train apart, each on its own share of the data, and are merged by averaging."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from subspan.nn.lowrank.heads import HeadsWeights, MultiHeadLoRA
from subspan.nn.lowrank.layer import add_product_, replace_module
from subspan.nn.lowrank.limits import Limit, at_least, one_of
from subspan.nn.lowrank.parallel import ParallelHeadsLinear
from subspan.nn.lowrank.replicas import Batch, Replicas, replicate
from subspan.nn.lowrank.state_transform import ResetState, transform_state

__all__ = ["LTE", "LTEWeights"]


class LTEWeights(HeadsWeights):
    """Merges the heads every T steps.

    Args:
        recipe: settings.
        batch: how batches are divided.
        replicas: the copies of what has no heads, by name.
        **kwargs: see `HeadsWeights`.
    """

    def __init__(self, recipe: LTE, batch: Batch, replicas: dict[str, Replicas], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recipe, self.batch, self.replicas = recipe, batch, replicas
        self._hook = self.model.register_forward_pre_hook(batch.see, with_kwargs=True)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """With several processes make gradients those of the mean loss of all heads, as they are where one has all."""
        if self.batch.processes == 1:
            return
        alone, shared = self._gradients()
        for gradient in itertools.chain(shared, *alone):
            gradient.div_(self.batch.processes)
        for gradient in shared:
            dist.all_reduce(gradient)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradients of each head's own loss by their norm, and those of what is shared by theirs.

        Returns:
            Root mean square of the heads' norms before.
        """
        alone, shared = self._gradients()
        # Of the mean loss a head's gradient is an N-th of that of its own.
        norms = [self.batch.total * _clip(part, max_norm / self.batch.total) for part in alone]
        _clip(shared, max_norm)
        squares = torch.stack(norms).square().sum()
        if self.batch.processes > 1:
            dist.all_reduce(squares)
        return (squares / self.batch.total).sqrt()

    def _gradients(self) -> tuple[list[list[Tensor]], list[Tensor]]:
        """The gradients of each head, slices of those that heads have together, and those of what is shared."""
        alone: list[list[Tensor]] = [[] for _ in range(self.batch.heads)]
        taken = set()
        for layer in self.layers.values():
            own_bias = [layer.bias] if layer.bias is not None and layer.bias.ndim > 1 else []
            for parameter in (*layer.factors().values(), *own_bias):
                taken.add(parameter)
                if parameter.grad is not None:
                    for part, gradient in zip(alone, parameter.grad, strict=True):
                        part.append(gradient)
        for replicas in self.replicas.values():
            for part, module in zip(alone, replicas.copies.values(), strict=True):
                own = [parameter for parameter in module.parameters() if parameter not in taken]
                taken.update(own)
                part += [parameter.grad for parameter in own if parameter.grad is not None]
        rest = (parameter for parameter in self.model.parameters() if parameter not in taken)
        return alone, [parameter.grad for parameter in rest if parameter.grad is not None]

    @property
    def divided(self) -> bool:
        """Whether other processes have other heads."""
        return self.batch.processes > 1

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a model or of its optimizer (``PARAMETER/KEY``), as a process with all heads would hold them.

        Every process calls it.
        """
        device = next(self.model.parameters()).device  # where the processes can send each other tensors
        found = {}
        for key in sorted(tensors, key=self._ours):
            tensor, number = tensors[key], _copy_of(key)
            # The clocks of stacks of heads are the same everywhere.
            if number is None and not (tensor.ndim and self._has_heads(key)):
                found[key] = tensor
                continue
            parts = [part.to(tensor.device) for part in self.batch.gather(tensor.to(device).unsqueeze(0)).unbind()]
            if number is None:
                found[key] = torch.cat(parts)
                continue
            for process, part in enumerate(parts):
                copied = number - self.batch.first + process * self.batch.heads
                found[_with_copy(key, copied)] = part.clone()
        return found

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this process holds of tensors that were collected."""
        heads = range(self.batch.first, self.batch.first + self.batch.heads)
        found = {}
        for key, tensor in tensors.items():
            if (number := _copy_of(key)) is not None and number not in heads:
                continue
            divided = number is None and tensor.ndim > 0 and self._has_heads(key)
            found[key] = tensor[heads.start : heads.stop] if divided else tensor
        return found

    def _ours(self, key: str) -> tuple[str, int]:
        """Sorts keys alike in all processes."""
        number = _copy_of(key)
        return (key, 0) if number is None else (_with_copy(key, 0), number)

    def _has_heads(self, key: str) -> bool:
        """Whether a tensor, or what an optimizer keeps of it, has one slice for each head."""
        name, _, child = key.partition("/")[0].rpartition(".")
        layer = self.layers.get(name)
        if layer is None or child == "weight":
            return False
        return child != "bias" or (layer.bias is not None and layer.bias.ndim > 1)

    def end_step(self, step: int, optimizer: torch.optim.Optimizer) -> list[str]:
        """Merge, after every T-th step."""
        super().end_step(step, optimizer)
        if (step + 1) % self.recipe.merge_every:
            return []
        self.merge_heads(step, optimizer)
        return [f"merge {(step + 1) // self.recipe.merge_every}: {self.batch.total} heads averaged"]

    @torch.no_grad()
    def merge_heads(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """W <- W + (1/N)·Σ(Dₙ − Dₙ'), and the mean of all else."""
        for name, layer in self.layers.items():
            assert isinstance(layer, ParallelHeadsLinear)
            key = None
            if self.recipe.rounding == "stochastic":
                key = torch.randint(1 << 62, (), generator=self.generator(f"{name}.weight", step))
            L, R = layer.news_of_all()
            add_product_(layer.W, L.mT, R, alpha=layer.scale / self.batch.total, key=key)
            if self.recipe.reset:
                layer.reset_(self.generator(name, step))
                for parameter in layer.factors().values():
                    transform_state(optimizer, parameter, ResetState(), self.generator(name, step))
            layer.remember()
            if biases := layer.own_biases():
                cast(Tensor, layer.bias).copy_(self.batch.mean(biases))
        for replicas in self.replicas.values():
            replicas.average_()

    def merge(self) -> list[str]:
        """Turn the model into an ordinary one, that of the mean of all heads; every process calls it."""
        names = super().merge()
        self._hook.remove()
        for name, replicas in self.replicas.items():
            replicas.average_()
            replace_module(self.model, name, next(iter(replicas.copies.values())))
        self.replicas = {}  # else what is trained from now on would be averaged with them by another call
        return names


_COPY = re.compile(r"(?<=\.copies\.)\d+(?=\.)")


def _copy_of(key: str) -> int | None:
    """The number of the head whose copy a tensor belongs to."""
    match = _COPY.search(key)
    return None if match is None else int(match[0])


def _with_copy(key: str, number: int) -> str:
    return _COPY.sub(str(number), key, count=1)


def _clip(gradients: list[Tensor], max_norm: float) -> Tensor:
    """Clip by the norm of all, which is returned."""
    if not gradients:
        return torch.zeros(())
    norm = nn.utils.get_total_norm(gradients)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))
    return norm


@dataclass(frozen=True)
class LTE(MultiHeadLoRA):
    """LoRA-the-Explorer: parallel heads, each on its own share of every batch, averaged every T steps.

    Head n trains with the weight W + Dₙ − Dₙ', Dₙ = s·BₙAₙ, on its share; every ``merge_every`` steps
    W <- W + (1/N)·Σ(Dₙ − Dₙ') in float32 and Dₙ' = Dₙ, so that every head starts from the same W and keeps its factors
    and moments. With ``reset`` Bₙ = 0, Aₙ is drawn anew and the moments are forgotten instead. What has no heads
    (embeddings, norms, biases, heads of the model that are not replaced) is trained as N copies, averaged too.

    The batch of a step is divided into N equal shares. Weight decay acts on Dₙ and not on Dₙ', so on W too.

    Args:
        heads, rank, alpha: see `MultiHeadLoRA`.
        merge_every: T.
        reset: begin anew after each merge.
        others: ``replicated``, or ``shared``: one copy of what has no heads, trained on the whole batch.
        rounding: of merges into bfloat16 weights: ``nearest`` loses small ones, ``stochastic`` keeps them in the mean.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
        >>> weights = LTE(heads=2, rank=4, merge_every=1).apply(model)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.randn(8, 16)).square().mean().backward()
        >>> optimizer.step()
        >>> weights.end_step(0, optimizer)
        ['merge 1: 2 heads averaged']

    Source: arXiv 2402.16828.
    """

    name: ClassVar[str] = "lte"
    title: ClassVar[str] = "LoRA-the-Explorer"
    summary: ClassVar[str] = "parallel heads on shares of the data, merged by averaging"
    limits: ClassVar[Mapping[str, Limit]] = {
        **MultiHeadLoRA.limits,
        "merge_every": at_least(1),
        "others": one_of("replicated", "shared"),
        "rounding": one_of("nearest", "stochastic"),
    }

    merge_every: int = 10
    reset: bool = False
    others: Literal["replicated", "shared"] = "replicated"
    rounding: Literal["nearest", "stochastic"] = "stochastic"

    @property
    def unshardable(self) -> str | None:
        """Processes have heads of their own."""
        return "it divides its heads over the processes, each with the whole model"

    def check_run(self, *, processes: int, steps: int, eval_every: int) -> None:
        """Processes share the heads evenly, and are one model when it is evaluated: after a merge."""
        if self.heads % processes:
            raise ValueError(
                f"{processes} processes cannot share {self.heads} heads evenly: give a multiple of {processes}"
            )
        if processes == 1:
            return
        for name, value in (("steps", steps), ("eval_every", eval_every)):
            if value % self.merge_every:
                raise ValueError(
                    f"{name} is {value}, but heads on several processes are one model after a merge only: give a "
                    f"multiple of merge_every, {self.merge_every}."
                )

    def shares(self, processes: int) -> int:
        """One for each head of a process."""
        return self.heads // processes

    def build(self, model: nn.Module, chosen: dict[str, nn.Module], *, steps: int | None, seed: int) -> LTEWeights:
        """Replace them by `ParallelHeadsLinear`, and what has no heads by `Replicas`."""
        batch = Batch(self.heads)
        layers, embeddings = self.replace(
            model,
            chosen,
            lambda module: ParallelHeadsLinear(
                module,
                rank=self.rank,
                scale=self.alpha / self.rank,
                batch=batch,
                reset=self.reset,
                own_bias=self.others == "replicated",
            ),
        )
        replicas = replicate(model, batch) if self.others == "replicated" else {}
        weights = LTEWeights(self, batch, replicas, model=model, layers=layers, embeddings=embeddings, seed=seed)
        weights.begin()
        return weights
