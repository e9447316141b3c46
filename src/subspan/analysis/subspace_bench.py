"""Every finder of a subspace measured on the same matrix: time, captured energy, rank and orthogonality."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subspan.analysis.finders import Finder, adaptive_finders, fixed_rank_finders, peers
from subspan.analysis.timing import Clock, Timings, in_units, projection
from subspan.linalg import captured_energy, orthogonality_error

__all__ = ["MatrixResult", "Measurement", "measure_matrix"]

#: A first call that takes longer is the only one.
_ONCE = 1.0
#: Tolerances below it cannot be told from rounding in float32.
_LEAST_TOLERANCE = 1e-6
#: Short side of the corner of a large matrix on which it is estimated how long a method would take.
_CORNER = {"cpu": 512, "cuda": 2048}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One method on one matrix; None where ``reason`` says why there is no figure.

    Attributes:
        method: its name.
        units: time over that of one projection QᵀA; the median of the calls.
        least_units: the same of the fastest call.
        milliseconds: the median of the calls.
        calls: calls that count; one for a slow method, without a warm-up.
        energy: ‖QᵀA‖ over that of the best basis of the same rank, at most 1 up to rounding.
        captured: ‖QᵀA‖ / ‖A‖.
        rank: columns of Q.
        orthogonality: ‖QᵀQ − I‖₂.
        reason: why the method was not measured.
    """

    method: str
    units: float | None = None
    least_units: float | None = None
    milliseconds: float | None = None
    calls: int = 0
    energy: float | None = None
    captured: float | None = None
    rank: int | None = None
    orthogonality: float | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class MatrixResult:
    """All methods on one matrix.

    Attributes:
        matrix: its name.
        reason: why the matrix was not measured, or None.
        shape: (m, n).
        rank: the rank that is asked for.
        optimum: ‖QᵀA‖ / ‖A‖ of the best basis of this rank.
        rtol: tolerance of the adaptive finders, whose optimal rank is ``rank``.
        unit_milliseconds: one projection QᵀA.
        methods: the measurements.
    """

    matrix: str
    reason: str | None = None
    shape: tuple[int, int] | None = None
    rank: int | None = None
    optimum: float | None = None
    rtol: float | None = None
    unit_milliseconds: float | None = None
    methods: list[Measurement] = dataclasses.field(default_factory=list)


class _Failure(NamedTuple):
    reason: str


def measure_matrix(
    name: str,
    A: Tensor,
    rank: int,
    *,
    clock: Clock,
    rounds: int = 3,
    longest: float = 60.0,
    before: Callable[[str, int], None] = lambda method, calls: None,
) -> MatrixResult:
    """Measure every finder on a matrix, in turns.

    What fails, is not installed or would take too long has a reason in place of figures.

    Args:
        name: of the matrix.
        A: (m, n), float32.
        rank: columns of a basis, from 1 to min(m, n).
        clock: how to time.
        rounds: calls of each method, after one that warms up.
        longest: seconds that one call may be expected to take.
        before: told before each call the method and how many calls there are in all.

    Returns:
        :class:`MatrixResult`; a matrix of zeros, or with NaN or infinity, is one with a reason.

    Example:
        >>> from subspan.analysis.timing import PROCESS
        >>> result = measure_matrix("diagonal", torch.diag(torch.arange(1.0, 9.0)), 2, clock=PROCESS, rounds=1)
        >>> [round(method.energy, 4) for method in result.methods if method.method == "exact SVD"]
        [1.0]
    """
    m, n = A.shape
    if not A.numel():
        return MatrixResult(name, "it is empty", (m, n))
    if not A.isfinite().all():
        return MatrixResult(name, "it holds NaN or infinity (in float32)", (m, n))
    if not A.any():
        return MatrixResult(name, "it is zero, any basis is right", (m, n))
    if not 1 <= rank <= min(m, n):
        return MatrixResult(name, f"rank {rank} is more than the {min(m, n)} directions of a {m}x{n} matrix", (m, n))
    wide = A.double()
    gram = wide @ wide.mT if m <= n else wide.mT @ wide
    squares = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    squares /= squares.sum()
    rtol = math.sqrt(squares[rank:].sum().item()) * (1 + 1e-4)
    finders = _finders(A, rank, rtol)
    reasons = {method: finder for method, finder in finders.items() if isinstance(finder, str)}
    reasons |= _too_slow(A, rank, rtol, finders.keys() - reasons, clock, longest)
    measured = {name: _safe(finder) for name, finder in finders.items() if name not in reasons and callable(finder)}
    calls = len(measured) * (rounds + 1)
    unit = projection(A, rank)
    timings = in_units(
        measured,
        unit,
        rounds,
        clock=clock,
        once_above=_ONCE,
        before=lambda method: before(method, calls),
    )
    return MatrixResult(
        name,
        shape=(m, n),
        rank=rank,
        optimum=math.sqrt(squares[:rank].sum().item()),
        rtol=rtol,
        unit_milliseconds=1e3 * statistics.median(clock.seconds(unit)[0] for _ in range(5)),
        methods=[
            Measurement(method, reason=reasons[method])
            if method in reasons
            else _measurement(method, timings[method], wide, squares)
            for method in finders
        ],
    )


