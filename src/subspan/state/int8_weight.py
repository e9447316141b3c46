"""A weight matrix that is held in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_LARGEST = 127
# Steps of smaller groups would cost more than an eighth of the codes.
_LEAST_GROUP = 16
# Elements that are rounded together.
_CHUNK = 1 << 22
_aten = torch.ops.aten
_ALIASES = (_aten.detach.default, _aten.alias.default)


class Int8Weight(Tensor):
    """A matrix W held as int8 codes and one bfloat16 step for each group of neighbours in a row: W = step·code.

    It takes part in operations as the float matrix that it stands for, which exists while an operation needs it: a
    linear layer makes it in forward and again in backward, and in between 8 bits an element are held. Its gradient is
    an ordinary tensor. What changes it is ``copy_``, `round_rows_` and the optimizers of subspan; other operations in
    place, and views of it, raise.

    A step is the largest magnitude of its group over 127, rounded up, so that no code is cut off. It stays as it is
    while the group needs more than half of it and no more than it: a step that followed the largest weight would round
    every code of the group anew each time, and an unchanged weight would not stay unchanged.

    Args:
        codes: int8 (rows, columns).
        steps: bfloat16 (rows, groups); ``columns`` is a multiple of ``groups``.
        dtype: of the float matrix.
        transposed: it stands for the transposed matrix; codes and steps are the same.

    Example:
        >>> W = Int8Weight.of(torch.tensor([[1.0, -0.5, 0.004, 0.0] * 4]), group_size=16)
        >>> W.codes[0, :4].tolist()
        [126, -63, 1, 0]
        >>> (W @ torch.eye(16))[0, :4]  # as the float matrix
        tensor([ 0.9998, -0.4999,  0.0079,  0.0000])

    Source: arXiv 2407.08296 (weights of 8 bits in groups of 256, rounded stochastically).
    """

    codes: Tensor
    steps: Tensor
    transposed: bool

    @staticmethod
    def __new__(cls, codes: Tensor, steps: Tensor, dtype: torch.dtype, transposed: bool = False) -> Int8Weight:
        rows, columns = codes.shape
        shape, strides = ((columns, rows), (1, columns)) if transposed else ((rows, columns), (columns, 1))
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, shape, strides=strides, dtype=dtype, device=codes.device
        )

    def __init__(self, codes: Tensor, steps: Tensor, dtype: torch.dtype, transposed: bool = False) -> None:
        self.codes, self.steps, self.transposed = codes, steps, transposed

    @staticmethod
    def of(W: Tensor, group_size: int = 256) -> Int8Weight:
        """``W`` (rows, columns) rounded to nearest.

        Args:
            W: a float matrix.
            group_size: the most elements that share a step; the largest divisor of ``columns`` up to it is taken.

        Raises:
            ValueError: not a float matrix, or no divisor of its columns from 16 to ``group_size``.
        """
        if W.ndim != 2 or not W.is_floating_point():
            raise ValueError(
                f"a {W.dtype} tensor of shape {tuple(W.shape)} cannot be held in int8; give a float matrix"
            )
        group = group_of(W.shape[1], group_size)
        if group is None:
            raise ValueError(
                f"a matrix of shape {tuple(W.shape)} cannot be held in int8: its {W.shape[1]} columns have no divisor "
                f"from {_LEAST_GROUP} to group_size={group_size}; leave it in float"
            )
        codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
        steps = torch.zeros(W.shape[0], W.shape[1] // group, dtype=torch.bfloat16, device=W.device)
        result = Int8Weight(codes, steps, W.dtype)
        result._set(W)
        return result

    def dense(self) -> Tensor:
        """The float matrix."""
        W = self.rows(0, self.codes.shape[0], self.dtype)
        return W.mT if self.transposed else W

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows of the float matrix (not transposed), a new tensor; in float32 they are exact."""
        codes, steps = self.codes[start:stop], self.steps[start:stop]
        if dtype == torch.float16:  # in which small steps have few digits
            return self.rows(start, stop, torch.float32).to(dtype)
        return (codes.unflatten(1, (steps.shape[1], -1)) * steps.to(dtype).unsqueeze(-1)).flatten(1)

    def round_rows_(self, start: int, W: Tensor, bits: Tensor | None = None) -> None:
        """Replace rows, rounded to nearest, or stochastically, so that their mean is ``W``.

        Args:
            start: first row (not transposed).
            W: float32 (k, columns), finite.
            bits: (k, columns) random integers from 0 to 2¹⁶ − 1, or None.
        """
        steps = self.steps[start : start + W.shape[0]]
        groups = W.unflatten(1, (steps.shape[1], -1))
        needed = _up(groups.abs().amax(dim=-1).float() / _LARGEST)
        steps.copy_(torch.where((needed <= steps) & (needed > steps / 2), steps, needed))
        self._encode(start, groups, bits)

    def _encode(self, start: int, groups: Tensor, bits: Tensor | None = None) -> None:
        """Set the codes of some rows (k, groups, group) from the steps that are there."""
        steps = self.steps[start : start + groups.shape[0]].float().unsqueeze(-1)
        share = groups / torch.where(steps > 0, steps, 1.0)
        share += 0.5 if bits is None else (bits.view(share.shape) + 0.5) * 2.0**-16
        codes = share.floor_().clamp_(-_LARGEST, _LARGEST).flatten(1)
        self.codes[start : start + groups.shape[0]] = codes.to(torch.int8)
        torch.autograd.graph.increment_version(self)  # so that a graph from before is not gone through backwards

    def _set(self, W: Tensor, steps: Tensor | None = None) -> None:
        """Become ``W`` (not transposed), with steps of its own, or with those that it was held with before."""
        self.steps.zero_() if steps is None else self.steps.copy_(steps)
        length = max(1, _CHUNK // max(1, W.shape[1]))
        for start in range(0, W.shape[0], length):
            rows = W[start : start + length].to(self.codes.device, torch.float32)
            if steps is None:
                self.round_rows_(start, rows)
            else:
                self._encode(start, rows.unflatten(1, (steps.shape[1], -1)))

    def restored(self, W: Tensor, steps: Tensor | None = None) -> Int8Weight:
        """A weight like this one that holds ``W``, rounded to nearest.

        With the steps that it had, the ``dense()`` of a weight gives each of its codes again, in bfloat16 too: a number
        of 127 steps is off by at most 127/256 of one.

        Raises:
            ValueError: steps of another shape, or of another weight.
        """
        if steps is not None and steps.shape != self.steps.shape:
            raise ValueError(
                f"a weight of shape {tuple(self.shape)} has steps of shape {tuple(self.steps.shape)}, not of shape "
                f"{tuple(steps.shape)}: quantise it with the group_size with which it was saved"
            )
        if steps is not None:
            largest = W.unflatten(1, (steps.shape[1], -1)).abs().amax(dim=-1)
            if bool((largest.float() > (_LARGEST + 0.5) * steps.to(W.device).float()).any()):
                raise ValueError("the steps are not those of this weight, which is larger than they allow")
        result = Int8Weight(torch.empty_like(self.codes), torch.empty_like(self.steps), self.dtype)
        result._set(W, steps)
        return result

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        """Shape, dtype and group size; the numbers are in `dense`."""
        group = self.codes.shape[1] // self.steps.shape[1]
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"Int8Weight(shape={tuple(self.shape)}, dtype={self.dtype}, group_size={group}{grad})"

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """This weight without its gradient; what is assigned to it is rounded to nearest."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        with torch.no_grad():
            self.copy_(value)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """As of any tensor; the result shares nothing with this weight unless it is this weight."""
        moved = super().to(*args, **kwargs)
        shares = isinstance(moved, Int8Weight) and moved is not self and moved.codes is self.codes
        return moved.clone() if shares else moved

    def float(self) -> Tensor:  # type: ignore[override]
        """In float32."""
        return self.to(torch.float32)

    def double(self) -> Tensor:  # type: ignore[override]
        """In float64."""
        return self.to(torch.float64)

    def half(self) -> Tensor:  # type: ignore[override]
        """In float16."""
        return self.to(torch.float16)

    def bfloat16(self) -> Tensor:  # type: ignore[override]
        """In bfloat16."""
        return self.to(torch.bfloat16)

    def share_memory_(self) -> Int8Weight:
        """Move codes and steps to memory that processes share."""
        self.codes.share_memory_()
        self.steps.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether processes share it."""
        return self.codes.is_shared()

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype, bool]]:
        """For torch.compile."""
        return ["codes", "steps"], (self.dtype, self.transposed)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], context: tuple[torch.dtype, bool], outer_size: Any, outer_stride: Any
    ) -> Int8Weight:
        """For torch.compile."""
        return Int8Weight(inner["codes"], inner["steps"], *context)

    def _stable_hash_for_caching(self) -> str:
        """For torch.compile: what a compiled graph depends on, beside the shapes."""
        return f"Int8Weight-{self.dtype}-{self.transposed}"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on float matrices; what only renames, copies or writes is done on codes and steps."""
        W = args[0] if args else None
        if isinstance(W, Int8Weight):
            if (turned := _turned(func, args)) is not None:
                return Int8Weight(W.codes, W.steps, W.dtype, W.transposed != turned)
            if func is _aten.clone.default:
                return Int8Weight(W.codes.clone(), W.steps.clone(), W.dtype, W.transposed)
            dtype = (kwargs or {}).get("dtype") or W.dtype
            if func is _aten._to_copy.default and dtype.is_floating_point:
                # Another dtype needs no copy: autocast asks for one at each use. `to` makes one.
                device = kwargs.get("device")
                return Int8Weight(W.codes.to(device=device), W.steps.to(device=device), dtype, W.transposed)
            if func is _aten.copy_.default:
                return _copy(W, args[1])
        _refuse_writes_and_views(func, args, kwargs or {})
        args, kwargs = tree_map_only(Int8Weight, Int8Weight.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def _turned(func: Any, args: tuple[Any, ...]) -> bool | None:
    """Whether a view of a matrix is the transposed one; None for any other view or operation."""
    if func in _ALIASES or (func is _aten.view.default and list(args[1]) == list(args[0].shape)):
        return False
    if func is _aten.t.default:
        return True
    if func is _aten.transpose.int:
        return bool((args[1] - args[2]) % 2)
    return [dim % 2 for dim in args[1]] == [1, 0] if func is _aten.permute.default else None


def _copy(target: Int8Weight, source: Tensor) -> Int8Weight:
    same = isinstance(source, Int8Weight) and source.transposed is target.transposed
    if isinstance(source, Int8Weight) and same and source.steps.shape == target.steps.shape:
        target.codes.copy_(source.codes)
        target.steps.copy_(source.steps)
    else:
        W = source.dense() if isinstance(source, Int8Weight) else source.expand(target.shape)
        target._set(W.mT if target.transposed else W)
    return target


def _refuse_writes_and_views(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise where the result would silently be lost in a float matrix that nobody holds."""
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        values = value if isinstance(value, (list, tuple)) else [value]
        if argument.alias_info is not None and any(isinstance(item, Int8Weight) for item in values):
            what = "change" if argument.alias_info.is_write else "give a view of"
            # No TypeError, which the operators of Python (W -= x) would take for a type that they do not know.
            raise RuntimeError(
                f"{func} would {what} a weight that is held in int8; read weight.dense(), write with "
                "weight.copy_(float_matrix), and train with an optimizer of subspan.optim"
            )


def _up(X: Tensor) -> Tensor:
    """``X`` >= 0 in bfloat16, rounded up."""
    nearest = X.to(torch.bfloat16)
    return torch.where(nearest.float() < X, (nearest.view(torch.int16) + 1).view(torch.bfloat16), nearest)


def group_of(columns: int, group_size: int) -> int | None:
    """The largest divisor of ``columns`` from 16 to ``group_size``; None where there is none.

    >>> group_of(688, 256), group_of(4096, 256), group_of(97, 256), group_of(101 * 103, 100)
    (172, 256, 97, None)
    """
    divisors = (size for size in range(min(columns, group_size), _LEAST_GROUP - 1, -1) if columns % size == 0)
    return next(divisors, None)


def held(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors whose memory a tensor takes: codes and steps of an `Int8Weight`, else the tensor itself.

    >>> sum(part.nbytes for part in held(Int8Weight.of(torch.ones(64, 256))))
    16512
    """
    return (tensor.codes, tensor.steps) if isinstance(tensor, Int8Weight) else (tensor,)
