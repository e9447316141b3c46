"""Subspaces that follow a sequence of matrices: one cheap step for each new matrix instead of a new factorisation.

All take the left basis Q (m×r) of A (m×n); for the right side pass ``A.mT``, a view, and the n×r basis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subspan.linalg.operator import MatrixOperator, as_operator
from subspan.linalg.orthonormal import orthonormalize
from subspan.linalg.scaling import finite_amax, inverse_scale

__all__ = ["dct_basis", "grassmann_step", "largest_rows", "oja_step", "power_step", "svd_update"]


@torch.no_grad()
def power_step(A: Tensor | MatrixOperator, Q: Tensor) -> Tensor:
    """Warm block power step Q ← qr(A(AᵀQ)), columns kept from flipping.

    Args:
        A: tensor (..., m, n) or operator.
        Q: (..., m, r), orthonormal columns.

    Returns:
        Orthonormal (..., m, r), each column at an acute angle to that of Q; float32 or float64.

    Raises:
        ValueError: if A has a non-finite entry or Q does not fit.

    Example:
        >>> power_step(torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([[0.6], [0.8]])).abs().mT
        tensor([[1., 0.]])

    Source: Halko, Martinsson, Tropp, arXiv:0909.4061, section 4.5.
    """
    operator, scale, Q = _tracked(A, Q)
    Z = torch.nn.functional.normalize(operator.rmatmul(Q * scale), dim=-2)
    return _aligned(orthonormalize(operator.matmul(Z * scale)), Q)


@torch.no_grad()
def oja_step(A: Tensor | MatrixOperator, Q: Tensor, step: float) -> Tensor:
    """Online principal component analysis: a gradient step on ‖A − QQᵀA‖²_F / (2‖A‖²_F), and QR back to a basis.

    Q ← qr(Q + step·(I − QQᵀ)A(AᵀQ)/‖A‖²_F). Dividing by the norm makes the step free of the scale of A.

    Args:
        A: tensor (..., m, n) or operator.
        Q: (..., m, r), orthonormal columns.
        step: length of the step, not negative; the limit of large steps is the power step without its QQᵀ part.

    Returns:
        Orthonormal (..., m, r), columns aligned with those of Q; float32 or float64.

    Raises:
        ValueError: if A has a non-finite entry, Q does not fit or ``step`` is negative.

    Example:
        >>> Q = torch.tensor([[0.6], [0.8]])
        >>> [round(x, 2) for x in oja_step(torch.diag(torch.tensor([1.0, 0.0])), Q, 1.0).flatten().tolist()]
        [0.89, 0.46]

    Source: Oja, J. Math. Biol. 15 (1982); Liang et al., Online Subspace Descent, arXiv:2408.12857.
    """
    _check_step(step)
    operator, scale, Q = _tracked(A, Q)
    return _aligned(orthonormalize(Q + step * _descent(operator, scale, Q)), Q)


@torch.no_grad()
def grassmann_step(A: Tensor | MatrixOperator, Q: Tensor, step: float) -> Tensor:
    """Step along the Grassmann geodesic of the largest descent direction of ‖A − QQᵀA‖²_F / (2‖A‖²_F).

    The descent direction D = (I − QQᵀ)A(AᵀQ)/‖A‖²_F is replaced by its leading term σuvᵀ. Along the geodesic the
    direction Qv turns to u and the rest of the subspace stays:

        Q ← Q + (Qv (cos φ − 1) + u sin φ) vᵀ,  φ = step·σ.

    Q stays orthonormal up to rounding; call :func:`orthonormalize` now and then over thousands of steps.

    Args:
        A: tensor (..., m, n) or operator.
        Q: (..., m, r), orthonormal columns.
        step: length of the step, not negative. The angle is at most π/2, beyond which the error grows again.

    Returns:
        Orthonormal (..., m, r), float32 or float64; Q itself where there is nothing to gain.

    Raises:
        ValueError: if A has a non-finite entry, Q does not fit or ``step`` is negative.

    Example:
        >>> Q = torch.tensor([[0.6], [0.8]])
        >>> [round(x, 2) for x in grassmann_step(torch.diag(torch.tensor([1.0, 0.0])), Q, 1.0).flatten().tolist()]
        [0.9, 0.43]

    Source: Edelman, Arias, Smith, arXiv:physics/9806030; Balzano, Nowak, Recht, arXiv:1006.4046; Rajabi et al.,
    SubTrack++, arXiv:2502.01586.
    """
    _check_step(step)
    operator, scale, Q = _tracked(A, Q)
    D = _descent(operator, scale, Q)
    v = torch.linalg.eigh(D.mT @ D).eigenvectors[..., -1:]
    Dv = D @ v
    # What rounding leaves of Q in the direction would undo the orthogonality.
    Dv = Dv - Q @ (Q.mT @ Dv)
    sigma = torch.linalg.vector_norm(Dv, dim=-2, keepdim=True)
    u = Dv / sigma.clamp_min(torch.finfo(Q.dtype).tiny)
    angle = torch.where(sigma > torch.finfo(Q.dtype).eps, (step * sigma).clamp_max(math.pi / 2), 0.0)
    return Q + (Q @ v * (angle.cos() - 1) + u * angle.sin()) @ v.mT


@torch.no_grad()
def svd_update(
    U: Tensor, S: Tensor, C: Tensor, *, rank: int | None = None, forget: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Left factors of the truncated SVD of [forget·U diag(S), C] from those of what came before.

    With C = UP + WR (WR the QR of what U does not hold), the SVD of the small matrix [[forget·diag(S), P], [0, R]]
    turns [U W]. Without truncation nothing is lost: U diag(S²) Uᵀ is the Gram matrix of all columns so far.

    Args:
        U: (..., m, r), orthonormal columns.
        S: (..., r), not negative.
        C: (..., m, c), new columns.
        rank: columns to keep, r by default; at most min(m, r + c).
        forget: factor on the old singular values, from 0 to 1.

    Returns:
        (U, S) of shapes (..., m, rank) and (..., rank), S descending.

    Raises:
        ValueError: if shapes or arguments do not fit, or C has a non-finite entry.

    Example:
        >>> U, S = svd_update(torch.eye(3)[:, :1], torch.tensor([2.0]), torch.tensor([[0.0], [5.0], [0.0]]))
        >>> S.tolist()
        [5.0]

    Source: Brand, Linear Algebra Appl. 415 (2006).
    """
    if U.shape[:-1] != C.shape[:-1] or S.shape != (*U.shape[:-2], U.shape[-1]):
        raise ValueError(f"U {tuple(U.shape)}, S {tuple(S.shape)} and C {tuple(C.shape)} do not fit")
    if not 0 <= forget <= 1:
        raise ValueError(f"forget={forget} must be from 0 to 1")
    m, r, c = U.shape[-2], U.shape[-1], C.shape[-1]
    kept = r if rank is None else rank
    if not 1 <= kept <= min(m, r + c):
        raise ValueError(f"rank={kept} is not possible with {r} old and {c} new columns of length {m}")
    if not bool(C.isfinite().all()):
        raise ValueError("C has a NaN or infinite entry: leave the columns out")
    dtype = torch.promote_types(torch.promote_types(U.dtype, C.dtype), torch.float32)
    U, S, C = U.to(dtype), S.to(dtype), C.to(dtype)
    # Householder QR of [U C] is orthonormal to rounding even where C lies in the span of U or r + c is above m.
    Q, R = torch.linalg.qr(torch.cat([U, C], dim=-1))
    small = torch.cat([R[..., :r] * (forget * S).unsqueeze(-2), R[..., r:]], dim=-1)
    turn, sigma, _ = torch.linalg.svd(small, full_matrices=False)
    return Q @ turn[..., :kept], sigma[..., :kept]


