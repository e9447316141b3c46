"""Matrices with a known spectrum: Haar singular vectors, so that no coordinate is special."""

from __future__ import annotations

import torch
from torch import Tensor

from subspan.linalg import random_stiefel, seeded_generator


def with_spectrum(sigma: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    """A of shape (m, n) with the singular values ``sigma``, in float64."""
    generator = seeded_generator(seed, "spectrum")
    U = random_stiefel(m, len(sigma), generator=generator, dtype=torch.float64)
    V = random_stiefel(n, len(sigma), generator=generator, dtype=torch.float64)
    return (U * sigma.double()) @ V.mT


def slow(k: int) -> Tensor:
    """σ_i = i^(-1/2)."""
    return torch.arange(1, k + 1, dtype=torch.float64).rsqrt()


def exponential(k: int) -> Tensor:
    """σ_i from 1 to e^-20."""
    return torch.exp(-20 * torch.arange(k, dtype=torch.float64) / k)
