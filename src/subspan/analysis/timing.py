"""Time in units of another piece of work that is measured beside it: figures that a busy machine leaves alone."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subspan.linalg import random_stiefel, seeded_generator

__all__ = ["CUDA", "PROCESS", "THREAD", "WALL", "Clock", "Timings", "clock_for", "in_units", "projection"]


class Clock(NamedTuple):
    """A way to time a call.

    Attributes:
        description: what is counted, in words, for records.
        seconds: calls a function; returns the seconds it took and its result.
    """

    description: str
    seconds: Callable[[Callable[[], Any]], tuple[float, Any]]


def _counted_by(counter: Callable[[], float]) -> Callable[[Callable[[], Any]], tuple[float, Any]]:
    def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
        start = counter()
        result = function()
        return counter() - start, result

    return seconds


def _cuda_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    result = function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, result


THREAD = Clock("processor time of the calling thread", _counted_by(time.thread_time))
PROCESS = Clock("processor time of all threads of the process", _counted_by(time.process_time))
WALL = Clock("wall-clock time", _counted_by(time.perf_counter))
CUDA = Clock("time between two CUDA events, synchronised before and after", _cuda_seconds)


def clock_for(device: torch.device, threads: int) -> Clock:
    """The clock for a device and a number of threads.

    On one thread of a CPU it counts processor time, which other processes do not add to; of the whole process, so that
    a library which starts threads of its own does not look faster than it is.

    Args:
        device: where the work is done.
        threads: threads that do it.

    Returns:
        :class:`Clock`.

    Example:
        >>> clock_for(torch.device("cpu"), 2).description
        'wall-clock time'
    """
    if device.type == "cuda":
        return CUDA
    # Some systems count processor time in steps of 16 ms.
    return PROCESS if threads == 1 and time.get_clock_info("process_time").resolution < 1e-5 else WALL


@dataclass
class Timings:
    """Calls of one method.

    Attributes:
        units: time of each call over that of the unit right before it.
        seconds: time of each call.
        result: what the last call returned.
    """

    units: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    result: Any = None


def projection(A: Tensor, rank: int) -> Callable[[], Tensor]:
    """The unit: one projection QᵀA on a random basis of ``rank`` columns.

    Args:
        A: (m, n), float32.
        rank: columns of Q.

    Returns:
        Function without arguments.

    Example:
        >>> projection(torch.eye(4, 6), 2)().shape
        torch.Size([2, 6])
    """
    Q = random_stiefel(A.shape[0], rank, generator=seeded_generator(0), device=A.device)
    return lambda: Q.mT @ A


def in_units(
    methods: Mapping[str, Callable[[], Any]],
    unit: Callable[[], Any],
    rounds: int,
    *,
    clock: Clock = THREAD,
    once_above: float = math.inf,
    unit_calls: int = 3,
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, Timings]:
    """Time methods in turns, each right after the unit (the median of some calls).

    The first round warms up and does not count, except for methods that take long: these are called once.

    Args:
        methods: functions by name.
        unit: what is counted in.
        rounds: rounds that count.
        clock: how to time.
        once_above: seconds of a first call from which on it is the only one.
        unit_calls: calls of the unit before each method.
        before: told the name of the method that is called next.

    Returns:
        :class:`Timings` by name.

    Example:
        >>> timings = in_units({"double": lambda: (sum(range(9**4)), sum(range(9**4)))}, lambda: sum(range(9**4)), 5)
        >>> len(timings["double"].units)
        5
    """
    timings = {name: Timings() for name in methods}
    once: set[str] = set()
    for round_ in range(rounds + 1):
        for name, method in methods.items():
            if name in once:
                continue
            before(name)
            unit_seconds = statistics.median(clock.seconds(unit)[0] for _ in range(unit_calls))
            seconds, result = clock.seconds(method)
            if not round_ and seconds > once_above:
                once.add(name)
            if round_ or name in once:
                timing = timings[name]
                timing.units.append(seconds / unit_seconds)
                timing.seconds.append(seconds)
                timing.result = result
    return timings
