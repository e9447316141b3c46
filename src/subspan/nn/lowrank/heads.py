"""Several LoRA heads on one frozen weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from subspan.linalg import orthonormalize
from subspan.nn.lowrank.layer import LowRankLayer, replace_module
from subspan.nn.lowrank.select import select_layers
from subspan.nn.lowrank.weights import LowRankWeights, WeightRecipe

__all__ = ["HeadsLinear", "MultiHeadLoRA"]


class HeadsLinear(LowRankLayer):
    """y = x·(W + (s/N)·Σ BₙᵀAₙ)ᵀ + b with a frozen W and N heads; N = 1 is LoRA.

    Args:
        layer: the linear layer.
        heads: N.
        rank: r of each head.
        scale: s.

    Attributes:
        lora_A: Aₙ (N, r, in).
        lora_B: Bₙ (N, r, out), the transpose of the usual B, so that all heads together are one matrix without a copy.
    """

    weight: Tensor

    def __init__(self, layer: nn.Module, *, heads: int, rank: int, scale: float) -> None:
        super().__init__(layer)
        self.weight = layer.weight  # type: ignore[assignment]
        self.weight.requires_grad_(False)
        self.heads, self.rank, self.scale = heads, rank, scale
        dtype = torch.bfloat16 if self.weight.dtype == torch.bfloat16 else torch.float32
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.empty(heads, rank, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(heads, rank, self.out_features, device=device, dtype=dtype))

    @property
    def W(self) -> Tensor:
        """The frozen matrix (out, in), a view."""
        return self.weight.mT if self.transposed else self.weight

    def factors(self) -> dict[str, nn.Parameter]:
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    @torch.no_grad()
    def reset_(self, generator: torch.Generator) -> None:
        """Aₙ orthogonal times √(in/r), Bₙ = 0."""
        self.lora_B.zero_()
        if self.lora_A.is_meta:
            return
        for A in self.lora_A:
            drawn = torch.randn(self.in_features, self.rank, generator=generator)
            Q = orthonormalize(drawn) if self.rank <= self.in_features else orthonormalize(drawn.mT).mT
            A.copy_(Q.mT * (self.in_features / self.rank) ** 0.5)

    def effective_weight(self) -> Tensor:
        A, B = (factor.float().flatten(0, 1) for factor in (self.lora_A, self.lora_B))
        return torch.addmm(self.W.float(), B.mT, A, alpha=self.scale / self.heads)

    def forward(self, input: Tensor) -> Tensor:
        """The product x·W_effᵀ + b."""
        A, B = self.lora_A.flatten(0, 1), self.lora_B.flatten(0, 1)
        y = nn.functional.linear(input, self.W, self.bias).flatten(0, -2)
        y = torch.addmm(y, nn.functional.linear(input, A).flatten(0, -2), B.to(y.dtype), alpha=self.scale / self.heads)
        return y.view(*input.shape[:-1], -1)


@dataclass(frozen=True)
class MultiHeadLoRA(WeightRecipe):
    """Multi-head LoRA: W frozen, N heads of rank r on the same data, their mean added.

    h(x) = Wx + (s/N)·Σ BₙAₙx with s = alpha/r; Aₙ orthogonal times √(in/r), Bₙ = 0 at the start.

    Args:
        heads: N.
        rank: r of each head.
        alpha: s = alpha/r.

    Raises:
        ValueError: a value that is not allowed.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
        >>> weights = MultiHeadLoRA(heads=2, rank=4).apply(model)
        >>> sorted(weights.factors())
        ['0.lora_A', '0.lora_B', '2.lora_A', '2.lora_B']

    Source: arXiv 2402.16828.
    """

    name: ClassVar[str] = "mhlora"
    title: ClassVar[str] = "Multi-head LoRA"
    arxiv: ClassVar[str] = "2402.16828"
    summary: ClassVar[str] = "several LoRA heads on a frozen weight, averaged"

    heads: int = 4
    rank: int = 32
    alpha: float = 4096.0

    def __post_init__(self) -> None:
        for name in ("heads", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 1.")
        if not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha!r}; it must be greater than 0.")

    def apply(
        self,
        model: nn.Module,
        *,
        target_modules: str | Sequence[str] = "all-linear",
        exclude: str | Sequence[str] = (),
        steps: int | None = None,
        seed: int = 0,
    ) -> LowRankWeights:
        """Replace linear layers by `HeadsLinear`; see `WeightRecipe.apply`."""
        layers = {}
        for name, module in select_layers(model, target_modules, exclude).items():
            layer = HeadsLinear(module, heads=self.heads, rank=self.rank, scale=self.alpha / self.rank)
            replace_module(model, name, layer)
            layers[name] = layer
        weights = LowRankWeights(model, dict(layers), seed)
        for name, layer in layers.items():
            layer.reset_(weights.generator(name, -1))
        return weights
