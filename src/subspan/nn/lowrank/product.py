"""The product with a frozen matrix and factors beside it, by whichever way takes the fewest operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["directions", "heads_product"]


def heads_product(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, scale: float, held: tuple[Tensor, Tensor] | None
) -> Tensor:
    """xₙ(W + scale·(BₙᵀAₙ − B'ₙᵀA'ₙ))ᵀ + bₙ for the N shares xₙ of a batch.

    Directly, the factors take part with 2·k·(m + n) operations for each row of x, where k is how many directions there
    are. Or W + scale·BₙᵀAₙ is formed, in the precision of W, rounded once to that of the product and not kept for the
    backward pass, which forms it again: 2·k·m·n for each head, which is less where there are more rows than a matrix
    has. Then the gradients of the factors may come from that of the formed matrix, so that no rank takes more than
    dense training does. Weights that are not wider than the product are never formed: their rounding would swallow
    small products.

    Args:
        x: (..., n), of which each head gets an N-th, in order.
        W: (m, n); it may need a gradient.
        A, B: Aₙ (N, r, n) and Bₙ (N, r, m).
        bias: (m,), (N, m) or None.
        scale: of the factors.
        held: A' and B', which get no gradient.

    Returns:
        (..., m), in the dtype of autocast or of W.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else W.dtype
    x = x.to(dtype) if torch.is_autocast_enabled(device) else x
    with torch.autocast(device, enabled=False):
        return _HeadsProduct.apply(x, W, A, B, bias, *(held or (None, None)), scale, dtype)  # type: ignore[no-any-return]


def directions(
    A: Tensor, B: Tensor, held: tuple[Tensor, Tensor] | None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Factors of BₙᵀAₙ − B'ₙᵀA'ₙ, as (Bₙ − B'ₙ)ᵀAₙ + B'ₙᵀ(Aₙ − A'ₙ), in ``dtype``.

    So what is small is rounded after its difference was taken, and nothing remains where A = A' and B = B'.
    """
    dtype = dtype or A.dtype
    if held is None:
        return A.to(dtype), B.to(dtype)
    held_A, held_B = held
    As, Bs = (A, A - held_A), (B - held_B, held_B)
    return torch.cat([X.to(dtype) for X in As], 1), torch.cat([X.to(dtype) for X in Bs], 1)


class _HeadsProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        held_A: Tensor | None,
        held_B: Tensor | None,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        As, Bs = directions(A, B, _pair(held_A, held_B), dtype)
        heads, rank, _ = As.shape
        m, n = W.shape
        count = x.numel() // n
        rows = x.reshape(heads, count // heads, n)
        ctx.scale, ctx.dtype = scale, dtype
        exact = W.dtype.itemsize > dtype.itemsize or dtype in (torch.float32, torch.float64)
        saved = 2 * count * (m + n) * (2 * rank - A.shape[1])
        ctx.forms = exact and saved > 2 * heads * m * n * (2 * rank + _passing(x.device))
        y = x.new_empty(*x.shape[:-1], m)
        per_head = y.view(heads, count // heads, m)
        H = None
        if ctx.forms:
            for number in range(heads):
                own = bias if bias is None or bias.ndim == 1 else bias[number]
                _product(rows[number], _formed(W, As[number], Bs[number], scale).mT, own, per_head[number])
        else:
            shared = bias if bias is None or bias.ndim == 1 else None
            _product(rows.flatten(0, 1), W.to(dtype).mT, shared, y.view(count, m))
            H = rows @ As.mT
            per_head.baddbmm_(H, Bs, alpha=scale)
            if bias is not None and bias.ndim == 2:
                per_head += bias.to(dtype).unsqueeze(1)
            H = H if held_A is None else H[..., : A.shape[1]].contiguous()
        ctx.save_for_backward(x, W, A, B, bias, held_A, held_B, H)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, bias, held_A, held_B, H = ctx.saved_tensors
        need_x, need_W, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
        heads, r, n = A.shape
        m, s = W.shape[0], ctx.scale
        dX = gW = gA = gB = g_bias = None
        with torch.autocast(dY.device.type, enabled=False):
            As, Bs = directions(A, B, _pair(held_A, held_B), ctx.dtype)
            count = x.numel() // n
            dy, rows = dY.reshape(heads, count // heads, m), x.reshape(heads, count // heads, n)
            a, b = As[:, :r], Bs[:, :r] if held_B is None else B.to(ctx.dtype)
            dH = None
            if ctx.forms:
                if need_x:
                    dX = torch.empty_like(rows)
                    for number in range(heads):
                        torch.mm(dy[number], _formed(W, As[number], Bs[number], s), out=dX[number])
            elif need_x:
                dH = dy @ Bs.mT
                dX = (dy.flatten(0, 1) @ W.to(ctx.dtype)).view(rows.shape).baddbmm_(dH, As, alpha=s)
                dH = dH if held_A is None else dH[..., :r] + dH[..., r:]
            if (need_A or need_B) and ctx.forms and count * (2 * r * (m + n) - m * n) > 2 * heads * r * m * n:
                gA, gB = torch.empty_like(a), torch.empty_like(b)
                for number in range(heads):
                    G = (dy[number].mT @ rows[number]).mul_(s)
                    torch.mm(b[number], G, out=gA[number])
                    torch.mm(a[number], G.mT, out=gB[number])
            else:
                if need_A:
                    gA = ((dy @ b.mT if dH is None else dH).mT @ rows).mul_(s)
                if need_B:
                    gB = ((rows @ a.mT if H is None else H).mT @ dy).mul_(s)
            if need_W:
                gW = (dy.flatten(0, 1).mT @ rows.flatten(0, 1)).to(W.dtype)
            if need_bias:
                g_bias = dy.sum(1 if bias.ndim == 2 else (0, 1), dtype=bias.dtype)
        gA, gB = (None if g is None else g.to(A.dtype) for g in (gA, gB))
        return None if dX is None else dX.view(x.shape), gW, gA, gB, g_bias, None, None, None, None


def _passing(device: torch.device) -> int:
    """Operations in whose time a number of a formed matrix is read, added and written: about 8 bytes of traffic."""
    return 100 if device.type == "cpu" else 1000


def _pair(A: Tensor | None, B: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if A is None or B is None else (A, B)


def _formed(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + scale·BᵀA in the dtype of the factors, summed up in that of W and rounded once."""
    product = B.mT @ A
    return torch.add(W, product, alpha=scale, out=product)


def _product(x: Tensor, W: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out <- x·W + bias."""
    if bias is None:
        torch.mm(x, W, out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, W, out=out)
