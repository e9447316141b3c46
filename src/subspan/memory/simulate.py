"""Run a training without its numbers: tensors have shapes and dtypes but no memory, whatever size the model has."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from subspan.memory.trace import tensors_in
from subspan.optim import LowRankOptimizer
from subspan.optim.method import State
from subspan.optim.shards import local
from subspan.state import Int8Weight, held
from subspan.state.host import as_on_accelerator, rehearsed

__all__ = ["advance", "materialise", "real_indices", "rehearse_step", "simulated"]

# Elements of a parameter above which it is never stacked with others, so that one stands for all that are alike.
_LARGE = 1 << 16
# Elements up to which a vector may be a table of numbers that Python code computes once.
_TABLE = 1 << 10
_ARITHMETIC = (torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor)
_EMPTY = torch.ops.aten.empty.memory_format
_READ = torch.ops.aten._local_scalar_dense.default
_ISINF = torch.ops.aten.isinf.default


@contextlib.contextmanager
def simulated(device: Literal["cpu", "accelerator"] = "accelerator", number: int = 1) -> Iterator[None]:
    """All tensors that are made here are fake: an operation computes the shape of its result and nothing else.

    Models, backward passes and the optimizers of subspan run as they are. What Python reads is kept real: integers
    (positions, tokens) and scalars (the clocks of an optimizer); a number that would come out of fake ones is
    ``number``. The fake tensors are on the CPU, since fake ones on a device abort where torch was built without it.

    Args:
        device: whose row tiles and buckets optimizers use. Attention is the flash kernel of the CPU either way, whose
            memory is that of the others which do not form the matrix of scores.
        number: 0 lets checks of rounding errors and factorisations pass.

    Example:
        >>> with simulated():
        ...     weight = torch.ones(1_000_000, 1_000_000)  # four terabytes
        ...     (weight @ weight).shape
        torch.Size([1000000, 1000000])
    """
    with contextlib.ExitStack() as stack:
        if device == "accelerator":
            stack.enter_context(as_on_accelerator())
        stack.enter_context(rehearsed())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_HostNumbers(number))
        yield


class _HostNumbers(TorchDispatchMode):
    """Keeps real what Python code decides by, and answers what depends on numbers that are not there."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if Int8Weight in types:
            return NotImplemented  # it comes back as operations on what it holds
        kwargs = kwargs or {}
        tensors = [*tensors_in(args), *tensors_in(tuple(kwargs.values()))]
        fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if func is _READ and fake:
            dtype = args[0].dtype
            return float(self.number) if dtype.is_floating_point else dtype == torch.bool or self.number
        if func is _ISINF and fake:  # what is not there is finite
            with unset_fake_temporarily():
                return torch.zeros(args[0].shape, dtype=torch.bool)
        if not fake and not _is_bulk(func, tensors) and (tensors or _makes_host_numbers(func, args, kwargs)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _is_bulk(func: Any, tensors: list[torch.Tensor]) -> bool:
    """Whether integers are computed for so many elements that Python reads none of them: those that round weights."""
    return func in _ARITHMETIC and math.prod(torch.broadcast_shapes(*(x.shape for x in tensors))) > _LARGE


def _makes_host_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a factory of tensors makes a scalar, indices, or a short table (of codes, which is kept)."""
    if not (args and isinstance(args[0], (list, tuple))):
        return bool(args)  # arange, linspace
    shape = args[0]
    if kwargs.get("dtype") in (torch.int64, torch.int32) or not shape:
        return True
    return func is not _EMPTY and len(shape) == 1 and shape[0] <= _TABLE


@contextlib.contextmanager
def real_indices() -> Iterator[None]:
    """What is made on the meta device has no numbers but for indices, which Python code reads: they are on the CPU.

    Adapters that permute or pick entries make their layers so. Ranges and integer factories are indices.

    Example:
        >>> with torch.device("meta"), real_indices():
        ...     weight, order = torch.ones(1_000_000, 1_000_000), torch.arange(3)
        >>> weight.device.type, order
        ('meta', tensor([0, 1, 2]))
    """
    with _RealIndices():
        yield


class _RealIndices(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if "device" not in kwargs or any(True for _ in tensors_in(args)) or not result.is_meta:
            return result
        index = not result.is_floating_point() or func.overloadpacket is torch.ops.aten.arange
        return func(*args, **kwargs | {"device": "cpu"}) if index else result


def materialise(model: nn.Module) -> None:
    """Give the parameters and buffers of a model on the meta device storages, fake ones inside `simulated`."""
    made: dict[torch.Tensor, torch.Tensor] = {}  # tied ones stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = nn.Parameter(_empty(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = made[parameter]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(buffer, torch.empty(buffer.shape, dtype=buffer.dtype))


def _empty(parameter: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty(part.shape, dtype=part.dtype) for part in held(parameter)]
    return Int8Weight(parts[0], parts[1], parameter.dtype) if isinstance(parameter, Int8Weight) else parts[0]


def rehearse_step(optimizer: torch.optim.Optimizer) -> None:
    """Step in simulation; of many large parameters that agree in everything only one is worked on.

    They are worked on one after the other, and what they hold (gradients, state) stays allocated throughout, so that
    the memory is that of a whole step, which would take a minute at some hundred matrices.
    """
    if not isinstance(optimizer, LowRankOptimizer):
        optimizer.step()
        return
    optimizer.init_state()
    optimizer._take_slots()
    first: dict[Any, torch.Tensor] = {}
    rest = []
    for name, parameter, group in list(optimizer._everything()):
        folded = name in optimizer._folded
        if parameter.numel() <= _LARGE or (parameter.grad is None and not folded):
            continue
        shapes = tuple((key, value.shape) for key, value in optimizer.state[parameter].items())
        kind = (id(group), parameter.shape, parameter.stride(), parameter.dtype, shapes, folded)
        if first.setdefault(kind, parameter) is not parameter:
            rest.append((name, parameter, group, first[kind], parameter.grad, optimizer._folded.pop(name, None)))
            parameter.grad = None
    sharing, optimizer._sharing = optimizer._sharing, {}  # one alone has no partners
    optimizer.step()
    optimizer._sharing = sharing
    for name, parameter, group, like, gradient, _ in rest:
        parameter.grad = gradient
        advance(optimizer, name, group, optimizer.state[parameter], optimizer.state[like])
    optimizer._arm_slots([name for name, *_ in rest if name in optimizer._slots])


def advance(optimizer: LowRankOptimizer, name: str, group: Any, state: State, like: State) -> None:
    """Set the clock of a parameter as if it had been stepped with the one that is ``like`` it."""
    refreshed = "refreshes" in state and int(state["refreshes"]) < int(like["refreshes"])
    for key, value in state.items():
        if key != "next_refresh" and not isinstance(local(value), FakeTensor):
            value.copy_(like[key])
    if refreshed and optimizer.method.refresh is not None:
        step, first = int(state["step"]) - 1, int(state["refreshes"]) == 1
        due = optimizer.method.refresh.next_refresh(step, first, lambda: optimizer._place(name), group, state)
        state["next_refresh"].fill_(due)
