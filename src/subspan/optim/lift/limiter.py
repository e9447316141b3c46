"""Norm-growth limiter (Fira, arXiv 2410.01623)."""

from __future__ import annotations

import torch
from torch import Tensor

from subspan.optim.method import Geometry
from subspan.state import StateSpec


def limiter_specs(geometry: Geometry) -> dict[str, StateSpec]:
    """The limited norm of the last step, one for each matrix of a stack."""
    return {"residual_norm": StateSpec(geometry.batch, geometry.dtype)}


def limit_growth(norm: Tensor, previous: Tensor, limit: float | None) -> Tensor:
    """Factor that keeps ``norm`` from growing by more than ``limit``; the limited norm replaces ``previous``.

    S <- S·min(1, limit·‖S_prev‖/‖S‖), and without limit where the previous norm is 0, as at the first step.

    Args:
        norm: (...) norms of this step.
        previous: (...) limited norms of the step before, overwritten.
        limit: γ ≥ 1, or None for no limit.

    Returns:
        (...) factors in (0, 1].
    """
    bound = torch.where(previous > 0, previous * (torch.inf if limit is None else limit), torch.inf)
    limited = torch.minimum(norm, bound)
    previous.copy_(limited)
    return torch.where(norm > 0, limited / norm, torch.ones_like(norm))
