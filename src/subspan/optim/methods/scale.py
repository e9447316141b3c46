"""SCALE: gradients normalised output by output, and momentum for the head alone."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from subspan.optim.inner import Normalised
from subspan.optim.method import Method
from subspan.optim.optimizer import LowRankOptimizer, Params
from subspan.optim.output_groups import output_groups


class SCALE(LowRankOptimizer):
    """SCALE: each output of each matrix makes a step of one size; the head keeps a momentum, nothing else has state.

    D_i = M_i/rms(M_i) for each output i, M = G, or M <- momentum·M + (1 − momentum)·G of the head. Vectors (norms,
    biases) take Adam.

    Only a model tells where the outputs of its matrices are and which of them is the head. Group dicts say it
    themselves: ``outputs="rows"`` for (out, in), ``"columns"`` for (in, out) and embeddings, and their ``momentum``.
    A group without ``outputs`` takes Adam.

    Args:
        params: a model, or group dicts with ``outputs``.
        lr: learning rate.
        betas: of Adam.
        eps: of Adam, and a floor below the rms of an output.
        weight_decay: decoupled weight decay.
        momentum: of the head of a model, and of groups that have none of their own; 0 keeps no state.
        norm: ``"rms"``: divide by the root mean square, as the official code does and as published learning rates
            mean it. ``"l2"``: by the norm, as the paper writes it with a learning rate for each layer.
        experts: where stacks of experts have their outputs if their model does not say it: ``"rows"``: (experts, out,
            in), ``"columns"``: (experts, in, out). Only with a model.
        moments, min_quantized, rounding: as for `GaLore`; ``moments`` is how the momentum is held.
        seed, nonfinite: see `LowRankOptimizer`.
        **grouping: with a model: settings of `param_groups` such as ``lr_scale`` and ``other_lr_scale``.

    Raises:
        ValueError: no group says where its outputs are; a stack of experts or a convolution that does not tell.

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 100))
        >>> optimizer = SCALE(model)
        >>> optimizer.planned_state_bytes()["exp_avg"]  # the head's momentum, and the first moments of the biases
        6992

    Source: arXiv 2506.16659.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.9,
        norm: Literal["rms", "l2"] = "rms",
        experts: Literal["rows", "columns"] | None = None,
        moments: str = "float32",
        min_quantized: int = 4096,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        seed: int = 0,
        nonfinite: Literal["skip", "raise"] = "skip",
        **grouping: Any,
    ) -> None:
        if experts not in (None, "rows", "columns"):
            raise ValueError(f"experts={experts!r}: choose 'rows', 'columns', or None")
        if isinstance(params, nn.Module):
            params, grouping = output_groups(params, experts=experts, **grouping), {}
        elif experts is not None:
            raise TypeError("SCALE takes experts only together with a model; set 'outputs' in the group of the experts")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "outputs": None,
            "momentum": momentum,
            "moments": moments,
            "min_quantized": min_quantized,
            "rounding": rounding,
        }
        method = Method("scale", Normalised(norm))
        super().__init__(params, method, defaults, seed=seed, nonfinite=nonfinite, grouping=grouping)
        if not any(group["outputs"] is not None for group in self.param_groups):
            raise ValueError(
                "scale: no parameter group says where its outputs are, so nothing would be normalised; pass the model "
                "itself, or set 'outputs' in a group dict: 'rows' for (out, in), 'columns' for (in, out) and embeddings"
            )
