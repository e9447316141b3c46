"""A linear layer with heads that train apart, each on its own share of a batch."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from subspan.nn.lowrank.heads import HeadsLinear, rows_of
from subspan.nn.lowrank.product import directions, heads_product
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
        A, B = directions(self.lora_A, self.lora_B, self._held())
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
        A, B = directions(self.lora_A, self.lora_B, self._held())
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
        return heads_product(x, self.W, self.lora_A, self.lora_B, bias, self.scale, self._held())

    def _held(self) -> tuple[Tensor, Tensor] | None:
        """The factors of Dₙ'."""
        return None if self.merged_A is None or self.merged_B is None else (self.merged_A, self.merged_B)
