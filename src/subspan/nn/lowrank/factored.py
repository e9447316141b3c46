"""Linear layers whose weight is a product of two factors, trained from their singular directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from subspan.linalg import canonical_signs, exact_basis, randomized_svd
from subspan.nn.lowrank.layer import LowRankLayer
from subspan.nn.lowrank.limits import BETWEEN, Limit, at_least, or_none
from subspan.nn.lowrank.moments import carry_moments
from subspan.nn.lowrank.select import check_untied
from subspan.nn.lowrank.state_transform import ResetState, transform_state
from subspan.nn.lowrank.weights import LowRankWeights, WeightRecipe
from subspan.optim.shards import is_sharded, local

__all__ = ["Factored", "FactoredLinear", "FactoredWeights"]

# Shorter sides up to which the exact SVD costs little.
_SMALL = 512
#: Singular values below this share of the largest are rounding; their directions keep a right factor of this size.
_FLOOR = 1e-6


class FactoredLinear(LowRankLayer):
    """y = (x·Aᵀ)·Bᵀ + b: a weight W = BA that is never formed, neither here nor in backward.

    Args:
        layer: the linear layer whose place it takes. Its matrix is not kept, and not read but by `spectral_`.
        rank: r, from 1 to min(in, out).

    Attributes:
        factor_A: A (r, in).
        factor_B: B (out, r).

    Raises:
        ValueError: a rank that is not possible.

    Example:
        >>> dense = nn.Linear(16, 32)
        >>> layer = FactoredLinear(dense, rank=4)
        >>> layer.spectral_(dense, torch.Generator().manual_seed(0))
        >>> layer(torch.randn(2, 16)).shape
        torch.Size([2, 32])
    """

    def __init__(self, layer: nn.Module, *, rank: int) -> None:
        super().__init__(layer)
        self.check_rank(rank)
        self.rank = rank
        self.register_parameter("weight", None)  # which T5 asks for its dtype
        weight: Any = layer.weight
        like: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.factor_A = nn.Parameter(torch.zeros(rank, self.in_features, **like))
        self.factor_B = nn.Parameter(torch.zeros(self.out_features, rank, **like))

    def factors(self) -> dict[str, nn.Parameter]:
        return {"factor_A": self.factor_A, "factor_B": self.factor_B}

    @torch.no_grad()
    def reset_(self, generator: torch.Generator) -> None:
        """A ~ U(±1/√in) and B ~ U(±1/√r), as those of two ``nn.Linear`` after each other; the function changes."""
        for factor in (self.factor_A, self.factor_B):
            if not factor.is_meta:
                drawn = torch.rand(factor.shape, generator=generator).mul_(2).sub_(1)
                factor.copy_(drawn / factor.shape[1] ** 0.5)

    @torch.no_grad()
    def spectral_(self, layer: nn.Module, generator: torch.Generator) -> None:
        """B = U√Σ and A = √Σ·Vᵀ of the r leading singular triplets of a layer's matrix, the best product of rank r.

        Large matrices and ranks of at most half of the shorter side take a randomised SVD, others the exact one. A
        matrix of zeros has no directions: A is drawn, and B = 0.

        Args:
            layer: the dense layer.
            generator: of the sketch, and of A for a matrix of zeros.
        """
        weight: Any = layer.weight
        W = weight.mT if self.transposed else weight
        if W.is_meta:
            return
        if min(W.shape) <= _SMALL or 2 * self.rank > min(W.shape):
            found = exact_basis(W, self.rank)
            assert found.projected is not None and found.singular_values is not None
            U, S = found.basis, found.singular_values
            Vh = found.projected / S.clamp_min(torch.finfo(S.dtype).tiny).unsqueeze(-1)
        else:
            U, S, Vh = randomized_svd(W, self.rank, generator=generator, n_iter=4)
        self.reset_(generator)
        if not S[0] > 0:
            self.factor_B.zero_()
            return
        right = _right_sizes(S)
        self.factor_B.copy_(U * (S / right))
        self.factor_A.copy_(Vh * right.unsqueeze(-1))

    def effective_weight(self) -> Tensor:
        A, B = self.wide_factors()
        return B @ A

    def wide_factors(self) -> tuple[Tensor, Tensor]:
        """A and B in at least float32, detached, and whole where `fully_shard` has divided them."""
        dtype = torch.promote_types(self.factor_A.dtype, torch.float32)
        A, B = self.factor_A.detach(), self.factor_B.detach()
        if is_sharded(A):
            A, B = A.full_tensor(), B.full_tensor()  # type: ignore[attr-defined]
        return A.to(dtype), B.to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The product (x·Aᵀ)·Bᵀ + b."""
        return nn.functional.linear(nn.functional.linear(input, self.factor_A), self.factor_B, self.bias)

    @torch.no_grad()
    def decay_product_(self, strength: float) -> bool:
        """Add the gradient of ½·strength·‖BA‖² to those that are there: BᵀB·A to A's, and B·AAᵀ to B's.

        Returns:
            Whether there was a gradient.
        """
        A, B = self.wide_factors()
        gA, gB = self.factor_A.grad, self.factor_B.grad
        if gA is not None:
            local(gA).add_(_own_rows((B.mT @ B) @ A, gA), alpha=strength)
        if gB is not None:
            local(gB).add_(_own_rows(B @ (A @ A.mT), gB), alpha=strength)
        return gA is not None or gB is not None

    @torch.no_grad()
    def rebalance_(self) -> tuple[Tensor, Tensor] | None:
        """Write W = BA as U√Σ·√ΣVᵀ without forming it, so that BᵀB = AAᵀ = Σ.

        B = Q₁R₁ and Aᵀ = Q₂R₂ by QR, and R₁R₂ᵀ = XΣYᵀ by the SVD of an r×r matrix: B <- Q₁X√Σ, A <- √Σ(Q₂Y)ᵀ. What
        is singular but for rounding keeps a small right factor and no left one, since two zeros would never move. All
        in float64: in float32 the product would move by 1e-6 each time.

        Returns:
            M and M⁻¹ (r, r) with B_new = B·M and A_new = M⁻¹·A; None where BA = 0 and nothing was changed.

        Raises:
            ValueError: a factor is not finite.
        """
        A, B = self.factor_A.double(), self.factor_B.double()
        Q1, R1 = torch.linalg.qr(B)
        Q2, R2 = torch.linalg.qr(A.mT)
        core = R1 @ R2.mT
        if not core.isfinite().all():
            raise ValueError("a factor has a NaN or an infinity: the run has diverged; lower the learning rate")
        X, S, Yh = torch.linalg.svd(core)
        signs = canonical_signs(X)
        X, Yh = X * signs, Yh * signs.mT
        if not S[0] > 0:
            return None
        right = _right_sizes(S)
        self.factor_B.copy_(Q1 @ (X * (S / right)))
        self.factor_A.copy_((Q2 @ (Yh.mT * right)).mT)
        M = (R2.mT @ Yh.mT) / right
        return M, torch.linalg.pinv(M)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


