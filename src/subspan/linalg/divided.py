"""A matrix that is divided over processes, and the range finder that never puts it, nor a divided basis, together."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from subspan.linalg.cholesky_qr import divided_cholesky_qr
from subspan.linalg.division import Division
from subspan.linalg.operator import MatrixOperator, _product
from subspan.linalg.orthonormal import canonical_signs, orthonormalize
from subspan.linalg.range_finder import RangeFinderResult
from subspan.linalg.scaling import finite_amax, inverse_scale
from subspan.linalg.sketch import gaussian_sketch
from subspan.linalg.surplus import complete, within_rank

__all__ = ["DividedOperator", "divided_range_finder"]


class DividedOperator(MatrixOperator):
    """A (m, n) whose rows or columns lie on several processes; every method but the properties is a collective call.

    As a `MatrixOperator` it gives whole results on all processes, so that every finder works on it; products with thin
    factors in pieces are those of `sketch` and `coordinates`.

    Args:
        local: the rows (mᵢ, n) or columns (m, nᵢ) of this process; none, where the matrix has fewer than processes.
        division: which they are.

    Raises:
        ValueError: ``local`` is not the piece that ``division`` gives to this process.
    """

    def __init__(self, local: Tensor, division: Division) -> None:
        self.local, self.division = local.detach(), division
        by_rows = division.side == "rows"
        own = division.rows if by_rows else division.columns
        pieces = (own.stop - own.start, division.n) if by_rows else (division.m, own.stop - own.start)
        if tuple(local.shape) != pieces:
            raise ValueError(
                f"a piece of shape {pieces} is needed of the {division.m}×{division.n} matrix that is divided by "
                f"{division.side}, got {tuple(local.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        """Shape (m, n) of the whole matrix."""
        return torch.Size((self.division.m, self.division.n))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the entries."""
        return self.local.dtype

    @property
    def device(self) -> torch.device:
        """Device of the piece of this process, and of the results."""
        return self.local.device

    @torch.no_grad()
    def matmul(self, X: Tensor) -> Tensor:
        """AX of shape (m, k), on all processes, for the whole X of shape (n, k)."""
        Y = self.sketch(X)
        return self.division.all_rows(Y) if self.division.side == "rows" else Y

    @torch.no_grad()
    def rmatmul(self, X: Tensor) -> Tensor:
        """AᵀX of shape (n, k), on all processes, for the whole X of shape (m, k)."""
        if self.division.side == "rows":
            return self.division.total(_times(self.local.mT, X[self.division.rows]))
        return self.division.all_rows(_times(self.local.mT, X), self.division.n)

    @torch.no_grad()
    def sketch(self, X: Tensor) -> Tensor:
        """AX for the whole X (n, k): the rows of this process where A is divided by rows, else all of them."""
        if self.division.side == "rows":
            return _times(self.local, X)
        # Summed in at least float32, as a product of all columns would be.
        Y = _times(self.local, X[self.division.columns])
        return self.division.total(Y.to(torch.promote_types(Y.dtype, torch.float32)))

    @torch.no_grad()
    def coordinates(self, Q: Tensor) -> Tensor:
        """The columns of QᵀA (k, n) that this process has; Q (m, k) is the piece of the rows that A is divided by."""
        B = _times(self.local.mT, Q).mT
        return self.division.own_columns_of_sum(B) if self.division.side == "rows" else B.contiguous()

    @torch.no_grad()
    def orthonormalize(self, Y: Tensor) -> Tensor:
        """Orthonormal columns with the range of Y (m, k), which is in pieces where A is divided by rows."""
        if self.division.side == "columns":
            return orthonormalize(Y)
        Q = divided_cholesky_qr(Y, self.division.total)
        if Q is None:  # dependent columns; the same answer on all processes
            return orthonormalize(self.division.all_rows(Y))[self.division.rows]
        return Q

    @torch.no_grad()
    def signs(self, Q: Tensor) -> Tensor:
        """`canonical_signs` of a Q that is in pieces where A is divided by rows."""
        if self.division.side == "columns":
            return canonical_signs(Q)
        extremes = torch.nn.functional.pad(Q, (0, 0, 0, 1))  # a row of zeros, which decides on nothing
        most, least = self.division.largest(torch.cat([extremes.amax(dim=0), -extremes.amin(dim=0)])).chunk(2)
        return torch.where(most < least, -1.0, 1.0).to(Q.dtype)[None]

    @torch.no_grad()
    def amax(self) -> Tensor:
        """Largest |entry| of the whole matrix, 0-D; NaN or infinite exactly if an entry is."""
        if self.local.numel():
            largest = torch.maximum(self.local.amax(), -self.local.amin())
        else:
            largest = self.local.new_zeros(())
        # A maximum drops NaN on some backends, a sum does not.
        finite = torch.where(largest.isfinite(), largest, torch.zeros_like(largest))
        poison = self.division.total((largest - finite).to(torch.float32))
        return self.division.largest(finite.clone()) + poison.to(largest.dtype)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """The whole matrix, on all processes: a gather of m·n numbers, for finders that cannot do without.

        A warning says so, once.
        """
        warnings.warn(
            "a matrix that is divided over processes is gathered as a whole on each of them; of the finders of subspaces "
            "the exact SVD needs that, the randomised one does not (shown once)",
            RuntimeWarning,
            stacklevel=2,
        )
        if self.division.side == "rows":
            return self.division.all_rows(self.local)
        return self.division.all_columns(self.local)

    @torch.no_grad()
    def squared_norm(self, scale: Tensor) -> Tensor:
        """‖scale·A‖²_F of the whole matrix, 0-D, float64."""
        X = self.local.to(torch.promote_types(self.dtype, torch.float32)) * scale
        return self.division.total(torch.linalg.vector_norm(X, dtype=torch.float64).square())