def _finders(A: Tensor, rank: int, rtol: float) -> dict[str, Finder | str]:
    adaptive: dict[str, Finder | str] = dict(adaptive_finders(A, rtol))
    if rtol < _LEAST_TOLERANCE:
        adaptive = dict.fromkeys(adaptive, f"tolerance {rtol:.0e} is below the rounding of float32")
    return {**fixed_rank_finders(A, rank), **adaptive, **peers(A, rank)}


def _too_slow(A: Tensor, rank: int, rtol: float, methods: Set[str], clock: Clock, longest: float) -> dict[str, str]:
    """Reasons of the methods that would take too long on a large matrix, from their time on a corner of it.

    All methods take time in proportion to m·n·min(m, n) at a given share of the rank, or less.
    """
    corner = _CORNER[A.device.type]
    factor = min(A.shape) / corner
    if factor < 3:
        return {}
    part = A[: round(A.shape[0] / factor), : round(A.shape[1] / factor)].contiguous()
    finders = _finders(part, max(1, round(rank / factor)), rtol)
    reasons = {}
    for method in methods:
        finder = finders[method]
        if isinstance(finder, str):
            continue
        expected = min(clock.seconds(_safe(finder))[0] for _ in range(2)) * factor**3
        if expected > longest:
            reasons[method] = f"would take about {expected:.0f} s, more than {longest:g} s"
    return reasons


def _safe(finder: Finder) -> Callable[[], Tensor | _Failure]:
    """The finder with a :class:`_Failure` for what it raises: other libraries raise anything."""

    def call() -> Tensor | _Failure:
        try:
            return finder()
        except Exception as error:
            name = type(error).__name__.lstrip("_")
            return _Failure(f"{name}: {error}".partition("\n")[0])

    return call


def _measurement(method: str, timings: Timings, A: Tensor, squares: Tensor) -> Measurement:
    """The row of a method.

    Args:
        method: its name.
        timings: its calls, the last of which returned the basis.
        A: the matrix in float64.
        squares: squared singular values of A over their sum, descending.
    """
    if isinstance(timings.result, _Failure):
        return Measurement(method, reason=timings.result.reason)
    Q = timings.result.to(A.device, torch.float64)
    figures: dict[str, Any] = {
        "units": statistics.median(timings.units),
        "least_units": min(timings.units),
        "milliseconds": 1e3 * statistics.median(timings.seconds),
        "calls": len(timings.units),
        "rank": Q.shape[-1],
    }
    if not Q.isfinite().all():
        return Measurement(method, reason="the basis holds NaN or infinity")
    if not Q.shape[-1]:
        return Measurement(method, **figures, reason="no column is needed for its tolerance")
    captured = captured_energy(A, Q).item()
    return Measurement(
        method,
        **figures,
        energy=captured / math.sqrt(squares[: Q.shape[-1]].sum().item()),
        captured=captured,
        orthogonality=orthogonality_error(Q).item(),
    )
