"""The three-queue schedule: random numbers, sketch products, and panels run side by side on a CUDA device."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor

from subspan.linalg.tolerance import FixedPrecision

__all__ = ["SketchQueue"]


class SketchQueue:
    """Sketches AΩ₁, AΩ₂, … of a matrix; on a CUDA device the next one is under way while a panel is factored.

    A left-looking finder never changes A, so that AΩ_{i+1} needs nothing of panel i. One queue moves the random
    numbers, one multiplies, and the caller's own stream factors panels; events order them. The numbers and products
    are those of the plain order, which a CPU runs (its BLAS has all cores at work already). What was drawn ahead and
    never taken is put back: the generator is left where the plain order leaves it.

    A right-looking finder multiplies what the panels leave of A: its next product has to wait for the panel, and only
    the random numbers are ahead.

    Args:
        problem: the matrix and its generator.
        multiply: give sketches AΩ; otherwise the test matrices Ω alone.

    Example:
        >>> from subspan.linalg import seeded_generator
        >>> problem = FixedPrecision(torch.eye(3), rtol=0.1, atol=None, max_rank=None, block_size=1,
        ...                          generator=seeded_generator(0))
        >>> with SketchQueue(problem) as sketches:
        ...     sketches.take(2).shape
        torch.Size([3, 2])
    """

    def __init__(self, problem: FixedPrecision, *, multiply: bool = True) -> None:
        self._problem, self._multiply = problem, multiply
        self._ahead: tuple[int, Tensor, torch.cuda.Event, Tensor] | None = None
        device = problem.operator.device
        self._queues: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        if device.type == "cuda":
            self._queues = torch.cuda.Stream(device), torch.cuda.Stream(device)
            for queue in self._queues:
                queue.wait_stream(torch.cuda.current_stream(device))  # A may still be in the making

    def take(self, width: int, following: int | None = None) -> Tensor:
        """The next sketch (..., m, width), or test matrix (..., n, width); ``following``: width to begin meanwhile."""
        if self._queues is None:
            return self._problem.sketch(width) if self._multiply else self._problem.test_matrix(width)
        if self._ahead is None or self._ahead[0] != width:
            self._put_back()
            self._begin(width)
        assert self._ahead is not None
        _, Y, ready, _ = self._ahead
        self._ahead = None
        current = torch.cuda.current_stream(Y.device)
        current.wait_event(ready)
        Y.record_stream(current)
        if following is not None:
            self._begin(following)
        return Y

    def _begin(self, width: int) -> None:
        assert self._queues is not None
        numbers, products = self._queues
        before = self._state()
        with torch.cuda.stream(numbers):
            taken = self._problem.test_matrix(width)
            ready = torch.cuda.Event()
            ready.record(numbers)
        if self._multiply:
            with torch.cuda.stream(products):
                products.wait_event(ready)
                taken.record_stream(products)
                taken = self._problem.operator.matmul(taken)
                ready = torch.cuda.Event()
                ready.record(products)
        self._ahead = (width, taken, ready, before)

    def _state(self) -> Tensor:
        generator = self._problem.generator
        return torch.get_rng_state() if generator is None else generator.get_state()

    def _put_back(self) -> None:
        if self._ahead is None:
            return
        before, generator = self._ahead[3], self._problem.generator
        if generator is None:
            torch.set_rng_state(before)
        else:
            generator.set_state(before)
        self._ahead = None

    def __enter__(self) -> SketchQueue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_back()
        if self._queues is not None:
            for queue in self._queues:
                torch.cuda.current_stream(self._problem.operator.device).wait_stream(queue)
