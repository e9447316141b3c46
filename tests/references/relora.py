"""ReLoRA as the paper's loop has it, for one network of plain tensors: dense matrices, Adam by hand, no engine."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def jagged_cosine(step: int, steps: int, warmup: int, period: int, rewarm: int, floor: float = 0.1) -> float:
    """The share of the peak at a step: warm-up, cosine to ``floor``, and in each later cycle a ramp from 0."""

    def cosine(at: int) -> float:
        if at < warmup:
            return at / warmup
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (at - warmup) / (steps - warmup)))

    inside = step % period
    if step >= period and inside < rewarm:
        return inside / rewarm * cosine(step - inside + rewarm)
    return cosine(step)


def train(
    weights: list[Tensor],
    batches: list[tuple[Tensor, Tensor]],
    draw: Callable[[int, int], Tensor],
    *,
    rank: int,
    alpha: float,
    period: int,
    rates: list[float],
    share: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> list[Tensor]:
    """Train tanh networks without biases; the effective weights at the end.

    Args:
        weights: W (out, in) of each layer.
        batches: inputs and targets, one pair a step.
        draw: A (rank, in) of a layer after so many steps.
        rank, alpha: of the factors.
        period: steps of a cycle.
        rates: learning rate of each step.
        share: of the moments that is pruned, those with the smallest first moments.
    """
    weights, s = [W.clone() for W in weights], alpha / rank
    factors = [[draw(i, 0), torch.zeros(W.shape[0], rank)] for i, W in enumerate(weights)]
    moments = [[[torch.zeros_like(X), torch.zeros_like(X)] for X in pair] for pair in factors]
    age = 0
    for step, (x, y) in enumerate(batches):
        leaves = [[X.clone().requires_grad_() for X in pair] for pair in factors]
        for i, (W, (A, B)) in enumerate(zip(weights, leaves, strict=True)):
            x = x @ (W + s * B @ A).T
            x = torch.tanh(x) if i + 1 < len(weights) else x
        gradients = torch.autograd.grad((x - y).square().mean(), [X for pair in leaves for X in pair])
        age += 1
        for index, G in enumerate(gradients):
            i, k = divmod(index, 2)
            m, v = moments[i][k]
            m.mul_(betas[0]).add_(G, alpha=1 - betas[0])
            v.mul_(betas[1]).addcmul_(G, G, value=1 - betas[1])
            m_hat, v_hat = m / (1 - betas[0] ** age), v / (1 - betas[1] ** age)
            factors[i][k] = factors[i][k] - rates[step] * m_hat / (v_hat.sqrt() + eps)
        if (step + 1) % period == 0:
            age = 0
            for i, (A, B) in enumerate(factors):
                weights[i] = weights[i] + s * B @ A
                factors[i] = [draw(i, step + 1), torch.zeros_like(B)]
                for m, v in moments[i]:
                    dropped = m.abs().flatten().argsort()[: round(share * m.numel())]
                    m.view(-1)[dropped] = 0
                    v.view(-1)[dropped] = 0
    return [W + s * B @ A for W, (A, B) in zip(weights, factors, strict=True)]
