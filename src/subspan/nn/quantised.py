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

__all__ = ["STEPS", "quantize_weights"]

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

    Embeddings, heads, vectors, matrices with fewer than ``min_quantized`` elements, and those whose columns no number
    from 16 to ``group_size`` divides, stay as they are.

    ``model.state_dict()`` holds ordinary float matrices in the memory of the host, so that what is saved is a model
    like any other, and beside each its steps as ``NAME_steps``: loaded into a model that is quantised, the two give the
    same codes again; without the steps a matrix is rounded to nearest.

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
    groups = param_groups(model, rank=1, target_modules=target_modules, exclude=exclude)
    targets = {id(parameter) for _, parameter in groups[0]["params"]}
    names = []
    for prefix, module in model.named_modules():
        W = getattr(module, "weight", None)
        if not _is_linear(module) or id(W) not in targets or isinstance(W, Int8Weight):
            continue
        assert isinstance(W, nn.Parameter)
        if W.numel() < min_quantized or group_of(W.shape[1], group_size) is None:
            continue
        _quantize(W, f"{prefix}.weight" if prefix else "weight", group_size)
        names.append(canonical_name(f"{prefix}.weight" if prefix else "weight"))
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), Int8Weight):
            _hook(module)
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to hold in int8: target_modules={target_modules!r}, "
            f"min_quantized={min_quantized}, group_size={group_size}; only nn.Linear and Conv1D can be, without "
            "embeddings and heads"
        )
    return names


def _is_linear(module: nn.Module) -> bool:
    """Whether a layer does nothing with its weight but multiply."""
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "ProjectedConv1D")


def _quantize(W: nn.Parameter, name: str, group_size: int) -> None:
    """Turn the parameter itself into one of 8 bits, whoever holds it."""
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


def _hook(module: nn.Module) -> None:
    if _save not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_save)
        module.register_load_state_dict_pre_hook(_load)


def _save(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Put the float matrix and the steps into a state dict, on the host, in place of the weight."""
    W = state_dict.get(f"{prefix}weight")
    if isinstance(W, Int8Weight):
        steps = W.steps.cpu()
        state_dict[f"{prefix}weight"] = Int8Weight(W.codes.cpu(), steps, W.dtype).dense()
        state_dict[f"{prefix}weight{STEPS}"] = steps


def _load(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Turn a float matrix of a state dict back into the weight that it was saved from."""
    W, own = state_dict.get(f"{prefix}weight"), module.weight
    steps = state_dict.pop(f"{prefix}weight{STEPS}", None)
    if not isinstance(W, Tensor) or not isinstance(own, Int8Weight) or W.shape != own.shape:
        return  # torch says what is wrong
    if isinstance(W, Int8Weight):
        return
    try:
        state_dict[f"{prefix}weight"] = own.restored(W, steps)
    except ValueError as error:
        error_msgs.append(f"{prefix}weight: {error}")
