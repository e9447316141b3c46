"""From the settings of a run to its optimizer, and the check that the Trainer really uses it."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, Literal

import torch
from torch import nn

from subspan.nn import project_gradients, quantize_weights
from subspan.optim import LowRankOptimizer, create_optimizer, method_info
from subspan.train.config import PretrainConfig
from subspan.train.processes import launched
from subspan.train.reduce import check_reduction
from subspan.train.weights import check_weights, projection_rank, recipe_settings, weight_groups

__all__ = ["build_optimizer", "check_optimizer", "check_settings", "hold_weights", "projected_names", "resolve"]

#: What `build_optimizer` takes from settings of the run.
_OWN_SETTINGS = frozenset(
    {"lr", "weight_decay", "seed", "rank", "target_modules", "exclude", "lr_scale", "other_lr_scale"}
)

#: Elements that share a step in int8 weights of methods that do not say.
_INT8_GROUP = 256


def resolve(config: PretrainConfig, hidden_size: int) -> PretrainConfig:
    """Fill in what depends on the method and the model: `lr`, `rank`, `weight_storage`, ``update_proj_gap``, and all
    settings of a recipe of weights.

    Args:
        config: settings of the run.
        hidden_size: width of the model; a quarter of it is the default rank, half of it the most that a rank found
            from a tolerance may take by default.

    Raises:
        ValueError: an unknown method, or a rank for a method that projects nothing.

    Example:
        >>> resolve(PretrainConfig(), hidden_size=256).rank
        64
    """
    info = method_info(config.method)
    # A recipe that is another with other defaults hands the rest on.
    kinds = [kind for kind in reversed(info.optimizer.__mro__) if issubclass(kind, LowRankOptimizer)]
    defaults = {key: value for kind in kinds for key, value in inspect.signature(kind).parameters.items()}
    if info.size is None and config.rank is not None:
        instead = "; --weight_settings.rank is that of factors" if config.weights != "dense" else ""
        raise ValueError(
            f"rank is {config.rank}, but the method {config.method!r} projects nothing; leave rank out{instead}."
        )
    rank = config.rank
    if rank is None and info.size == "rank":
        share = 2 if config.optimizer.get("rank_policy") == "tolerance" else 4
        size = projection_rank(config, hidden_size) if config.low_rank else max(1, hidden_size // share)
        rank = int(info.default_size or size)
    optimizer = dict(config.optimizer)
    if "update_proj_gap" in defaults:
        own = defaults["update_proj_gap"].default
        optimizer.setdefault("update_proj_gap", min(own, max(1, config.steps // 10)))
    lr = defaults["lr"].default if config.lr is None else config.lr
    held = config.weight_settings if config.weights == "dense" else recipe_settings(config)
    settled: dict[str, Any] = {"weight_storage": _storage(config), "weight_settings": held}
    return dataclasses.replace(config, rank=rank, lr=lr, optimizer=optimizer, **settled)


def _storage(config: PretrainConfig) -> Literal["float", "int8"]:
    if config.low_rank:
        return "float"
    return config.weight_storage or ("float" if method_info(config.method).int8_group is None else "int8")


def hold_weights(model: nn.Module, config: PretrainConfig) -> None:
    """Hold the weights of a model that was built as the settings say; before its optimizer is built.

    Raises:
        ValueError: weights in int8, and no layer whose weight can be held so.
    """
    if _storage(config) == "int8":
        group = method_info(config.method).int8_group or _INT8_GROUP
        quantize_weights(model, config.target_modules, config.exclude, group_size=group)


def check_settings(config: PretrainConfig, processes: int | None = None) -> None:
    """Refuse settings that the method does not have, before any data is read or a model is built.

    Args:
        config: the settings.
        processes: that will train; None: as many as were launched.

    Raises:
        ValueError: an unknown method or setting, or an impossible value.
    """
    fused: Literal["full", "fused"] = "full" if config.gradient == "full" else "fused"
    check_weights(config, processes or launched())
    plain: dict[str, Any] = {"weights": "dense", "weight_settings": {}, "adapter": None, "adapter_settings": {}}
    plain |= {"project": None, "target_modules": "all-linear", "exclude": [], "gradient": fused, "share_inputs": False}
    settings = dataclasses.replace(resolve(config, 8), **plain)
    optimizer = build_optimizer(nn.Linear(8, 8), settings)
    check_reduction(dataclasses.replace(config, weight_storage=_storage(config)), optimizer, processes or launched())
    if _storage(config) == "int8" and optimizer.param_groups[0]["rounding"] == "nearest":
        raise ValueError(
            f"weight_storage is 'int8', and the method {config.method!r} rounds to nearest, which loses most steps: "
            "give --optimizer.rounding stochastic."
        )
    if config.gradient != "full" and config.optimizer.get("refresh") == "now":
        raise ValueError(
            f"optimizer.refresh is 'now', but gradient {config.gradient!r} can only refresh late: leave refresh out."
        )
    if config.gradient == "projected" and not optimizer.folds:
        raise ValueError(
            f"gradient is 'projected', but the method {config.method!r} needs the gradients themselves: take galore or "
            "golore, or --gradient fused."
        )
    if config.gradient == "fused" and not optimizer.folds:
        for name, allowed in (("max_grad_norm", 0), ("grad_accumulation", 1)):
            if (value := getattr(config, name)) != allowed:
                raise ValueError(
                    f"{name} is {value}, but with gradient 'fused' the method {config.method!r} uses each gradient up "
                    f"in backward: give --{name} {allowed}, or --gradient full."
                )


def build_optimizer(model: nn.Module, config: PretrainConfig) -> LowRankOptimizer:
    """Build the optimizer of a resolved configuration; the Trainer calls it with its model.

    Raises:
        ValueError: settings that the method does not have, or nothing to project.
    """
    settings = dict(config.optimizer)
    if taken := sorted(settings.keys() & _OWN_SETTINGS):
        raise ValueError(f"optimizer: {', '.join(taken)} is a setting of the run; give --{taken[0]} instead.")
    settings |= {"lr": config.lr, "weight_decay": config.weight_decay, "seed": config.seed}
    params: Any = model
    if config.low_rank:
        params = weight_groups(model, config)
    else:
        grouping = ("target_modules", "exclude", "lr_scale", "other_lr_scale")
        settings |= {name: getattr(config, name) for name in grouping}
        if config.rank is not None:
            settings["rank"] = config.rank
    try:
        optimizer = create_optimizer(config.method, params, **settings)
    except TypeError as error:
        raise ValueError(f"optimizer: {error}") from error
    if config.shard == "bases" and launched() > 1:
        optimizer.divide_bases()
    if config.gradient == "fused":
        optimizer.fuse_into_backward()
    elif config.gradient == "projected":
        project_gradients(model, optimizer, share_inputs=config.share_inputs)
    return optimizer


def projected_names(optimizer: LowRankOptimizer) -> list[str]:
    """Return the names of the projected parameters."""
    return [row.name for row in optimizer.rows() if row.rank is not None]


def check_optimizer(optimizer: torch.optim.Optimizer, config: PretrainConfig, model: nn.Module) -> None:
    """Check that the Trainer uses the optimizer that was asked for.

    Raises:
        RuntimeError: another class, or not the same parameters projected.
    """
    wanted = build_optimizer(model, dataclasses.replace(config, gradient="full", share_inputs=False))
    if type(optimizer) is not type(wanted):
        raise RuntimeError(
            f"the Trainer uses {type(optimizer).__name__} although {type(wanted).__name__} was asked for; this version "
            "of transformers does not honour optimizer_cls_and_kwargs."
        )
    assert isinstance(optimizer, LowRankOptimizer)
    if (found := projected_names(optimizer)) != (expected := projected_names(wanted)):
        raise RuntimeError(f"{len(found)} tensors are projected instead of {len(expected)}: {found} != {expected}")
