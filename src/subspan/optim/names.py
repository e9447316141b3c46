"""Names of parameters."""

from __future__ import annotations

import functools
import re


@functools.cache
def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which ``layers.10`` follows ``layers.9``."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name))


def canonical_name(name: str) -> str:
    """``name`` without what wrappers (DDP, torch.compile) put into it, so that seeds and checkpoints do not change."""
    return name.replace("_orig_mod.", "").removeprefix("module.")
