"""Linear layers whose weight is made of low-rank parts: what all of them have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from subspan.nn.quantised import is_conv1d
from subspan.optim.apply import read, store
from subspan.optim.shards import is_sharded
from subspan.optim.tiling import row_tiles
from subspan.state import random_bits_of_runs

__all__ = ["LowRankLayer", "add_product_", "low_rank_layers", "merge_layers"]


class LowRankLayer(nn.Module, ABC):
    """y = x·W_effᵀ + b with an effective weight W_eff (out, in) that is made of a frozen matrix, factors, or both.

    Made from a linear layer, in whose place it stands. ``weight`` is the layer's own parameter in its own orientation,
    so that names and ties stay as they are, or None; trained are `factors`.

    Args:
        layer: ``nn.Linear`` or Hugging Face's ``Conv1D``.
    """

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if not (isinstance(layer, nn.Linear) or is_conv1d(layer)):
            raise TypeError(f"{type(layer).__name__} is no linear layer; give nn.Linear or Conv1D")
        self.dense_class = type(layer)
        #: Whether the layer's own weight is (in, out), as that of ``Conv1D``.
        self.transposed = is_conv1d(layer)
        weight: Any = layer.weight
        rows, columns = weight.shape
        self.out_features, self.in_features = (columns, rows) if self.transposed else (rows, columns)
        self.register_parameter("bias", getattr(layer, "bias", None))  # type: ignore[arg-type]
        # In evaluation nn.TransformerEncoderLayer multiplies by the frozen weights of its layers itself, past the
        # factors; layers that have a hook it calls.
        self.register_forward_pre_hook(_called)

    def check_rank(self, rank: int) -> None:
        """Refuse a rank that factors of this matrix cannot have.

        Raises:
            ValueError: naming the ranks that are possible.
        """
        most = min(self.in_features, self.out_features)
        if not 1 <= rank <= most:
            raise ValueError(
                f"rank={rank} is not possible for a {self.out_features}×{self.in_features} matrix: give 1 to {most}"
            )

    @abstractmethod
    def factors(self) -> dict[str, nn.Parameter]:
        """What is trained in place of the matrix, by its name in this layer."""

    @abstractmethod
    def effective_weight(self) -> Tensor:
        """W_eff (out, in), a new tensor in at least float32."""

    @abstractmethod
    def reset_(self, generator: torch.Generator) -> None:
        """Draw the factors anew; the function of the layer does not change where it has a frozen matrix."""

    def dense(self) -> nn.Module:
        """An ordinary layer of the class that this one was made from, with the effective weight in its own dtype."""
        W = self.effective_weight()
        parameter = next(iter(self.factors().values()))
        size = (self.out_features, self.in_features) if self.transposed else (self.in_features, self.out_features)
        with torch.device("meta"):
            layer: Any = self.dense_class(*size)
        layer.weight = nn.Parameter((W.mT if self.transposed else W).to(parameter.dtype).contiguous())
        layer.bias = self.bias
        return layer  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _called(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing."""


def low_rank_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLayer]]:
    """The low-rank layers of a model by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LowRankLayer))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where the module ``name`` of a model is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def merge_layers(model: nn.Module) -> list[str]:
    """Put an ordinary layer with the effective weight in the place of every low-rank layer.

    Returns:
        Names of the layers.

    Raises:
        ValueError: a layer that `fully_shard` has divided; nothing is changed.
    """
    names, layers = [], list(low_rank_layers(model))
    for name, layer in layers:
        if any(is_sharded(parameter) for parameter in layer.parameters()):
            raise ValueError(
                f"{name or 'the layer'} is divided over processes and cannot be merged there: save a checkpoint, "
                "load it into a model that is whole, and merge that (subspan merge does so for a run)"
            )
    for name, layer in layers:
        with torch.no_grad():
            replace_module(model, name, layer.dense())
        names.append(name)
    return names


@torch.no_grad()
def add_product_(W: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1.0, key: Tensor | None = None) -> None:
    """W <- W + alpha·left·right in place: summed up in at least float32 and rounded once.

    Args:
        W: (m, n), in any dtype, or an `Int8Weight`.
        left, right: (m, k) and (k, n).
        alpha: factor.
        key: int64 0-D; rounds bfloat16 and int8 weights stochastically with it, where None rounds to nearest. A small
            product that is rounded to nearest is lost.

    Example:
        >>> W = torch.ones(2, 2, dtype=torch.bfloat16)
        >>> add_product_(W, torch.full((2, 1), 0.5), torch.ones(1, 2))
        >>> W[0, 0]
        tensor(1.5000, dtype=torch.bfloat16)
    """
    dtype = torch.promote_types(W.dtype, torch.float32)
    left, right = left.to(dtype), right.to(dtype)
    if W.dtype == dtype and type(W) in (Tensor, nn.Parameter):
        W.addmm_(left, right, alpha=alpha)
        return
    for tile in row_tiles(W, wide=key is not None):
        w = read(W, tile, dtype).addmm(tile.of(left), right, alpha=alpha)
        bits = None
        if key is not None and W.dtype != torch.float16:
            first = (tile.start + torch.arange(tile.length, device=w.device))[:, None] * W.shape[1]
            bits = random_bits_of_runs(key.to(w.device), first, W.shape[1], aligned=W.shape[1] % 4 == 0)
        store(W, tile, w, bits)
