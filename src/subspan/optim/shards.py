"""How one parameter and its state lie on the processes over which `fully_shard` has divided it.

A matrix that is projected from the right is divided along its columns as parts see it, (m, n) with the projected side
first: the basis is the same on every process, R and the moments are divided by columns, and a step needs no other
piece. One that is projected from the left is divided by rows, and so is its basis: R is a sum over the processes, of
which each keeps some columns, with its moments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subspan.linalg import DenseOperator, DividedOperator, Division, MatrixOperator
from subspan.optim.projection import Projection, Selection
from subspan.state import StateSpec

if TYPE_CHECKING:
    from subspan.optim.method import Found, Geometry, Subspace, Update


def is_sharded(X: Tensor) -> bool:
    """Whether X is a DTensor."""
    return hasattr(X, "device_mesh")


def local(X: Tensor) -> Tensor:
    """The piece of this process, sharing its memory; X itself where it is whole."""
    return X.to_local() if is_sharded(X) else X  # type: ignore[attr-defined]


def local_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The pieces of this process of all tensors of a state."""
    return {key: local(tensor) for key, tensor in state.items()}


def shard_group(mesh: Any) -> Any:
    """The processes over which parameters are divided: the last dimension of the mesh."""
    return mesh.get_group(mesh.ndim - 1)


