"""Where the backward pass of a layer leaves what an optimizer needs of a gradient that is never formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subspan.optim.late import Folded, test_matrix, widened
from subspan.optim.method import Geometry, State
from subspan.state import StateSpec


class GradientSlots:
    """Two leaves of the graph whose gradients are R and Y, and their sums over micro-batches.

    The leaves are zeros without memory of their own, in the dtype of the products: R and Y of a single backward pass
    are held as they were computed, sums in float32.

    Args:
        geometry: of the oriented gradient G (m, n).
        spec: how the basis Q (m, r) is held.
        right: whether the columns of the parameter are its projected side.
        like: the parameter.

    Attributes:
        held: the tensors that hold Q, the optimizer's own.
        key: of the test matrix Ω while a refresh is due, else None.
        projected: leaf (r, n) whose gradient is QᵀG.
        sketch: leaf (m, r) whose gradient is GΩ.
        R, Y: their sums.
        active: False once the optimizer is gone, and in copies: the layer then forms its gradient.
    """

    def __init__(self, geometry: Geometry, spec: StateSpec, right: bool, like: Tensor) -> None:
        self.spec, self.right, self.active = spec, right, True
        self.held: tuple[Tensor, ...] = ()
        self.key: Tensor | None = None
        self.R, self.Y = Sum(), Sum()
        self.projected = _leaf(geometry.rank, geometry.n, like, self.R)
        self.sketch = _leaf(geometry.m, geometry.rank, like, self.Y)

    def arm(self, state: State, key: Tensor | None) -> None:
        """Take over the basis of ``state``, and the key of a refresh that is due."""
        self.held, self.key = tuple(state[name] for name in self.spec.stored("basis")), key

    @property
    def basis(self) -> Tensor:
        """Q (m, r), decoded."""
        return decoded(self.spec, self.held)

    @property
    def test_matrix(self) -> Tensor | None:
        """Ω (n, r), drawn anew, while a refresh is due."""
        if self.key is None:
            return None
        shape = (self.projected.shape[1], self.spec.shape[1])
        return test_matrix(self.key, self.projected, shape, self.spec.dtype)

    def __deepcopy__(self, memo: Any) -> GradientSlots:
        """A copy that no optimizer looks into."""
        copied = GradientSlots.__new__(GradientSlots)
        copied.__setstate__(self.__getstate__())
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"right": self.right}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.right, self.active = state["right"], False

    def take(self) -> Folded | None:
        """What backward has left since the last call, None if it did not run."""
        R, Y = self.R.value, self.Y.value
        self.clear()
        if R is None:
            return None
        squared = torch.linalg.vector_norm(widened(R)).double().square()
        return Folded(R, Y if self.key is not None else None, squared, whole=False)

    def clear(self) -> None:
        """Forget what backward has left."""
        self.R.value = self.Y.value = None


class Sum:
    """Takes the gradients of a leaf: the first one as it is, the sum of several in at least float32.

    Attributes:
        value: the sum, None before the first one.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None

    @torch.no_grad()
    def __call__(self, leaf: Tensor) -> None:
        """Take the gradient of the leaf; a hook after its accumulation."""
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:
            self.value = gradient if self.value is None else widened(self.value).add_(gradient)


def decoded(spec: StateSpec, held: Sequence[Tensor]) -> Tensor:
    """The tensor that ``held`` holds, in the order of `StateSpec.stored`."""
    return spec.decode("", dict(zip(spec.stored(""), held, strict=True)))


def _leaf(rows: int, columns: int, like: Tensor, taken_by: Sum) -> Tensor:
    leaf = torch.zeros((), dtype=like.dtype, device=like.device).expand(rows, columns).requires_grad_()
    leaf.register_post_accumulate_grad_hook(taken_by)
    return leaf
