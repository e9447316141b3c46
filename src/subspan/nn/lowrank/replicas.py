"""Copies of what has no heads: each head trains its own, on its own share of a batch."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from subspan.nn.lowrank.layer import LowRankLayer, replace_module

__all__ = ["Batch", "Replicas", "replicate"]


class Batch:
    """How the batch that a model is given is divided over heads.

    With several processes each has as many of the heads, in the order of their ranks, and a batch of its own for them.

    Args:
        heads: of all processes.

    Attributes:
        heads: that divide a batch here.
        total: heads of all processes.
        first: number of the first head that is here.
        processes: how many there are.
        sequences, length: of the batch that the model was given last.

    Raises:
        ValueError: the processes cannot share the heads evenly.
    """

    def __init__(self, heads: int) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.processes, rank = (dist.get_world_size(), dist.get_rank()) if together else (1, 0)
        if heads % self.processes:
            raise ValueError(
                f"{self.processes} processes cannot share {heads} heads evenly: give a multiple of {self.processes}"
            )
        self.total, self.heads = heads, heads // self.processes
        self.first = rank * self.heads
        self.sequences = self.length = 0

    def gather(self, X: Tensor) -> Tensor:
        """The rows of all processes below each other, in the order of the heads."""
        if self.processes == 1:
            return X
        parts = [torch.empty_like(X, memory_format=torch.contiguous_format) for _ in range(self.processes)]
        dist.all_gather(parts, X.contiguous())
        return torch.cat(parts)

    def mean(self, tensors: Sequence[Tensor]) -> Tensor:
        """Mean of one tensor a head over all processes, in the dtype of the tensors."""
        return mean(tensors, self.total, everywhere=self.processes > 1)

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at what a model is called with; a hook before its forward pass.

        Raises:
            ValueError: a batch that the heads cannot divide evenly.
        """
        tensors = [x for x in (*args, *(kwargs.get(k) for k in ("input_ids", "inputs_embeds"))) if x is not None]
        given = next((x for x in tensors if isinstance(x, Tensor) and x.ndim), None)
        if given is None:
            raise ValueError("parallel heads do not see the batch: call the model with a tensor, or with input_ids=")
        self.sequences, self.length = given.shape[0], given.shape[1] if given.ndim > 1 else 1
        if module.training and self.sequences % self.heads:
            raise ValueError(
                f"{self.heads} parallel heads cannot divide a batch of {self.sequences} sequences evenly: give a "
                f"multiple of {self.heads}"
            )

    def divides(self, x: Tensor) -> bool:
        """Whether a tensor of a forward pass has the sequences of the batch, or all of their tokens, in its rows."""
        return x.ndim > 0 and x.shape[0] in (self.sequences, self.sequences * self.length)

    def check(self, x: Tensor) -> None:
        """Refuse a tensor whose rows do not tell which head they belong to.

        Raises:
            RuntimeError: other rows than the batch has, such as those that a mixture of experts chooses.
        """
        if not self.divides(x):
            raise RuntimeError(
                f"a layer with parallel heads was given {x.shape[0]} rows of a batch of {self.sequences} sequences of "
                f"{self.length} tokens, so that it is not known which head each belongs to: leave it out of "
                "target_modules (experts cannot have parallel heads)"
            )


def mean(tensors: Sequence[Tensor], count: int, *, everywhere: bool = False) -> Tensor:
    """Sum over ``count``, taken in at least float32; ``everywhere`` adds the sums of all processes."""
    total = tensors[0].to(torch.promote_types(tensors[0].dtype, torch.float32), copy=True)
    for tensor in tensors[1:]:
        total += tensor
    if everywhere:
        dist.all_reduce(total)
    return (total / count).to(tensors[0].dtype)


class Replicas(nn.Module):
    """Copies of a module, one a head: each sees its own share of a batch; in evaluation all have their mean.

    That is the mean of the copies that are here, which are equal to all others after a merge.

    Args:
        copies: the copies.
        batch: how batches are divided.
    """

    def __init__(self, copies: Iterable[nn.Module], batch: Batch) -> None:
        super().__init__()
        # Named by the number of the head among all, wherever it is trained.
        self.copies = nn.ModuleDict({str(batch.first + number): module for number, module in enumerate(copies)})
        self.batch = batch

    def forward(self, *args: Any) -> Any:
        """Call each copy with its share."""
        if not self.training:
            here = {name: mean(same, len(same)) for name, same in self._parameters_by_name()}
            return torch.func.functional_call(next(iter(self.copies.values())), here, args)
        shares = [self._divided(x) for x in args]
        whole = all(len({id(part) for part in parts}) == 1 for parts in shares)
        results = []
        for number, module in enumerate(self.copies.values()):
            result = module(*(parts[number] for parts in shares))
            if whole:  # the same for all sequences, such as embeddings of positions
                result = result.expand(self.batch.sequences // len(self.copies), *result.shape[1:])
            results.append(result)
        return torch.cat(results)

    def _divided(self, x: Any) -> tuple[Any, ...]:
        if isinstance(x, Tensor) and x.ndim and not (x.shape[0] == 1 and self.batch.sequences > 1):
            self.batch.check(x)
            return x.chunk(len(self.copies))
        return (x,) * len(self.copies)

    def _parameters_by_name(self) -> Iterator[tuple[str, list[Tensor]]]:
        for same in zip(*(module.named_parameters() for module in self.copies.values()), strict=True):
            yield same[0][0], [parameter.detach() for _, parameter in same]

    @torch.no_grad()
    def average_(self) -> None:
        """Set all copies, those of other processes too, to their mean."""
        for _, same in self._parameters_by_name():
            average = self.batch.mean(same)
            for parameter in same:
                parameter.copy_(average)


def replicate(model: nn.Module, batch: Batch) -> dict[str, Replicas]:
    """Put `Replicas` in the place of all modules that hold parameters to be trained and are no low-rank layers.

    Parameters that several modules share are shared by their copies too.

    Args:
        model: the model, in which low-rank layers have their places already.
        batch: how batches are divided.

    Raises:
        ValueError: a module that holds parameters beside other modules, so that it cannot be copied alone.
    """
    memos: list[dict[int, Any]] = [{} for _ in range(batch.heads)]
    found = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRankLayer) or not any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        if next(module.children(), None) is not None or not name:
            raise ValueError(
                f"{name or type(model).__name__} holds parameters of its own beside other modules, so parallel heads "
                "cannot have copies of them; give others='shared'"
            )
        found[name] = Replicas((copy.deepcopy(module, memo) for memo in memos), batch)
    for name, replicas in found.items():
        replace_module(model, name, replicas)
    return found
