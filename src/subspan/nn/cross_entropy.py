"""Cross-entropy of a linear head without the logits of all tokens at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["linear_cross_entropy"]

# Logits of a chunk, in elements: 64 MiB in float32.
_CHUNK = 1 << 24


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, count: Tensor | int | None = None, ignore_index: int = -100
) -> Tensor:
    """Mean of −log softmax(hidden·weightᵀ)[label], a few rows at a time.

    Forward computes both gradients while the logits of a chunk exist, so that they are formed once only and never kept:
    the same three products as the plain way, (b, V) numbers less. Logits are rounded as the product rounds them and
    go through softmax in float32; the gradient of the weight is added up in float32.

    (torch 2.13's function of this name has twice the time on a CPU, ignores autocast, and returns a bfloat16 loss for
    bfloat16 weights, which is off by up to 1 %.)

    Args:
        hidden: (..., d), what the head is applied to.
        weight: (V, d) of the head.
        labels: (...), int64; rows with ``ignore_index`` do not count.
        count: number to divide by, in place of that of the labels that count (as with accumulated micro-batches).
        ignore_index: label of rows that do not count.

    Returns:
        The loss, 0-D, float32 (float64 for float64); NaN when no label counts, as in torch. One backward pass can go
        through it.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> hidden, weight, labels = torch.randn(6, 4), torch.randn(9, 4), torch.randint(9, (6,))
        >>> plain = nn.functional.cross_entropy(hidden @ weight.mT, labels)
        >>> bool(torch.isclose(linear_cross_entropy(hidden, weight, labels), plain))
        True

    Source: the scheme of Liger Kernel's fused linear cross-entropy, arXiv 2410.10989.
    """
    if hidden.shape[:-1] != labels.shape or weight.ndim != 2 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)} do not fit: "
            "they are (..., d), (V, d) and (...)"
        )
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        # Inside of forward nothing tells whether a graph is being built.
        wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
        rows = hidden.reshape(-1, hidden.shape[-1])
        total = _LossSum.apply(rows, weight, labels.reshape(-1), ignore_index, wanted)
    if count is None:
        count = (labels != ignore_index).sum()
    return total / count  # type: ignore[no-any-return]


class _LossSum(torch.autograd.Function):
    """Sum of the losses of all rows; the gradients are ready when forward is."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, wanted: list[bool]
    ) -> Tensor:
        dX = torch.empty_like(hidden) if wanted[0] else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        dW = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        rows = max(1, _CHUNK // weight.shape[0])
        total = hidden.new_zeros((), dtype=wide)
        for start in range(0, hidden.shape[0], rows):
            x, y = hidden[start : start + rows], labels[start : start + rows]
            logits = (x @ weight.mT).to(wide)
            total += nn.functional.cross_entropy(logits, y, reduction="sum", ignore_index=ignore_index)
            if not any(wanted):
                continue
            # The gradient of the logits, in their place: softmax minus the one of the label.
            counts = y != ignore_index
            dlogits = torch.softmax(logits, dim=-1, out=logits)
            dlogits.scatter_add_(1, y.where(counts, 0).unsqueeze(1), -torch.ones_like(dlogits[:, :1]))
            dlogits = dlogits.mul_(counts.unsqueeze(1)).to(hidden.dtype)
            if dX is not None:
                torch.mm(dlogits, weight, out=dX[start : start + rows])
            if dW is not None:
                dW += dlogits.mT @ x
        # Sums over all rows, before they are divided: too large for float16.
        narrow = dW is not None and weight.dtype != torch.float16
        ctx.save_for_backward(dX, dW.to(weight.dtype) if dW is not None and narrow else dW)
        ctx.used, ctx.dtype = False, weight.dtype
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.used:
            raise RuntimeError("linear_cross_entropy gives its gradients up in the first backward; call it again")
        ctx.used = True
        dX, dW = ctx.saved_tensors
        dX = None if dX is None else dX.mul_(upstream)
        dW = None if dW is None else dW.mul_(upstream).to(ctx.dtype)
        return dX, dW, None, None, None
