"""Follow the memory of tensors: which storages are allocated, when they are freed, what they are for."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from subspan.state import Int8Weight, held

__all__ = ["MemoryTrace", "Moment", "Timeline"]

#: Operations of `fully_shard` and collective calls.
_SHARDING = ("fsdp", "c10d")


@dataclass
class _Storage:
    """One allocation; what it is for may become known after it was made."""

    nbytes: int
    category: str


@dataclass(frozen=True)
class _Event:
    """An allocation (positive bytes) or a release."""

    storage: _Storage
    nbytes: int
    phase: str
    operation: str


@dataclass(frozen=True)
class Moment:
    """One moment of a trace.

    Attributes:
        bytes: by category, of all that is allocated.
        phase: what was going on (``forward``, ``backward``, ``step``, ...).
        operation: the torch operation that allocated.
    """

    bytes: dict[str, int]
    phase: str
    operation: str

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Timeline:
    """What a trace comes to.

    Attributes:
        peak: the moment at which the most is allocated.
        most: the largest bytes of each category by itself, at whatever moment.
        phases: peak bytes of each phase.
        workspaces: the largest bytes of the category ``workspace`` in each phase.
    """

    peak: Moment
    most: dict[str, int]
    phases: dict[str, int]
    workspaces: dict[str, int]


class MemoryTrace(TorchDispatchMode):
    """Counts the storages that tensors hold while it is entered, each once, from allocation to release.

    It sees every tensor that an operation returns, on any device, also on fake ones. It does not see what a kernel
    takes and gives back inside (the workspace of cuBLAS or LAPACK), nor what an allocator keeps or rounds up.

    What `fully_shard` gathers, copies and reduces during forward and backward is ``buffers``: parameters and gradients
    while they are whole.

    Args:
        logits_size: tensors whose last dimension has this size are ``logits``, in place of ``activations``.
        device: tensors elsewhere are not counted; None counts all.

    Attributes:
        phase: name of what goes on, to be set by who drives the trace.
        category: what allocations are for unless `label` says otherwise.
        allocated: bytes that are allocated now.

    Example:
        >>> with MemoryTrace() as trace:
        ...     x = torch.ones(100)
        ...     y = x + 1  # both, 400 bytes each
        ...     del y
        >>> trace.timeline().peak.total, trace.allocated
        (800, 400)
    """

    def __init__(self, logits_size: int | None = None, device: torch.device | None = None) -> None:
        super().__init__()
        self.phase, self.category = "before", "activations"
        self.logits_size, self.device = logits_size, device
        self.allocated = 0
        self._live: dict[int, tuple[Any, _Storage]] = {}
        self._buffers: set[int] = set()
        self._events: list[_Event] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if Int8Weight in types or any(hasattr(kind, "to_local") for kind in types):
            return NotImplemented  # it comes back as operations on what it holds
        self._follow_buffers()
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            if self.device is not None and tensor.device.type != self.device.type:
                continue
            category = self.category
            if category == "activations" and tensor.ndim and tensor.shape[-1] == self.logits_size:
                category = "logits"
            self._follow(tensor, category, str(func))
        if func.namespace in _SHARDING and self.category == "activations":
            self._take_buffers(tensors_in((args, *(kwargs or {}).values(), result)), str(func))
        return result

    def label(self, tensors: Iterable[Tensor | None], category: str) -> None:
        """Say what the storages of ``tensors`` are for, from their allocation on; new ones are followed from now."""
        self._follow_buffers()
        for part in (part for whole in tensors if whole is not None for part in held(whole)):
            if self.device is None or part.device.type == self.device.type:
                self._follow(part, category, "")
                self._live[part.untyped_storage()._cdata][1].category = category

    def _take_buffers(self, tensors: Iterable[Tensor], operation: str) -> None:
        for tensor in tensors:
            if self.device is None or tensor.device.type == self.device.type:
                self._follow(tensor, "buffers", operation)
                key = tensor.untyped_storage()._cdata
                entry = self._live[key][1]
                if entry.category in ("activations", "logits", "buffers"):
                    entry.category = "buffers"
                    self._buffers.add(key)

    def _follow_buffers(self) -> None:
        """See which buffers have been emptied, or filled again, since: no operation does that."""
        changed = []
        for key in list(self._buffers):
            reference, entry = self._live.get(key, (None, None))
            storage = None if reference is None else reference()
            if storage is None or entry is None:
                self._buffers.remove(key)
            elif storage.nbytes() != entry.nbytes:
                changed.append((storage.nbytes() - entry.nbytes, entry))
        for grown, entry in sorted(changed, key=lambda change: change[0]):  # room is made first
            entry.nbytes += grown
            self._record(entry, grown, "")

    def timeline(self) -> Timeline:
        """Peaks, with every allocation in the category that it was given last."""
        held: Counter[str] = Counter()
        most: Counter[str] = Counter()
        phases: Counter[str] = Counter()
        workspaces: Counter[str] = Counter()
        total, highest = 0, -1
        peak = Moment({}, "", "")
        for event in self._events:
            category = event.storage.category
            held[category] += event.nbytes
            total += event.nbytes
            most[category] = max(most[category], held[category])
            phases[event.phase] = max(phases[event.phase], total)
            workspaces[event.phase] = max(workspaces[event.phase], held["workspace"])
            if total > highest:
                highest = total
                peak = Moment({key: count for key, count in held.items() if count}, event.phase, event.operation)
        return Timeline(peak, dict(most), dict(phases), dict(workspaces))

    def _follow(self, tensor: Tensor, category: str, operation: str) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        known = self._live.get(key)
        if known is not None:
            if (grown := nbytes - known[1].nbytes) != 0:
                known[1].nbytes = nbytes
                self._record(known[1], grown, operation)
            return
        entry, trace = _Storage(nbytes, category), weakref.ref(self)

        def release(_: object) -> None:
            if (alive := trace()) is not None and alive._live.pop(key, None) is not None:
                alive._record(entry, -entry.nbytes, "")

        self._live[key] = (weakref.ref(storage, release), entry)
        self._record(entry, nbytes, operation)

    def _record(self, storage: _Storage, nbytes: int, operation: str) -> None:
        self.allocated += nbytes
        self._events.append(_Event(storage, nbytes, self.phase, operation))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in the arguments or the result of an operation: itself, or in lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
