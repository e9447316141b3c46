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

    def is_for_all(self, x: Tensor) -> bool:
        """Whether a tensor is the same for all sequences: a single row for them, or positions without them.

        Raises:
            RuntimeError: it may be both, a number for each sequence or one for each position.
        """
        if x.ndim == 1 and x.shape[0] == self.length == self.sequences > 1:
            raise RuntimeError(
                f"a module with a copy for each parallel head was given {self.length} numbers, of {self.sequences} "
                "sequences or of as many positions: give another batch size, or others='shared'"
            )
        return self.sequences > 1 and (x.shape[0] == 1 or (x.ndim == 1 and x.shape[0] == self.length))

    def check(self, x: Tensor) -> None:
        """Refuse a tensor whose rows do not tell which head they belong to.

        In backward, where activation checkpointing computes a module again, nothing is refused that was not refused in
        forward: the model may have been given a batch of another size since.

        Raises:
            RuntimeError: other rows than the batch has, such as those that a mixture of experts chooses.
        """
        if x.shape[0] not in (self.sequences, self.sequences * self.length) and not (x.ndim > 1 and _in_backward()):
            raise RuntimeError(
                f"a module with parallel heads, or with a copy for each of them, was given {x.shape[0]} rows of a "
                f"batch of {self.sequences} sequences of {self.length} tokens, so that it is not known which head each "
                "belongs to: leave it out of target_modules (experts cannot have parallel heads), or give "
                "others='shared' where it has none"
            )


def _in_backward() -> bool:
    """Whether autograd is at work, as `torch.utils.checkpoint` asks; torch has no public name for it."""
    return bool(torch._C._current_graph_task_id() != -1)


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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call each copy with its share."""
        copies = list(self.copies.values())
        if not self.training:
            here = {name: mean(same, len(same)) for name, same in self._tensors_by_name()}
            return torch.func.functional_call(copies[0], here, args, kwargs)
        if len(copies) == 1:
            return copies[0](*args, **kwargs)
        shares = [self._divided(x) for x in args]
        named = {key: self._divided(x) for key, x in kwargs.items()}
        results = []
        for number, module in enumerate(copies):
            own = {key: parts[number] for key, parts in named.items()}
            results.append(module(*(parts[number] for parts in shares), **own))
        if all(parts[0] is parts[1] for parts in (*shares, *named.values())):
            # The same for all sequences, such as embeddings of positions: of one sequence, or without a place for it.
            flat = any(isinstance(x, Tensor) and x.ndim == 1 for x in (*args, *kwargs.values()))
            results = [result.unsqueeze(0) if flat else result for result in results]
        return self._joined(results)

    def _divided(self, x: Any) -> tuple[Any, ...]:
        if isinstance(x, Tensor) and x.ndim and not self.batch.is_for_all(x):
            self.batch.check(x)
            return x.chunk(len(self.copies))
        return (x,) * len(self.copies)

    def _joined(self, results: list[Any]) -> Any:
        if isinstance(results[0], tuple):
            return tuple(self._joined(list(same)) for same in zip(*results, strict=True))
        if results[0].shape[0] == 1:
            each = self.batch.sequences // len(self.copies)
            results = [result.expand(each, *result.shape[1:]) for result in results]
        return torch.cat(results)

    def _tensors_by_name(self) -> Iterator[tuple[str, list[Tensor]]]:
        """Parameters, and buffers such as running means."""
        for tensors in (nn.Module.named_parameters, nn.Module.named_buffers):
            for same in zip(*(tensors(module) for module in self.copies.values()), strict=True):
                if same[0][1].is_floating_point():
                    yield same[0][0], [tensor.detach() for _, tensor in same]

    @torch.no_grad()
    def average_(self) -> None:
        """Set all copies, those of other processes too, to their mean."""
        for _, same in self._tensors_by_name():
            average = self.batch.mean(same)
            for tensor in same:
                tensor.copy_(average)


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
        if any(True for child in module.children() for _ in child.parameters()) or not name:
            raise ValueError(
                f"{name or type(model).__name__} holds parameters of its own beside other modules, so parallel heads "
                "cannot have copies of them; give others='shared'"
            )
        found[name] = Replicas((copy.deepcopy(module, memo) for memo in memos), batch)
    for name, replicas in found.items():
        replace_module(model, name, replicas)
    return found
