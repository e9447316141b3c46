"""GaLore whose bases come late: a sketch of one step's gradient gives the basis from the next step on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from references.galore import GaLoreReference
from references.parts import drop_round_off


def canonical(Q: Tensor) -> Tensor:
    largest = Q.gather(0, Q.abs().argmax(0, keepdim=True))
    return Q * torch.where(largest < 0, -1.0, 1.0)


class LateGaLoreReference(GaLoreReference):
    """`start(G, rank)` draws the first basis, `test(G, rank)` gives the Ω of the sketch GΩ at a refresh.

    With `warm`, that many columns of Ω are the first rows of the first moment before the step, as long as random ones.
    With `hold`, which rounds a basis, no basis is turned: the one of a sketch has its left singular vectors.
    """

    def __init__(
        self,
        *,
        start: Callable[[Tensor, int], Tensor],
        test: Callable[[Tensor, int], Tensor],
        warm: int = 0,
        hold: Callable[[Tensor], Tensor] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.start, self.test, self.warm, self.hold = start, test, warm, hold
        self.turned = True

    def direction(self, G: Tensor) -> Tensor:
        if self.Q is None:
            self.Q = self.start(G, self.rank).double()
            if self.hold is not None:
                self.Q = self.hold(self.Q)
        R = self.Q.T @ G
        if not self.turned:
            X = torch.linalg.eigh(R @ R.T).eigenvectors.flip(1)
            new = canonical(self.Q @ X)
            self.carry(self.Q, new)
            self.Q, R, self.turned = new, new.T @ G, True
        R = drop_round_off(R, len(G))
        M = self.inner.M
        D = self.lift(self.Q, R, self.inner(R), G)
        if self.t % self.gap == 0:
            Omega = self.test(G, self.rank).double()
            for column in range(self.warm):
                if isinstance(M, Tensor) and M[column].norm() > 0:
                    Omega[:, column] = len(Omega) ** 0.5 * M[column] / M[column].norm()
            Y = G @ Omega
            if self.hold is None:
                new = canonical(torch.linalg.qr(Y).Q)
            else:
                new = self.hold(canonical(torch.linalg.svd(Y, full_matrices=False).U))
            self.carry(self.Q, new)
            self.Q, self.turned = new, self.hold is not None
        return D
