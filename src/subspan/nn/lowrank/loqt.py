"""LoQT: frozen weights of 4 bits, and trained factors in subspaces of their gradients that are chosen anew."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from subspan.nn.lowrank.limits import POSITIVE, Limit, at_least, one_of
from subspan.nn.lowrank.loqt_layer import NF4, LoQTLinear
from subspan.nn.lowrank.restarts import GrowingGap, Restarts
from subspan.nn.lowrank.select import check_own, check_rank
from subspan.nn.lowrank.state_transform import Keep, ResetState, edit_state, transform_state
from subspan.nn.lowrank.weights import WeightRecipe
from subspan.optim.late import key_of
from subspan.optim.method import State
from subspan.state import Codec, DoubleBlockwise

__all__ = ["LoQT"]


class _LoQTRestarts(Restarts):
    """The refreshes of LoQT: those of its gaps, and one after the first step, whose gradient is the first one.

    The sketch of a step serves from the next one on, so no batch is for a refresh alone.
    """

    def __init__(self, *args: Any, moments: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.moments = moments

    def due(self, step: int) -> bool:
        return (step == 0 or self.when.due(step + 1)) and step + 1 != self.steps

    def _loqt_layers(self) -> Iterator[tuple[str, LoQTLinear]]:
        for name, layer in self.layers.items():
            assert isinstance(layer, LoQTLinear)
            yield name, layer

    def begin_step(self, step: int) -> None:
        due = self.due(step)
        for name, layer in self._loqt_layers():
            layer.arm(key_of(self.generator(name, step)) if due else None)

    @torch.no_grad()
    def end_step(self, step: int, optimizer: torch.optim.Optimizer) -> list[str]:
        """Refresh all layers where it is due.

        Raises:
            ValueError: a factor that is not in the optimizer, or whose moments do not have its shape.
            RuntimeError: a factor that `fully_shard` has divided.
        """
        if not self.due(step):
            return []
        self.transform(step, optimizer, self.state)  # which keeps all, but refuses what cannot be transformed
        if self.moments == "rotate":
            for _, layer in self._loqt_layers():
                edit_state(optimizer, layer.factor, functools.partial(_check_rotatable, layer.rank))
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        errors, kept = [], []
        for name, layer in self._loqt_layers():  # in the same order in all processes
            Y = layer.take_sketch()
            if together:
                dist.all_reduce(Y)
            norm = float(torch.linalg.vector_norm(Y))
            if not (norm and math.isfinite(norm)):
                kept.append(name)
                continue
            turn, error = layer.refresh_(Y, self.generator(f"{name}.surplus", step))
            errors.append(error)
            if self.moments == "rotate":
                edit_state(optimizer, layer.factor, functools.partial(_rotate, turn))
            elif self.moments == "reset":
                transform_state(optimizer, layer.factor, ResetState(), self.generator(name, step))
        worst = f", weights rounded by at most {100 * max(errors):.1f} %" if errors else ""
        words = [f"refresh: {len(errors)} layers have a new subspace{worst}"]
        if kept:
            words.append(f"refresh: {', '.join(kept)} kept theirs, for want of a finite gradient that is not zero")
        return words


def _rotate(turn: Tensor, state: State) -> None:
    """M <- P_newᵀP_old·M; second moments stay, and where they are zero M is not let in, to be divided by ε."""
    M, V = state["exp_avg"], state["exp_avg_sq"]
    M.copy_(turn.to(M.dtype) @ M)
    M *= V > 0


def _check_rotatable(rank: int, state: State) -> None:
    if not all(key in state and state[key].shape[0] == rank for key in ("exp_avg", "exp_avg_sq")):
        raise ValueError(
            "moments='rotate' turns exp_avg in the shape of the factor, and the state of this optimizer consists of "
            f"{', '.join(state)}; use AdamW, or moments='reset'"
        )


@dataclass(frozen=True)
class LoQT(WeightRecipe):
    """LoQT: y = x(W + s·PT)ᵀ, with W and P frozen in 4 bits, and T trained.

    P has the leading singular vectors of the gradient of W on its shorter side. After the first step, and then after
    gaps of first_gap + ⌊growthᵏ⌋ steps, PT is merged into W, P is found anew from the gradient of that step, W is
    rounded again, and T begins with what makes up for the rounding.

    Args:
        rank: r.
        alpha: s; it is not divided by r.
        first_gap: T₀ in steps.
        growth: ψ.
        compensation: N_c, see `LoQTLinear`.
        weight_bits: 4, or None for weights as they are.
        projection_bits: 4, or None.
        double_quantization: whether the scales of W have 8 bits.
        svd: ``randomized``: P from a sketch of the gradient, which is never formed; ``exact``: from the gradients
            themselves, which are kept, of all layers, in the steps that end with a refresh.
        moments: what becomes of the moments of T at a refresh. ``rotate``: the first one is turned to the new
            subspace; ``reset``: they begin anew; ``keep``: they stay, as in the official code, although they belong to
            the old one.

    Raises:
        ValueError: a value that is not allowed.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        >>> weights = LoQT(rank=8).apply(model)
        >>> [(name, tuple(factor.shape)) for name, factor in weights.factors().items()]
        [('0.lora_B', (8, 128)), ('2.lora_A', (8, 128))]
        >>> model[0].weight_q.nbytes, model[0].weight_q_scale.nbytes  # 64·128 weights
        (4096, 512)

    Source: arXiv 2405.16528.
    """

    name: ClassVar[str] = "loqt"
    title: ClassVar[str] = "LoQT: Low-Rank Adapters for Quantized Pretraining"
    arxiv: ClassVar[str] = "2405.16528"
    summary: ClassVar[str] = "a trained factor in gradient subspaces beside frozen weights of 4 bits"
    limits: ClassVar[Mapping[str, Limit]] = {
        "rank": at_least(1),
        "alpha": POSITIVE,
        "first_gap": at_least(1),
        "growth": at_least(1.0),
        "compensation": at_least(0),
        "weight_bits": one_of(4, None),
        "projection_bits": one_of(4, None),
        "svd": one_of("randomized", "exact"),
        "moments": one_of("rotate", "reset", "keep"),
    }

    rank: int = 128
    alpha: float = 0.5
    first_gap: int = 100
    growth: float = 1.2
    compensation: int = 5
    weight_bits: Literal[4] | None = 4
    projection_bits: Literal[4] | None = 4
    double_quantization: bool = False
    svd: Literal["randomized", "exact"] = "randomized"
    moments: Literal["rotate", "reset", "keep"] = "rotate"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.double_quantization and self.weight_bits is None:
            raise ValueError(
                "double_quantization=True needs weights that are quantised; leave it out, or weight_bits=4"
            )

    def build(self, model: nn.Module, chosen: dict[str, nn.Module], *, steps: int | None, seed: int) -> Restarts:
        """Replace them by `LoQTLinear`."""
        check_own(model, chosen)
        check_rank(self.rank, chosen)
        codec: Codec = DoubleBlockwise(NF4) if self.double_quantization else NF4
        weights = _LoQTRestarts(
            model,
            {},
            seed,
            when=GrowingGap(self.first_gap, self.growth),
            state=Keep(),
            moments=self.moments,
            steps=steps,
        )
        for name in list(chosen):
            module = chosen.pop(name)  # one dense matrix after the other is let go
            layer = LoQTLinear(
                module,
                rank=self.rank,
                scale=self.alpha,
                weight=None if self.weight_bits is None else codec,
                projection=None if self.projection_bits is None else NF4,
                exact=self.svd == "exact",
                compensation=self.compensation,
            )
            weights.install(name, layer)
            W: Any = module.weight
            if not W.is_meta:
                layer.hold_(W.detach().mT if layer.transposed else W.detach())
        return weights
