"""Q-APOLLO and Q-APOLLO-Mini."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from subspan.optim.methods.apollo import APOLLO, APOLLOMini
from subspan.optim.optimizer import Params


class QAPOLLO(APOLLO):
    """Q-APOLLO: APOLLO for weights that are held in int8, rounded stochastically.

    Call ``subspan.nn.quantize_weights(model, group_size=128)`` first; weights that are not held in int8 are trained in
    their dtype, those in bfloat16 rounded stochastically too.

    Args:
        params: a model (with ``rank=...``), groups from `param_groups`, or group dicts.
        lr: learning rate.
        rounding: ``"nearest"`` for a comparison: it loses the steps that are smaller than half a code.
        **settings: all other settings of `APOLLO`.

    Example:
        >>> from torch import nn
        >>> from subspan.nn import quantize_weights
        >>> model = nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 128))
        >>> quantize_weights(model, group_size=128)
        ['0.weight', '2.weight']
        >>> QAPOLLO(model, rank=4).param_groups[0]["rounding"]
        'stochastic'

    Source: arXiv 2412.05270.
    """

    _name = "q_apollo"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        *,
        rounding: Literal["nearest", "stochastic"] = "stochastic",
        **settings: Any,
    ) -> None:
        super().__init__(params, lr, rounding=rounding, **settings)


class QAPOLLOMini(APOLLOMini):
    """Q-APOLLO-Mini: APOLLO-Mini for weights that are held in int8, the least memory of all recipes that keep moments.

    Args:
        params: a model, groups from ``param_groups(model, rank=1)``, or group dicts.
        lr: learning rate.
        rounding: as for `QAPOLLO`.
        **settings: all other settings of `APOLLOMini`; ``other_moments="8bit"`` with a model shrinks what is left.

    Example:
        >>> from torch import nn
        >>> QAPOLLOMini(nn.Linear(64, 32)).param_groups[0]["rank"]
        1

    Source: arXiv 2412.05270.
    """

    _name = "q_apollo_mini"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        *,
        rounding: Literal["nearest", "stochastic"] = "stochastic",
        **settings: Any,
    ) -> None:
        super().__init__(params, lr, rounding=rounding, **settings)
