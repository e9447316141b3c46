"""The axes of a low-rank optimizer, and a method as one choice on each of them.

| axis | question | class |
|---|---|---|
| subspace | which subspace? | `Subspace` |
| refresh | when is it chosen anew? | `Refresh` |
| transport | what happens to the moments then? | `Transport` |
| inner | which optimizer runs inside? | `Inner` |
| lift | how does its direction become a weight step, and what is done with the rest of the gradient? | `Lift` |

Parts are frozen and hold structure only: numbers come from the param group, tensors from the parameter's state.
They see oriented matrices ``(..., m, n)``, the projected side first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from subspan.linalg import MatrixOperator
from subspan.optim.projection import Identity, Nothing, Projection
from subspan.optim.shards import WHOLE, Shards
from subspan.state import StateSpec, basis_codec, moment_codec

State = dict[str, Tensor]
Group = Mapping[str, Any]
Total = Callable[[Tensor], Tensor]
Roster = tuple[tuple[str, int], ...]  # (name, elements) of every projected parameter


def _is_large(spec: StateSpec, group: Group) -> bool:
    return math.prod(spec.shape) >= group.get("min_quantized", 4096)


def check_flag(name: str, value: object) -> None:
    """Refuse anything but True and False: a string such as "no" would count as true.

    Raises:
        ValueError: naming the setting and its value.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not allowed; it must be True or False")


@dataclass(frozen=True)
class Geometry:
    """Shape of one oriented matrix (or stack of matrices) and the rank at which it is projected.

    Args:
        batch: leading dimensions of a stack (experts); empty for one matrix.
        m: rows, the projected side.
        n: columns.
        rank: number of directions; ``m`` means no projection, 0 means no low-rank part.
        dtype: in which the basis and the moments are held (float64 for float64 parameters, else float32).
    """

    batch: tuple[int, ...]
    m: int
    n: int
    rank: int
    dtype: torch.dtype = torch.float32

    @property
    def projected(self) -> bool:
        """Whether there is a subspace to find: neither empty nor everything."""
        return 0 < self.rank < self.m


@dataclass(frozen=True)
class Found:
    """A new subspace.

    Args:
        tensors: its state tensors.
        projected: this step's projected gradient, where the search gave it for free.
        rank: number of directions, where the search decided on it; else it is the one that was asked for.
    """

    tensors: State
    projected: Tensor | None = None
    rank: int | None = None


class Subspace(ABC):
    """Which subspace? Finds the state tensors that define a projection, and builds the projection from them."""

    #: False for projections whose columns are not orthonormal: they cannot be rotated or projected back.
    orthonormal: ClassVar[bool] = True
    #: False when R leaves out entries of the gradient, so that NaN and Inf in them do not show in R.
    sees_all: ClassVar[bool] = True
    #: False when the rank changes from refresh to refresh; the one in force is then part of the state.
    fixed_rank: bool = True
    #: True when `find` decides on the rank, and `rank` is the most that it may take.
    finds_rank: bool = False
    #: False when the tensors are not kept but found again, from the same generator, at every step.
    stored: bool = True
    #: What decides on the subspace: the gradient, no more of it than a sketch GΩ, or nothing of it.
    sees: Literal["gradient", "sketch", "nothing"] = "gradient"

    def at(self, step: int, group: Group) -> Subspace:
        """The part that finds the subspace at this step: itself, but for those that choose among others."""
        return self

    def rank(self, m: int, group: Group, *, name: str, refreshes: int, roster: Callable[[], Roster]) -> int:
        """Number of directions for a projected side of ``m``: the group's ``rank``, or its ``density`` times ``m``.

        ``refreshes`` counts the refreshes before the one that asks.
        """
        if group["rank"] is not None:
            return min(group["rank"], m)
        return min(m, max(1, round(group["density"] * m))) if group["density"] > 0 else 0

    def specs(self, geometry: Geometry) -> dict[str, StateSpec]:
        """The tensors of a projection that exists (``0 < rank < m``)."""
        shape = (*geometry.batch, geometry.m, geometry.rank)
        return {"basis": StateSpec(shape, geometry.dtype)}

    @abstractmethod
    def find(
        self, operator: MatrixOperator, geometry: Geometry, *, generator: torch.Generator, step: int, group: Group
    ) -> Found:
        """The subspace for the gradient behind ``operator``; only called when ``0 < rank < m``."""

    @abstractmethod
    def projection(self, tensors: State) -> Projection:
        """The projection that these tensors define."""


