"""Gradients normalised output by output, with a moving average or without any state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from subspan.optim.inner.adam import Adam
from subspan.optim.method import Group, Inner, State
from subspan.state import StateSpec


@dataclass(frozen=True)
class Normalised(Inner):
    """U_i = M_i / max(rms(M_i), ε) for each output i of a layer (SCALE, arXiv 2506.16659).

    M is the gradient, or with the group's ``momentum`` β the moving average M <- β·M + (1 − β)·G. The mean square is
    over all that leads to the output. The size of a gradient is forgotten, so M needs no bias correction, and ε is no
    more than a floor: an output whose M is smaller makes smaller steps, and none where M is zero.

    Only matrices of groups whose ``outputs`` are ``"rows"`` or ``"columns"`` are normalised, all else takes Adam.

    Args:
        norm: ``"rms"``: entries have size 1, the size of Adam's. ``"l2"``: outputs have norm 1, which divides the step
            of one with n inputs by √n.

    Example:
        >>> G = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
        >>> Normalised("l2").direction(G, {}, 1, {"momentum": 0.0, "eps": 1e-8})
        tensor([[ 0.6000, -0.8000],
                [ 0.0000,  0.0000]])

    Source: arXiv 2506.16659.
    """

    norm: Literal["rms", "l2"] = "rms"

    whole_rows: ClassVar[bool] = True
    #: What takes vectors, and groups without ``outputs``.
    rest: ClassVar[Inner] = Adam()

    def __post_init__(self) -> None:
        if self.norm not in ("rms", "l2"):
            raise ValueError(f"norm={self.norm!r}: choose 'rms' or 'l2'")

    def at(self, ndim: int, group: Group) -> Inner:
        return self if ndim > 1 and group.get("outputs") is not None else self.rest

    def specs(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, StateSpec]:
        rule = self.at(len(shape), group)
        if rule is not self:
            return rule.specs(shape, dtype, group)
        if not group["momentum"]:
            return {}
        matrix = shape if len(shape) <= 3 else (shape[0], math.prod(shape[1:]))
        *batch, rows, columns = matrix
        sides = (columns, rows) if group["outputs"] == "columns" else (rows, columns)
        return {"exp_avg": StateSpec((*batch, *sides), dtype, moment=1)}

    def direction(self, R: Tensor, state: State, age: int, group: Group) -> Tensor:
        M = state["exp_avg"].lerp_(R, 1.0 - group["momentum"]) if group["momentum"] else R
        root = math.sqrt(R.shape[-1])
        # In float64, in which the squares of all float32 numbers have their place.
        rms = torch.linalg.vector_norm(M, dim=-1, keepdim=True, dtype=torch.float64).div_(root)
        U = M / rms.to(M.dtype).clamp_min(max(group["eps"], torch.finfo(M.dtype).tiny))
        return U if self.norm == "rms" else U.div_(root)
