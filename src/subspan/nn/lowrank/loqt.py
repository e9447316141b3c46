"""LoQT: frozen weights of 4 bits, and one trained factor in a subspace of the gradient that is chosen anew."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from subspan.linalg import exact_basis, random_stiefel
from subspan.nn.lowrank.layer import LowRankLayer, replace_module
from subspan.nn.lowrank.restarts import GrowingGap, Restarts
from subspan.nn.lowrank.select import select_layers
from subspan.nn.lowrank.state_transform import Keep, ResetState, edit_state
from subspan.nn.lowrank.weights import LowRankWeights, WeightRecipe
from subspan.nn.projected import ProjectedProduct
from subspan.optim.late import basis_from_sketch, key_of, widened
from subspan.optim.method import State
from subspan.optim.slots import Reader, Sum, empty_leaf
from subspan.optim.storage import rounded
from subspan.state import Blockwise, Codec, DoubleBlockwise, StateSpec

__all__ = ["LoQT", "LoQTLinear"]

# torchao has an NF4 tensor too. A codec is less: plain tensors, which optimizers, checkpoints and plans know already.
_NF4 = Blockwise("normal", 4, block=64)


class _WholeReader(Reader):
    """Reads for layers that leave the whole gradient in place of a sketch."""

    def sketch(self, key: Tensor, held: Sequence[Tensor], left: Tensor, right: Tensor) -> Tensor:
        return left.mT @ right


class LoQTLinear(LowRankLayer):
    """y = x·(W + s·ΔW)ᵀ + b with a frozen W of 4 bits, and ΔW = PT (or its transpose) with a frozen P of 4 bits.

    P spans directions of the shorter side of W, of the input where both are equal. Nothing of the size of W is kept from
    one pass to the next but its codes.

    Args:
        layer: the linear layer.
        rank: r.
        scale: s.
        weight: codec of W; None holds it as it is, under its own name.
        projection: codec of P; None: in the dtype of the factor.
        exact: find subspaces from the whole gradient, in place of a sketch.
        compensation: how often W is quantised anew to find the factor that makes up for the error; 0: the factor is
            zero then.

    Raises:
        ValueError: a rank above the shorter side.

    Attributes:
        factor: T (r, longer side): ``lora_B``, transposed, with the input side projected, else ``lora_A``.
    """

    weight: Tensor

    def __init__(
        self,
        layer: nn.Module,
        *,
        rank: int,
        scale: float,
        weight: Codec | None = _NF4,
        projection: Codec | None = _NF4,
        exact: bool = False,
        compensation: int = 5,
    ) -> None:
        super().__init__(layer)
        own: Any = layer.weight
        self.rank, self.scale, self.exact, self.compensation = rank, scale, exact, compensation
        #: Whether P belongs to the input side.
        self.input_side = self.in_features <= self.out_features
        short, long = sorted((self.in_features, self.out_features))
        if not 1 <= rank <= short:
            raise ValueError(
                f"rank is {rank}, but the layer is {self.in_features} to {self.out_features}: it must be from 1 to "
                f"{short}; lower it, or exclude the layer"
            )
        dtype = torch.bfloat16 if own.dtype == torch.bfloat16 else torch.float32
        self.weight_spec = StateSpec((self.out_features, self.in_features), own.dtype, codec=weight)
        self.basis_spec = StateSpec((short, rank), dtype if projection is None else torch.float32, codec=projection)
        self._register("basis", self.basis_spec, own.device)
        if weight is None:
            self.weight = own
            self.weight.requires_grad_(False)
        else:
            self._register("weight_q", self.weight_spec, own.device)
        factor = nn.Parameter(torch.zeros(rank, long, device=own.device, dtype=dtype))
        self.register_parameter("lora_B" if self.input_side else "lora_A", factor)
        reader = _WholeReader if exact else Reader
        self._reader = reader(self.basis_spec, weight=self.weight_spec)
        self._key: Tensor | None = None
        self._leaf: Tensor | None = None
        self._sum = Sum()

    def _register(self, key: str, spec: StateSpec, device: torch.device) -> None:
        for name, part in spec.stored(key).items():
            self.register_buffer(name, part.allocate(device))

    @property
    def factor(self) -> nn.Parameter:
        return next(iter(self.factors().values()))

    def factors(self) -> dict[str, nn.Parameter]:
        name = "lora_B" if self.input_side else "lora_A"
        return {name: getattr(self, name)}

    def _held_weight(self) -> tuple[Tensor, ...]:
        if self.weight_spec.codec is None:
            return (self.weight.mT if self.transposed else self.weight,)
        return tuple(getattr(self, name) for name in self.weight_spec.stored("weight_q"))

    def _held_basis(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.basis_spec.stored("basis"))

    @property
    def P(self) -> Tensor:
        """The frozen factor (shorter side, r), decoded, float32."""
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
        x, bias, device = input, self.bias, input.device.type
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

    def arm(self, key: Tensor) -> None:
        """Let the backward passes of a step leave a sketch of their gradient, or the whole of it."""
        short, rank = self.basis_spec.shape
        width = self.factor.shape[1] if self.exact else rank
        self._key, self._sum = key, Sum()
        self._leaf = empty_leaf(short, width, self.factor, self._sum)

    def take_sketch(self) -> Tensor:
        """What they have left (shorter side, r or longer side), in float32; zeros where there was no backward pass."""
        Y, self._key, self._leaf = self._sum.value, None, None
        self._sum = Sum()
        short, rank = self.basis_spec.shape
        return self.factor.new_zeros(short, rank, dtype=torch.float32) if Y is None else widened(Y)

    @torch.no_grad()
    def refresh_(self, Y: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
        """Merge the factor, go over to the subspace that a sketch tells, and round the weight again.

        Returns:
            P_newᵀ·P_old (r, r), and the relative error of the weight, see `hold_`.
        """
        W, old, spec = self.effective_weight(), self.P, self.basis_spec
        if self.exact:
            new = rounded(spec, exact_basis(Y, spec.shape[1]).basis)
        else:
            new, _ = basis_from_sketch(spec, Y, self.factor.dtype, generator, turn=True)
        self._hold_basis(new)
        return self.P.mT @ old, self.hold_(W)


class _LoQTRestarts(Restarts):
    """The refreshes of LoQT: those of its gaps, and one after the first step, whose gradient is the first one.

    The sketch of a step serves from the next one on, so no batch is for a refresh alone.
    """

    def __init__(self, *args: Any, moments: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.moments = moments

    def _due(self, step: int) -> bool:
        return step == 0 or self.when.due(step + 1)

    def _loqt_layers(self) -> Iterator[tuple[str, LoQTLinear]]:
        for name, layer in self.layers.items():
            assert isinstance(layer, LoQTLinear)
            yield name, layer

    def begin_step(self, step: int) -> None:
        if self._due(step):
            for name, layer in self._loqt_layers():
                layer.arm(key_of(self.generator(name, step)))

    @torch.no_grad()
    def end_step(self, step: int, optimizer: torch.optim.Optimizer) -> list[str]:
        """Refresh all layers where it is due.

        Raises:
            ValueError: a factor that is not in the optimizer, or whose moments do not have its shape.
            RuntimeError: a factor that `fully_shard` has divided.
        """
        if not self._due(step):
            return []
        self.check_optimizer(optimizer)
        sketches = {name: layer.take_sketch() for name, layer in self._loqt_layers()}
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for Y in sketches.values():  # the order of the layers is the same everywhere
                dist.all_reduce(Y)
        norms = torch.stack([torch.linalg.vector_norm(Y) for Y in sketches.values()]).tolist()
        errors, kept = [], []
        for (name, layer), norm in zip(self._loqt_layers(), norms, strict=True):
            Y = sketches.pop(name)
            if not (norm and math.isfinite(norm)):
                kept.append(name)
                continue
            turn, error = layer.refresh_(Y, self.generator(f"{name}.surplus", step))
            errors.append(error)
            if self.moments == "rotate":
                edit_state(optimizer, layer.factor, lambda state, turn=turn: _rotate(state, turn))
        if self.moments == "reset":
            self.transform(step, optimizer)
        worst = f", weights rounded by at most {100 * max(errors):.1f} %" if errors else ""
        words = [f"refresh: {len(errors)} layers have a new subspace{worst}"]
        if kept:
            words.append(f"refresh: {', '.join(kept)} kept theirs, for want of a finite gradient that is not zero")
        return words


def _rotate(state: State, turn: Tensor) -> None:
    """M <- P_newᵀP_old·M; second moments stay, and where they are zero M is not let in, to be divided by ε."""
    M, V = state.get("exp_avg"), state.get("exp_avg_sq")
    if M is None or M.shape[0] != turn.shape[0]:
        raise ValueError(
            "moments='rotate' turns first moments in the shape of the factor, and this optimizer has none; use AdamW, "
            "or moments='reset'"
        )
    M.copy_(turn.to(M.dtype) @ M)
    if V is not None:
        M *= V > 0


@dataclass(frozen=True)
class LoQT(WeightRecipe):
    """LoQT: y = x(W + s·PT)ᵀ, with W and P frozen in 4 bits, and T trained.

    P has the leading singular vectors of the gradient of W on its shorter side. After the first step, and then after
    gaps of first_gap + ⌊growthᵏ⌋ steps, PT is merged into W, P is found anew from the gradient of that step, W is rounded
    again, and T begins with what makes up for the rounding.

    Args:
        rank: r.
        alpha: s; it is not divided by r.
        first_gap: T₀ in steps.
        growth: ψ.
        compensation: N_c, see `LoQTLinear`.
        weight_bits: 4, or None for weights as they are.
        projection_bits: 4, or None.
        double_quantization: whether the scales of W have 8 bits.
        svd: ``randomized``: P from a sketch of the gradient, which is never formed; ``exact``: from the gradient itself,
            which is kept, of all layers, for the step that ends with a refresh.
        moments: what becomes of the moments of T at a refresh. ``rotate``: the first one is turned to the new subspace;
            ``reset``: they begin anew; ``keep``: they stay, as in the official code, although they belong to the old one.

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
        for name, least in (("rank", 1), ("first_gap", 1), ("growth", 1), ("compensation", 0)):
            value = getattr(self, name)
            if not (value >= least and math.isfinite(value)):
                raise ValueError(f"{name} is {value!r}; it must be at least {least}")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"alpha is {self.alpha!r}; it must be greater than 0")
        choices: dict[str, tuple[Any, ...]] = {
            "weight_bits": (4, None),
            "projection_bits": (4, None),
            "svd": ("randomized", "exact"),
            "moments": ("rotate", "reset", "keep"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose {' or '.join(map(repr, allowed))}")
        if self.double_quantization and self.weight_bits is None:
            raise ValueError("double_quantization=True needs weights that are quantised; leave it out, or weight_bits=4")

    def apply(
        self,
        model: nn.Module,
        *,
        target_modules: str | Sequence[str] = "all-linear",
        exclude: str | Sequence[str] = (),
        steps: int | None = None,
        seed: int = 0,
    ) -> LowRankWeights:
        """Replace linear layers by `LoQTLinear`; see `WeightRecipe.apply`."""
        chosen = select_layers(model, target_modules, exclude)
        self._check(model, chosen)
        codec: Codec = DoubleBlockwise(_NF4) if self.double_quantization else _NF4
        layers: dict[str, LowRankLayer] = {}
        weights = _LoQTRestarts(
            model,
            layers,
            seed,
            when=GrowingGap(self.first_gap, self.growth),
            state=ResetState() if self.moments == "reset" else Keep(),
            moments=self.moments,
        )
        for name, module in chosen.items():
            layer = LoQTLinear(
                module,
                rank=self.rank,
                scale=self.alpha,
                weight=None if self.weight_bits is None else codec,
                projection=None if self.projection_bits is None else _NF4,
                exact=self.svd == "exact",
                compensation=self.compensation,
            )
            layer.reset_(weights.generator(name, -1))
            W: Any = module.weight
            if not W.is_meta:
                layer.hold_(W.detach().mT if layer.transposed else W.detach())
            replace_module(model, name, layer)
            weights.layers[name] = layer
        return weights

    def _check(self, model: nn.Module, chosen: dict[str, nn.Module]) -> None:
        """Refuse what cannot be, before anything is changed."""
        owners: dict[int, list[str]] = {}
        for prefix, module in model.named_modules():
            for key, parameter in module._parameters.items():
                owners.setdefault(id(parameter), []).append(f"{prefix}.{key}".lstrip("."))
        for name, module in chosen.items():
            W: Any = module.weight
            others = [other for other in owners[id(W)] if other != f"{name}.weight".lstrip(".")]
            if others:
                raise ValueError(
                    f"{name} shares its weight with {', '.join(others)}, which LoQT would freeze or part from it; "
                    "exclude it, or build the model without tied weights"
                )
            if self.rank > min(W.shape):
                raise ValueError(
                    f"rank is {self.rank}, but {name} is a matrix {tuple(W.shape)}; lower the rank, or exclude the layer"
                )
