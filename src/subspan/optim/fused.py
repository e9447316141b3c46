"""Hooks that take each gradient as soon as backward has it, and free it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any
from weakref import WeakMethod, ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from subspan.optim.shards import is_sharded

# The optimizer that takes the gradients of a parameter, weakly on both sides.
_TAKERS: MutableMapping[Tensor, ref[torch.optim.Optimizer]] = WeakIdKeyDictionary()

Named = Iterable[tuple[str, Tensor, dict[str, Any]]]


class BackwardFusion:
    """One hook on each parameter whose gradient is not to be kept.

    Args:
        named: gives (name, parameter, group) of those parameters, as they are now.
        take: called with each of them once its gradient is whole; the gradient is freed afterwards.
        optimizer: for what GradScaler leaves on it.

    Raises:
        RuntimeError: another optimizer takes the same gradients.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, named: Callable[[], Named], take: Callable[[str, Tensor, Any], None]
    ) -> None:
        # Weak, so that hooks do not keep an optimizer alive that nobody steps any more.
        self._optimizer, self._named, self._take = ref(optimizer), WeakMethod(named), WeakMethod(take)
        self._hooks: dict[str, tuple[Tensor, Any]] = {}
        # GradScaler then hands itself to the optimizer instead of failing on gradients that are not there.
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        self.bind()

    def bind(self) -> None:
        """Put a hook on each parameter that has none; wrappers swap parameters, groups are added."""
        named = self._named()
        assert named is not None
        for name, parameter, group in named():
            bound = self._hooks.get(name)
            if bound is not None and bound[0] is parameter:
                continue
            if bound is not None:
                bound[1].remove()
            if is_sharded(parameter):
                raise RuntimeError(
                    f"{name}: fuse_into_backward() and project_gradients() are not possible with parameters that "
                    "fully_shard has divided, whose gradients are reduced in pieces already; leave them out"
                )
            if parameter.requires_grad and parameter.numel() > 0:
                taker = _TAKERS.get(parameter)
                if taker is not None and taker() not in (None, self._optimizer()):
                    raise RuntimeError(f"{name}: another optimizer takes this gradient in backward; one of them can")
                _TAKERS[parameter] = self._optimizer
                hook = parameter.register_post_accumulate_grad_hook(self._hook(name, self._position(group)))
                self._hooks[name] = (parameter, hook)

    def _position(self, group: dict[str, Any]) -> int:
        optimizer = self._optimizer()
        assert optimizer is not None
        return next(i for i, other in enumerate(optimizer.param_groups) if other is group)

    def _hook(self, name: str, position: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            optimizer, take = self._optimizer(), self._take()
            # Compiled graphs run hooks of weights without a gradient too.
            if optimizer is None or take is None or parameter.grad is None:
                return
            with torch.no_grad(), without_autocast(parameter.device):
                # By its place: a state that is loaded, as accelerate's prepare() does, replaces the group itself.
                take(name, parameter, optimizer.param_groups[position])
            parameter.grad = None

        return hook


def refuse_scaler(optimizer: torch.optim.Optimizer) -> None:
    """Raise where a gradient scaler has handed itself to the optimizer, since it cannot unscale what was folded.

    Raises:
        RuntimeError: a gradient scaler.
    """
    left = [key for key in ("grad_scale", "found_inf") if hasattr(optimizer, key)]
    for key in left:  # the scaler would take them away after a step that succeeds
        delattr(optimizer, key)
    if left:
        raise RuntimeError(
            "GradScaler cannot unscale gradients that were taken in backward; use bfloat16 autocast, which needs no "
            "scaler, or leave fuse_into_backward(), or compress_gradients(), out"
        )


def without_autocast(device: torch.device) -> torch.autocast:
    """Products in the dtype of their factors, also where backward or step is called under autocast."""
    return torch.autocast(device.type, enabled=False)


def refuse_processes(folds: bool) -> None:
    """Raise where hooks would see the gradients of one process only.

    Args:
        folds: whether gradients are folded, so that what is left of them could be averaged.

    Raises:
        RuntimeError: more than one process.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and (processes := torch.distributed.get_world_size()) > 1:
        raise RuntimeError(
            f"fuse_into_backward() takes the gradients of this process alone, and there are {processes}; "
            + (
                "call subspan.distributed.exclude_from_ddp(model, optimizer) before the model is wrapped in DDP"
                if folds
                else "a method that needs the gradients themselves cannot update in backward then: leave it out, or "
                "take GaLore"
            )
        )