@torch.no_grad()
def largest_rows(A: Tensor, r: int) -> Tensor:
    """Numbers of the r rows of largest norm, ascending; of ``A.mT`` those of columns.

    Args:
        A: (..., m, n).
        r: rows to select, from 1 to m.

    Returns:
        int64 of shape (..., r).

    Raises:
        ValueError: if r is not between 1 and m.

    Example:
        >>> largest_rows(torch.tensor([[3.0], [1.0], [-5.0]]), 2)
        tensor([0, 2])

    Source: Muhamed et al., Grass, arXiv:2406.17660.
    """
    m = A.shape[-2]
    if not 1 <= r <= m:
        raise ValueError(f"r={r} rows cannot be selected from {m}: between 1 and {m}")
    largest = A.abs().amax(dim=(-2, -1), keepdim=True).to(torch.promote_types(A.dtype, torch.float32))
    norms = torch.linalg.vector_norm(A / torch.where(largest > 0, largest, 1.0), dim=-1)
    return norms.topk(r, dim=-1).indices.sort(dim=-1).values


@torch.no_grad()
def dct_basis(m: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Orthonormal m×m matrix of the discrete cosine transform (DCT-II), a basis that all matrices of a size share.

    Column k is √(2/m)·cos(π(i + ½)k/m), and 1/√m for k = 0. The r columns that matter for A are
    ``largest_rows(dct_basis(m).mT @ A, r)``.

    Args:
        m: size.
        device: device of the result, the CPU by default.
        dtype: floating-point type of the result; computed in float64.

    Returns:
        Tensor (m, m).

    Example:
        >>> dct_basis(2)
        tensor([[ 0.7071,  0.7071],
                [ 0.7071, -0.7071]])

    Source: Ahmed, Natarajan, Rao, IEEE Trans. Comput. C-23 (1974); Modoranu et al., arXiv:2505.17967.
    """
    position = torch.arange(m, dtype=torch.float64)
    basis = torch.cos(torch.outer(position + 0.5, position) * (math.pi / m)) * math.sqrt(2 / m)
    basis[:, 0] = 1 / math.sqrt(m)
    return basis.to(device=device, dtype=dtype)


def _tracked(A: Tensor | MatrixOperator, Q: Tensor) -> tuple[MatrixOperator, Tensor, Tensor]:
    operator = as_operator(A)
    if Q.shape[:-1] != operator.shape[:-1] or Q.shape[-1] > operator.shape[-2]:
        raise ValueError(f"a basis of shape {tuple(Q.shape)} does not fit a matrix of shape {tuple(operator.shape)}")
    dtype = torch.promote_types(torch.promote_types(operator.dtype, Q.dtype), torch.float32)
    return operator, inverse_scale(finite_amax(operator), dtype, operator.device), Q.to(dtype)


def _descent(operator: MatrixOperator, scale: Tensor, Q: Tensor) -> Tensor:
    """(I − QQᵀ)A(AᵀQ)/‖A‖²_F, minus the gradient of ‖A − QQᵀA‖²_F / (2‖A‖²_F) on the Grassmann manifold."""
    power = operator.matmul(operator.rmatmul(Q * scale) * scale)
    total = operator.squared_norm(scale)[..., None, None].clamp_min(torch.finfo(torch.float64).tiny)
    return ((power - Q @ (Q.mT @ power)) / total).to(Q.dtype)


def _aligned(new: Tensor, old: Tensor) -> Tensor:
    """``new`` with the signs of columns that put each one at an acute angle to that of ``old``."""
    return new * torch.where((new * old).sum(dim=-2, keepdim=True) < 0, -1.0, 1.0).to(new.dtype)


def _check_step(step: float) -> None:
    if not (math.isfinite(step) and step >= 0):
        raise ValueError(f"step={step} must be a finite number that is not negative")