def _own_rows(X: Tensor, like: Tensor) -> Tensor:
    """The rows of a whole matrix that this process has of one that is divided."""
    if not is_sharded(like):
        return X
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return local(distribute_tensor(X, mesh, placements, src_data_rank=None))  # which sends nothing


def _right_sizes(S: Tensor) -> Tensor:
    return S.clamp_min(_FLOOR * float(S[0])).sqrt()


class FactoredWeights(LowRankWeights):
    """Factored layers: the decay of their products before a step, and balanced factors from time to time.

    Args:
        model, layers, seed: see `LowRankWeights`.
        recipe: the settings.
    """

    layers: dict[str, FactoredLinear]  # type: ignore[assignment]

    def __init__(self, model: nn.Module, layers: dict[str, FactoredLinear], recipe: Factored, seed: int = 0) -> None:
        super().__init__(model, dict(layers), seed)
        self.recipe = recipe

    def before_step(self, step: int) -> None:
        """Add the gradient of the products' decay."""
        strength = self.recipe.product_decay
        if strength and not any([layer.decay_product_(strength) for layer in self.layers.values()]):
            raise RuntimeError(
                f"product_decay={strength:g} is added to gradients, but no factor has one: call before_step between "
                "backward and step, and with an optimizer that is not fused into backward"
            )

    def end_step(self, step: int, optimizer: torch.optim.Optimizer) -> list[str]:
        """Balance factors and carry their moments, or begin moments anew, where a period ends."""
        super().end_step(step, optimizer)
        balance, reset = (
            gap > 0 and (step + 1) % gap == 0 for gap in (self.recipe.rebalance_gap, self.recipe.momentum_reset_gap)
        )
        done = []
        if balance:
            for name, layer in self.layers.items():
                self._rebalance(name, layer, optimizer)
            done.append(f"factors of {len(self.layers)} layers balanced")
        if reset or (balance and self.recipe.moments == "reset"):
            for name, factor in self.factors().items():
                transform_state(optimizer, factor, ResetState(), self.generator(name, step))
            done.append("moments of the factors reset")
        return done

    def _rebalance(self, name: str, layer: FactoredLinear, optimizer: torch.optim.Optimizer) -> None:
        try:
            changed = layer.rebalance_()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if changed is None or self.recipe.moments == "reset":
            return
        M, inverse = changed
        # Gradients go the other way: those of B by M⁻ᵀ, those of A by Mᵀ.
        carry_moments(optimizer, f"{name}.factor_B", layer.factor_B, right=inverse.mT)
        carry_moments(optimizer, f"{name}.factor_A", layer.factor_A, left=M.mT)


