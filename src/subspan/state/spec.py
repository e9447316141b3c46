"""What one state tensor is, before it exists."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class StateSpec:
    """Declaration of one state tensor: it drives allocation, planning, loading and the transport of moments.

    Args:
        shape: shape of the tensor.
        dtype: dtype in which it is held; loading keeps it, whatever the parameter's dtype is.
        moment: 1 for a tensor that transforms like the projected gradient, 2 for one that transforms like its square,
            None for anything else. The rank axis of a moment is its second last.
        host: True for bookkeeping scalars, which stay on the CPU so that reading them never waits for a device.

    Example:
        >>> StateSpec((4, 8)).nbytes
        128
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    moment: Literal[1, 2] | None = None
    host: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def allocate(self, device: torch.device) -> Tensor:
        """A zero tensor of this declaration on ``device`` (on the CPU when ``host``)."""
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
