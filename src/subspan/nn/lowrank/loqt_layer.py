"""The layer of LoQT: a frozen weight of 4 bits, and one trained factor in a subspace of its gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subspan.linalg import exact_basis, random_stiefel
from subspan.nn.lowrank.layer import LowRankLayer
from subspan.nn.projected import ProjectedProduct
from subspan.optim.late import basis_from_sketch, widened
from subspan.optim.slots import Reader, Sum, empty_leaf
from subspan.optim.storage import rounded
from subspan.state import Blockwise, Codec, StateSpec

__all__ = ["NF4", "LoQTLinear"]

#: torchao has a tensor for it. A codec is less: plain tensors, which optimizers, files and plans know already.
NF4 = Blockwise("normal", 4, block=64)


class _WholeReader(Reader):
    """Reads for layers that leave the whole gradient in place of a sketch."""

    def sketch(self, key: Tensor, held: Sequence[Tensor], left: Tensor, right: Tensor) -> Tensor:
        return left.mT @ right


class LoQTLinear(LowRankLayer):
    """y = x·(W + s·ΔW)ᵀ + b with a frozen W of 4 bits, and ΔW = PT (or its transpose) with a frozen P of 4 bits.

    P spans directions of the shorter side of W, of the input where both are equal. Nothing of the size of W is kept
    from one pass to the next but its codes.

    Args:
        layer: the linear layer.
        rank: r.
        scale: s.
        weight: codec of W; None holds it as it is.
        projection: codec of P; None: in the dtype of the factor.
        exact: find subspaces from the whole gradient, in place of a sketch.
        compensation: how often W is quantised anew to find the factor that makes up for the error; 0: the factor is
            zero then.

    Raises:
        ValueError: a rank above the shorter side.

    Attributes:
        factor: T (r, longer side): ``lora_B``, transposed, with the input side projected, else ``lora_A``.
    """

    def __init__(
        self,
        layer: nn.Module,
        *,
        rank: int,
        scale: float,
        weight: Codec | None = NF4,
        projection: Codec | None = NF4,
        exact: bool = False,
        compensation: int = 5,
    ) -> None:
        super().__init__(layer)
        self.check_rank(rank)
        own: Any = layer.weight
        self.rank, self.scale, self.exact, self.compensation = rank, scale, exact, compensation
        #: Whether P belongs to the input side.
        self.input_side = self.in_features <= self.out_features
        short, long = sorted((self.in_features, self.out_features))
        dtype = torch.bfloat16 if own.dtype == torch.bfloat16 else torch.float32
        self.weight_spec = StateSpec((self.out_features, self.in_features), own.dtype, codec=weight)
        self.basis_spec = StateSpec((short, rank), dtype if projection is None else torch.float32, codec=projection)
        if weight is not None:
            self.register_parameter("weight", None)  # which T5 asks for its dtype
        # Both are buffers, with float weights too: an optimizer never sees them, and only `hold_` writes to them.
        self._held = (
            self.weight_spec.stored("weight" if weight is None else "weight_q"),
            self.basis_spec.stored("basis"),
        )
        for name, part in (self._held[0] | self._held[1]).items():
            self.register_buffer(name, part.allocate(own.device))
        factor = nn.Parameter(torch.zeros(rank, long, device=own.device, dtype=dtype))
        self.register_parameter("lora_B" if self.input_side else "lora_A", factor)
        reader = _WholeReader if exact else Reader
        self._reader = reader(self.basis_spec, weight=self.weight_spec)
        self._key: Tensor | None = None
        self._leaf: Tensor | None = None
        self._sum = Sum()

    @property
    def factor(self) -> nn.Parameter:
        return next(iter(self.factors().values()))

    def factors(self) -> dict[str, nn.Parameter]:
        name = "lora_B" if self.input_side else "lora_A"
        return {name: getattr(self, name)}

    def _held_weight(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self._held[0])

    def _held_basis(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self._held[1])

    @property
    def P(self) -> Tensor:
        """The frozen factor (shorter side, r), decoded, in float32; not to be written to."""
        return self._reader.read_basis(self._held_basis()).float()

    def _oriented(self, X: Tensor) -> Tensor:
        """A matrix (out, in) with the side of P first, or back; a view."""
        return X.mT if self.input_side else X

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        W, _ = self._reader.read_weight(self._held_weight(), torch.float32)
        W = W.clone() if self.weight_spec.codec is None else W
        self._oriented(W).addmm_(self.P, self.factor.float(), alpha=self.scale)
        return W

    def forward(self, input: Tensor) -> Tensor:
        """The product x·W_effᵀ + b."""
        bias: Tensor | None = self.bias
        x, device = input, input.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        held = (*self._held_weight(), *self._held_basis())
        with torch.autocast(device, enabled=False):
            return ProjectedProduct.apply(  # type: ignore[no-any-return]
                x, bias, self._key, self.factor, self._leaf, self.input_side, self._reader, self.scale, None, *held
            )

    @torch.no_grad()
    def reset_(self, generator: torch.Generator) -> None:
        """P random, with orthonormal columns before it is rounded, and T = 0."""
        self.factor.zero_()
        if not self.factor.is_meta:
            short, rank = self.basis_spec.shape
            self._hold_basis(random_stiefel(short, rank, generator=generator))

    def _hold_basis(self, P: Tensor) -> None:
        coded = self.basis_spec.encode("", P).values()
        for held, part in zip(self._held_basis(), coded, strict=True):
            held.copy_(part)

    @torch.no_grad()
    def hold_(self, W: Tensor) -> float:
        """Hold W (out, in): round it, and let T hold what P can of the error; alternate, and keep the best.

        Q = quant(W'), T = P⁺(W − Q)/s, W' = W − s·PT, beginning with W' = W.

        Returns:
            ‖W − Q − s·PT‖_F / ‖W‖_F.
        """
        P, spec = self.P, self.weight_spec
        inverse = torch.linalg.pinv(P)
        W = W.float()
        rounded_from, least = W, math.inf
        for attempt in range(max(1, self.compensation)):
            coded = spec.encode("", rounded_from.to(spec.dtype if spec.codec is None else torch.float32))
            error = W - spec.decode("", coded).float()
            T = torch.zeros_like(self.factor)
            if self.compensation:
                T = (inverse @ self._oriented(error)).div_(self.scale).to(T.dtype)
            self._oriented(error).addmm_(P, T.float(), alpha=-self.scale)
            size = float(torch.linalg.vector_norm(error))
            if attempt == 0 or size < least:
                least = size
                self.factor.copy_(T)
                for held, part in zip(self._held_weight(), coded.values(), strict=True):
                    held.copy_(part)
            if not least:
                break
            rounded_from = W.clone()
            self._oriented(rounded_from).addmm_(P, T.float(), alpha=-self.scale)
        whole = float(torch.linalg.vector_norm(W))
        return least / whole if whole else 0.0

    @property
    def _sketch_shape(self) -> tuple[int, int]:
        short, rank = self.basis_spec.shape
        return short, self.factor.shape[1] if self.exact else rank

    def arm(self, key: Tensor | None) -> None:
        """Let the backward passes of a step leave a sketch of their gradient, or the whole of it; None: nothing."""
        self._key, self._sum = key, Sum()
        self._leaf = None if key is None else empty_leaf(*self._sketch_shape, self.factor, self._sum)

    def take_sketch(self) -> Tensor:
        """What they have left (shorter side, r or longer side), in float32; zeros where there was no backward pass."""
        Y = self._sum.value
        self.arm(None)
        return self.factor.new_zeros(self._sketch_shape, dtype=torch.float32) if Y is None else widened(Y)

    @torch.no_grad()
    def refresh_(self, Y: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
        """Merge the factor, go over to the subspace that a sketch tells, and round the weight again.

        Returns:
            P_newᵀ·P_old (r, r), and the relative error of the weight, see `hold_`.
        """
        W, old, spec = self.effective_weight(), self.P.clone(), self.basis_spec
        if self.exact:
            new = rounded(spec, exact_basis(Y, spec.shape[1]).basis)
        else:
            new, _ = basis_from_sketch(spec, Y, self.factor.dtype, generator, turn=True)
        self._hold_basis(new)
        return self.P.mT @ old, self.hold_(W)
