"""Every way to find a basis that can be measured: subspan's own, and those of other libraries where installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor

from subspan.linalg import (
    AdaptiveMethod,
    adaptive_range_finder,
    exact_basis,
    gram_basis,
    krylov_range_finder,
    randomized_svd,
    range_finder,
    seeded_generator,
)

__all__ = ["Finder", "adaptive_finders", "fixed_rank_finders", "peers"]

#: Returns a basis (m, r).
Finder = Callable[[], Tensor]


def fixed_rank_finders(A: Tensor, rank: int) -> dict[str, Finder]:
    """The finders of subspan that take a rank.

    The warm start is given what a step before would have left at best: the basis of the same matrix, for three quarters
    of the columns.

    Args:
        A: (m, n).
        rank: columns of the basis.

    Returns:
        Functions by name.

    Example:
        >>> fixed_rank_finders(torch.eye(8), 2)["sketch, QR"]().shape
        torch.Size([8, 2])
    """

    def sketch(**settings: Any) -> Finder:
        return lambda: range_finder(A, rank, generator=seeded_generator(0), **settings).basis

    old = range_finder(A, max(1, rank * 3 // 4), generator=seeded_generator(1)).basis
    return {
        "sketch, QR": sketch(rotate=False),
        "sketch, QR, rotation": sketch(),
        "one power iteration": sketch(rotate=False, n_iter=1),
        "one power iteration, rotation": sketch(n_iter=1),
        "block Krylov": lambda: krylov_range_finder(A, rank, generator=seeded_generator(0)).basis,
        "sparse sign, QR": sketch(rotate=False, sketch="sparse_sign"),
        "Hadamard, QR": sketch(rotate=False, sketch="hadamard"),
        "column sampling, QR": sketch(rotate=False, sketch="sampling"),
        "warm start, QR": sketch(rotate=False, start=old),
        "randomized_svd": lambda: randomized_svd(A, rank, generator=seeded_generator(0)).U,
        "eigh of Gram": lambda: gram_basis(A, rank).basis,
        "exact SVD": lambda: exact_basis(A, rank).basis,
    }


def adaptive_finders(A: Tensor, rtol: float) -> dict[str, Finder]:
    """The finders of subspan that take a tolerance; the explicit basis is formed.

    Args:
        A: (m, n).
        rtol: tolerance relative to ‖A‖_F.

    Returns:
        Functions by name.

    Example:
        >>> sorted(adaptive_finders(torch.eye(8), 0.5))[:2]
        ['adaptive, gram_schmidt', 'adaptive, householder']
    """

    def adaptive(method: AdaptiveMethod) -> Finder:
        return lambda: adaptive_range_finder(A, rtol=rtol, method=method, generator=seeded_generator(0)).basis()

    return {f"adaptive, {method}": adaptive(method) for method in get_args(AdaptiveMethod)}


def peers(A: Tensor, rank: int) -> dict[str, Finder | str]:
    """What other libraries have for the same task.

    Args:
        A: (m, n), float32.
        rank: columns of the basis.

    Returns:
        Functions by name, or the reason why it cannot be measured.

    Example:
        >>> peers(torch.eye(8), 2)["torch.linalg.svd"]().shape
        torch.Size([8, 2])
    """

    def lowrank(n_iter: int) -> Finder:
        return lambda: torch.svd_lowrank(A, q=rank, niter=n_iter)[0]

    def sklearn(n_iter: int, n_oversamples: int) -> Callable[[ModuleType], Any]:
        settings = {"n_iter": n_iter, "n_oversamples": n_oversamples, "random_state": 0}
        return lambda module: module.randomized_svd(A.numpy(), rank, **settings)[0]

    def arpack(module: ModuleType) -> Any:
        # From a vector of ones, since the argument for a seed differs between versions.
        return module.svds(A.numpy(), k=rank, v0=torch.ones(min(A.shape)).numpy(), return_singular_vectors="u")[0]

    return {
        "torch.svd_lowrank niter=0": lowrank(0),
        "torch.svd_lowrank niter=1": lowrank(1),
        "torch.svd_lowrank niter=2": lowrank(2),
        "torch.linalg.svd": lambda: torch.linalg.svd(A, full_matrices=False)[0][:, :rank],
        "scipy svds": _on_arrays(A, "scipy.sparse.linalg", arpack),
        "scipy interpolative": _on_arrays(
            A, "scipy.linalg.interpolative", lambda module: module.svd(A.double().numpy(), rank)[0]
        ),
        "sklearn n_iter=1, p=0": _on_arrays(A, "sklearn.utils.extmath", sklearn(1, 0)),
        "sklearn defaults": _on_arrays(A, "sklearn.utils.extmath", sklearn(4, 10)),
    }


def _on_arrays(A: Tensor, module: str, function: Callable[[ModuleType], Any]) -> Finder | str:
    """A function on NumPy's arrays as a finder, if its library is there and the matrix on the CPU."""
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError:
        return "not installed"
    except ImportError as error:
        return f"cannot be imported: {error}"
    if A.device.type != "cpu":
        return "runs on the CPU only"
    return lambda: torch.from_numpy(function(imported).copy())
