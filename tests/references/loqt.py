"""LoQT (arXiv 2405.16528) for one matrix: W and P rounded, T trained, P from the singular vectors of a gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from references.parts import Adam, exact_basis


def normal_levels() -> list[float]:
    """The table of the NF4 data type (2305.14314) as it is printed, to seven digits."""
    return [
        -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
    ]  # fmt: skip


class LoQTReference:
    """Holds Q and P as they are rounded, and T; the side of P is the shorter one, the input where both are equal.

    After each of the steps `refreshes` (the first is 1): merge, P from that gradient, round, compensate. The
    first moment is turned with the subspace, which the official code leaves out.
    """

    def __init__(
        self,
        W: Tensor,
        P: Tensor,
        *,
        lr: float,
        scale: float,
        refreshes: list[int],
        compensation: int,
        quantise: Callable[[Tensor], Tensor],
        eps: float = 1e-8,
    ) -> None:
        self.transposed = W.shape[1] <= W.shape[0]
        self.lr, self.scale, self.refreshes, self.compensation = lr, scale, refreshes, compensation
        self.quantise, self.adam, self.t = quantise, Adam(eps=eps), 0
        self.P = quantise(P).double()
        self.hold(W.double())

    def turn(self, X: Tensor) -> Tensor:
        return X.T if self.transposed else X

    def weight(self) -> Tensor:
        return self.Q + self.scale * self.turn(self.P @ self.T)

    def hold(self, W: Tensor) -> None:
        found = []
        rounded_from = W
        for _ in range(max(self.compensation, 1)):
            Q = self.quantise(rounded_from).double()
            T = torch.linalg.pinv(self.P) @ self.turn(W - Q) / self.scale
            if not self.compensation:
                T = torch.zeros_like(T)
            rounded_from = W - self.scale * self.turn(self.P @ T)
            found.append(((rounded_from - Q).norm(), Q, T))
        self.errors = [float(error) for error, _, _ in found]
        _, self.Q, self.T = min(found, key=lambda item: item[0])

    def step(self, G: Tensor) -> None:
        G = self.turn(G.double())
        self.T = self.T - self.lr * self.adam(self.scale * self.P.T @ G)
        self.t += 1
        if self.t in self.refreshes:
            W, old = self.weight(), self.P
            self.P = self.quantise(exact_basis(G, old.shape[1])).double()
            self.adam.M = self.P.T @ old @ self.adam.M
            self.hold(W)
