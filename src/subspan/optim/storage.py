"""Which state tensors are held by a codec, and the way between what is held and what is worked with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from subspan.optim.buckets import gather, scatter
from subspan.optim.method import State
from subspan.state import StateSpec


def opened(state: State, specs: Mapping[str, StateSpec]) -> State:
    """The declared tensors that ``state`` holds, decoded; those without a codec are its own."""
    return {key: spec.decode(key, state) for key, spec in specs.items() if key in state}


def close(state: State, specs: Mapping[str, StateSpec], tensors: State) -> None:
    """Make ``state`` hold ``tensors``, all that ``specs`` declares and nothing else.

    Where shapes stay, its tensors do too: those who hold them (`GradientSlots`) would keep the old ones alive.
    """
    held = {name: tensor for key, spec in specs.items() for name, tensor in spec.encode(key, tensors[key]).items()}
    for key in state.keys() - held.keys():
        del state[key]
    for name, tensor in held.items():
        there = state.get(name)
        alike = there is not None and (there.shape, there.dtype, there.device) == (
            tensor.shape, tensor.dtype, tensor.device
        )  # fmt: skip
        if there is None or not alike:
            state[name] = tensor
        elif there is not tensor:
            there.copy_(tensor)


def rounded(spec: StateSpec, tensor: Tensor) -> Tensor:
    """``tensor`` as it will be read again."""
    return spec.decode("", spec.encode("", tensor))


def gather_state(specs: Mapping[str, StateSpec], states: Sequence[State]) -> State:
    """The declared tensors of several parameters, decoded and stacked; of one parameter as they are."""
    tensors = {}
    for key, spec in specs.items():
        coded = {name: gather([state[name] for state in states]) for name in spec.stored(key)}
        tensors[key] = (spec if len(states) == 1 else spec.stacked(len(states))).decode(key, coded)
    return tensors


def scatter_state(specs: Mapping[str, StateSpec], tensors: State, states: Sequence[State]) -> None:
    """Encode and write back what `gather_state` gave."""
    for key, spec in specs.items():
        if spec.codec is None:
            scatter(tensors[key], [state[key] for state in states])
            continue
        for name, coded in spec.encode(key, tensors[key]).items():
            targets = [state[name] for state in states]
            torch._foreach_copy_(targets, list(coded.unbind(0)) if len(targets) > 1 else [coded])
