"""How many parameters of a model are trained."""

from __future__ import annotations

from torch import nn

from subspan.nn.lowrank.lte import ParallelHeadsLinear
from subspan.nn.lowrank.replicas import Replicas

__all__ = ["count_trained"]


def count_trained(model: nn.Module) -> int:
    """Count the elements of all parameters that are trained; copies of one, which parallel heads keep, count once.

    Example:
        >>> from subspan.nn.lowrank import LTE
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32))
        >>> weights = LTE(heads=3, rank=2).apply(model)  # 3·2·(16 + 32) of heads, 32 of a bias, 64 of a norm
        >>> count_trained(model)
        384
    """
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    surplus = 0
    for module in model.modules():
        if isinstance(module, Replicas):
            # A set, since copies of an embedding and of the output layer that is tied to it share theirs.
            trained -= {parameter for copy in list(module.copies.values())[1:] for parameter in copy.parameters()}
        elif isinstance(module, ParallelHeadsLinear) and module.bias in trained and module.bias.ndim == 2:
            surplus += module.bias[1:].numel()
    return sum(parameter.numel() for parameter in trained) - surplus
