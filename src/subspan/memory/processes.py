"""What several processes hold and send: as `fully_shard` divides a model, and as DDP copies it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from subspan.memory.plan import PeakPlan
from subspan.memory.simulate import advance, rehearse_step
from subspan.memory.trace import Timeline, tensors_in
from subspan.memory.training import trace_training
from subspan.optim import LowRankOptimizer

__all__ = [
    "Collectives",
    "Layout",
    "ProcessPlan",
    "ddp_layouts",
    "one_of",
    "sharded_layouts",
    "trace_sharded",
    "with_buckets",
]

_NEVER = 1 << 62
_KINDS = {"allreduce_": "all-reduced", "_allgather_base_": "gathered", "_reduce_scatter_base_": "scattered"}


@dataclass(frozen=True)
class Layout:
    """One way to divide the work over processes.

    Bytes of collective calls are those of whole tensors. In a ring of p processes each one sends (p − 1)/p of what is
    gathered or scattered, and twice that of what is all-reduced.

    Attributes:
        state: bytes of optimizer state of a process, by key.
        step: bytes of collective calls in a step, by what they are.
        refresh: bytes that a refresh of all matrices adds.
    """

    state: dict[str, int]
    step: dict[str, int]
    refresh: dict[str, int]

    @property
    def state_bytes(self) -> int:
        """All optimizer state of a process."""
        return sum(self.state.values())


@dataclass(frozen=True)
class ProcessPlan:
    """What several processes hold and send.

    Attributes:
        world_size: how many there are.
        shard: ``none``, ``full`` or ``bases``, as in the settings of a run.
        alone: bytes of optimizer state of a process that trains alone.
        layouts: this way to divide the work, and the other one.
    """

    world_size: int
    shard: Literal["none", "full", "bases"]
    alone: int
    layouts: dict[str, Layout]


@contextlib.contextmanager
def one_of(world_size: int) -> Iterator[DeviceMesh]:
    """Be the first of several processes, which has the largest pieces; there are no others, so nothing is sent.

    Yields:
        Their mesh, on the CPU.

    Raises:
        RuntimeError: this process belongs to others already.

    Example:
        >>> with one_of(4) as mesh:
        ...     mesh.size(), mesh.get_rank()
        (4, 0)
    """
    if dist.is_initialized():
        raise RuntimeError(
            "several processes are planned by a process that is in no group: end the group, or plan first"
        )
    from torch.testing._internal.distributed import fake_pg  # it registers the backend

    dist.init_process_group("fake", rank=0, world_size=world_size, store=fake_pg.FakeStore())
    try:
        yield init_device_mesh("cpu", (world_size,))
    finally:
        dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Counts the bytes of collective calls while it is entered, by kind: of whole tensors, not of pieces.

    In a ring of p processes each one sends (p − 1)/p of what is gathered or scattered, and twice that of what is
    all-reduced.

    Attributes:
        bytes: by kind: ``gathered``, ``scattered`` (sums of which each process gets a piece), ``all-reduced``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            if name not in _KINDS:
                raise RuntimeError(f"c10d.{name} is a collective call that is not counted")
            self.bytes[_KINDS[name]] += max(tensor.numel() * tensor.itemsize for tensor in tensors_in(args))
        return func(*args, **(kwargs or {}))


def trace_sharded(
    model: nn.Module,
    optimizer: LowRankOptimizer,
    loss: Callable[[], Tensor],
    *,
    grad_accumulation: int = 1,
    logits_size: int | None = None,
    before_step: Callable[[int], object] = lambda step: None,
) -> tuple[Timeline, dict[str, int]]:
    """`trace_training` of a simulated model that `fully_shard` has divided.

    Args:
        model, optimizer, loss, grad_accumulation, logits_size: see there.
        before_step: called with the number of each step when its gradients are there.

    Returns:
        The timeline, and the bytes of collective calls in the forward and backward passes of a step.
    """
    calls, in_steps, steps = Collectives(), Counter[str](), 0

    def step() -> None:
        nonlocal steps
        before, steps = calls.bytes.copy(), steps + 1
        before_step(steps - 1)
        # In a plain step all projected gradients are held together, until processes have agreed on them.
        rehearse_step(optimizer) if steps == 1 else optimizer.step()
        in_steps.update(calls.bytes - before)

    with calls:
        timeline = trace_training(
            model, optimizer, loss, grad_accumulation=grad_accumulation, logits_size=logits_size, step=step
        )
    passes = steps * min(grad_accumulation, 2)
    return timeline, {kind: count * grad_accumulation // passes for kind, count in (calls.bytes - in_steps).items()}


def sharded_layouts(build: Callable[[], LowRankOptimizer], passes: dict[str, int]) -> dict[str, Layout]:
    """Bases that every process holds, and divided ones, from optimizers that are stepped in vain.

    Args:
        build: makes an optimizer of parameters that `fully_shard` has divided and that have no gradients; called in
            `simulated` surroundings with the number 0.
        passes: bytes of the collective calls of `fully_shard` in a step.
    """
    layouts = {}
    own = {f"{'weights' if kind == 'gathered' else 'gradients'} {kind}": count for kind, count in passes.items()}
    for name in ("bases whole", "bases divided"):
        optimizer = build()
        if name == "bases divided":
            optimizer.divide_bases()
        optimizer.init_state()
        entries = [item for item in optimizer._everything() if item[1].requires_grad]
        with Collectives() as calls:
            first = _each_kind_alone(optimizer, entries, calls)
            for state in optimizer.state.values():
                if "next_refresh" in state:
                    state["next_refresh"].fill_(_NEVER)
            plain = _each_kind_alone(optimizer, entries, calls)
        step = own | {f"optimizer: {kind}": count for kind, count in plain.items()}
        refresh = {f"optimizer: {kind}": count for kind, count in (first - plain).items()}
        layouts[name] = Layout(optimizer.planned_state_bytes(), step, refresh)
    return layouts


def _each_kind_alone(
    optimizer: LowRankOptimizer, entries: list[tuple[str, Tensor, Any]], calls: Collectives
) -> Counter[str]:
    """Step one parameter of each kind alone; the bytes are those of all."""
    kinds: dict[Any, list[tuple[str, Tensor, Any]]] = defaultdict(list)
    for name, parameter, group in entries:
        kinds[id(group), parameter.shape, parameter.stride(), parameter.dtype].append((name, parameter, group))
    total: Counter[str] = Counter()
    for (_, first, _), *rest in kinds.values():
        before = calls.bytes.copy()
        first.grad = torch.empty_like(first)
        optimizer.step()
        first.grad = None
        for kind, count in (calls.bytes - before).items():
            total[kind] += count * (1 + len(rest))
        for name, parameter, group in rest:
            advance(optimizer, name, group, optimizer.state[parameter], optimizer.state[first])
    return total


def ddp_layouts(model: nn.Module, optimizer: LowRankOptimizer) -> dict[str, Layout]:
    """Plain DDP, and, where the method needs no more, projected gradients in place of whole ones.

    Args:
        model: the model, whole.
        optimizer: its optimizer.
    """
    state, whole = optimizer.planned_state_bytes(), "gradients all-reduced"
    every = sum(p.numel() * p.itemsize for p in model.parameters() if p.requires_grad)
    plain = {} if optimizer.fused else {"gradients whole": Layout(state, {whole: every}, {})}
    if not optimizer.folds:
        return plain
    assert optimizer.method.subspace is not None and optimizer.method.refresh is not None
    dense, projected, refresh = every, 0, 0
    for name, parameter, group in optimizer._projected():
        geometry = optimizer._geometry(name, parameter, group, optimizer._state(parameter))
        if not parameter.requires_grad or geometry is None or not geometry.projected:
            continue
        batch, held = math.prod(geometry.batch), geometry.dtype.itemsize
        R, Y = (batch * geometry.rank * side for side in (geometry.n, geometry.m))
        dense -= parameter.numel() * parameter.itemsize
        projected += R * parameter.itemsize
        sees = optimizer.method.subspace.at(0, group).sees
        if optimizer.method.refresh.late:
            refresh += Y * parameter.itemsize if sees == "sketch" else 0
            continue
        refresh += R * (held - parameter.itemsize)  # beside the basis it is found in at least float32
        if sees == "gradient":  # to one process, which sends the basis, and 8 bytes that say whether it is one
            refresh += parameter.numel() * parameter.itemsize + Y * held + 8
        elif sees == "sketch":  # and a bound on the entries of the gradient
            refresh += Y * parameter.itemsize + 4
    step = {whole: dense, "projections all-reduced": projected}
    return plain | {"gradients projected": Layout(state, step, {"optimizer: all-reduced": refresh})}


def with_buckets(plan: PeakPlan, model: nn.Module, excluded: bool, optimizer: torch.optim.Optimizer) -> PeakPlan:
    """The plan of one process, with the buckets in which DDP keeps a copy of the gradients that it reduces.

    Args:
        plan: of the process alone.
        model: the model.
        excluded: projected parameters were taken out of DDP.
        optimizer: of the model.
    """
    size = sum(p.numel() * p.itemsize for p in model.parameters() if p.requires_grad)
    if excluded and isinstance(optimizer, LowRankOptimizer):
        size -= sum(p.numel() * p.itemsize for p in optimizer.projected_parameters().values())
    return dataclasses.replace(
        plan,
        most=plan.most | {"buffers": size},
        at_peak=plan.at_peak | {"buffers": size},
        peak=plan.peak + size,
    )