class Refresh(ABC):
    """When? Gives the step at which the subspace is chosen anew."""

    #: True when a subspace found from the gradient of one step serves from the next one on.
    late: bool = False

    def specs(self, group: Group) -> dict[str, StateSpec]:
        """State of the rule itself."""
        return {}

    def compare(self, state: State, old: State, new: State, group: Group) -> None:
        """Look at the subspace tensors before and after a refresh other than the first one."""
        return

    @abstractmethod
    def next_refresh(self, step: int, first: bool, place: Callable[[], float], group: Group, state: State) -> int:
        """Step of the refresh after the one at ``step``; ``place`` gives the place in the period, in [0, 1)."""


class Transport(ABC):
    """What happens to the moments when the basis changes?"""

    #: True when the rule compares the old basis with the new one.
    needs_bases: bool = False

    def specs(self) -> dict[str, StateSpec]:
        """State of the rule itself."""
        return {}

    @abstractmethod
    def carry(
        self, state: State, specs: Mapping[str, StateSpec], new: State, step: int, total: Total = lambda X: X
    ) -> None:
        """Change the moments in ``state``; ``new`` holds the new subspace tensors, ``state`` still the old ones.

        ``specs`` declares what the state becomes. With a changed rank a rule may leave moments as many rows as they
        have: `resized` follows. Where each process has some rows of the bases only, ``total`` sums over them.
        """

    def age(self, state: State, step: int) -> int:
        """Number of gradients that the moments have seen, this one included."""
        return step


class Inner(ABC):
    """Which optimizer runs inside? An element-wise rule from a projected gradient to a direction of the same shape."""

    #: True for a rule that is not element-wise: it needs whole rows of what it sees.
    whole_rows: ClassVar[bool] = False

    def at(self, ndim: int, group: Group) -> Inner:
        """The rule of a dense parameter with ``ndim`` dimensions: itself, but for those that choose among others."""
        return self

    @abstractmethod
    def specs(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, StateSpec]:
        """Moments for a projected gradient of ``shape``."""

    @abstractmethod
    def direction(self, R: Tensor, state: State, age: int, group: Group) -> Tensor:
        """The direction U, a new tensor; the moments in ``state`` are updated in place."""

    def correction(self, age: int, group: Group) -> float:
        """The factor that bias correction contributed to the direction."""
        return 1.0

    #: Whether `step_fused` is there.
    fuses: ClassVar[bool] = False

    def step_fused(
        self,
        Ws: list[Tensor],
        Gs: list[Tensor],
        states: list[State],
        age: int,
        group: Group,
        *,
        beta: float,
        alpha: float,
    ) -> None:
        """W <- beta·W + alpha·U for contiguous tensors of one dtype, in one kernel."""
        raise TypeError(f"{type(self).__name__} has no fused kernel")


@dataclass(frozen=True)
class Update:
    """A weight step D = factor·P·low_rank + gain∘G + residual(G − P·projected), never formed as an m×n tensor.

    Args:
        low_rank: (..., r, n) or None.
        factor: of ``low_rank``.
        gain: broadcasts against G, or None.
        residual: element-wise function of the part of the gradient outside the subspace, or None.
        projected: (..., r, n), needed with ``residual``.
    """

    low_rank: Tensor | None = None
    factor: float = 1.0
    gain: Tensor | None = None
    residual: Callable[[Tensor], Tensor] | None = None
    projected: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """What a lift rule may look at: gradient G (..., m, n), projected R and direction U (..., r, n), and the state.

    G is None where it was folded away, and never for a rule that `Lift.needs_gradient`. Where ``shards`` divides the
    parameter all are pieces, and the update is for the columns of R that this process has.
    """

    gradient: Tensor | None
    projected: Tensor
    direction: Tensor
    projection: Projection
    state: State
    group: Group
    correction: float
    shards: Shards = WHOLE


class Lift(ABC):
    """How does the low-rank direction become a weight step?"""

    #: True when the rule reads the gradient itself, not only its projection.
    needs_gradient: bool = False
    #: True when the rule multiplies by the basis.
    needs_orthonormal: bool = True

    def specs(self, geometry: Geometry) -> dict[str, StateSpec]:
        """State of the rule itself."""
        return {}

    @abstractmethod
    def lift(self, step: Step) -> Update:
        """The weight step of this rule; it may overwrite ``step.direction``."""


