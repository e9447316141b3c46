"""Orthonormal bases: Householder QR, uniform samples of the Stiefel manifold, signs, and how orthonormal a basis is."""

from __future__ import annotations

import torch
from torch import Tensor

from subspan.linalg.sketch import gaussian_sketch

__all__ = ["canonical_signs", "orthogonality_error", "orthonormalize", "random_stiefel"]


@torch.no_grad()
def orthonormalize(Y: Tensor) -> Tensor:
    """Orthonormal basis Q of the columns of Y by thin Householder QR, Y = QR.

    Q is orthonormal to rounding for every finite Y: a rank-deficient or zero Y gets arbitrary orthonormal columns where
    its own give none. (Cholesky QR and Gram-Schmidt lose orthogonality on gradients, hence Householder.)

    Args:
        Y: (..., m, r) with r <= m; half-precision input is orthonormalised in float32.

    Returns:
        Q of shape (..., m, r), float32, or float64 for float64 input.

    Raises:
        ValueError: if r > m.

    Example:
        >>> orthonormalize(torch.tensor([[3.0], [4.0]])).abs()
        tensor([[0.6000],
                [0.8000]])

    Source: Golub, Van Loan, Matrix Computations, 5.2.
    """
    m, r = Y.shape[-2:]
    if r > m:
        raise ValueError(f"{r} columns of length {m} cannot be orthonormal: pass at most {m} columns")
    return torch.linalg.qr(Y.to(torch.promote_types(Y.dtype, torch.float32)), mode="reduced").Q


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
        ±1 of shape (..., 1, r), in the dtype of Q; +1 for a zero column.

    Example:
        >>> canonical_signs(torch.tensor([[0.6, -0.8], [-0.8, 0.6]]))
        tensor([[-1., -1.]])
    """
    largest = Q.abs().argmax(dim=-2, keepdim=True)
    return _signs(Q.gather(-2, largest))


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


def _signs(x: Tensor) -> Tensor:
    """±1 with the sign of x, +1 at zero (torch.sign gives 0 there, which would delete a column)."""
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)
