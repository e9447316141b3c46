"""A linear layer with heads that train apart, each on its own share of a batch."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from subspan.nn.lowrank.heads import HeadsLinear, rows_of
from subspan.nn.lowrank.replicas import Batch, mean
from subspan.optim.shards import mark_part

__all__ = ["ParallelHeadsLinear"]


class ParallelHeadsLinear(HeadsLinear):
    """Heads of which each sees its own share of a batch, with the weight W + Dₙ − Dₙ', where Dₙ = s·BₙᵀAₙ.

    Dₙ' is what of head n is in W already: Dₙ as it was at the last merge. In evaluation all sequences see the mean of
    the heads.

    Args:
        layer: the linear layer.
        rank, scale: r and s of each head.
        batch: how batches are divided, and how many heads there are here.
        reset: heads begin anew after each merge, so that there is no Dₙ'.
        own_bias: whether each head trains a bias of its own.

    Attributes:
        merged_A, merged_B: the factors of Dₙ'.
    """

    merged_A: Tensor | None
    merged_B: Tensor | None

    def __init__(self, layer: nn.Module, *, rank: int, scale: float, batch: Batch, reset: bool, own_bias: bool) -> None:
        super().__init__(layer, heads=batch.heads, rank=rank, scale=scale)
        self.batch = batch
        if batch.processes > 1:
            for factor in (self.lora_A, self.lora_B):
                mark_part(factor, batch.total, batch.first)
        self.register_buffer("merged_A", None if reset else torch.empty_like(self.lora_A.detach()))
        self.register_buffer("merged_B", None if reset else torch.zeros_like(self.lora_B.detach()))
        if own_bias and self.bias is not None:
            self.bias = nn.Parameter(self.bias.detach().expand(batch.heads, -1).clone(), self.bias.requires_grad)

    @torch.no_grad()
    def reset_(self, generator: torch.Generator) -> None:
        """Aₙ orthogonal times √(in/r), Bₙ = 0, each head drawn as it is where one process has all."""
        self._reset(generator, range(self.batch.first, self.batch.first + self.heads))
        self.remember()

    @torch.no_grad()
    def remember(self) -> None:
        """What the heads are now is in W."""
        if self.merged_A is not None and self.merged_B is not None:
            self.merged_A.copy_(self.lora_A)
            self.merged_B.copy_(self.lora_B)

    def news(self) -> tuple[Tensor, Tensor]:
        """Factors L (k, out) and R (k, in) of Σ(Dₙ − Dₙ') = s·LᵀR."""
        A, B = _stacked(self.lora_A, self.lora_B, self.merged_A, self.merged_B)
        return B.flatten(0, 1), A.flatten(0, 1)

    def news_of_all(self) -> tuple[Tensor, Tensor]:
        """The same with the heads of all processes, each of which calls it."""
        L, R = self.news()
        return self.batch.gather(L), self.batch.gather(R)

    def effective_weight(self) -> Tensor:
        """W and the mean of what all heads have found since the last merge; every process calls it."""
        L, R = self.news_of_all()
        return torch.addmm(self.W.float(), L.float().mT, R.float(), alpha=self.scale / self.batch.total)

    def dense(self) -> nn.Module:
        layer: Any = super().dense()
        if biases := self.own_biases():
            layer.bias = nn.Parameter(self.batch.mean(biases))
        return layer  # type: ignore[no-any-return]

    def embed(self, ids: Tensor, embedding: nn.Embedding) -> Tensor:
        """Rows of the weight of each head, for an embedding that is tied to this layer."""
        A, B = _stacked(self.lora_A, self.lora_B, self.merged_A, self.merged_B)
        if not self.training:
            return rows_of(ids, self.weight, A.flatten(0, 1), B.flatten(0, 1), self.scale / self.heads, embedding)
        self.batch.check(ids)
        shares = zip(ids.chunk(self.heads), A, B, strict=True)
        return torch.cat([rows_of(part, self.weight, a, b, self.scale, embedding) for part, a, b in shares])

    def own_biases(self) -> list[Tensor]:
        """The biases of the heads here; none where they share one, or there is none."""
        return [] if self.bias is None or self.bias.ndim == 1 else list(self.bias.detach().unbind())

    def forward(self, input: Tensor) -> Tensor:
        """Each share of the batch times the weight of its head."""
        x, bias = input, cast(Tensor | None, self.bias)
        if not self.training:
            L, R = self.news()
            biases = self.own_biases()
            return self._sum(x, R, L, mean(biases, len(biases)) if biases else bias)
        self.batch.check(x)
        device = x.device.type
        parts: list[Any] = [x, self.W, self.lora_A, self.lora_B, self.merged_A, self.merged_B]
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            parts = [None if part is None else part.to(dtype) for part in parts]
            bias = None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            y = _ParallelProduct.apply(*parts, self.scale)
            if bias is None:
                return y  # type: ignore[no-any-return]
            if bias.ndim == 1:
                return y + bias  # type: ignore[no-any-return]
            return (y.view(self.heads, -1, self.out_features) + bias.unsqueeze(1)).view(y.shape)  # type: ignore[no-any-return]


def _stacked(A: Tensor, B: Tensor, merged_A: Tensor | None, merged_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """[A A'] (N, k, in) and [B −B'] (N, k, out)."""
    if merged_A is None or merged_B is None:
        return A, B
    return torch.cat([A, merged_A], 1), torch.cat([B, -merged_B], 1)


class _ParallelProduct(torch.autograd.Function):
    """xₙ(W + s·BₙᵀAₙ − s·B'ₙᵀA'ₙ)ᵀ; what is merged takes part as more directions, and gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, merged_A: Tensor | None, merged_B: Tensor | None, s: float
    ) -> Tensor:
        ctx.scale = s
        As, Bs = _stacked(A, B, merged_A, merged_B)
        rows = x.reshape(A.shape[0], -1, x.shape[-1])
        H = rows @ As.mT
        y = (rows.flatten(0, 1) @ W.mT).view(*rows.shape[:2], -1).baddbmm_(H, Bs, alpha=s)
        ctx.save_for_backward(x, W, H[..., : A.shape[1]] if merged_A is not None else H, As, Bs)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, W, H, As, Bs = ctx.saved_tensors
        rank, s = H.shape[-1], ctx.scale
        with torch.autocast(dY.device.type, enabled=False):
            dy, rows = (t.reshape(As.shape[0], -1, t.shape[-1]) for t in (dY, x))
            dH = (dy @ Bs.mT).mul_(s)
            dX = None
            if ctx.needs_input_grad[0]:
                dX = (dy.flatten(0, 1) @ W).view(rows.shape).baddbmm_(dH, As).view(x.shape)
            gA = dH[..., :rank].mT @ rows
            gB = (H.mT @ dy).mul_(s)
            gW = dy.flatten(0, 1).mT @ rows.flatten(0, 1) if ctx.needs_input_grad[1] else None
        return dX, gW, gA, gB, None, None, None
