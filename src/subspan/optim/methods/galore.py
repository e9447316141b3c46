"""GaLore."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from subspan.optim.inner import Adam
from subspan.optim.lift import ProjectBack
from subspan.optim.method import Inner, Method
from subspan.optim.optimizer import LowRankOptimizer, Params
from subspan.optim.refresh import EveryGap, is_late
from subspan.optim.subspace import gradient_subspace, tolerance_keys
from subspan.optim.transport import Keep


class GaLore(LowRankOptimizer):
    """GaLore: Adam on R = QᵀG, where Q spans the leading singular directions of a recent gradient.

    W <- (1 − lr·wd)·W − lr·scale·Q·Adam(QᵀG); Q is chosen anew every ``update_proj_gap`` steps, the moments are kept.

    Args:
        params: a model (with ``rank=...``), groups from `param_groups`, or GaLore's own group dicts.
        lr: learning rate.
        betas, eps, weight_decay: of Adam.
        update_proj_gap: steps between refreshes.
        scale: factor on the projected step (α in the paper).
        proj_type: side that is projected: ``"std"`` (the short one), ``"reverse_std"``, ``"left"``, ``"right"``.
        svd: ``"randomized"``: a fresh Gaussian sketch, rotated to singular directions; ``"exact"``: the paper's SVD.
        rank_policy: ``"fixed"``: always ``rank`` directions; ``"tolerance"``: at each refresh as many as leave at most
            ``rtol``·‖G‖_F outside, rounded up to a multiple of 8, and at most ``rank``. The state is re-allocated when
            the rank changes.
        rtol: tolerance of the rank policy, between 0 and 1; 0.2, its default, keeps 96 % of the energy ‖G‖²_F.
        stagger: spread refreshes over the period; the paper refreshes all matrices at once (False).
        refresh: ``"now"``: a new basis projects the gradient that it was found from; ``"late"``: it serves from the
            next step on, as it has to in `fuse_into_backward`.
        warm_start: share, at most 0.75, of the columns of the test matrix of a late refresh that are leading right
            directions of the first moment instead of random ones; 0: none.
        inner: the optimizer inside; Adam by default.
        eps_placement: see `Adam`; galore-torch adds ε ``"before"`` bias correction.
        decay: ``"before"`` the update, or ``"after"`` it as galore-torch does.
        moments: how the moments are held: ``"float32"``, ``"bfloat16"``, ``"8bit"`` or ``"4bit"``. Dense groups
            (embeddings, heads) keep float32 unless their dict says otherwise, or ``other_moments`` of `param_groups`
            does; vectors (norms, biases) always do.
        basis_storage: how the basis is held: ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"int4"``. What it is
            rounded to projects and projects back.
        min_quantized: tensors of state with fewer elements keep float32.
        rounding: of bfloat16 weights, once a step: to ``"nearest"``, or ``"stochastic"``, which keeps small steps in
            the mean.
        seed, nonfinite: see `LowRankOptimizer`.
        **grouping: with a model: settings of `param_groups` such as ``rank`` and ``target_modules``.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = GaLore(model, lr=1e-2, rank=4)
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> optimizer.step()

    Source: arXiv 2403.03507.
    """

    _name = "galore"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        svd: Literal["randomized", "exact"] = "randomized",
        rank_policy: Literal["fixed", "tolerance"] = "fixed",
        rtol: float | None = None,
        stagger: bool = True,
        refresh: Literal["now", "late"] = "now",
        warm_start: float = 0.0,
        inner: Inner | None = None,
        eps_placement: Literal["after", "before"] = "after",
        decay: Literal["before", "after"] = "before",
        moments: str = "float32",
        basis_storage: str = "float32",
        min_quantized: int = 4096,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        seed: int = 0,
        nonfinite: Literal["skip", "raise"] = "skip",
        **grouping: Any,
    ) -> None:
        method = Method(
            self._name,
            subspace=gradient_subspace(svd, rank_policy),
            refresh=EveryGap(stagger, late=is_late(refresh)),
            transport=Keep(),
            inner=inner or Adam(eps_placement),
            lift=ProjectBack(),
            decay=decay,
        )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": None,
            **tolerance_keys(rank_policy, rtol),
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "warm_start": warm_start,
            "moments": moments,
            "basis_storage": basis_storage,
            "min_quantized": min_quantized,
            "rounding": rounding,
        }
        super().__init__(params, method, defaults, seed=seed, nonfinite=nonfinite, grouping=grouping)
