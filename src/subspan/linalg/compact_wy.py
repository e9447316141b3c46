"""Products of Householder reflectors in compact-WY form, Q = I − VTVᵀ, applied and extended without forming Q."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CompactWY"]


class CompactWY:
    """Orthogonal Q = H₁H₂…H_k = I − VTVᵀ of shape m×m with V (m×k) and T (k×k).

    Each H_i = I − τ_i v_i v_iᵀ; V holds the v_i, unit lower trapezoidal; T is upper triangular. The basis that k
    columns give is the first k columns of Q. Everything is batched over leading dimensions, and an identity reflector
    (τ = 0, from a zero column) is no special case: T = (I + diag(τ)·S)⁻¹ diag(τ) with S the strict upper triangle of
    VᵀV divides by nothing.

    Args:
        V: (..., m, k), unit lower trapezoidal.
        T: (..., k, k), upper triangular.

    Example:
        >>> Q, R = CompactWY.factor(torch.tensor([[3.0], [4.0]]))
        >>> Q.apply_transpose(torch.tensor([[3.0], [4.0]])).mT
        tensor([[-5.,  0.]])

    Source: Schreiber, Van Loan, SIAM J. Sci. Stat. Comput. 10 (1989); Puglisi, SIAM J. Sci. Stat. Comput. 13 (1992).
    """

    def __init__(self, V: Tensor, T: Tensor) -> None:
        self.V = V
        self.T = T

    @classmethod
    @torch.no_grad()
    def factor(cls, Y: Tensor) -> tuple[CompactWY, Tensor]:
        """Householder QR of Y.

        Args:
            Y: (..., m, k) with k <= m, float32 or float64.

        Returns:
            Q in compact-WY form, and R (..., k, k), upper triangular, with Y = Q[:, :k] R.

        Raises:
            ValueError: if k > m.
        """
        m, k = Y.shape[-2:]
        if k > m:
            raise ValueError(f"{k} reflectors of length {m} do not exist: pass at most {m} columns")
        packed, tau = torch.geqrf(Y)
        V = packed.tril(-1)
        V.diagonal(dim1=-2, dim2=-1).fill_(1)
        return cls(V, _triangular_factor(V, tau)), packed[..., :k, :].triu()

    @classmethod
    @torch.no_grad()
    def from_vectors(cls, V: Tensor) -> CompactWY:
        """Q from its Householder vectors alone, τ_i = 2/(v_iᵀv_i).

        H_i is then orthogonal whatever V is, so that rounded vectors (bfloat16, int8) still give an orthonormal basis.

        Args:
            V: (..., m, k); columns must not be zero. Reflectors that were identities become true reflections.

        Returns:
            Q in compact-WY form, in float32 (float64 for float64).
        """
        V = V.to(torch.promote_types(V.dtype, torch.float32))
        return cls(V, _triangular_factor(V, 2 / V.square().sum(dim=-2)))

    @property
    def shape(self) -> torch.Size:
        """Shape (..., m, k) of the basis."""
        return self.V.shape

    @torch.no_grad()
    def apply(self, X: Tensor) -> Tensor:
        """QX for X of shape (..., m, p)."""
        return X - self.V @ (self.T @ (self.V.mT @ X))

    @torch.no_grad()
    def apply_transpose(self, X: Tensor) -> Tensor:
        """QᵀX for X of shape (..., m, p)."""
        return X - self.V @ (self.T.mT @ (self.V.mT @ X))

    @torch.no_grad()
    def reflect_(self, X: Tensor) -> Tensor:
        """X ← QᵀX in place, for X of shape (..., m, p)."""
        return X.sub_(self.V @ (self.T.mT @ (self.V.mT @ X)))

    @torch.no_grad()
    def project(self, X: Tensor) -> Tensor:
        """The first k rows of QᵀX, shape (..., k, p), for X of shape (..., m, p)."""
        k = self.shape[-1]
        return X[..., :k, :] - (self.V[..., :k, :] @ self.T.mT) @ (self.V.mT @ X)

    @torch.no_grad()
    def back_project(self, X: Tensor) -> Tensor:
        """Q[:, :k] X, shape (..., m, p), for X of shape (..., k, p)."""
        m, k = self.shape[-2:]
        padded = torch.nn.functional.pad(X, (0, 0, 0, m - k))
        return padded - self.V @ ((self.T @ self.V[..., :k, :].mT) @ X)

    @torch.no_grad()
    def columns(self) -> Tensor:
        """The basis, Q[:, :k], as an explicit matrix of shape (..., m, k)."""
        k = self.shape[-1]
        Q = self.V @ (self.T @ self.V[..., :k, :].mT)
        Q.neg_().diagonal(dim1=-2, dim2=-1).add_(1)
        return Q

    @torch.no_grad()
    def append(self, Y: Tensor) -> CompactWY:
        """The Q whose basis spans that of this one and the columns of Y.

        Args:
            Y: (..., m, b) with k + b <= m.

        Returns:
            Q in compact-WY form with k + b reflectors; this one is not changed.
        """
        return self.append_panel(self.apply_transpose(Y)[..., self.shape[-1] :, :])

    @torch.no_grad()
    def append_panel(self, panel: Tensor) -> CompactWY:
        """:meth:`append` for who has the rows k to m of QᵀY already, shape (..., m - k, b)."""
        return self.then(CompactWY.factor(panel)[0])

    @torch.no_grad()
    def then(self, other: CompactWY) -> CompactWY:
        """The product of this Q and of ``other``, which acts on the rows from k on.

        With V = [V₁ V₂], the off-diagonal block of T is −T₁(V₁ᵀV₂)T₂.

        Args:
            other: of shape (..., m - k, b).

        Returns:
            The product in compact-WY form.
        """
        k, b = self.shape[-1], other.shape[-1]
        coupling = -self.T @ (self.V[..., k:, :].mT @ other.V) @ other.T
        pad = torch.nn.functional.pad
        V = torch.cat([self.V, pad(other.V, (0, 0, k, 0))], dim=-1)
        T = torch.cat([torch.cat([self.T, coupling], dim=-1), pad(other.T, (k, 0))], dim=-2)
        assert T.shape[-1] == k + b
        return CompactWY(V, T)


def _triangular_factor(V: Tensor, tau: Tensor) -> Tensor:
    """T = (I + diag(τ)·triu(VᵀV, 1))⁻¹ diag(τ); the solver takes the unit diagonal for granted."""
    S = (V.mT @ V).triu(1)
    return torch.linalg.solve_triangular(tau.unsqueeze(-1) * S, torch.diag_embed(tau), upper=True, unitriangular=True)
