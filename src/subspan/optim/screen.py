"""Look at gradients before anything is changed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subspan.optim.sharding import agreed
from subspan.optim.shards import local


def nonfinite_gradients(work: list[tuple[str, Tensor]]) -> list[str]:
    """Names of the parameters whose gradients hold NaN or Inf.

    A sum over all elements shows NaN and Inf at the price of one read, and all sums reach the host together; only where
    a sum is not finite, which an overflow also causes, are the elements looked at. Of parameters that are divided over
    processes each looks at its piece, and all agree in one collective call.

    Args:
        work: names, and parameters that have a gradient.

    Raises:
        ValueError: a sparse, complex or integer gradient.
    """
    sums = []
    for name, parameter in work:
        assert parameter.grad is not None
        gradient = local(parameter.grad)
        if gradient.layout != torch.strided:
            raise ValueError(f"{name}: {gradient.layout} gradients are not supported; use a dense one (sparse=False)")
        if not gradient.is_floating_point():
            raise ValueError(f"{name}: {gradient.dtype} gradients are not supported; use a real floating-point dtype")
        sums.append(gradient.sum().to(work[0][1].device, torch.float32))
    if not sums:
        return []
    finite = torch.stack(sums).isfinite().tolist()
    suspects = [(name, parameter.grad) for (name, parameter), good in zip(work, finite, strict=True) if not good]
    bad = [name for name, gradient in suspects if gradient is not None and not bool(local(gradient).isfinite().all())]
    return agreed(bad, work)


def nonfinite_projections(R: Tensor, count: int) -> list[int]:
    """Positions of the projected gradients whose norm is not finite.

    Every entry of G enters R = PᵀG, so the norm of R shows NaN and Inf in G without a look at all of it. It also shows
    what is too large to be squared, as a second moment has to.

    Args:
        R: one projected gradient, or ``count`` of them stacked.
        count: number of gradients.
    """
    norms = torch.linalg.vector_norm(R.reshape(count, -1), dim=-1)
    return [position for position, norm in enumerate(norms.tolist()) if not math.isfinite(norm)]
