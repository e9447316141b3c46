"""All methods by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from subspan.optim.groups import unknown_setting
from subspan.optim.methods.adamw import AdamW
from subspan.optim.methods.apollo import APOLLO, APOLLOMini
from subspan.optim.methods.fira import Fira
from subspan.optim.methods.frugal import FRUGAL
from subspan.optim.methods.galore import GaLore
from subspan.optim.methods.galore_8bit import GaLore8bit
from subspan.optim.methods.golore import GoLore
from subspan.optim.methods.q_apollo import QAPOLLO, QAPOLLOMini
from subspan.optim.methods.q_galore import QGaLore
from subspan.optim.methods.scale import SCALE
from subspan.optim.optimizer import LowRankOptimizer, Params
from subspan.optim.sharding import unshardable


@dataclass(frozen=True)
class MethodInfo:
    """One method.

    Args:
        name: registry name.
        optimizer: its class.
        title: the paper's spelling.
        arxiv: number of the paper.
        summary: one line.
        size: group key that says how much is projected; None for a dense method.
        default_size: the paper's value of it for a model of usual size; None: about a quarter of the hidden size.
        int8_group: elements that share a step, where the paper holds weights in int8; None: weights stay in float.
    """

    name: str
    optimizer: type[LowRankOptimizer]
    title: str
    arxiv: str
    summary: str
    size: Literal["rank", "density"] | None = "rank"
    default_size: float | None = None
    int8_group: int | None = None

    @property
    def shards(self) -> bool:
        """Whether it trains what `fully_shard` has divided, with its default settings."""
        return self.unshardable is None

    @property
    def unshardable(self) -> str | None:
        """Why it does not; None where it does.

        >>> method_info("galore").shards, method_info("galore_8bit").unshardable
        (True, "moments='8bit' has blocks that do not keep to the pieces")
        """
        if self.int8_group is not None:
            return "weights in int8 cannot be divided"
        model = nn.Sequential(nn.Embedding(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        optimizer = self.optimizer(model)  # type: ignore[call-arg]
        reasons = (unshardable(optimizer.method, group) for group in optimizer.param_groups)
        return next((reason for reason in reasons if reason is not None), None)


_METHODS = {
    info.name: info
    for info in (
        MethodInfo("adamw", AdamW, "AdamW", "1711.05101", "full-rank baseline, through the same executor", size=None),
        MethodInfo("galore", GaLore, "GaLore", "2403.03507", "Adam in a low-rank subspace of the gradient"),
        MethodInfo("galore_8bit", GaLore8bit, "8-bit GaLore", "2403.03507", "GaLore with moments of 8 bits"),
        MethodInfo(
            "q_galore", QGaLore, "Q-GaLore", "2407.08296", "8-bit GaLore, int8 weights, 4-bit bases, lazy refreshes",
            int8_group=256,
        ),
        MethodInfo("golore", GoLore, "GoLore", "2410.11289", "GaLore with random subspaces, late or throughout"),
        MethodInfo("fira", Fira, "Fira", "2410.01623", "GaLore plus the scaled rest of the gradient"),
        MethodInfo("apollo", APOLLO, "APOLLO", "2412.05270", "the gradient scaled by channel from a random sketch"),
        MethodInfo(
            "apollo_mini", APOLLOMini, "APOLLO-Mini", "2412.05270", "the gradient scaled as a whole, at rank 1",
            default_size=1,
        ),
        MethodInfo("q_apollo", QAPOLLO, "Q-APOLLO", "2412.05270", "APOLLO with int8 weights", int8_group=128),
        MethodInfo(
            "q_apollo_mini", QAPOLLOMini, "Q-APOLLO-Mini", "2412.05270", "APOLLO-Mini with int8 weights",
            default_size=1, int8_group=128,
        ),
        MethodInfo(
            "frugal", FRUGAL, "FRUGAL", "2411.07837", "Adam in a part of the space, sign descent in the rest",
            size="density", default_size=0.25,
        ),
        MethodInfo(
            "scale", SCALE, "SCALE", "2506.16659", "gradients normalised by output, no state but the head's momentum",
            size=None,
        ),
    )
}  # fmt: skip


def list_methods() -> list[str]:
    """Names of all methods.

    >>> "galore" in list_methods()
    True
    """
    return list(_METHODS)


def method_info(name: str) -> MethodInfo:
    """What the registry knows of a method.

    Raises:
        ValueError: no method has this name; the message lists the names.
    """
    if name not in _METHODS:
        raise ValueError(unknown_setting(name, _METHODS, "method"))
    return _METHODS[name]


def create_optimizer(name: str, params: Params, **settings: Any) -> LowRankOptimizer:
    """The optimizer of a method.

    Args:
        name: one of `list_methods`.
        params: a model, groups from `param_groups`, or what its class takes.
        **settings: settings of its class.

    Raises:
        ValueError: an unknown name.
        TypeError: a setting that the class does not have.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 32))
        >>> create_optimizer("galore", model, rank=8, lr=1e-2).method.name
        'galore'
    """
    return method_info(name).optimizer(params, **settings)  # type: ignore[arg-type]
