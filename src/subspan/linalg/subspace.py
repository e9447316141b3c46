"""The front door of the fixed-rank problem: a basis of the leading directions by whatever is fastest for the matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from subspan.linalg.exact import exact_basis, gram_basis
from subspan.linalg.krylov import krylov_range_finder
from subspan.linalg.operator import MatrixOperator, as_operator
from subspan.linalg.range_finder import RangeFinderResult, range_finder

__all__ = ["MethodChoice", "SubspaceMethod", "choose_method", "subspace"]

SubspaceMethod = Literal["auto", "sketch", "power", "krylov", "gram", "svd"]

# A side at which a full SVD takes no longer than the calls of the other methods.
_SHORT = 32
# Share of the directions beyond which sketch, QR and rotation cost more than the eigenproblem of all of them.
_MOST = 0.6
# Share below which reading A costs more than multiplying it, and a plain sketch misses much.
_FEW = 1 / 16


class MethodChoice(NamedTuple):
    """What :func:`subspace` does for a matrix, and why.

    Attributes:
        method: name of the method.
        reason: a sentence.
    """

    method: Literal["sketch", "power", "gram", "svd"]
    reason: str


def choose_method(shape: Sequence[int], rank: int, device: torch.device | str = "cpu") -> MethodChoice:
    """The method that :func:`subspace` takes for a matrix of this shape, and why.

    Args:
        shape: (..., m, n).
        rank: columns of the basis.
        device: where the matrix is.

    Returns:
        :class:`MethodChoice`.

    Example:
        >>> choose_method((1024, 2736), 256).method, choose_method((16, 64), 4).method
        ('sketch', 'svd')
    """
    m, n = shape[-2:]
    short = min(m, n)
    if rank > short:
        return MethodChoice("svd", f"rank {rank} is more than the {short} directions there are: the SVD is completed")
    if short <= _SHORT and torch.device(device).type == "cpu":
        return MethodChoice("svd", f"the shorter side, {short}, is so short that the exact SVD costs no more")
    if rank > _MOST * short:
        return MethodChoice("gram", f"rank {rank} is most of {short} directions: one eigenproblem gives all of them")
    if rank <= _FEW * short:
        return MethodChoice(
            "power",
            f"rank {rank} is few of {short} directions: a power iteration is cheap and a sketch would miss much",
        )
    return MethodChoice(
        "sketch", f"rank {rank} of {short} directions: sketch, QR and rotation take the fewest products"
    )


@torch.no_grad()
def subspace(
    A: Tensor | MatrixOperator,
    rank: int,
    method: SubspaceMethod = "auto",
    *,
    generator: torch.Generator | None = None,
) -> RangeFinderResult:
    """Basis of (about) the ``rank`` leading left singular directions of A, in descending order, and QᵀA.

    ============  ====================================================  ==================================
    method        how                                                   accuracy
    ============  ====================================================  ==================================
    ``"sketch"``  :func:`range_finder`                                  0.91 of the energy at σ_i = i^-1/2
    ``"power"``   :func:`range_finder` with one power iteration         0.98 of it
    ``"krylov"``  :func:`krylov_range_finder`                           0.99 of it
    ``"gram"``    :func:`gram_basis`                                    exact down to √u·σ₁
    ``"svd"``     :func:`exact_basis`                                   exact
    ``"auto"``    chosen by shape, rank and device; :func:`choose_method` says which one and why
    ============  ========================================================================================

    Args:
        A: tensor (..., m, n) or operator; not modified.
        rank: columns r of the basis, from 1 to m.
        method: see the table.
        generator: CPU generator of the randomised methods; None is torch's own.

    Returns:
        :class:`RangeFinderResult` with all three fields.

    Raises:
        ValueError: if A is empty or not finite, or an argument is out of its range.

    Example:
        >>> subspace(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2).singular_values
        tensor([3., 2.])
    """
    operator = as_operator(A)
    if method == "auto":
        method = choose_method(operator.shape, rank, operator.device).method
    if method == "svd":
        return exact_basis(operator, rank)
    if method == "gram":
        return gram_basis(operator, rank)
    if method in ("sketch", "power"):
        return range_finder(operator, rank, generator=generator, n_iter=int(method == "power"))
    if method == "krylov":
        return krylov_range_finder(operator, rank, generator=generator)
    raise ValueError(f"method={method!r} is unknown: choose 'auto', 'sketch', 'power', 'krylov', 'gram' or 'svd'")
