"""The late refresh: what of a gradient has to be kept when it is not kept itself.

R = QᵀG and the sketch Y = GΩ are linear in G, so both can be added up over micro-batches and the gradient thrown away.
The sketch that one step leaves gives the basis from the next step on. There the basis is turned to the singular
directions of R, before the moments see it; one that is held in fewer bytes has the directions of the sketch instead.
Until there is a sketch the basis is a random one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.linalg import (
    DenseOperator,
    canonical_signs,
    gaussian_sketch,
    orthonormalize,
    random_stiefel,
    seeded_generator,
)
from subspan.linalg.scaling import inverse_scale
from subspan.linalg.surplus import complete, round_off_floor
from subspan.optim.method import Found, Geometry, Group, Method, State
from subspan.optim.projection import Projection
from subspan.optim.storage import gather_state, rounded, scatter_state
from subspan.state import StateSpec


@dataclass
class Folded:
    """What is kept of the gradients of one parameter between two steps.

    Args:
        projected: R (..., r, n), the sum over the gradients so far; a single product in bfloat16 or float16 is held as
            it is, sums are not.
        sketch: Y (..., m, r), the same; None where no refresh is due.
        squared_norm: ‖G‖²_F of the last gradient, 0-D float64; infinite or NaN where it cannot be squared.
        count: number of gradients.
        whole: False where G was never formed: ``squared_norm`` is then ‖R‖²_F.
        factor: of R and Y, where multiplying would round them; None is 1.
        turn: X (r, r), where R is to count as XᵀR.
        found: the new subspace that R was taken with, and that `step` is to go over to.
    """

    projected: Tensor
    sketch: Tensor | None
    squared_norm: Tensor
    count: int = 1
    whole: bool = True
    factor: Tensor | None = None
    turn: Tensor | None = None
    found: Found | None = None

    @staticmethod
    def unformed(R: Tensor, Y: Tensor | None, found: Found | None = None) -> Folded:
        """R and Y of a gradient that is not there as a whole."""
        squared = torch.linalg.vector_norm(widened(R)).double().square()
        return Folded(R, Y, squared, whole=False, found=found)

    @property
    def norm_is_known(self) -> bool:
        """Whether `norm_squared` is that of the gradient."""
        return self.whole and self.count == 1

    def gradient(self) -> Tensor:
        """R in float32 (float64): ``projected`` itself where it is that already."""
        R = widened(self.projected)
        R = R if self.factor is None else R * self.factor
        return R if self.turn is None else self.turn.mT @ R

    def whole_sketch(self) -> Tensor | None:
        """Y in float32 (float64), in the same way."""
        if self.sketch is None:
            return None
        Y = widened(self.sketch)
        return Y if self.factor is None else Y * self.factor

    def add(self, other: Folded) -> None:
        """Add what another gradient left."""
        self.projected = self.gradient().add_(other.gradient())
        Y, more = self.whole_sketch(), other.whole_sketch()
        if Y is not None and more is not None:
            self.sketch = Y.add_(more)
        self.factor = None
        # NaN and infinity stay: what follows them is finite again, the sum is not.
        self.squared_norm = other.squared_norm + 0 * self.squared_norm
        self.count += other.count
        self.whole = self.whole and other.whole

    def norm_squared(self) -> Tensor:
        """‖G‖² of the one gradient, or ‖R‖² where several were added up or none was formed, 0-D float64."""
        if self.norm_is_known:
            return self.squared_norm
        square = torch.linalg.vector_norm(self.projected, dtype=torch.float64).square()
        return square if self.factor is None else square * self.factor.double().square()

    def scale_(self, factor: Tensor) -> None:
        """Multiply the gradient by a number."""
        if self.projected.dtype.itemsize >= 4:
            self.projected *= factor
            if self.sketch is not None:
                self.sketch *= factor
        else:
            self.factor = factor if self.factor is None else self.factor * factor
        self.squared_norm = self.squared_norm * factor.double().square()


def widened(X: Tensor) -> Tensor:
    """``X`` in at least float32, itself where it is."""
    return X.to(torch.promote_types(X.dtype, torch.float32))


def fold(G: Tensor, projection: Projection, Omega: Tensor | None) -> Folded:
    """R, Y and ‖G‖² of one oriented gradient (..., m, n)."""
    R = projection.project(G)
    if R.untyped_storage()._cdata == G.untyped_storage()._cdata:
        R = R.clone()  # at full rank R is G, which is about to be freed or overwritten
    sketch = None if Omega is None else DenseOperator(G).matmul(Omega).to(R.dtype)
    return Folded(R, sketch, torch.linalg.vector_norm(G, dtype=R.dtype).double().square())


def refresh_key(seed: int, name: str, refreshes: int) -> Tensor:
    """Key of the test matrix of one refresh; a tensor, so that compiled code need not know its value."""
    return key_of(seeded_generator(seed, name, refreshes))


def key_of(generator: torch.Generator) -> Tensor:
    """The seed of a generator as a key."""
    unsigned = generator.initial_seed()
    return torch.zeros((), dtype=torch.int64).fill_(unsigned - (unsigned >> 63 << 64))


@torch.library.custom_op(
    "subspan::test_matrix",
    mutates_args=(),
    schema="(Tensor key, Tensor like, SymInt[] shape, ScalarType drawn_as) -> Tensor",
)
def test_matrix(key: Tensor, like: Tensor, shape: Sequence[int], drawn_as: torch.dtype) -> Tensor:
    """Ω of a refresh, the same for all gradients that are added up, drawn from its key each time.

    An operation by itself, since a compiler cannot look into generators. Ω has the dtype and the device of ``like``.
    """
    generator = torch.Generator().manual_seed(int(key))
    *batch, n, rank = shape
    return gaussian_sketch(n, rank, generator=generator, batch_shape=tuple(batch), dtype=drawn_as).to(
        like.dtype
    ).to(like.device)  # fmt: skip


@test_matrix.register_fake
def _(key: Tensor, like: Tensor, shape: Sequence[int], drawn_as: torch.dtype) -> Tensor:
    return like.new_empty(shape)


@dataclass(frozen=True)
class WarmStart:
    """Test matrices that begin with the leading right directions of the low-rank gradients so far.

    The first columns of Ω are the first rows of M, the first moment, each with the length √n that a random column has
    in the mean. So these columns of the sketch have a power iteration behind them that cost nothing. A zero row of M,
    as before the first step, leaves the random column. Where a basis is shared, a row is one of [M₁ M₂ …].

    Args:
        moment: declaration of M (..., r, n).
        share: of the columns.
    """

    moment: StateSpec
    share: float

    def lengths(self, moments: Sequence[Tensor]) -> Tensor:
        """Lengths over √n of the leading rows of [M₁ M₂ …], (..., 1, count), from the decoded moments."""
        count = int(self.share * moments[0].shape[-2])
        columns = [M[..., :count, :].mT for M in moments]
        largest = torch.stack([X.abs().amax(dim=-2, keepdim=True) for X in columns]).amax(dim=0)
        divisor = torch.where(largest > 0, largest, 1.0)  # so that no square underflows
        squares = [torch.linalg.vector_norm(X / divisor, dim=-2, keepdim=True).square() for X in columns]
        return largest * (functools.reduce(torch.add, squares) / sum(X.shape[-2] for X in columns)).sqrt()

    def apply(self, Omega: Tensor, M: Tensor, lengths: Tensor) -> Tensor:
        """Ω (..., n, r) with the directions of the decoded M, whose rows have these `lengths`."""
        count = lengths.shape[-1]
        columns, random = M[..., :count, :].mT, Omega[..., :count].to(M.dtype)
        known = torch.where(lengths > 0, columns / torch.where(lengths > 0, lengths, 1.0), random)
        return torch.cat([known.to(Omega.dtype), Omega[..., count:]], dim=-1)


def warm_start(method: Method, geometry: Geometry, group: Group) -> tuple[str, WarmStart] | None:
    """The state key of the first moment and what it does to test matrices, None where they are random throughout."""
    share = group.get("warm_start", 0.0)
    if not share or not geometry.projected:
        return None
    moments = method.moments(geometry, group)
    return next((key, WarmStart(spec, share)) for key, spec in moments.items() if spec.moment == 1)


def random_start(state: State, specs: Mapping[str, StateSpec], geometry: Geometry, seed: int, name: str) -> None:
    """A random basis, for as long as there is no sketch; ``specs`` declares the subspace."""
    generator = seeded_generator(seed, name, "start")
    Q = random_stiefel(
        geometry.m, geometry.rank, generator=generator, batch_shape=geometry.batch, dtype=specs["basis"].dtype
    )
    tensors = gather_state(specs, [state])
    tensors["basis"].copy_(Q)
    scatter_state(specs, tensors, [state])


def basis_from_sketch(
    spec: StateSpec, Y: Tensor, dtype: torch.dtype, generator: torch.Generator, *, turn: bool = False
) -> tuple[Tensor, bool]:
    """A basis of the range of Y, held as ``spec`` says, and whether it is turned already.

    A basis that is held by a codec cannot be turned once an R has been taken with what it was rounded to. It has the
    left singular directions of Y, which estimate those of G, and then it is rounded. Where Y, of gradients in
    ``dtype``, has fewer directions than columns, ``generator`` draws the others: rounding would decide on them.
    """
    Y = widened(Y)
    Q = orthonormalize(Y)
    triangle = Q.mT @ Y
    # The first columns of a random sketch span its range: the diagonal shows whether all of them are needed.
    diagonal, floor = triangle.diagonal(dim1=-2, dim2=-1).abs(), round_off_floor(Y.shape[-2], dtype, Y.dtype)
    deficient = not bool((diagonal > floor * torch.linalg.matrix_norm(triangle)[..., None]).all())
    if deficient or turn or spec.codec is not None:
        Q, X = turned(Q, [triangle], dtype, generator)
    if deficient:
        kept = _above_round_off(X, [triangle], Y.shape[-2], dtype)
        Q = complete(Q, ~kept, m=Y.shape[-2], generator=generator)
    if spec.codec is not None:
        return rounded(spec, Q * canonical_signs(Q)), True
    return (Q * canonical_signs(Q)).to(spec.dtype), turn


def turned(
    Q: Tensor, stacked: Sequence[Tensor], dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """QX with canonical signs, turned to the singular directions of [R₁ R₂ …], and X, their left singular vectors.

    Where a basis is not shared, ``stacked`` is R alone, and XᵀR are its coordinates in the new basis. Directions that
    R, of gradients in ``dtype``, does not have are drawn from ``generator``, since rounding would decide on them; their
    columns of X are zero.
    """
    largest = torch.stack([R.abs().amax(dim=(-2, -1)) for R in stacked]).amax(dim=0)
    scale = inverse_scale(largest, stacked[0].dtype, stacked[0].device)
    scaled = [(R * scale).double() for R in stacked]
    # A Gram matrix squares the condition number: in float32 rounding would decide on directions below 3e-4 of the
    # largest, and another order of summation, as with other processes, would turn them.
    X = torch.linalg.eigh(functools.reduce(torch.add, (R @ R.mT for R in scaled))).eigenvectors.flip(-1)
    X = X.to(stacked[0].dtype)
    kept = _above_round_off(X, [R * scale for R in stacked], Q.shape[-2], dtype)
    if not bool(kept.all()):
        X = complete(X, ~kept, m=X.shape[-2], generator=generator)
    Q = Q.to(X.dtype) @ X
    signs = canonical_signs(Q)
    return Q * signs, X * signs * kept


def _above_round_off(X: Tensor, stacked: Sequence[Tensor], m: int, dtype: torch.dtype) -> Tensor:
    """Which columns of X (..., 1, r) are more than rounding of [R₁ R₂ …], the projections of gradients of m rows."""
    squares = [torch.linalg.vector_norm(X.mT @ R, dim=-1).double().square() for R in stacked]
    lengths = functools.reduce(torch.add, squares).sqrt()
    whole = torch.linalg.vector_norm(lengths, dim=-1, keepdim=True)
    # Eigenvectors of nothing hold a few rounding units of the others: 5e-7 was seen where the floor is 4.8e-7.
    floor = max(4.0 * round_off_floor(m, X.dtype, X.dtype), round_off_floor(m, dtype, X.dtype))
    return ((lengths > floor * whole) | (whole == 0)).unsqueeze(-2)


def nonfinite_folded(folded: Mapping[str, Folded]) -> list[str]:
    """Names of the parameters with a gradient that is not finite, or too large to be squared."""
    if not folded:
        return []
    device = next(iter(folded.values())).projected.device
    squares = torch.stack([item.squared_norm.to(device) for item in folded.values()])
    return [name for name, square in zip(folded, squares.tolist(), strict=True) if not math.isfinite(square)]


def sketch_norms(folded: Mapping[str, Folded]) -> dict[str, float]:
    """‖Y‖ of each sketch, as far as it can be squared: of a finite R the sketch may be infinite, in float16 above all.

    All reach the host together.
    """
    sketches = {name: item.sketch for name, item in folded.items() if item.sketch is not None}
    if not sketches:
        return {}
    device = next(iter(sketches.values())).device
    norms = [torch.linalg.vector_norm(Y, dtype=widened(Y[..., :0, :]).dtype) for Y in sketches.values()]
    return dict(zip(sketches, torch.stack([norm.to(device) for norm in norms]).tolist(), strict=True))
