"""Bytes of weights, gradients and optimizer state from declarations, and of everything from a trace."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from subspan.memory.trace import Timeline
from subspan.optim import LowRankOptimizer
from subspan.optim.shards import local
from subspan.state import held

#: What `PeakPlan` divides memory into.
CATEGORIES = (
    "weights", "gradients", "moments", "bases", "other state", "refresh workspace", "step workspace", "activations",
    "logits",
)  # fmt: skip
# By the beginning of a state key: codes and scales have names with more behind it.
_KINDS = {"exp_avg": "moments", "basis": "bases", "rows": "bases"}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by role.

    Args:
        weights: parameters and buffers, tied ones once.
        gradients: as they exist before the first step: whole ones, or what was folded of them.
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

    def devices(self, capacity: float) -> int:
        """How many devices of ``capacity`` bytes hold the total when it is divided evenly.

        >>> MemoryPlan(weights=14, gradients=14, state={"exp_avg": 14, "exp_avg_sq": 14}).devices(40)
        2
        """
        return math.ceil(self.total / capacity)


def plan(model: nn.Module, optimizer: LowRankOptimizer, micro_batches: int = 1) -> MemoryPlan:
    """Plan the memory that training ``model`` with ``optimizer`` holds, from shapes and declarations alone.

    Of a model that `fully_shard` has divided, what this process holds, without the rows that pad the last pieces.

    Args:
        model: the model.
        optimizer: its optimizer; its state need not exist yet.
        micro_batches: backward passes for each step.

    Example:
        >>> from subspan.optim import GaLore
        >>> model = nn.Linear(64, 32, bias=False)
        >>> plan(model, GaLore(model, rank=4)).state["exp_avg"]  # 4 × 64 float32
        1024
    """
    tensors = map(local, [*model.parameters(), *model.buffers()])
    return MemoryPlan(
        weights=sum(part.numel() * part.itemsize for tensor in tensors for part in held(tensor)),
        gradients=optimizer.planned_gradient_bytes(micro_batches),
        state=optimizer.planned_state_bytes(),
    )


def adamw_state_bytes(parameters: Iterable[Tensor]) -> dict[str, int]:
    """State of ``torch.optim.AdamW``, whose moments have the dtype of the weights.

    >>> adamw_state_bytes([nn.Linear(64, 32, bias=False).bfloat16().weight])
    {'exp_avg': 4096, 'exp_avg_sq': 4096, 'step': 4}
    """
    tensors = list(parameters)
    moment = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    return {"exp_avg": moment, "exp_avg_sq": moment, "step": 4 * len(tensors)}


def adamw_8bit_state_bytes(parameters: Iterable[Tensor], block_size: int = 256) -> dict[str, int]:
    """State of torchao's ``AdamW8bit``: a byte an element, a float32 scale a block and a table of 256 float32 a moment.

    Tensors below 4,096 elements, and those that blocks do not divide, keep moments in their own dtype.

    >>> adamw_8bit_state_bytes([nn.Linear(64, 64, bias=False).weight])
    {'exp_avg': 5184, 'exp_avg_sq': 5184, 'step': 4}
    """
    tensors = list(parameters)
    moment = 0
    for tensor in tensors:
        elements = tensor.numel()
        quantised = elements >= 4096 and elements % block_size == 0
        moment += elements + 4 * (elements // block_size + 256) if quantised else elements * tensor.itemsize
    return {"exp_avg": moment, "exp_avg_sq": moment, "step": 4 * len(tensors)}


@dataclass(frozen=True)
class PeakPlan:
    """Bytes of training steps with everything in them.

    Attributes:
        most: by category (`CATEGORIES`), the most at any moment.
        at_peak: by category, at the moment of the peak.
        peak: all bytes at that moment.
        phase: of that moment: ``forward``, ``backward`` or ``step``, of the first step with ``first `` before.
        operation: the torch operation that allocated then.
    """

    most: dict[str, int]
    at_peak: dict[str, int]
    peak: int
    phase: str
    operation: str

    @classmethod
    def of(cls, timeline: Timeline) -> PeakPlan:
        """The plan that a trace of training steps comes to."""
        most = dict.fromkeys(CATEGORIES, 0) | _by_category(timeline.most)
        for phase, count in timeline.workspaces.items():
            name = _workspace(phase)
            most[name] = max(most[name], count)
        peak = timeline.peak
        at_peak = dict.fromkeys(CATEGORIES, 0) | _by_category(peak.bytes)
        at_peak[_workspace(peak.phase)] = peak.bytes.get("workspace", 0)
        return cls(most, at_peak, peak.total, peak.phase, peak.operation)

    @property
    def moment(self) -> str:
        """The moment of the peak, for people."""
        where = {"forward": "at the end of forward", "step": "in the optimizer step"}
        kind = self.phase.rpartition(" ")[2]
        return where.get(kind, f"in {kind}") + (", first step" if self.phase.startswith("first") else "")


def _workspace(phase: str) -> str:
    return "refresh workspace" if phase.startswith("first") or phase == "before" else "step workspace"


def _by_category(traced: dict[str, int]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for name, count in traced.items():
        kind, _, key = name.partition(":")
        if kind == "state":
            kind = next((kind for start, kind in _KINDS.items() if key.startswith(start)), "other state")
        if kind != "workspace":
            total[kind] += count
    return dict(total)
