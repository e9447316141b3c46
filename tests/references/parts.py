"""The few formulas that several papers share: orientation, exact SVD, Adam, the norm-growth limiter."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Find = Callable[[Tensor, int, int, Tensor | None], Tensor]

EPS_FP32 = 2.0**-23


def projects_left(shape: tuple[int, ...], proj_type: str) -> bool:
    """True where the basis has one row per row of W. Square matrices: `std` goes right, `reverse_std` left."""
    rows, columns = shape
    return {"std": rows < columns, "reverse_std": rows >= columns, "left": True, "right": False}[proj_type]


def exact_basis(G: Tensor, rank: int, step: int = 0, old: Tensor | None = None) -> Tensor:
    """Leading left singular vectors; the entry of largest magnitude of each is positive."""
    U = torch.linalg.svd(G.double(), full_matrices=False).U[:, :rank]
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    return U * torch.where(largest < 0, -1.0, 1.0)


def drop_round_off(R: Tensor, m: int, eps_gradient: float = EPS_FP32) -> Tensor:
    """Rows of R = QᵀG that are no more than rounding of the gradient count as zero."""
    floor = max(EPS_FP32, eps_gradient / math.sqrt(m)) * R.norm()
    return torch.where(R.norm(dim=1, keepdim=True) <= floor, 0.0, R)


class Adam:
    """Direction N of Adam for one array; `corrected=False` leaves the bias correction to the caller."""

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_placement: str = "after",
        corrected: bool = True,
    ) -> None:
        self.beta1, self.beta2 = betas
        self.eps, self.eps_placement, self.corrected = eps, eps_placement, corrected
        self.reset()

    def reset(self) -> None:
        self.M: Tensor | float = 0.0
        self.V: Tensor | float = 0.0
        self.t = 0

    @property
    def correction(self) -> float:
        return math.sqrt(1 - self.beta2**self.t) / (1 - self.beta1**self.t)

    def __call__(self, R: Tensor) -> Tensor:
        self.t += 1
        self.M = self.beta1 * self.M + (1 - self.beta1) * R
        self.V = self.beta2 * self.V + (1 - self.beta2) * R**2
        if not self.corrected:
            return self.M / (self.V.sqrt() + self.eps)
        if self.eps_placement == "before":  # ε joins √V before the bias correction, as in Hugging Face's old AdamW
            return self.correction * self.M / (self.V.sqrt() + self.eps)
        return (self.M / (1 - self.beta1**self.t)) / ((self.V / (1 - self.beta2**self.t)).sqrt() + self.eps)


class SGD:
    """Plain gradient descent as the inner rule."""

    def reset(self) -> None: ...

    def __call__(self, R: Tensor) -> Tensor:
        return R


class Limiter:
    """Norm-growth limiter: ‖S_t‖ ≤ γ‖S_{t−1}‖, where the stored norm is the limited one."""

    def __init__(self, gamma: float = 1.01) -> None:
        self.gamma = gamma
        self.norm: Tensor | None = None

    def __call__(self, S: Tensor) -> Tensor:
        if self.norm is not None and S.norm() > self.gamma * self.norm:
            S = self.gamma * self.norm * S / S.norm()
        self.norm = S.norm()
        return S


def decayed_step(W: Tensor, D: Tensor, lr: float, weight_decay: float, decay: str = "before") -> Tensor:
    """Decoupled weight decay: on the old weights, or (galore-torch) on the new ones."""
    shrink = 1 - lr * weight_decay
    return shrink * W - lr * D if decay == "before" else shrink * (W - lr * D)
