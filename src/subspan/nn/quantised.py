"""Linear layers whose weights are held in 8 bits while they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subspan.optim import param_groups
from subspan.optim.names import canonical_name
from subspan.state import Int8Weight
from subspan.state.int8_weight import group_of

__all__ = ["STEPS", "Int8Conv1D", "Int8Linear", "quantize_weights"]

#: Ending of the key in a ``state_dict`` under which the steps of a weight of 8 bits stand.
STEPS = "_steps"


def quantize_weights(
    model: nn.Module,
    target_modules: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    *,
    group_size: int = 256,
    min_quantized: int = 4096,
) -> list[str]:
    """Hold the weights of a model's linear layers in int8, in place, for training.

    Each becomes a `subspan.state.Int8Weight`: int8 codes and one bfloat16 step for a group of at most ``group_size``
    neighbours in a row, 1.008 bytes an element. A layer makes the float matrix while it multiplies. Train with an
    optimizer of subspan and ``rounding="stochastic"``, as `QGaLore`, `QAPOLLO` and `QAPOLLOMini` do by themselves:
    rounded to nearest, a step that is smaller than half a code would be lost.

    Frozen weights, embeddings, heads, vectors, subclasses of ``nn.Linear``, matrices with fewer than ``min_quantized``
    elements, and those whose columns no number from 16 to ``group_size`` divides, stay as they are.

    ``model.state_dict()`` holds ordinary float matrices in the memory of the host, so that what is saved is a model
    like any other, and beside each its steps as ``NAME_steps``: loaded into a model that is quantised, the two give the
    same codes again; without the steps a matrix is rounded to nearest. (``save_pretrained`` writes the steps into the
    same file, where transformers names them as unexpected and leaves them out.)

    Args:
        model: the model; parameters stay the same objects, so that an optimizer that has them keeps them. Call it
            before `fuse_into_backward` and `project_gradients`.
        target_modules, exclude: which matrices, as for `subspan.optim.param_groups`.
        group_size: the most elements that share a step.
        min_quantized: elements from which a matrix is held in int8.

    Returns:
        Names of the weights that are held in int8 now.

    Raises:
        ValueError: nothing to quantise, or patterns that match nothing.
        RuntimeError: a weight that autograd or hooks hold on to.

    Example:
        >>> model = nn.Sequential(nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 8))
        >>> quantize_weights(model)
        ['0.weight']
        >>> sum(p.numel() for p in model.parameters()), model[0].weight.codes.nbytes
        (16968, 16384)

    Source: arXiv 2407.08296 (groups of 256), 2412.05270 (groups of 128).
    """
    if group_size < 1:
        raise ValueError(f"group_size={group_size} is not allowed; it must be at least 16, such as 128 or 256")
    if any(hasattr(module, "gradient_slots") for module in model.modules()):
        raise RuntimeError("the model has projected gradients already: call quantize_weights before project_gradients")
    groups = param_groups(model, rank=1, target_modules=target_modules, exclude=exclude)
    targets = {id(parameter) for _, parameter in groups[0]["params"]}
    names = []
    for prefix, module in model.named_modules():
        W, kind = getattr(module, "weight", None), _kind(module)
        if kind is None or W is None or not (id(W) in targets or isinstance(W, Int8Weight)):
            continue
        if not isinstance(W, Int8Weight):  # else it is tied to one before
            if W.numel() < min_quantized or group_of(W.shape[1], group_size) is None:
                continue
            _quantize(W, f"{prefix}.weight" if prefix else "weight", group_size)
            names.append(canonical_name(f"{prefix}.weight" if prefix else "weight"))
        module.__class__ = kind
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to hold in int8: target_modules={target_modules!r}, "
            f"min_quantized={min_quantized}, group_size={group_size}; only nn.Linear and Conv1D can be, without "
            "embeddings and heads"
        )
    return names


class Int8Layer(nn.Module):
    """What a layer has to do whose weight may be an `Int8Weight`; with another weight it does nothing of its own."""

    weight: Tensor

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the layer; where neither device nor dtype change, torch would put another tensor into the parameter."""
        W = self.weight
        if not isinstance(W, Int8Weight):
            return super()._apply(fn, recurse)
        with torch.no_grad():
            moved = fn(W)
            if (moved.dtype, moved.device) != (W.dtype, W.device):
                if W._post_accumulate_grad_hooks or W._backward_hooks:
                    raise RuntimeError(
                        f"a weight in int8 that has hooks cannot be moved from {W.dtype} on {W.device} to "
                        f"{moved.dtype} on {moved.device}: move the model before fuse_into_backward()"
                    )
                if not isinstance(moved, Int8Weight):  # without numbers, as to_empty makes it
                    codes, steps = (torch.empty_like(part, device=moved.device) for part in (W.codes, W.steps))
                    moved = Int8Weight(codes, steps, moved.dtype)
                return super()._apply(lambda tensor: moved if tensor is W else fn(tensor), recurse)
            if moved is not W:
                W.copy_(moved)
        self._parameters["weight"] = None
        try:
            return super()._apply(fn, recurse)
        finally:
            self._parameters["weight"] = W  # type: ignore[assignment]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the float matrix and the steps, on the host."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        W = self.weight
        if isinstance(W, Int8Weight):
            steps = W.steps.cpu()
            destination[f"{prefix}weight"] = Int8Weight(W.codes.cpu(), steps, W.dtype).dense()
            destination[f"{prefix}weight{STEPS}"] = steps

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Turn a float matrix back into the codes that it was saved from."""
        own, W = self.weight, state_dict.get(f"{prefix}weight")
        if isinstance(own, Int8Weight):
            steps = state_dict.pop(f"{prefix}weight{STEPS}", None)
            # What has another shape torch refuses itself.
            if isinstance(W, Tensor) and not isinstance(W, Int8Weight) and W.shape == own.shape:
                try:
                    state_dict[f"{prefix}weight"] = own.restored(W, steps)
                except ValueError as error:
                    error_msgs.append(f"{prefix}weight: {error}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class Int8Linear(Int8Layer, nn.Linear):
    """A linear layer with a weight of 8 bits; made by `quantize_weights`."""

    def forward(self, input: Tensor) -> Tensor:
        """xWᵀ + b."""
        return _linear(input, self.weight, self.bias)


class Int8Conv1D(Int8Layer):
    """Hugging Face's ``Conv1D``, a linear layer with the weight transposed, in the same way."""

    bias: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """The product xW + b."""
        return _linear(input, self.weight.mT, self.bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # With a frozen weight torch would repeat it for each matrix of a stack that it cannot flatten.
    return nn.functional.linear(x.contiguous() if isinstance(weight, Int8Weight) else x, weight, bias)


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """The class of a layer once its weight has 8 bits; None for layers that may do more than multiply by it."""
    if type(module) in (nn.Linear, Int8Linear):
        return Int8Linear
    return Int8Conv1D if is_conv1d(module) or type(module) is Int8Conv1D else None


def is_conv1d(module: nn.Module) -> bool:
    """Whether a layer is Hugging Face's ``Conv1D``."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _quantize(W: nn.Parameter, name: str, group_size: int) -> None:
    """Turn the parameter itself into one of 8 bits, whoever holds it."""
    if W._backward_hooks or W._post_accumulate_grad_hooks:
        raise RuntimeError(
            f"{name} has hooks, which it would lose: call quantize_weights before they are registered (before "
            "fuse_into_backward, for one)"
        )
    with torch.no_grad():
        quantised = nn.Parameter(Int8Weight.of(W.detach(), group_size), requires_grad=W.requires_grad)
    W.grad = None
    try:
        torch.utils.swap_tensors(W, quantised)
    except RuntimeError as error:
        raise RuntimeError(
            f"{name} cannot be held in int8 now, since something refers to it ({error}); call quantize_weights before "
            "fuse_into_backward, project_gradients and the first backward"
        ) from error
