"""Weights of 8 bits (arXiv 2407.08296): after each step every group of a row is rounded to multiples of its step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Int8Reference:
    """Another method's loop whose weights are rounded; `uniform(t)` gives numbers in [0, 1), None rounds to nearest."""

    def __init__(self, inner: Any, group: int, uniform: Callable[[int], Tensor] | None) -> None:
        self.inner, self.group, self.uniform, self.t = inner, group, uniform, 0
        self.steps: Tensor | None = None

    def start(self, W: Tensor) -> Tensor:
        return self.rounded(W, torch.full(W.shape, 0.5))

    def step(self, W: Tensor, G: Tensor) -> Tensor:
        W = self.inner.step(W, G)
        self.t += 1
        return self.rounded(W, torch.full(W.shape, 0.5) if self.uniform is None else self.uniform(self.t))

    def rounded(self, W: Tensor, u: Tensor) -> Tensor:
        rows, columns = W.shape
        result, steps = torch.empty(rows, columns, dtype=torch.float64), torch.empty(rows, columns // self.group)
        for i in range(rows):
            for k in range(columns // self.group):
                part = slice(k * self.group, (k + 1) * self.group)
                need = up(float(W[i, part].abs().max()) / 127)
                old = float(self.steps[i, k]) if self.steps is not None else 0.0
                step = old if old / 2 < need <= old else need
                codes = (W[i, part].double() / step + u[i, part].double()).floor().clamp(-127, 127)
                result[i, part], steps[i, k] = codes * step, step
        self.steps = steps
        return result


def up(x: float) -> float:
    """The least number with 8 binary digits that is not below x."""
    digits = 2.0 ** (math.frexp(x)[1] - 8)
    return math.ceil(x / digits) * digits
