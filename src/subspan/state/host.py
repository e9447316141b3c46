"""Whether an operation is done when it returns, and how large pieces of work should be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_accelerated: ContextVar[bool] = ContextVar("accelerated", default=False)
_rehearsed: ContextVar[bool] = ContextVar("rehearsed", default=False)


def on_host(device: torch.device) -> bool:
    """Whether operations on ``device`` are done when they return, so that reading a result waits for nothing."""
    return device.type == "cpu" and not _accelerated.get()


@contextlib.contextmanager
def as_on_accelerator() -> Iterator[None]:
    """Work on the CPU in the pieces that an accelerator would be given, to see what memory it would need."""
    token = _accelerated.set(True)
    try:
        yield
    finally:
        _accelerated.reset(token)


def is_rehearsed() -> bool:
    """Whether nothing is computed, so that of many equal pieces of work two show the memory that all of them need."""
    return _rehearsed.get()


@contextlib.contextmanager
def rehearsed() -> Iterator[None]:
    """Work in vain, on tensors without numbers."""
    token = _rehearsed.set(True)
    try:
        yield
    finally:
        _rehearsed.reset(token)
