"""Factored weights (arXiv 2105.01029, balanced as in 2505.22922): W = BA by dense autograd, W and its SVD formed."""

from __future__ import annotations

import torch
from torch import Tensor

from references.parts import Adam


def spectral(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B = U√Σ and A = √ΣVᵀ."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


class FactoredReference:
    def __init__(
        self, B: Tensor, A: Tensor, *, lr: float, decay: float, gap: int, moments: str, reset_gap: int
    ) -> None:
        self.B, self.A = B.double(), A.double()
        self.lr, self.decay, self.gap, self.moments, self.reset_gap = lr, decay, gap, moments, reset_gap
        self.adam_B, self.adam_A = Adam(), Adam()
        self.t = 0

    def step(self, G: Tensor) -> Tensor:
        """Take the gradient of the loss with respect to W; return the new W."""
        A, B = self.A.requires_grad_(), self.B.requires_grad_()
        W = B @ A
        gB, gA = torch.autograd.grad((W * G.double()).sum() + self.decay / 2 * W.square().sum(), (B, A))
        self.B = (B - self.lr * self.adam_B(gB)).detach()
        self.A = (A - self.lr * self.adam_A(gA)).detach()
        self.t += 1
        if self.gap and self.t % self.gap == 0:
            self.balance()
        if self.reset_gap and self.t % self.reset_gap == 0:
            self.adam_A.reset()
            self.adam_B.reset()
        return self.B @ self.A

    def balance(self) -> None:
        B, A = spectral(self.B @ self.A, self.B.shape[1])
        change = torch.linalg.lstsq(self.B, B).solution  # B_new = B·change
        back = torch.linalg.inv(change)
        self.B, self.A = B, A
        if self.moments == "reset":
            self.adam_A.reset()
            self.adam_B.reset()
            return
        # L(B·C, C⁻¹A): the gradient of B_new is gB·C⁻ᵀ, that of A_new is Cᵀ·gA.
        self.adam_B.M = self.adam_B.M @ back.T
        self.adam_A.M = change.T @ self.adam_A.M
        # No history of gradients leaves M²/V above this (Cauchy and Schwarz).
        most = (1 - 0.9) ** 2 / ((1 - 0.999) * (1 - 0.9**2 / 0.999))
        self.adam_B.V = torch.maximum(self.adam_B.V @ back.T**2, self.adam_B.M**2 / most)
        self.adam_A.V = torch.maximum(change.T**2 @ self.adam_A.V, self.adam_A.M**2 / most)
