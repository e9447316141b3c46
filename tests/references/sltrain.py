"""SLTrain (arXiv 2406.02214) by dense autograd: W = (alpha/r)·BA + S, S a whole matrix with its places masked."""

from __future__ import annotations

import torch
from torch import Tensor

from references.parts import Adam


class SLTrainReference:
    def __init__(self, B: Tensor, A: Tensor, S: Tensor, *, alpha: float, lr: float) -> None:
        self.B, self.A, self.S = (part.double().clone() for part in (B, A, S))
        self.support = S != 0
        self.scale, self.lr = alpha / B.shape[1], lr
        self.adam = [Adam(), Adam(), Adam()]

    def weight(self) -> Tensor:
        return self.scale * self.B @ self.A + self.S

    def step(self, G: Tensor) -> Tensor:
        """Take the gradient of the loss with respect to W; return the new W."""
        parts = [part.detach().requires_grad_() for part in (self.B, self.A, self.S)]
        B, A, S = parts
        gradients = torch.autograd.grad(((self.scale * B @ A + S * self.support) * G.double()).sum(), parts)
        steps = [adam(gradient) for adam, gradient in zip(self.adam, gradients, strict=True)]
        self.B, self.A, self.S = (p.detach() - self.lr * u for p, u in zip(parts, steps, strict=True))
        return self.weight()
