"""Random test matrices from a seed: the same numbers for every device, bucket, order and world size."""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "SketchKind",
    "gaussian_sketch",
    "hadamard_sketch",
    "sampling_sketch",
    "seeded_generator",
    "sparse_sign_sketch",
]

SketchKind = Literal["gaussian", "sparse_sign", "hadamard", "sampling"]


def seeded_generator(*key: int | str) -> torch.Generator:
    """CPU generator whose stream is a function of ``key`` alone.

    The key is encoded without ambiguity (type, length and value of each part), hashed with SHA-256, and the first eight
    bytes of the digest are the seed. Python's own ``hash`` would not do: it is salted per process.
    (torch's CPU generator uses 32 bits of a seed: among 100,000 keys one pair, give or take, shares its stream.)

    Args:
        *key: integers and strings, for instance (seed, parameter name, refresh count).

    Returns:
        A ``torch.Generator`` on the CPU.

    Raises:
        TypeError: if a part of the key is neither an integer nor a string.

    Example:
        >>> a, b = seeded_generator(0, "layers.0.weight", 3), seeded_generator(0, "layers.0.weight", 3)
        >>> bool((torch.randn(4, generator=a) == torch.randn(4, generator=b)).all())
        True
    """
    digest = hashlib.sha256()
    for part in key:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TypeError(f"a key consists of integers and strings, got {part!r} of type {type(part).__name__}")
        data = str(part).encode()
        digest.update(f"{'s' if isinstance(part, str) else 'i'}{len(data)}:".encode() + data)
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest.digest()[:8], "big"))
    return generator


@torch.no_grad()
def gaussian_sketch(
    n: int,
    l: int,  # noqa: E741 - the letter of the literature
    *,
    generator: torch.Generator | None,
    batch_shape: tuple[int, ...] = (),
    scale: float | Tensor = 1.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    part: slice = slice(None),
) -> Tensor:
    """Gaussian test matrix Ω with independent entries N(0, scale²).

    The numbers are drawn on the CPU in float32 (float64 for ``dtype=torch.float64``), one matrix after the other, so a
    batch holds what as many single calls would have drawn; only then are they scaled, cast and moved.

    Args:
        n: rows of Ω.
        l: columns of Ω, the width of the sketch.
        generator: CPU generator, advanced by the call; None is torch's own.
        batch_shape: leading dimensions.
        scale: factor, a number or a tensor that broadcasts against the result.
        device: device of the result, the CPU by default.
        dtype: floating-point type of the result.
        part: of the first leading dimension; all is drawn, and this kept.

    Returns:
        Ω of shape (*batch_shape, n, l), or that part of it.

    Example:
        >>> gaussian_sketch(6, 2, generator=seeded_generator(0)).shape
        torch.Size([6, 2])

    Source: Halko, Martinsson, Tropp, arXiv:0909.4061.
    """
    drawn_as = torch.promote_types(dtype, torch.float32)
    kept = range(*batch_shape[:1])[part] if batch_shape else range(1)
    each = torch.Size(batch_shape[1:]).numel()
    omega = torch.empty(len(kept) * each, n, l, dtype=drawn_as)
    first, skipped = kept.start * each, torch.empty(0)
    for number in range(torch.Size(batch_shape).numel()):
        inside = first <= number < first + len(omega)
        if not inside and not skipped.numel():
            skipped = torch.empty(n, l, dtype=drawn_as)
        (omega[number - first] if inside else skipped).normal_(generator=generator)
    shape = (len(kept), *batch_shape[1:]) if batch_shape else ()
    # In place: the matrix is new, and another one of its size would be another piece of memory to fill.
    return omega.reshape(*shape, n, l).to(device).mul_(scale).to(dtype)


