"""What happens to the moments when the basis changes?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.optim.method import State, Total, Transport
from subspan.state import StateSpec


def resized(moment: Tensor, spec: StateSpec, R: Tensor | None) -> Tensor:
    """A moment for another rank: rows of leading directions stay, surplus ones go, new ones are filled.

    A new row of a second moment gets c·mean(R_i²), where c is the ratio of the second moments to the squares of R in
    the rows that stay, and a new row of a first moment is zero. Were both zero, bias correction, which counts the
    steps of all rows alike, would make the first steps in new directions several times too large.

    Args:
        moment: (..., r_old, n).
        spec: of the moment with r_new rows.
        R: projected gradient (..., r_new, n) of the step that changes the rank, or None: new rows are zero.

    Returns:
        A new tensor (..., r_new, n).
    """
    result = spec.allocate(moment.device)
    kept = min(moment.shape[-2], result.shape[-2])
    result[..., :kept, :] = moment[..., :kept, :]
    if spec.moment == 2 and R is not None and kept < result.shape[-2]:
        # In float64: the squares of a gradient that is skipped for its size would leave NaN.
        squares = R.double().square().mean(dim=-1, keepdim=True)
        known = squares[..., :kept, :].sum(dim=-2, keepdim=True)
        ratio = result[..., :kept, :].double().mean(dim=-1, keepdim=True).sum(dim=-2, keepdim=True) / known
        filled = squares[..., kept:, :] * torch.where(known > 0, ratio, 0.0)
        result[..., kept:, :] = filled.clamp_max(torch.finfo(spec.dtype).max).to(spec.dtype)
    return result


@dataclass(frozen=True)
class Keep(Transport):
    """Moments stay as they are, in the old coordinates (GaLore, Fira, APOLLO)."""

    def carry(
        self, state: State, specs: Mapping[str, StateSpec], new: State, step: int, total: Total = lambda X: X
    ) -> None:
        return


@dataclass(frozen=True)
class RotateFirst(Transport):
    """M <- (Q_newᵀ Q_old) M; second moments stay (GoLore's momentum re-projection, arXiv 2410.11289).

    Where gradients have fewer directions than the rank, some second moments are zero. A first moment that the rotation
    brings there would be divided by ε alone, a step of any size, so it is left out.
    """

    needs_bases = True

    def carry(
        self, state: State, specs: Mapping[str, StateSpec], new: State, step: int, total: Total = lambda X: X
    ) -> None:
        if "basis" not in new:
            return
        overlap = total(new["basis"].mT @ state["basis"])
        known = [state[key] > 0 for key, spec in specs.items() if spec.moment == 2]
        for key, spec in specs.items():
            if spec.moment == 1:
                state[key] = overlap @ state[key]
                for there in known:  # rows that a larger rank adds get second moments afterwards
                    rows = min(there.shape[-2], state[key].shape[-2])
                    state[key][..., :rows, :] *= there[..., :rows, :]


@dataclass(frozen=True)
class Reset(Transport):
    """Moments start again from zero, and so does their bias correction (FRUGAL, arXiv 2411.07837)."""

    def specs(self) -> dict[str, StateSpec]:
        return {"reset_step": StateSpec((), torch.int64, host=True)}

    def carry(
        self, state: State, specs: Mapping[str, StateSpec], new: State, step: int, total: Total = lambda X: X
    ) -> None:
        for key, spec in specs.items():
            if spec.moment is not None and key in state:
                state[key].zero_()
        state["reset_step"].fill_(step)

    def age(self, state: State, step: int) -> int:
        return step - int(state["reset_step"])
