"""What happens to the moments when the basis changes?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from subspan.optim.method import State, Transport
from subspan.state import StateSpec


@dataclass(frozen=True)
class Keep(Transport):
    """Moments stay as they are, in the old coordinates (GaLore, Fira, APOLLO)."""

    def carry(self, state: State, specs: Mapping[str, StateSpec], new: State, step: int) -> None:
        return


@dataclass(frozen=True)
class RotateFirst(Transport):
    """M <- (Q_newᵀ Q_old) M; second moments stay (GoLore's momentum re-projection, arXiv 2410.11289)."""

    needs_bases = True

    def carry(self, state: State, specs: Mapping[str, StateSpec], new: State, step: int) -> None:
        if "basis" not in new:
            return
        overlap = new["basis"].mT @ state["basis"]
        for key, spec in specs.items():
            if spec.moment == 1:
                state[key].copy_(overlap @ state[key])


@dataclass(frozen=True)
class Reset(Transport):
    """Moments start again from zero, and so does their bias correction (FRUGAL, arXiv 2411.07837)."""

    def specs(self) -> dict[str, StateSpec]:
        return {"reset_step": StateSpec((), torch.int64, host=True)}

    def carry(self, state: State, specs: Mapping[str, StateSpec], new: State, step: int) -> None:
        for key, spec in specs.items():
            if spec.moment is not None:
                state[key].zero_()
        state["reset_step"].fill_(step)

    def age(self, state: State, step: int) -> int:
        return step - int(state["reset_step"])
