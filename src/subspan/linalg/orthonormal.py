"""Orthonormal bases: ways to make them, uniform samples of the Stiefel manifold, signs, and the error of a basis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from subspan.linalg.cholesky_qr import cholesky_qr2, shifted_cholesky_qr3, sketched_cholesky_qr
from subspan.linalg.polar import gram_schmidt_twice, newton_schulz
from subspan.linalg.sketch import gaussian_sketch

__all__ = ["OrthonormalMethod", "canonical_signs", "orthogonality_error", "orthonormalize", "random_stiefel"]


OrthonormalMethod = Literal[
    "householder", "cholesky", "shifted_cholesky", "sketched_cholesky", "gram_schmidt", "newton_schulz"
]

_METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "cholesky": cholesky_qr2,
    "shifted_cholesky": shifted_cholesky_qr3,
    "sketched_cholesky": sketched_cholesky_qr,
    "gram_schmidt": gram_schmidt_twice,
    "newton_schulz": newton_schulz,
}


@torch.no_grad()
def orthonormalize(Y: Tensor, *, method: OrthonormalMethod = "householder", fallback: bool = True) -> Tensor:
    """Orthonormal basis Q of the columns of Y, by default by thin Householder QR, Y = QR.

    =======================  ================================================================  ================
    method                   how                                                               κ(Y) in float32
    =======================  ================================================================  ================
    ``"householder"``        LAPACK's QR; any finite Y, rank-deficient and zero ones too       any
    ``"cholesky"``           CholeskyQR2: Gram matrix, Cholesky, triangular solve, twice       below 3e3
    ``"shifted_cholesky"``   CholeskyQR3: a shifted pass first                                 below 1e6
    ``"sketched_cholesky"``  QR of a sketch of Y as preconditioner, then CholeskyQR2         below 1e7
    ``"gram_schmidt"``       classical Gram-Schmidt, column by column, each one twice          below 1e7
    ``"newton_schulz"``      polar factor, products only                                       below 1e5
    =======================  ================================================================  ================

    All but the first are there for devices on which QR is slow. They are checked, ‖QᵀQ − I‖_F ≤ 10u√r with the unit
    roundoff u, and Householder QR replaces what fails, matrix by matrix in a batch. (Plain CholeskyQR2 fails on the
    gradients of early training.)

    Args:
        Y: (..., m, r) with r <= m; half-precision input is orthonormalised in float32.
        method: see the table. Every method gives another basis of the same space.
        fallback: replace what fails the check; without it the result is what the method gives, be it NaN.

    Returns:
        Q of shape (..., m, r), float32, or float64 for float64 input. A rank-deficient or zero Y gets arbitrary
        orthonormal columns where its own give none.

    Raises:
        ValueError: if r > m or the method is unknown.

    Example:
        >>> orthonormalize(torch.tensor([[3.0], [4.0]])).abs()
        tensor([[0.6000],
                [0.8000]])

    Source: Golub, Van Loan, Matrix Computations, 5.2; Fukaya et al., arXiv:1809.11085 (shifted CholeskyQR3); Balabanov,
    arXiv:2210.09953 (sketched CholeskyQR).
    """
    m, r = Y.shape[-2:]
    if r > m:
        raise ValueError(f"{r} columns of length {m} cannot be orthonormal: pass at most {m} columns")
    if method != "householder" and method not in _METHODS:
        raise ValueError(f"method={method!r} is unknown: choose 'householder', {', '.join(map(repr, _METHODS))}")
    Y = Y.to(torch.promote_types(Y.dtype, torch.float32))
    if method == "householder" or r == 0:
        return _householder(Y)
    Q = _METHODS[method](Y)
    if not fallback:
        return Q
    gram = Q.mT @ Q
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    passed = torch.linalg.matrix_norm(gram) <= 5 * torch.finfo(Q.dtype).eps * math.sqrt(r)  # False for NaN
    if not bool(passed.all()):
        Q = torch.where(passed[..., None, None], Q, _householder(Y))
    return Q


@torch.no_grad()
def random_stiefel(
    m: int,
    r: int,
    *,
    generator: torch.Generator,
    batch_shape: tuple[int, ...] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform (Haar) sample Q of the m×r matrices with orthonormal columns.

    QR of a Gaussian Z = QR, the columns of Q times sign(diag R). Without the signs the law of Q is that of LAPACK's
    sign convention (the law of QQᵀ is right either way).

    Args:
        m: length of the columns.
        r: number of columns, at most m.
        generator: CPU generator, advanced by the call.
        batch_shape: leading dimensions; each matrix is an independent sample.
        device: device of the result, the CPU by default.
        dtype: floating-point type of the result.

    Returns:
        Q of shape (*batch_shape, m, r).

    Raises:
        ValueError: if r > m.

    Example:
        >>> from subspan.linalg import seeded_generator
        >>> Q = random_stiefel(5, 2, generator=seeded_generator(0))
        >>> bool(torch.allclose(Q.mT @ Q, torch.eye(2), atol=1e-6))
        True

    Source: Mezzadri, arXiv:math-ph/0609050.
    """
    if not 0 < r <= m:
        raise ValueError(f"r={r} orthonormal columns of length m={m} do not exist: r must be between 1 and {m}")
    Z = gaussian_sketch(
        m,
        r,
        generator=generator,
        batch_shape=batch_shape,
        device=device,
        dtype=torch.promote_types(dtype, torch.float32),
    )
    Q, R = torch.linalg.qr(Z, mode="reduced")
    return (Q * _signs(R.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)).to(dtype)


@torch.no_grad()
def canonical_signs(Q: Tensor) -> Tensor:
    """Signs that make the entry of largest magnitude of each column positive.

    Singular vectors are defined up to a sign; moments that are kept across a refresh would otherwise depend on the
    LAPACK build. Multiply the columns of the basis, and the rows of what was projected with it, by these.

    Args:
        Q: (..., m, r).

    Returns:
        ±1 of shape (..., 1, r), in the dtype of Q; +1 for a zero column and for a tie of both signs.

    Example:
        >>> canonical_signs(torch.tensor([[0.6, -0.8], [-0.8, 0.6]]))
        tensor([[-1., -1.]])
    """
    # The sign of the largest entry plus the smallest one: two reductions, and no |Q| in memory.
    return _signs(Q.amax(dim=-2, keepdim=True) + Q.amin(dim=-2, keepdim=True))


@torch.no_grad()
def orthogonality_error(Q: Tensor) -> Tensor:
    """Spectral norm ‖QᵀQ − I‖₂: 0 for orthonormal columns, about 1e-6 for a good float32 basis.

    Args:
        Q: (..., m, r).

    Returns:
        Tensor of shape (...), float32 or float64.

    Example:
        >>> orthogonality_error(2 * torch.eye(3))
        tensor(3.)
    """
    Q = Q.to(torch.promote_types(Q.dtype, torch.float32))
    gram = Q.mT @ Q
    return torch.linalg.matrix_norm(gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device), ord=2)


def _householder(Y: Tensor) -> Tensor:
    """The Q of torch.linalg.qr, without forming R beside it."""
    return torch.linalg.householder_product(*torch.geqrf(Y))


def _signs(x: Tensor) -> Tensor:
    """±1 with the sign of x, +1 at zero (torch.sign gives 0 there, which would delete a column)."""
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)
