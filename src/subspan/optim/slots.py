"""Where the backward pass of a layer leaves what an optimizer needs of a gradient that is never formed."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from subspan.optim.late import Folded, WarmStart, test_matrix, widened
from subspan.optim.method import Geometry, State
from subspan.state import StateSpec


@dataclass(frozen=True)
class Reader:
    """Reads what backward needs from tensors of an optimizer's state, decoding it anew each time.

    Args:
        basis: how the basis Q (m, r) is held.
        warm: what the first moment does to test matrices.
        weight: how a frozen weight is held; None for one that is ready to be multiplied by.
    """

    basis: StateSpec
    warm: WarmStart | None = None
    weight: StateSpec | None = None

    def read_weight(self, held: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Sequence[Tensor]]:
        """W, if it is held by a frozen layer in this dtype, and the tensors behind those that hold it."""
        if self.weight is None:
            return held[0], held[1:]
        count = len(self.weight.stored(""))
        return _decoded(self.weight, held[:count]).to(dtype), held[count:]

    def read_basis(self, held: Sequence[Tensor]) -> Tensor:
        """Q; ``held`` begins with the tensors that hold it."""
        return _decoded(self.basis, held[: len(self.basis.stored(""))])

    def draw(self, key: Tensor, held: Sequence[Tensor], like: Tensor, n: int) -> Tensor:
        """Ω (n, r) in the dtype of ``like``; ``held`` ends with the first moment and its lengths, where it is used."""
        Omega = test_matrix(key, like, (n, self.basis.shape[-1]), self.basis.dtype)
        if self.warm is None:
            return Omega
        *moment, lengths = held[len(self.basis.stored("")) :]
        return self.warm.apply(Omega, _decoded(self.warm.moment, moment), lengths)

    def sketch(self, key: Tensor, held: Sequence[Tensor], left: Tensor, right: Tensor) -> Tensor:
        """GΩ of the gradient G = leftᵀ·right."""
        return left.mT @ (right @ self.draw(key, held, right, right.shape[-1]))


class GradientSlots:
    """Two leaves of the graph whose gradients are R and Y, and their sums over micro-batches.

    The leaves are zeros without memory of their own, in the dtype of the products: R and Y of a single backward pass
    are held as they were computed, sums in float32.

    Args:
        geometry: of the oriented gradient G (m, n).
        basis: how the basis Q (m, r) is held.
        right: whether the columns of the parameter are its projected side.
        like: the parameter.

    Attributes:
        reader: reads Q and Ω from ``held``.
        held: tensors of the optimizer's state: those of Q and, while a refresh is due, of the first moment, whose
            lengths come last.
        key: of the test matrix Ω while a refresh is due, else None.
        projected: leaf (r, n) whose gradient is QᵀG.
        sketch: leaf (m, r) whose gradient is GΩ.
        R, Y: their sums.
        shared: xQ, where other layers have the same basis and input.
        active: False once the optimizer is gone, and in copies: the layer then forms its gradient.
    """

    def __init__(self, geometry: Geometry, basis: StateSpec, right: bool, like: Tensor) -> None:
        self.reader = Reader(basis)
        self.right, self.active = right, True
        self.shared: SharedProduct | None = None
        self.held: tuple[Tensor, ...] = ()
        self.key: Tensor | None = None
        self.R, self.Y = Sum(), Sum()
        self.projected = empty_leaf(geometry.rank, geometry.n, like, self.R)
        self.sketch = empty_leaf(geometry.m, geometry.rank, like, self.Y)

    def arm(
        self, first: State, state: State, key: Tensor | None, warm: tuple[str, WarmStart, Tensor] | None = None
    ) -> None:
        """Take over the basis that ``first`` holds, and what a refresh that is due needs.

        Args:
            first: state of the parameter that decides on a basis which is shared.
            state: of the parameter itself.
            key: of the test matrix, while a refresh is due.
            warm: the state key of a first moment, what it does to test matrices, and its lengths.
        """
        self.held, self.key = tuple(first[name] for name in self.reader.basis.stored("basis")), key
        if warm is not None:
            moment, start, lengths = warm
            self.held += (*(state[name] for name in start.moment.stored(moment)), lengths)
        used = None if warm is None else warm[1]
        if key is not None and self.reader.warm != used:
            self.reader = replace(self.reader, warm=used)  # compiled code is kept where nothing changes
        if self.shared is not None:
            self.shared.forget()

    @property
    def basis(self) -> Tensor:
        """Q (m, r), decoded."""
        return self.reader.read_basis(self.held)

    @property
    def test_matrix(self) -> Tensor | None:
        """Ω (n, r), drawn anew, while a refresh is due."""
        return self.draw(self.projected)

    def draw(self, like: Tensor) -> Tensor | None:
        """Ω in the dtype and on the device of ``like``."""
        return None if self.key is None else self.reader.draw(self.key, self.held, like, self.projected.shape[1])

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
        return Folded.unformed(R, Y if self.key is not None else None)

    def clear(self) -> None:
        """Forget what backward has left."""
        self.R.value = self.Y.value = None
        if self.shared is not None:
            self.shared.forget()

    def retire(self) -> None:
        """Let go of all that belongs to an optimizer which is gone; the layer forms its gradient from now on."""
        self.clear()
        self.active, self.held, self.key = False, (), None


class SharedProduct:
    """xQ of an input that several layers have in common, from the first that needs it until the last has it.

    The input is referred to weakly and not marked, so that nothing outlives the pass: neither with an input that stays
    in memory, nor in a region that is recomputed.

    Args:
        layers: how many layers share Q.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self.forget()

    def forget(self) -> None:
        """Let go of the product."""
        self._input: weakref.ref[Tensor] | None = None
        self._of: tuple[Any, ...] = ()
        self._value: Tensor | None = None
        self._taken: set[int] = set()

    @torch.no_grad()
    def take(self, given: Tensor, x: Tensor, slots: GradientSlots) -> Tensor:
        """xQ for one of the layers; ``given`` is its input as it came, ``x`` the same in the dtype of the product."""
        first = slots.held[0]
        of = (id(first), first._version, given._version, x.dtype)
        value = self._value
        if value is None or self._input is None or self._input() is not given or self._of != of:
            self.forget()
            value = self._value = x @ slots.basis.to(x.dtype)
            self._input, self._of = weakref.ref(given, self._is_gone), of
        self._taken.add(id(slots))
        if len(self._taken) == self._layers:
            self.forget()
        return value

    def _is_gone(self, reference: weakref.ref[Tensor]) -> None:
        if reference is self._input:
            self.forget()


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


def _decoded(spec: StateSpec, held: Sequence[Tensor]) -> Tensor:
    """The tensor that ``held`` holds, in the order of `StateSpec.stored`."""
    return spec.decode("", dict(zip(spec.stored(""), held, strict=True)))


def empty_leaf(rows: int, columns: int, like: Tensor, taken_by: Sum) -> Tensor:
    """A leaf of zeros without memory of its own, in the dtype of ``like``, whose gradients a sum takes."""
    leaf = torch.zeros((), dtype=like.dtype, device=like.device).expand(rows, columns).requires_grad_()
    leaf.register_post_accumulate_grad_hook(taken_by)
    return leaf