@dataclass(frozen=True)
class Method:
    """A published method as one choice on each axis.

    Args:
        name: registry name.
        inner: the optimizer inside; the only part that a dense method has.
        subspace, refresh, transport, lift: the other axes; all None for a dense method.
        decay: ``"before"``: W <- (1 − lr·wd)·W − lr·D; ``"after"``: W <- (1 − lr·wd)·(W − lr·D).

    Raises:
        ValueError: parts that cannot work together.
    """

    name: str
    inner: Inner
    subspace: Subspace | None = None
    refresh: Refresh | None = None
    transport: Transport | None = None
    lift: Lift | None = None
    decay: Literal["before", "after"] = "before"

    def __post_init__(self) -> None:
        if self.decay not in ("before", "after"):
            raise ValueError(f"decay={self.decay!r}: choose 'before' or 'after'")
        if not isinstance(self.inner, Inner):
            raise ValueError(f"inner={self.inner!r} is not allowed; it must be an inner rule such as Adam() or SGD()")
        parts = (self.subspace, self.refresh, self.transport, self.lift)
        if any(part is None for part in parts) and any(part is not None for part in parts):
            raise ValueError(f"{self.name}: give subspace, refresh, transport and lift together, or none of them")
        if self.subspace is not None and self.inner.whole_rows:
            raise ValueError(f"{self.name}: {self.inner} is a rule for whole outputs, which a projection does not keep")
        if self.subspace is not None and not self.subspace.orthonormal:
            assert self.transport is not None and self.lift is not None
            for part, needs in ((self.transport, self.transport.needs_bases), (self.lift, self.lift.needs_orthonormal)):
                if needs:
                    raise ValueError(
                        f"{self.name}: {type(part).__name__} needs an orthonormal basis, "
                        f"which {type(self.subspace).__name__} does not give"
                    )
        late = self.refresh is not None and self.refresh.late
        if late and self.subspace is not None and self.subspace.sees == "gradient":
            raise ValueError(
                f"{self.name}: a late refresh keeps a sketch of the gradient, and {self.subspace} needs all of it; "
                "choose svd='randomized' and rank_policy='fixed', or refresh at once"
            )

    def parts(self) -> dict[str, str]:
        """Each part as text: two methods with equal parts train alike."""
        return {field.name: repr(getattr(self, field.name)) for field in fields(self)}

    @property
    def projects(self) -> bool:
        """Whether this method projects anything at all."""
        return self.subspace is not None

    def specs(
        self, geometry: Geometry | None, shape: torch.Size, dtype: torch.dtype, group: Group
    ) -> dict[str, StateSpec]:
        """The whole state of one parameter; ``geometry`` is None for a dense one."""
        step = {"step": StateSpec((), torch.float32, host=True)}
        if geometry is None:
            return step | self.dense_moments(tuple(shape), dtype, group)
        assert self.subspace is not None and self.transport is not None and self.lift is not None
        assert self.refresh is not None
        clock = StateSpec((), torch.int64, host=True)
        specs = step | {"next_refresh": clock, "refreshes": clock} | self.transport.specs()
        specs |= self.refresh.specs(group)
        if self.refresh.late:
            specs["turned"] = clock
        if not self.subspace.fixed_rank:
            specs["rank"] = clock
        if geometry.projected and self.subspace.stored:
            specs |= self.subspace_specs(geometry, group)
        return specs | self.moments(geometry, group) | self.lift.specs(geometry)

    def moments(self, geometry: Geometry, group: Group) -> dict[str, StateSpec]:
        """State of the inner rule for one projected parameter."""
        if geometry.rank == 0:
            return {}
        return self.dense_moments((*geometry.batch, geometry.rank, geometry.n), geometry.dtype, group)

    def dense_moments(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, StateSpec]:
        """State of the inner rule for a gradient of ``shape``, held as the group's ``moments`` say.

        Vectors and what has fewer than ``min_quantized`` elements stay as they are.
        """
        specs, storage = self.inner.specs(shape, dtype, group), group.get("moments", "float32")
        return {
            key: replace(spec, codec=moment_codec(storage, spec.moment))
            if spec.moment is not None and len(shape) > 1 and _is_large(spec, group)
            else spec
            for key, spec in specs.items()
        }

    def subspace_specs(self, geometry: Geometry, group: Group) -> dict[str, StateSpec]:
        """The tensors of a subspace, a basis held as the group's ``basis_storage`` says."""
        assert self.subspace is not None
        specs, codec = self.subspace.specs(geometry), basis_codec(group.get("basis_storage", "float32"))
        return {
            key: replace(spec, codec=codec) if spec.dtype.is_floating_point and _is_large(spec, group) else spec
            for key, spec in specs.items()
        }

    def projection(self, tensors: State, geometry: Geometry) -> Projection:
        """The projection in force: of the subspace, or the trivial ones at full rank and at rank 0."""
        if geometry.rank == 0:
            return Nothing()
        if geometry.rank == geometry.m:
            return Identity()
        assert self.subspace is not None
        return self.subspace.projection(tensors)
