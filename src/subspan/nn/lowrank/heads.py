"""Several LoRA heads on one frozen weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from subspan.linalg import orthonormalize
from subspan.nn.lowrank.layer import LowRankLayer, replace_module
from subspan.nn.lowrank.limits import POSITIVE, Limit, at_least
from subspan.nn.lowrank.product import heads_product
from subspan.nn.lowrank.select import check_rank, check_untied
from subspan.nn.lowrank.weights import LowRankWeights, WeightRecipe

__all__ = ["HeadsEmbedding", "HeadsLinear", "HeadsWeights", "MultiHeadLoRA"]


class HeadsLinear(LowRankLayer):
    """y = x·(W + (s/N)·Σ BₙᵀAₙ)ᵀ + b with a frozen W and N heads; N = 1 is LoRA.

    Args:
        layer: the linear layer.
        heads: N.
        rank: r of each head, from 1 to min(in, out).
        scale: s.

    Attributes:
        lora_A: Aₙ (N, r, in).
        lora_B: Bₙ (N, r, out), the transpose of the usual B, so that all heads together are one matrix without a copy.
    """

    weight: Tensor

    def __init__(self, layer: nn.Module, *, heads: int, rank: int, scale: float) -> None:
        super().__init__(layer)
        self.check_rank(rank)
        self.weight = layer.weight  # type: ignore[assignment]
        self.weight.requires_grad_(False)
        self.heads, self.rank, self.scale = heads, rank, scale
        dtype = torch.float32 if self.weight.dtype == torch.float16 else self.weight.dtype
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
        self._reset(generator, range(self.heads))

    def _reset(self, generator: torch.Generator, own: range) -> None:
        """Draw the heads that are here, of more that are drawn in order."""
        self.lora_B.zero_()
        if self.lora_A.is_meta:
            return
        for number in range(own.stop):
            drawn = torch.randn(self.in_features, self.rank, generator=generator)
            if number in own:
                A = orthonormalize(drawn).mT * (self.in_features / self.rank) ** 0.5
                self.lora_A[number - own.start].copy_(A)

    def effective_weight(self) -> Tensor:
        A, B = (factor.float().flatten(0, 1) for factor in (self.lora_A, self.lora_B))
        return torch.addmm(self.W.float(), B.mT, A, alpha=self.scale / self.heads)

    def forward(self, input: Tensor) -> Tensor:
        """The product x·W_effᵀ + b."""
        return self._sum(input, self.lora_A.flatten(0, 1), self.lora_B.flatten(0, 1), self.bias)

    def _sum(self, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
        """xWᵀ + b + (s/N)·xAᵀB with A (k, in) and B (k, out)."""
        return heads_product(x, self.W, A[None], B[None], bias, self.scale / self.heads, None)

    def embed(self, ids: Tensor, embedding: nn.Embedding) -> Tensor:
        """Rows of the effective weight, for an embedding that is tied to this layer."""
        A, B = self.lora_A.flatten(0, 1), self.lora_B.flatten(0, 1)
        return rows_of(ids, self.weight, A, B, self.scale / self.heads, embedding)


def rows_of(ids: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float, embedding: nn.Embedding) -> Tensor:
    """Rows of W + scale·BᵀA."""
    low_rank = nn.functional.embedding(ids, B.mT) @ A
    return nn.functional.embedding(ids, W, embedding.padding_idx).add(low_rank, alpha=scale)


class HeadsEmbedding(nn.Module):
    """An embedding whose weight is that of an output layer with heads, tied to it.

    Args:
        embedding: in whose place it stands.
        layer: the output layer, which holds all parameters.
    """

    def __init__(self, embedding: nn.Embedding, layer: HeadsLinear) -> None:
        super().__init__()
        # In a tuple, so that the parameters keep the name that they have in the output layer.
        self._tied = (embedding, layer)
        embedding.register_parameter("weight", None)  # else it would keep a whole one of a layer that is divided

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the layer's effective weight."""
        embedding, layer = self._tied
        return layer.embed(input, embedding)

    def dense(self, weight: nn.Parameter) -> nn.Embedding:
        """The embedding again, with the weight of the output layer that has become an ordinary one."""
        embedding, _ = self._tied
        embedding.weight = weight
        return embedding


class HeadsWeights(LowRankWeights):
    """Layers with heads, and the embeddings that are tied to some of them.

    Args:
        model, layers, seed: see `LowRankWeights`.
        embeddings: name of a `HeadsEmbedding` to the name of its layer.
    """

    def __init__(
        self, model: nn.Module, layers: dict[str, LowRankLayer], embeddings: dict[str, str], seed: int = 0
    ) -> None:
        super().__init__(model, layers, seed)
        self.embeddings = embeddings

    def begin(self) -> None:
        """Draw all factors."""
        for name, layer in self.layers.items():
            layer.reset_(self.generator(name, -1))

    def merge(self) -> list[str]:
        """Turn the model into an ordinary one that computes the same, with the ties that it had."""
        names = super().merge()
        for name, tied in self.embeddings.items():
            embedding: Any = self.model.get_submodule(name)
            replace_module(self.model, name, embedding.dense(self.model.get_submodule(tied).weight))
        self.embeddings = {}
        return names


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
    limits: ClassVar[Mapping[str, Limit]] = {"heads": at_least(1), "rank": at_least(1), "alpha": POSITIVE}

    heads: int = 4
    rank: int = 32
    alpha: float = 4096.0

    @property
    def unshardable(self) -> str | None:
        """Nothing: between steps nothing is done."""
        return None

    def build(self, model: nn.Module, chosen: dict[str, nn.Module], *, steps: int | None, seed: int) -> LowRankWeights:
        """Replace them by `HeadsLinear`."""
        layers, embeddings = self.replace(
            model,
            chosen,
            lambda module: HeadsLinear(module, heads=self.heads, rank=self.rank, scale=self.alpha / self.rank),
        )
        weights = HeadsWeights(model, layers, embeddings, seed)
        weights.begin()
        return weights

    def replace(
        self, model: nn.Module, chosen: dict[str, nn.Module], make: Callable[[nn.Module], HeadsLinear]
    ) -> tuple[dict[str, LowRankLayer], dict[str, str]]:
        """Put layers with heads in the place of those that were ``chosen``, and embeddings that are tied to them.

        Returns:
            The layers by name, and the names of the embeddings with those of their layers.

        Raises:
            ValueError: a rank above a side of a matrix, or a matrix that is tied to more than embeddings that only look
                up its rows.
        """
        check_rank(self.rank, chosen)
        tied: dict[Any, list[tuple[str, nn.Embedding]]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            # What does more than look up, such as scaling its rows, would be lost.
            if type(module) is nn.Embedding and module.max_norm is None:
                tied.setdefault(module.weight, []).append((name, module))
        names = [name for same in tied.values() for name, _ in same]
        check_untied(model, chosen, allowed=[f"{name}.weight" for name in names])
        layers: dict[str, LowRankLayer] = {}
        embeddings = {}
        for name, module in chosen.items():
            layers[name] = layer = make(module)
            replace_module(model, name, layer)
            for other, embedding in tied.get(module.weight, ()):
                embeddings[other] = name
                replace_module(model, other, HeadsEmbedding(embedding, layer))
        return layers, embeddings
