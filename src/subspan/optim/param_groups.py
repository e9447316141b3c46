"""Divide a model's parameters into projected and dense groups."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from subspan.optim.names import canonical_name

#: Settings of `param_groups` that an optimizer built from a model hands on.
GROUPING = frozenset({"rank", "density", "target_modules", "exclude", "lr_scale", "other_lr_scale", "other_moments"})

NEVER = (nn.Embedding, nn.EmbeddingBag, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
CONVOLUTIONS = (nn.modules.conv._ConvNd,)


def param_groups(
    model: nn.Module,
    rank: int | None = 128,
    target_modules: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    lr_scale: float = 1.0,
    other_lr_scale: float = 1.0,
    other_moments: str | None = None,
    weight_decay: float | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for a low-rank optimizer: the target matrices, the other matrices, and vectors.

    ``"all-linear"`` targets the weights of linear layers (also Hugging Face's ``Conv1D``) and stacks of experts (3-D
    parameters), without embeddings and without output heads: what is tied to an embedding, what a Hugging Face model
    names as its head or holds outside of its base model, and in a plain model the last linear layer from the width of
    the largest embedding to its (padded) number of entries. Biases, norms and all that is not a target stay dense. A
    tied weight appears once.

    Args:
        model: the model; only parameters that require a gradient are grouped.
        rank: number of directions; None leaves the target group without a rank (for dense methods and for settings
            such as ``density``).
        target_modules: ``"all-linear"``; a regular expression that has to match the whole name of a module or of a
            parameter; or a list of strings, of which one has to be part of the name. Convolutions are targets only
            when named.
        exclude: the same, to leave modules dense.
        lr_scale: factor on the learning rate of the targets.
        other_lr_scale: factor on the learning rate of all other parameters.
        other_moments: how the moments of the other matrices (embeddings, heads) are held, as ``moments`` of the
            optimizer; None leaves them in float32.
        weight_decay: of all matrices, targets or not; vectors (biases, norms) get 0. None leaves the optimizer's.
        **settings: further keys of the target group (``scale``, ``update_proj_gap``, ``proj_type``, ...).

    Returns:
        Group dicts with named parameters; empty groups are left out.

    Raises:
        ValueError: a pattern that matches nothing, or no target at all.

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 32), nn.Linear(32, 16))
        >>> [(sorted(g.keys() & {"rank"}), [name for name, _ in g["params"]]) for g in param_groups(model, rank=4)]
        [(['rank'], ['1.weight', '2.weight']), ([], ['0.weight']), ([], ['1.bias', '2.bias'])]
    """
    forbidden = _heads_and_embeddings(model)
    wanted, unwanted = _Pattern(target_modules), _Pattern(exclude) if exclude else None
    targets: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    vectors: list[tuple[str, nn.Parameter]] = []
    # Every name of a tied weight is offered to the patterns, but the weight is taken once.
    named = list(owned(model))
    seen: set[nn.Parameter] = set()
    for name, module, parameter in named:
        excluded = unwanted is not None and unwanted.matches(name)
        if wanted.all_linear:
            target = parameter not in forbidden and _is_linear(module, parameter)
        else:
            target = parameter.ndim >= 2 and wanted.matches(name)
        if parameter in seen or not parameter.requires_grad:
            continue
        seen.add(parameter)
        entry = (canonical_name(name), parameter)
        if target and not excluded:
            if parameter.ndim == 3 and isinstance(module, CONVOLUTIONS):
                raise ValueError(
                    f"{name}: the weight of a 1-D convolution cannot be projected, since three dimensions mean a stack "
                    "of matrices; put it into exclude"
                )
            targets.append(entry)
        elif parameter.ndim >= 2:
            others.append(entry)
        else:
            vectors.append(entry)
    for pattern in (wanted, unwanted):
        if pattern is not None:
            pattern.check_used([name for name, _, _ in named])
    if not targets:
        raise ValueError(
            f"target_modules={target_modules!r} selects no trainable matrix of {type(model).__name__}; "
            "use 'all-linear', a regular expression or a list of parts of module names"
        )
    target_settings = dict(settings)
    if rank is not None:
        target_settings["rank"] = rank
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    storage = {} if other_moments is None else {"moments": other_moments}
    groups = [
        {"params": targets, "name": "targets", "lr_scale": lr_scale, **decay, **target_settings},
        {"params": others, "name": "others", "lr_scale": other_lr_scale, **decay, **storage},
        {"params": vectors, "name": "vectors", "lr_scale": other_lr_scale, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class _Pattern:
    """``all-linear``, a regular expression for whole names, or a list of parts of names."""

    def __init__(self, pattern: str | Sequence[str]) -> None:
        self.all_linear = pattern == "all-linear"
        self.parts: list[str] = [] if isinstance(pattern, str) else list(pattern)
        self.expression: re.Pattern[str] | None = None
        if isinstance(pattern, str) and not self.all_linear:
            try:
                self.expression = re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        self.used: set[str] = set()

    def matches(self, name: str) -> bool:
        """Whether the parameter ``name``, or its module, is meant."""
        module = name.rpartition(".")[0]
        if self.expression is not None:
            hit = bool(self.expression.fullmatch(module) or self.expression.fullmatch(name))
            self.used |= {self.expression.pattern} if hit else set()
            return hit
        parts = [part for part in self.parts if part in name]
        self.used.update(parts)
        return bool(parts)

    def check_used(self, names: Collection[str]) -> None:
        """Refuse patterns that have matched nothing.

        Raises:
            ValueError: naming the pattern and what is close to it.
        """
        patterns = self.parts if self.expression is None else [self.expression.pattern]
        for pattern in patterns:
            if pattern not in self.used:
                words = {word for name in names for word in name.split(".") if not word.isdigit()}
                close = difflib.get_close_matches(pattern, sorted(words), n=3)
                hint = (
                    f"; close to it: {', '.join(close)}" if close else f"; names look like {', '.join(list(names)[:3])}"
                )
                raise ValueError(f"the pattern {pattern!r} selects no matrix of the model{hint}")


def owned(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Every parameter under each of its names, with the module that owns it."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield (f"{prefix}.{name}" if prefix else name), module, parameter


def _heads_and_embeddings(model: nn.Module) -> set[torch.Tensor]:
    """Weights of embeddings, of what is tied to them, and of output heads."""
    return {module.weight for module in _embeddings(model)} | output_heads(model)


def output_heads(model: nn.Module) -> set[torch.Tensor]:
    """Parameters of output heads.

    A Hugging Face model says what its head is: its output embeddings, and all that stands outside of its base model
    (classifiers, regression heads). Of a plain model, the last linear layer from the width of the largest embedding to
    its number of entries, or to that number padded, counts as the head.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    heads: set[torch.Tensor] = set()
    base, get_head = getattr(model, "base_model", None), getattr(model, "get_output_embeddings", None)
    if isinstance(base, nn.Module) and callable(get_head):
        head = get_head()
        if getattr(head, "weight", None) is not None:
            heads.add(head.weight)
        if base is not model:
            heads |= set(model.parameters()) - set(base.parameters())
    elif embeddings := _embeddings(model):
        table = max(embeddings, key=lambda module: module.num_embeddings)
        linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.in_features == table.embedding_dim]
        exact = [m for m in linear if m.out_features == table.num_embeddings]
        # Vocabularies are padded to multiples of at most 256. Of several candidates the last one is the head.
        padded = [m for m in linear if 0 <= m.out_features - table.num_embeddings < 256 and m.out_features % 8 == 0]
        heads |= {module.weight for module in (exact or padded)[-1:]}
    return heads


def _embeddings(model: nn.Module) -> list[nn.Embedding | nn.EmbeddingBag]:
    return [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]


def _is_linear(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether ``parameter`` is the matrix of a linear layer or a stack of expert matrices."""
    if isinstance(module, (*NEVER, *CONVOLUTIONS)):
        return False
    if isinstance(module, (nn.Linear, nn.MultiheadAttention)) or is_transposed(module):
        # Of torch's attention these are the input projections; its biases for keys and values have three dimensions.
        return parameter.ndim == 2 and min(parameter.shape) > 1
    return parameter.ndim == 3 and min(parameter.shape) > 1


def is_transposed(module: nn.Module) -> bool:
    """Whether this is Hugging Face's linear layer whose weight is (in, out)."""
    return type(module).__name__ in ("Conv1D", "ProjectedConv1D", "Int8Conv1D")