@dataclass(frozen=True)
class Factored(WeightRecipe):
    """Factored weights: W = BA of rank r in place of a matrix, from its singular directions, and nothing else.

    B (out, r) and A (r, in) have r(out + in) numbers, which has to be less than out·in. A low-rank FFN is
    ``target_modules="mlp"``; the plain low-rank model that papers compare with is ``init="kaiming", rebalance_gap=0``.

    Args:
        rank: r of all layers; None: from ``ratio``.
        ratio: share of a matrix's numbers that its factors have; r is rounded down to a multiple of 8.
        init: ``spectral``: B = U√Σ, A = √ΣVᵀ of the matrix that the layer had; ``kaiming``: drawn as two ``nn.Linear``.
        product_decay: λ of ½λ‖BA‖², whose gradient is added to that of the loss. The optimizer's own decay pulls at
            the factors: give it 0 for them.
        rebalance_gap: steps from one balancing of the factors (BᵀB = AAᵀ, the product stays) to the next; 0: never.
        moments: what becomes of the optimizer's moments then: ``rotate`` carries them along, ``reset`` begins anew.
        momentum_reset_gap: steps after which moments begin anew anyway; 0: never.

    Raises:
        ValueError: a value that is not allowed.

    Example:
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
        >>> weights = Factored(rank=8).apply(model)
        >>> model[0]
        FactoredLinear(in_features=32, out_features=64, rank=8)

    Source: arXiv 2105.01029 (spectral initialisation, decay of the product), 2406.16450 (FFNs), 2505.22922 (balancing
    and resets).
    """

    name: ClassVar[str] = "factored"
    title: ClassVar[str] = "Factored weights"
    arxiv: ClassVar[str] = "2105.01029"
    summary: ClassVar[str] = "a product of two factors in place of each matrix"
    limits: ClassVar[Mapping[str, Limit]] = {
        "rank": or_none(at_least(1), "for that of ratio"),
        "ratio": BETWEEN,
        "init": Limit(("spectral", "kaiming").__contains__, "choose one of spectral, kaiming"),
        "product_decay": at_least(0.0),
        "rebalance_gap": at_least(0),
        "moments": Limit(("rotate", "reset").__contains__, "choose one of rotate, reset"),
        "momentum_reset_gap": at_least(0),
    }

    rank: int | None = None
    ratio: float = 0.32
    init: Literal["spectral", "kaiming"] = "spectral"
    product_decay: float = 0.0
    rebalance_gap: int = 200
    moments: Literal["rotate", "reset"] = "rotate"
    momentum_reset_gap: int = 0

    @property
    def unshardable(self) -> str | None:
        """Whatever changes factors or their moments between steps."""
        gaps = {name: getattr(self, name) for name in ("rebalance_gap", "momentum_reset_gap")}
        given = [f"{name}={gap}" for name, gap in gaps.items() if gap]
        return f"{', '.join(given)}: that takes whole factors and moments; give 0" if given else None

    def build(self, model: nn.Module, chosen: dict[str, nn.Module], *, steps: int | None, seed: int) -> FactoredWeights:
        """Replace them by `FactoredLinear`."""
        ranks = {name: self._rank(name, module) for name, module in chosen.items()}
        check_untied(model, chosen)
        weights = FactoredWeights(model, {}, self, seed)
        for name, rank in ranks.items():
            module = chosen.pop(name)  # one dense matrix after the other is let go
            layer = FactoredLinear(module, rank=rank)
            weights.install(name, layer)
            if self.init == "spectral":
                layer.spectral_(module, weights.generator(name, -1))
        return weights

    def _rank(self, name: str, module: nn.Module) -> int:
        weight: Any = module.weight
        m, n = weight.shape
        largest = (m * n - 1) // (m + n)
        rank = self.rank
        if rank is None:
            rank = int(self.ratio * m * n / (m + n))
            rank = max(1, rank - rank % 8 if rank > 8 else rank)
        if rank > largest:
            least = f"the largest rank that does is {largest}" if largest else "no rank does: name it in exclude"
            raise ValueError(
                f"rank={rank} does not make {name or 'the layer'} smaller: its factors would have {rank * (m + n):,} "
                f"numbers in place of {m * n:,}; {least}"
            )
        return rank