def mark_part(parameter: Tensor, size: int, first: int) -> None:
    """Mark a parameter as a part of a stack of ``size`` matrices, from number ``first`` on.

    The other parts are parameters of other processes. Its subspaces are drawn as they are where one has the stack.
    """
    parameter.part_of = (size, first)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Shards:
    """How one parameter, its projected gradient and its state lie on the processes.

    Args:
        division: of the oriented matrix; None where it is whole, or dense.
        reduces: whether R is a sum over the processes: a matrix that is projected and divided by rows.
        stack: number of matrices, where the parameter is a stack of which each process has some.
        divides_basis: hold a piece of the basis also where all of it is used in each step, which gathers it each time.
        mesh: of the parameter; None where it is whole.
        part_of: see `mark_part`.
    """

    division: Division | None = None
    reduces: bool = False
    stack: int | None = None
    divides_basis: bool = False
    mesh: Any = None
    part_of: tuple[int, int] | None = None

    def operator(self, G: Tensor) -> MatrixOperator:
        """The whole oriented gradient, of which G is the piece of this process."""
        if self.division is not None:
            return DividedOperator(G, self.division)
        return DenseOperator(G, self.part_of if self.stack is None else (self.stack, self.own(self.stack).start))

    def find(self, subspace: Subspace, operator: MatrixOperator, geometry: Geometry, **kwargs: Any) -> Found:
        """The subspace; what is drawn without looking at the gradient is drawn for the whole of a marked stack."""
        if self.part_of is None:
            return subspace.find(operator, geometry, **kwargs)
        (size, first), (count, *rest) = self.part_of, geometry.batch
        found = subspace.find(operator, replace(geometry, batch=(size, *rest)), **kwargs)
        drawn = found.tensors.items()
        return replace(found, tensors={k: X[first : first + count] if X.shape[:1] == (size,) else X for k, X in drawn})

    def project(self, projection: Projection, G: Tensor) -> Tensor:
        """R = PᵀG: the columns of this process."""
        R = projection.project(G)
        return self.division.own_columns_of_sum(R) if self.division is not None and self.reduces else R

    @property
    def _whole_columns(self) -> bool:
        """Whether R, of which each process has a piece, is divided by rows: a divided side that is not projected."""
        return self.division is not None and self.division.side == "rows" and not self.reduces

    def own_columns(self, R: Tensor | None) -> Tensor | None:
        """The columns of this process of an R that may be whole."""
        if R is None or self.division is None or R.shape[-1] != self.division.n:
            return R
        return R[..., self.division.columns].contiguous()

    def total(self, X: Tensor) -> Tensor:
        """The sum of what each process has found in its piece of G."""
        return X if self.division is None else self.division.total(X)

    def over_columns(self, X: Tensor) -> Tensor:
        """The sum over all columns of R, from that over the columns of this process."""
        return X if self._whole_columns else self.total(X)

    def over_rows(self, X: Tensor) -> Tensor:
        """The same of its rows."""
        return self.total(X) if self._whole_columns else X

    def norms(self, X: Tensor, dim: int | tuple[int, int]) -> Tensor:
        """Norms along ``dim`` (-2, or both) of what has the shape of R, kept as dimensions."""
        norms = torch.linalg.vector_norm(X, dim=dim, keepdim=True)
        if self.division is None or (dim == -2 and not self._whole_columns):
            return norms
        return self.total(norms.square()).sqrt()

    def whole(self, R: Tensor) -> Tensor:
        """All columns that the piece of G has, of R or of what has its columns."""
        return self.division.all_columns(R) if self.division is not None and self.reduces else R

    def columns(self, squares: Tensor) -> Tensor:
        """Sums over the rows of the whole G, (1, n), for the columns of R, from those of the piece of this process."""
        if self.division is None or self.division.side == "columns":
            return squares
        return self.division.own_columns_of_sum(squares) if self.reduces else self.total(squares)

    def whole_update(self, update: Update) -> Update:
        """The update with all columns of the piece of W."""
        if not self.reduces:
            return update
        parts = (update.low_rank, update.gain, update.projected)
        low_rank, gain, projected = (None if part is None else self.whole(part) for part in parts)
        return replace(update, low_rank=low_rank, gain=gain, projected=projected)

    def local_projection(self, projection: Projection) -> Projection:
        """The projection whose basis this process has a piece of, for its piece of G."""
        if self.division is not None and self.division.side == "rows" and isinstance(projection, Selection):
            return Selection(projection.rows - self.division.rows.start, partial=True)
        return projection

    @property
    def gathers_basis(self) -> bool:
        """Whether the basis that is held in pieces is used as a whole."""
        return self.division is not None and self.divides_basis and self.division.side == "columns"

    def sharded_dim(self, key: str, spec: StateSpec) -> int | None:
        """Which dimension of a state tensor is divided; None: each process has all of it."""
        if self.mesh is None or spec.host or not spec.shape:
            return None
        if self.division is None:
            return 0
        if spec.moment is not None:
            return len(spec.shape) - (2 if self._whole_columns else 1)
        return 0 if key == "basis" and (self.division.side == "rows" or self.divides_basis) else None

    def local_spec(self, key: str, spec: StateSpec) -> StateSpec:
        """What of a state tensor this process holds."""
        dim = self.sharded_dim(key, spec)
        if dim is None:
            return spec
        own = self.own(spec.shape[dim])
        return replace(spec, shape=(*spec.shape[:dim], own.stop - own.start, *spec.shape[dim + 1 :]))

    def own(self, size: int) -> slice:
        """The piece of a divided dimension that this process has."""
        return Division("rows", size, 1, shard_group(self.mesh)).rows

    def piece(self, key: str, spec: StateSpec, value: Tensor) -> Tensor:
        """The piece of this process, of a state tensor that may be whole."""
        dim = self.sharded_dim(key, spec)
        if dim is None or tuple(value.shape) != spec.shape:
            return value
        own = self.own(spec.shape[dim])
        return value.narrow(dim, own.start, own.stop - own.start)

    def place(self, key: str, spec: StateSpec, value: Tensor) -> Tensor:
        """The state tensor whose piece on this process is ``value``: a DTensor, but for scalars of the host."""
        if self.mesh is None or spec.host:
            return value
        from torch.distributed.tensor import DTensor

        whole = torch.empty(spec.shape, device="meta")
        return DTensor.from_local(
            value.contiguous(),
            self.mesh,
            self._placements(key, spec),
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )

    def _placements(self, key: str, spec: StateSpec) -> Sequence[Any]:
        from torch.distributed.tensor import Replicate, Shard

        dim = self.sharded_dim(key, spec)
        return [Replicate()] * (self.mesh.ndim - 1) + [Replicate() if dim is None else Shard(dim)]

    def copied(self, key: str, spec: StateSpec, value: Tensor, device: torch.device) -> Tensor:
        """A copy of a saved state tensor, whole or a DTensor of any placement, as this process is to hold it."""
        if is_sharded(value):
            wanted = self._placements(key, spec) if self.mesh is not None and not spec.host else None
            if wanted is None or value.device_mesh != self.mesh:  # type: ignore[attr-defined]
                value = value.full_tensor()  # type: ignore[attr-defined]
            else:
                value = value.redistribute(self.mesh, wanted).to_local()  # type: ignore[attr-defined]
        value = self.piece(key, spec, value.detach())
        value = value.to("cpu" if spec.host else device, copy=True, memory_format=torch.contiguous_format)
        return self.place(key, spec, value)


#: A parameter that is not divided.
WHOLE = Shards()
