"""PeriodicLoRA: LoRA that is unloaded into the weights stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from subspan.nn.lowrank.layer import add_product_
from subspan.nn.lowrank.limits import BELOW_ONE, Limit
from subspan.nn.lowrank.relora import LORA_LIMITS, ReLoRA, RestartedLinear
from subspan.nn.lowrank.restarts import Restarts, check_rounding
from subspan.nn.lowrank.select import check_own, check_rank
from subspan.nn.lowrank.weights import WeightRecipe

__all__ = ["PeriodicLinear", "PeriodicLoRA"]


class PeriodicLinear(RestartedLinear):
    """A `RestartedLinear` that unloads a running mean of what its factors have learnt.

    M <- μM + (1−μ)·s·BA and W <- W + M. M is held as r terms, r·(in + out) numbers. The terms of μM + (1−μ)·s·BA that
    are left over, its smallest, go into W at once with all that they would have come to later, a factor 1/(1−μ): so W
    takes up the whole of each s·BA in the end, as with an M of full size, and a part of it sooner.

    Args:
        layer, rank, scale, dropout: as for `RestartedLinear`.
        momentum: μ.
    """

    momentum_A: Tensor
    momentum_B: Tensor

    def __init__(self, layer: nn.Module, *, rank: int, scale: float, dropout: float, momentum: float) -> None:
        super().__init__(layer, rank=rank, scale=scale, dropout=dropout)
        self.momentum, device = momentum, self.weight.device
        self.register_buffer("momentum_A", torch.zeros(rank, self.in_features, device=device))
        self.register_buffer("momentum_B", torch.zeros(rank, self.out_features, device=device))

    @torch.no_grad()
    def merge_(self, key: Tensor | None = None) -> None:
        """W <- W + M, rounded once."""
        mu = self.momentum
        left = torch.cat([mu * self.momentum_B, (1 - mu) * self.scale * self.lora_B[0].float()]).mT
        right = torch.cat([self.momentum_A, self.lora_A[0].float()]).mT
        (Q1, R1), (Q2, R2) = torch.linalg.qr(left), torch.linalg.qr(right)
        U, S, Vh = torch.linalg.svd(R1 @ R2.mT)
        U, V, kept = Q1 @ U[:, : len(S)], Q2 @ Vh[: len(S)].mT, self.rank
        add_product_(self.W, U * torch.cat([S[:kept], S[kept:] / (1 - mu)]), V.mT, key=key)
        root = S[:kept].sqrt()
        self.momentum_B.copy_((U[:, :kept] * root).mT)
        self.momentum_A.copy_((V[:, :kept] * root).mT)


@dataclass(frozen=True)
class PeriodicLoRA(WeightRecipe):
    """PeriodicLoRA: LoRA for fine-tuning that is unloaded into the weights every so many steps.

    h(x) = Wx + s·BAx with s = alpha/rank. At the end of a stage M <- μM + (1−μ)·s·BA and W <- W + M, A is drawn anew,
    B = 0, the factors' optimizer state is reset, and the learning rate climbs from 0. With μ = 0 the function of the
    model stays as it is, with μ > 0 the share μ of what a stage has learnt comes in later stages.

    Args:
        rank: r.
        alpha: s = alpha/r.
        restart_every: steps of a stage; None: a quarter of the run.
        momentum: μ.
        rewarm: steps in which the learning rate climbs; None: a fiftieth of a stage, but 10 at least, or half a stage.
        dropout: of the inputs of A.
        rounding: of bfloat16 weights when they take up M: ``nearest`` or ``stochastic``.

    Raises:
        ValueError: a value that is not allowed.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
        >>> weights = PeriodicLoRA(rank=4).apply(model, steps=400)
        >>> weights.when
        Every(period=100, start=0)

    Source: arXiv 2402.16141.
    """

    name: ClassVar[str] = "periodic_lora"
    title: ClassVar[str] = "PeriodicLoRA: Breaking the Low-Rank Bottleneck in LoRA Optimization"
    arxiv: ClassVar[str] = "2402.16141"
    summary: ClassVar[str] = "LoRA unloaded into the weights stage by stage"
    limits: ClassVar[Mapping[str, Limit]] = {**LORA_LIMITS, "momentum": BELOW_ONE}

    rank: int = 16
    alpha: float = 32.0
    restart_every: int | None = None
    momentum: float = 0.0
    rewarm: int | None = None
    dropout: float = 0.0
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rounding(self.rounding)

    def parts(self, steps: int | None = None) -> dict[str, Any]:
        """Arguments of `Restarts`, as `ReLoRA.parts`."""
        return ReLoRA(
            restart_every=self.restart_every, state="reset", rewarm=self.rewarm, rounding=self.rounding
        ).parts(steps)

    def check_run(self, *, processes: int, steps: int, eval_every: int) -> None:
        """Stages are longer than their re-warming."""
        self.parts(steps)

    def build(self, model: nn.Module, chosen: dict[str, nn.Module], *, steps: int | None, seed: int) -> Restarts:
        """Replace them by `RestartedLinear`, with momentum by `PeriodicLinear`."""
        weights = Restarts(model, {}, seed, **self.parts(steps))
        check_own(model, chosen)
        check_rank(self.rank, chosen)
        sizes: dict[str, Any] = {"rank": self.rank, "scale": self.alpha / self.rank, "dropout": self.dropout}
        for name, module in chosen.items():
            if self.momentum:
                weights.install(name, PeriodicLinear(module, **sizes, momentum=self.momentum))
            else:
                weights.install(name, RestartedLinear(module, **sizes))
        return weights
