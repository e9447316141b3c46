"""What one state tensor is, before it exists."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from subspan.state.codec import Codec


@dataclass(frozen=True)
class StateSpec:
    """Declaration of one state tensor: it drives allocation, planning, loading and the transport of moments.

    Args:
        shape: shape of the tensor.
        dtype: dtype in which it is held; loading keeps it, whatever the parameter's dtype is. With a codec: in which
            it is worked with.
        moment: 1 for a tensor that transforms like the projected gradient, 2 for one that transforms like its square,
            None for anything else. The rank axis of a moment is its second last.
        host: True for bookkeeping scalars, which stay on the CPU so that reading them never waits for a device.
        codec: how it is held in fewer bytes, in several tensors; None: as it is.

    Example:
        >>> StateSpec((4, 8)).nbytes
        128
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    moment: Literal[1, 2] | None = None
    host: bool = False
    codec: Codec | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that hold it."""
        return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in self.stored("").values())

    def stored(self, key: str) -> dict[str, StateSpec]:
        """Declarations of the tensors that hold it, by their state keys; ``key`` is its own."""
        if self.codec is None:
            return {key: self}
        return {key + suffix: spec for suffix, spec in self.codec.specs(self.shape).items()}

    def encode(self, key: str, value: Tensor) -> dict[str, Tensor]:
        """The tensors that hold ``value``, by their state keys."""
        if self.codec is None:
            return {key: value}
        return {key + suffix: tensor for suffix, tensor in self.codec.encode(value).items()}

    def decode(self, key: str, state: Mapping[str, Tensor]) -> Tensor:
        """The tensor that ``state`` holds under ``key``: itself where there is no codec."""
        if self.codec is None:
            return state[key]
        coded = {suffix: state[key + suffix] for suffix in self.codec.specs(self.shape)}
        return self.codec.decode(coded, self.shape).to(self.dtype)

    def stacked(self, count: int) -> StateSpec:
        """The declaration of ``count`` of these, stacked."""
        return replace(self, shape=(count, *self.shape))

    def allocate(self, device: torch.device) -> Tensor:
        """A zero tensor of this shape and dtype on ``device`` (on the CPU when ``host``)."""
        return torch.zeros(self.shape, dtype=self.dtype, device="cpu" if self.host else device)

    def check(self, value: object, where: str) -> Tensor:
        """Return ``value`` if it is a tensor of this shape and dtype.

        Raises:
            ValueError: naming ``where``, what was found and what is declared.
        """
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}: expected a tensor, found {type(value).__name__}")
        if tuple(value.shape) != self.shape or value.dtype != self.dtype:
            raise ValueError(
                f"{where}: found shape {tuple(value.shape)} and {value.dtype}, "
                f"but this optimizer declares shape {self.shape} and {self.dtype}"
            )
        return value


Specs = Mapping[str, StateSpec]


def stored(specs: Specs) -> dict[str, StateSpec]:
    """Declarations of the tensors that are really held, codes and scales included."""
    return {name: spec for key, each in specs.items() for name, spec in each.stored(key).items()}
