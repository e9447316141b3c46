"""Orthonormalisation through the Gram matrix: products and small factorisations only, at the price of conditioning.

None of these is safe on its own: :func:`subspan.linalg.orthonormalize` checks what they return.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from subspan.linalg.sketch import gaussian_sketch, seeded_generator

__all__ = ["cholesky_qr2", "divided_cholesky_qr", "shifted_cholesky_qr3", "sketched_cholesky_qr"]

# Rows of the preconditioning sketch for each column, and the shift as a share of the trace of the Gram matrix: the
# smallest at which Cholesky of a float32 Gram matrix was never seen to break down. (The shift 11(mn + n(n+1))u‖Y‖² of
# the literature is larger, and three passes then end at a condition number of 1e5.)
_ROWS = 1.5
_SHIFT = 1e-6


def cholesky_qr2(Y: Tensor) -> Tensor:
    """CholeskyQR twice: YᵀY = RᵀR, Q = YR⁻¹. Breaks down when κ(Y)² nears 1/u."""
    return _cholesky_qr(_cholesky_qr(_unit(Y)))


def shifted_cholesky_qr3(Y: Tensor) -> Tensor:
    """CholeskyQR with a shifted Gram matrix, which cannot break down, and then twice without."""
    eps = torch.finfo(Y.dtype).eps
    shift = _SHIFT * eps / torch.finfo(torch.float32).eps
    return _cholesky_qr(_cholesky_qr(_cholesky_qr(_unit(Y), shift=shift)))


def sketched_cholesky_qr(Y: Tensor) -> Tensor:
    """QR of a sketch SY gives R with κ(YR⁻¹) of a few units whatever κ(Y) is; CholeskyQR twice does the rest.

    The sketch is a function of the shape alone, so that equal input gives equal output.
    """
    m, r = Y.shape[-2:]
    rows = min(m, int(_ROWS * r) + 8)
    S = gaussian_sketch(
        m, rows, generator=seeded_generator("sketched CholeskyQR", m, r), device=Y.device, dtype=Y.dtype
    )
    Y = _unit(Y)
    R = torch.linalg.qr(S.mT @ Y, mode="r").R
    return _cholesky_qr(_cholesky_qr(_times_inverse(Y, R)))


def divided_cholesky_qr(Y: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The rows of Q that belong to the rows Y (mᵢ, r) of this process; None where the columns are dependent.

    Three passes in float64, the first one shifted. The condition number of a float32 sketch is at most about 1e8 unless
    its columns are dependent, which float64 squares without loss. The Gram matrices of the passes are summed over the
    processes, r×r numbers each, so all come to the same answer.

    Args:
        Y: rows of this process, maybe none.
        total: sums over the processes.
    """
    Z = Y.double()
    lengths = total(Z.square().sum(dim=0)).sqrt()
    Z = Z / torch.where(lengths > 0, lengths, 1.0)
    identity = torch.eye(Z.shape[1], dtype=Z.dtype, device=Z.device)
    for shift in (_SHIFT * torch.finfo(Z.dtype).eps / torch.finfo(torch.float32).eps, 0.0, 0.0):
        gram = total(Z.mT @ Z)
        error = (gram - identity).abs().amax()
        R, info = torch.linalg.cholesky_ex(gram + shift * gram.diagonal().sum() * identity, upper=True)
        if int(info):
            return None
        Z = _times_inverse(Z, R)
    # The last pass squares the error that it finds.
    return Z.to(torch.promote_types(Y.dtype, torch.float32)) if float(error) < 1e-3 else None


def _cholesky_qr(Y: Tensor, shift: float = 0.0) -> Tensor:
    gram = Y.mT @ Y
    if shift:
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        diagonal += shift * diagonal.sum(dim=-1, keepdim=True)
    # cholesky_ex does not wait for a device and does not raise: what broke down is seen in the result.
    return _times_inverse(Y, torch.linalg.cholesky_ex(gram, upper=True).L)


def _times_inverse(Y: Tensor, R: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(R, Y, upper=True, left=False)


def _unit(Y: Tensor) -> Tensor:
    """Columns of unit length, so that no square over- or underflows; zero columns stay zero."""
    largest = Y.abs().amax(dim=(-2, -1), keepdim=True)
    return torch.nn.functional.normalize(Y / torch.where(largest > 0, largest, torch.ones_like(largest)), dim=-2)