@torch.no_grad()
def sparse_sign_sketch(
    n: int,
    l: int,  # noqa: E741
    *,
    generator: torch.Generator | None,
    nnz: int = 8,
    batch_shape: tuple[int, ...] = (),
) -> Tensor:
    """Sparse-sign test matrix Ω: each row has ``nnz`` entries ±√(l/nnz) at random places, the others are zero.

    ``nnz=1`` is the CountSketch. The mean square of an entry is 1, as for the Gaussian matrix. It needs 2·nnz·n random
    numbers instead of n·l.

    Args:
        n: rows of Ω.
        l: columns of Ω.
        generator: CPU generator, advanced by the call; None is torch's own.
        nnz: non-zero entries in a row, at most l are taken.
        batch_shape: leading dimensions.

    Returns:
        Ω of shape (*batch_shape, n, l), float32, on the CPU.

    Raises:
        ValueError: if ``nnz`` is not positive.

    Example:
        >>> Omega = sparse_sign_sketch(6, 4, generator=seeded_generator(0), nnz=1)
        >>> Omega.abs().sum(dim=1).tolist()
        [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]

    Source: Martinsson, Tropp, arXiv:2002.01387, section 9.2.
    """
    if nnz < 1:
        raise ValueError(f"nnz={nnz} must be at least 1")
    nnz = min(nnz, l)
    Omega = torch.zeros(torch.Size(batch_shape).numel(), n, l)
    for matrix in Omega:
        places = torch.rand(n, l, generator=generator).topk(nnz, dim=-1).indices
        signs = torch.randint(0, 2, (n, nnz), generator=generator).float() * 2 - 1
        matrix.scatter_(-1, places, signs * math.sqrt(l / nnz))
    return Omega.reshape(*batch_shape, n, l)


@torch.no_grad()
def hadamard_sketch(
    n: int,
    l: int,  # noqa: E741
    *,
    generator: torch.Generator | None,
    batch_shape: tuple[int, ...] = (),
) -> Tensor:
    """Test matrix Ω of the subsampled randomised Hadamard transform: random signs, Hadamard matrix, l of its columns.

    Entries are ±1. Column j of the Hadamard matrix has entry (-1)^popcount(i & j) in row i; its order is the next
    power of two, and the rows from n on are left out. l columns are drawn without replacement.

    Args:
        n: rows of Ω.
        l: columns of Ω, at most the next power of two of n.
        generator: CPU generator, advanced by the call; None is torch's own.
        batch_shape: leading dimensions.

    Returns:
        Ω of shape (*batch_shape, n, l), float32, on the CPU.

    Raises:
        ValueError: if l is more than the Hadamard matrix has columns.

    Example:
        >>> Omega = hadamard_sketch(4, 4, generator=seeded_generator(0))
        >>> (Omega.mT @ Omega).diagonal().tolist()
        [4.0, 4.0, 4.0, 4.0]

    Source: Halko, Martinsson, Tropp, arXiv:0909.4061, section 4.6; Tropp, arXiv:1011.1595.
    """
    order = 1 << (n - 1).bit_length()
    if l > order:
        raise ValueError(f"l={l} is more than the {order} columns of the Hadamard matrix for n={n}")
    Omega = torch.empty(torch.Size(batch_shape).numel(), n, l)
    rows = torch.arange(n).unsqueeze(-1)
    for matrix in Omega:
        signs = torch.randint(0, 2, (n, 1), generator=generator)
        parity = rows & torch.randperm(order, generator=generator)[:l]
        for shift in (16, 8, 4, 2, 1):
            parity = parity ^ (parity >> shift)
        matrix.copy_(1 - 2 * ((parity ^ signs) & 1))
    return Omega.reshape(*batch_shape, n, l)


@torch.no_grad()
def sampling_sketch(
    weights: Tensor,
    l: int,  # noqa: E741
    *,
    generator: torch.Generator | None,
) -> Tensor:
    """Numbers of l columns of A, drawn without replacement with probabilities that are proportional to ``weights``.

    A[:, numbers] is the sketch AΩ for an Ω of unit vectors. With the squared norms of the columns as weights it is the
    cheapest sketch that finds what is concentrated in few columns.

    Args:
        weights: (..., n), not negative, on the CPU. Columns of weight zero are drawn when no others are left.
        l: columns to draw, at most n.
        generator: CPU generator, advanced by the call; None is torch's own.

    Returns:
        int64 of shape (..., l).

    Raises:
        ValueError: if l > n.

    Example:
        >>> sampling_sketch(torch.tensor([0.0, 1.0, 0.0]), 1, generator=seeded_generator(0))
        tensor([1])

    Source: Drineas, Kannan, Mahoney, SIAM J. Comput. 36 (2006).
    """
    n = weights.shape[-1]
    if l > n:
        raise ValueError(f"l={l} columns cannot be drawn without replacement from {n}: at most {n}")
    # Exponential clocks: the l first of independent ones with these rates are such a sample; no draw can fail.
    flat = weights.double().reshape(-1, n)
    clocks = torch.stack([torch.empty(n, dtype=torch.float64).exponential_(generator=generator) for _ in flat])
    rate = flat / flat.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return (clocks / (rate + 1e-30)).topk(l, dim=-1, largest=False).indices.reshape(*weights.shape[:-1], l)
