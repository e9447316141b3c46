"""Quantisation as the papers describe it, one block after the other: dynamic levels (2110.02861), linear ones."""

from __future__ import annotations

import torch
from torch import Tensor

from references.parts import Adam


def dynamic_levels(bits: int, signed: bool) -> list[float]:
    """Leading zeros are a power of ten, the bits after the first one an even division of what lies above it.

    Signed levels end in ±1 instead of the last fraction. Unsigned ones keep it, and have 1 in place of the smallest.
    """
    digits = bits - 1 if signed else bits
    levels = [0.0]
    for zeros in range(digits):
        cells = 2 ** (digits - 1 - zeros)
        if cells == 1 and not signed:
            continue
        levels += [10.0**-zeros * (0.1 + 0.9 * (cell + 0.5) / cells) for cell in range(cells)]
    if signed:
        levels.remove(max(levels))
    levels.append(1.0)
    return sorted({sign * level for level in levels for sign in ((1, -1) if signed else (1,))})


def linear_levels(bits: int) -> list[float]:
    most = 2 ** (bits - 1) - 1
    return [code / most for code in range(-most, most + 1)]


def quantised(X: Tensor, levels: list[float], block: int, positive: bool = False) -> Tensor:
    """Every block of neighbours is divided by its largest magnitude and moved to the nearest levels."""
    table = torch.tensor(levels, dtype=torch.float64)
    result = []
    for part in X.float().flatten().split(block):
        scale = part.abs().max()
        shares = (part / scale if scale > 0 else part).double()
        nearest = table[(shares[:, None] - table).abs().argmin(dim=1)]
        if positive:
            nearest = torch.where((part > 0) & (nearest == 0), table[table > 0].min(), nearest)
        result.append(nearest.float() * scale)
    return torch.cat(result).reshape(X.shape).to(X.dtype)


class QuantisedAdam(Adam):
    """Adam whose moments are rounded after every step."""

    def __init__(self, bits: int, block: int, betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__(betas, eps)
        self.bits, self.block = bits, block

    def __call__(self, R: Tensor) -> Tensor:
        direction = super().__call__(R)
        assert isinstance(self.M, Tensor)
        assert isinstance(self.V, Tensor)
        self.M = quantised(self.M, dynamic_levels(self.bits, signed=True), self.block)
        self.V = quantised(self.V, dynamic_levels(self.bits, signed=False), self.block, positive=True)
        return direction