@torch.no_grad()
def divided_range_finder(
    operator: DividedOperator, rank: int, *, generator: torch.Generator | None = None
) -> RangeFinderResult:
    """`range_finder` for a divided matrix: the same basis to rounding, in pieces.

    A by rows: Y and the basis stay divided by rows; CholeskyQR in float64, checked, needs k×k all-reduces only, and
    the one large call is the reduce-scatter of QᵀA, k·n numbers. A by columns: the sketch, m·k numbers, is all-reduced
    and every process has the whole basis. Either way QᵀA is divided by columns.

    Args:
        operator: the matrix.
        rank: number k of columns of the basis.
        generator: CPU generator, in the same state on all processes; draws what `range_finder` draws.

    Returns:
        `RangeFinderResult`: ``basis`` in rows of this process, or whole where A is divided by columns; ``projected`` in
        columns of this process.

    Raises:
        ValueError: A has a non-finite entry.
    """
    division, n = operator.division, operator.shape[-1]
    scale = inverse_scale(finite_amax(operator), operator.dtype, operator.device)
    Omega = gaussian_sketch(n, rank, generator=generator, scale=scale, device=operator.device, dtype=operator.dtype)
    Q = operator.orthonormalize(operator.sketch(Omega))
    B = operator.coordinates(Q * scale)
    B64 = B.double()
    X = torch.linalg.eigh(division.total(B64 @ B64.mT)).eigenvectors.flip(-1).to(B.dtype)
    projected, Q = X.mT @ B, Q @ X
    squares = division.total(projected.double().square().sum(dim=-1))
    norms = squares.sqrt()
    kept = within_rank(norms.to(projected.dtype), operator.shape[0], operator.dtype)
    if not bool(kept.all()):
        Q = complete(
            Q,
            ~kept,
            m=operator.shape[0],
            generator=generator,
            rows=division.rows if division.side == "rows" else slice(None),
            orthonormalized=operator.orthonormalize,
        )
        projected = torch.where(kept.mT, projected, 0.0)
    signs = operator.signs(Q)
    return RangeFinderResult(Q * signs, projected * (signs.mT / scale), norms.to(Q.dtype) / scale.squeeze())


def _times(A: Tensor, X: Tensor) -> Tensor:
    if A.numel():
        return _product(A, X)
    return A.new_zeros(A.shape[0], X.shape[1], dtype=torch.promote_types(A.dtype, X.dtype))
