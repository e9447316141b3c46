"""Linear layers whose weight is a product of low rank plus a sparse matrix: formed to be multiplied, and not kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from subspan.nn.lowrank.layer import LowRankLayer
from subspan.nn.lowrank.limits import BETWEEN, POSITIVE, Limit, at_least
from subspan.nn.lowrank.select import check_untied
from subspan.nn.lowrank.weights import LowRankWeights, WeightRecipe
from subspan.optim.tiling import row_tiles
from subspan.state.host import is_rehearsed

__all__ = ["SLTrain", "SLTrainLinear"]

#: Of a row tile of the gradient: first row, number of rows, and which of the sparse entries lie in it.
_Piece = tuple[int, int, int, int]


class SLTrainLinear(LowRankLayer):
    """y = x·(s·BA + S)ᵀ + b with a sparse S whose places are fixed and whose values are trained.

    W = s·BA + S (out, in) is there while it is multiplied, once in forward and once in backward. Of its gradient
    G = dYᵀx a few rows at a time are formed, from which the values of S take theirs, and the factors s·G·Aᵀ and s·BᵀG;
    of fewer tokens than out·in/(out + in) s·dYᵀ(xAᵀ) and s·(dY·B)ᵀx are cheaper.

    Args:
        layer: the linear layer whose place it takes; its matrix is not kept.
        rank: r.
        scale: s.
        delta: share of the entries of S that are not zero.

    Attributes:
        lora_A: A (r, in).
        lora_B: B (out, r).
        values: of S, (k,) with k = ⌊delta·out·in⌋.
        indices: their places in the flattened matrix, ascending; int32 where the matrix has fewer than 2³¹ entries.

    Raises:
        ValueError: a matrix so small that S would have no entry.

    Example:
        >>> layer = SLTrainLinear(nn.Linear(16, 32), rank=4, scale=2.0, delta=0.05)
        >>> layer.reset_(torch.Generator().manual_seed(0))
        >>> layer(torch.randn(2, 16)).shape, layer.indices.shape, layer.indices.dtype
        (torch.Size([2, 32]), torch.Size([25]), torch.int32)
    """

    indices: Tensor

    def __init__(self, layer: nn.Module, *, rank: int, scale: float, delta: float) -> None:
        super().__init__(layer)
        self.rank, self.scale = rank, scale
        size = self.out_features * self.in_features
        count = math.floor(delta * size)
        if count < 1:
            raise ValueError(
                f"delta={delta} of the {size} entries of a {self.out_features}×{self.in_features} matrix is none: give "
                f"{1 / size:.2g} or more, or name the layer in exclude"
            )
        self.register_parameter("weight", None)  # which T5 asks for its dtype
        weight: Any = layer.weight
        like: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.lora_A = nn.Parameter(torch.zeros(rank, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **like))
        self.values = nn.Parameter(torch.zeros(count, **like))
        dtype = torch.int32 if size < 2**31 else torch.int64
        self.register_buffer("indices", torch.arange(count, dtype=dtype, device=weight.device))
        self._known: tuple[Tensor, int, list[_Piece]] | None = None

    def factors(self) -> dict[str, nn.Parameter]:
        return {"lora_A": self.lora_A, "lora_B": self.lora_B, "values": self.values}

    @torch.no_grad()
    def reset_(self, generator: torch.Generator) -> None:
        """B = 0, A and the values of S ~ U(±1/√in), the places of S uniformly random; the function changes."""
        if self.lora_A.is_meta:
            return
        self.lora_B.zero_()
        for drawn in (self.lora_A, self.values):
            numbers = torch.rand(drawn.shape, generator=generator).mul_(2).sub_(1)
            drawn.copy_(numbers / self.in_features**0.5)
        self.indices.copy_(_places(self.out_features * self.in_features, len(self.values), generator))

    def effective_weight(self) -> Tensor:
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        A, B, values = (factor.detach().to(dtype) for factor in self.factors().values())
        return _weight(A, B, values, self.indices, self.scale)

    def forward(self, input: Tensor) -> Tensor:
        """The product x·Wᵀ + b."""
        device, pieces = input.device.type, self._pieces()
        parts: list[Any] = [input, self.lora_A, self.lora_B, self.values, self.bias]
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            parts = [None if part is None else part.to(dtype) for part in parts]
        with torch.autocast(device, enabled=False):
            return _SparseAndLowRank.apply(*parts, self.indices, self.scale, pieces)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, entries={len(self.values)}"

    def _pieces(self) -> list[_Piece]:
        """Tiles of the gradient's rows with the entries in them, found once for all steps."""
        indices = self.indices
        if self._known is None or self._known[0] is not indices or self._known[1] != indices._version:
            m, n, count = self.out_features, self.in_features, len(indices)
            # Only shape and device of this view say how long a tile is.
            tiles = list(row_tiles(self.lora_A[:1].expand(m, n)))
            stops = [tile.start + tile.length for tile in tiles]
            if is_rehearsed():  # the places are not there: each tile has its share
                cuts = [stop * count // m for stop in stops]
            else:
                ends = torch.tensor([stop * n for stop in stops], dtype=indices.dtype, device=indices.device)
                cuts = torch.searchsorted(indices, ends).tolist()
            spans = pairwise([0, *cuts])
            pieces = [(tile.start, tile.length, *span) for tile, span in zip(tiles, spans, strict=True)]
            self._known = (indices, indices._version, pieces)
        return self._known[2]


def _places(size: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different numbers below ``size``, ascending; all such sets are equally likely."""
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        share_left = 1 - len(found) / size
        drawn = torch.randint(size, (int(1.1 * (count - len(found)) / share_left) + 16,), generator=generator)
        found = torch.cat([found, drawn]).unique()
    surplus = torch.randperm(len(found), generator=generator)[: len(found) - count]
    keep = torch.ones(len(found), dtype=torch.bool)
    keep[surplus] = False
    return found[keep]


def _weight(A: Tensor, B: Tensor, values: Tensor, indices: Tensor, scale: float) -> Tensor:
    W = torch.mm(B * scale, A)
    W.view(-1).index_add_(0, indices, values)
    return W


class _SparseAndLowRank(torch.autograd.Function):
    """x·Wᵀ + b; what is kept for backward is x and what W is made of."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        values: Tensor,
        bias: Tensor | None,
        indices: Tensor,
        scale: float,
        pieces: list[_Piece],
    ) -> Tensor:
        ctx.save_for_backward(x, A, B, values, indices)
        ctx.scale, ctx.pieces = scale, pieces
        return nn.functional.linear(x, _weight(A, B, values, indices, scale), bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, values, indices = ctx.saved_tensors
        scale, needs, wide = ctx.scale, ctx.needs_input_grad, torch.promote_types(A.dtype, torch.float32)
        dX = gA = gB = gV = gb = None
        with torch.autocast(dY.device.type, enabled=False):
            dy, rows = dY.reshape(-1, dY.shape[-1]), x.reshape(-1, x.shape[-1])
            if needs[0]:
                dX = (dy @ _weight(A, B, values, indices, scale)).view(x.shape)
            # Of many tokens G is cheaper to multiply than dY and x; it is there in tiles for the values.
            by_tiles = needs[3] and len(rows) * (len(B) + A.shape[1]) > len(B) * A.shape[1]
            if needs[1]:
                gA = torch.zeros_like(A, dtype=wide) if by_tiles else ((dy @ B) * scale).mT @ rows
            if needs[2]:
                gB = torch.empty_like(B) if by_tiles else dy.mT @ ((rows @ A.mT) * scale)
            if needs[3]:
                gV = torch.empty_like(values)
                for start, length, first, last in ctx.pieces:
                    tile = slice(start, start + length)
                    G = dy[:, tile].mT @ rows
                    places = indices[first:last] - start * A.shape[1]
                    gV[first:last] = G.view(-1).index_select(0, places)
                    if by_tiles and gA is not None:
                        gA += (B[tile] * scale).mT @ G
                    if by_tiles and gB is not None:
                        gB[tile] = G @ (A * scale).mT
                    del G, places  # before the next tile is there
            if gA is not None:
                gA = gA.to(A.dtype)
            if needs[4]:
                gb = dy.sum(0)
        return dX, gA, gB, gV, gb, None, None, None


@dataclass(frozen=True)
class SLTrain(WeightRecipe):
    """SLTrain: W = (alpha/r)·BA + S, S with a share delta of its entries at fixed random places, trained from scratch.

    At the start W is S alone (B = 0, A and S ~ U(±1/√in)): what the layers computed before is lost. Train with
    weight decay 0, as the paper does. State is that of r(out + in) + delta·out·in numbers, and 4 bytes for each place.

    Args:
        rank: r.
        alpha: s = alpha/r.
        delta: share of the entries of each matrix that are not zero in S.

    Raises:
        ValueError: a value that is not allowed.

    Example:
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
        >>> weights = SLTrain(rank=4).apply(model)
        >>> model[0]
        SLTrainLinear(in_features=32, out_features=64, rank=4, entries=61)

    Source: arXiv 2406.02214.
    """

    name: ClassVar[str] = "sltrain"
    title: ClassVar[str] = "SLTrain"
    arxiv: ClassVar[str] = "2406.02214"
    summary: ClassVar[str] = "factors and a sparse matrix at fixed places, in place of each matrix"
    limits: ClassVar[Mapping[str, Limit]] = {"rank": at_least(1), "alpha": POSITIVE, "delta": BETWEEN}

    rank: int = 128
    alpha: float = 32.0
    delta: float = 0.03

    @property
    def unshardable(self) -> str | None:
        """Nothing: between steps nothing is done."""
        return None

    def build(self, model: nn.Module, chosen: dict[str, nn.Module], *, steps: int | None, seed: int) -> LowRankWeights:
        """Replace them by `SLTrainLinear`."""
        check_untied(model, chosen)
        for name, module in chosen.items():
            self._check(name, module)
        weights = LowRankWeights(model, {}, seed)
        for name in list(chosen):
            module = chosen.pop(name)  # one dense matrix after the other is let go
            weights.install(name, SLTrainLinear(module, rank=self.rank, scale=self.alpha / self.rank, delta=self.delta))
        return weights

    def _check(self, name: str, module: nn.Module) -> None:
        weight: Any = module.weight
        m, n = weight.shape
        entries = math.floor(self.delta * m * n)
        where = f"{name or 'the layer'} ({m}×{n})"
        if entries < 1:
            raise ValueError(f"delta={self.delta} leaves no entry of {where}; name it in exclude")
        largest = (m * n - entries - 1) // (m + n)
        if self.rank > largest:
            least = f"the largest rank that does is {largest}" if largest > 0 else "no rank does: name it in exclude"
            raise ValueError(f"rank={self.rank} with delta={self.delta} does not make {where} smaller; {least}")
