"""Weights of low rank in a run: built from its settings, grouped for its optimizer, called between its steps."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import Any

from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from subspan.nn.lowrank import (
    LTE,
    LowRankWeights,
    PeriodicLoRA,
    ReLoRA,
    WeightRecipe,
    list_weights,
    low_rank_layers,
    restart_peft,
    weight_recipe,
    weight_recipe_class,
)
from subspan.optim import LowRankOptimizer, method_info
from subspan.optim.names import canonical_name
from subspan.train.adapters import adapter_factors, adapter_layers, apply_adapter, check_adapter
from subspan.train.callbacks import MetricsFile
from subspan.train.config import PretrainConfig, check_types
from subspan.train.processes import launched

__all__ = [
    "WeightsCallback",
    "batch_shares",
    "build_weights",
    "check_weights",
    "describe",
    "named_weights",
    "projection_rank",
    "weight_groups",
]


def check_weights(config: PretrainConfig, processes: int) -> None:
    """Refuse settings of weights that cannot be, before any data is read or a model is built.

    Args:
        config: the settings; also those of a run with dense weights, which has none of weights.
        processes: that will train.

    Raises:
        ValueError: naming the setting.
        ModuleNotFoundError: an adapter, and peft is not installed.
    """
    if config.weight_settings and config.weights == "dense":
        raise ValueError("weight_settings are given, but weights is 'dense': choose a recipe with --weights.")
    if config.adapter_settings and config.adapter is None:
        raise ValueError("adapter_settings are given, but no adapter: choose one with --adapter.")
    if not config.low_rank:
        if config.project is not None:
            raise ValueError(f"project is {config.project!r}, but weights is 'dense': leave project out.")
        return
    if config.weights != "dense":
        recipe = recipe_settings(config)
        kind = weight_recipe_class(config.weights)
        if config.adapter is not None and not _restarts(kind):
            able = [name for name in list_weights() if _restarts(weight_recipe_class(name))]
            raise ValueError(
                f"adapter is {config.adapter!r} and weights is {config.weights!r}: only {', '.join(able)} can restart "
                "an adapter; give one of the two."
            )
        own = None if config.adapter is not None else recipe.get("rank")
        if config.project == "factors" and own is not None and config.rank is not None and config.rank >= own:
            raise ValueError(
                f"rank is {config.rank}, but the factors of weights {config.weights!r} have rank {own}: the "
                "rank of the projection must be smaller, or there is nothing to project."
            )
        if processes > 1 and not kind.ddp:
            raise ValueError(f"weights {config.weights!r} cannot be trained by several processes: start one.")
        settled = kind(**recipe)
        settled.check_run(processes=processes, steps=config.steps, eval_every=config.eval_every)
        if config.shard != "none" and settled.unshardable is not None:
            raise ValueError(
                f"shard is {config.shard!r}, but weights {config.weights!r} cannot be divided over processes "
                f"({settled.unshardable}): leave shard out."
            )
        # Of a run that is continued, perhaps by other processes, the batch is not known yet.
        if config.resume == "none" and config.batch_size % (shares := batch_shares(config, processes)):
            raise ValueError(
                f"batch_size is {config.batch_size}, which {shares} parallel heads cannot divide evenly: "
                f"give a multiple of {shares}, or other --weight_settings.heads."
            )
        if processes > 1 and issubclass(kind, LTE) and config.optimizer.get("rank_policy") == "tolerance":
            raise ValueError(
                "optimizer.rank_policy is 'tolerance', which gives copies in several processes ranks of their own, so "
                "that they cannot be saved together: leave it out, or start one process."
            )
        if processes > 1 and issubclass(kind, LTE) and config.method == "q_galore" and config.project == "factors":
            raise ValueError(
                "method is 'q_galore', which gives heads in several processes gaps of their own, so that they cannot "
                "be saved together: give --method galore_8bit, or start one process."
            )
    if config.adapter is not None:
        check_adapter(config.adapter, config.adapter_settings)
        if config.shard != "none":
            raise ValueError(
                f"shard is {config.shard!r}, but adapter {config.adapter!r} cannot be divided over processes: leave "
                "shard out."
            )
    for name, allowed in (("gradient", "full"), ("weight_storage", "float")):
        if (value := getattr(config, name)) not in (None, allowed):
            raise ValueError(
                f"{name} is {value!r}, but with {named_weights(config)} it must be {allowed!r}: what is trained "
                "there is small."
            )
    if config.adapter is not None and (config.chunked_loss or config.project in ("others", "merged")):
        name = "chunked_loss" if config.chunked_loss else "project"
        raise ValueError(
            f"{name} is {getattr(config, name)!r}, but with an adapter only its factors are trained: leave it out."
        )
    _check_projection(config)


def _check_projection(config: PretrainConfig) -> None:
    info = method_info(config.method)
    if config.method == "adamw" and config.project is not None:
        raise ValueError(
            f"project is {config.project!r}, but the method 'adamw' projects nothing: give --method galore or another "
            "one that projects, or leave project out."
        )
    if config.method != "adamw" and info.size != "rank":
        raise ValueError(
            f"method is {config.method!r}, but {named_weights(config)} takes adamw or a method that has a rank."
        )
    if config.method != "adamw" and config.project is None:
        raise ValueError(
            f"method is {config.method!r}, but what it is to project with {named_weights(config)} is not said: give "
            "--project factors, others or merged; or --method adamw."
        )


def named_weights(config: PretrainConfig) -> str:
    """What the weights of a run are, for messages."""
    return f"weights {config.weights!r}" if config.adapter is None else f"adapter {config.adapter!r}"


def _restarts(kind: type[WeightRecipe]) -> bool:
    """Whether a recipe restarts layers, and so those of an adapter too."""
    return issubclass(kind, (ReLoRA, PeriodicLoRA))


def recipe_settings(config: PretrainConfig) -> dict[str, Any]:
    """All settings of the recipe of a run.

    Raises:
        ValueError: an unknown recipe or setting, or a value that is not allowed.
    """
    kind = weight_recipe_class(config.weights)
    try:
        check_types(kind, config.weight_settings)
        return dataclasses.asdict(weight_recipe(config.weights, **config.weight_settings))
    except ValueError as error:
        raise ValueError(f"weight_settings: {error}") from error


def batch_shares(config: PretrainConfig, processes: int) -> int:
    """What the sequences of a forward pass of a process have to be a multiple of."""
    return 1 if config.weights == "dense" else weight_recipe(config.weights, **config.weight_settings).shares(processes)


def projection_rank(config: PretrainConfig, hidden_size: int) -> int:
    """The rank at which gradients are projected by default: a quarter of the width, or of the factors' own rank."""
    size = recipe_settings(config).get("rank") if config.project == "factors" and config.adapter is None else None
    if config.project == "factors" and config.adapter is not None:
        size = config.adapter_settings.get("r", 8)
    return max(1, (size or hidden_size) // 4)


def build_weights(model: PreTrainedModel, config: PretrainConfig) -> tuple[Any, LowRankWeights | None]:
    """Give the chosen layers of a model the weights that the settings say, as they are before the first step.

    Args:
        model: the model; its layers are replaced in place.
        config: resolved settings.

    Returns:
        The model to train, which peft wraps, and what happens to its weights between steps; None where they are dense.

    Raises:
        ValueError: settings that do not fit the model.
    """
    if not config.low_rank:
        return model, None
    weights: LowRankWeights
    recipe = None if config.weights == "dense" else weight_recipe(config.weights, **config.weight_settings)
    if config.adapter is not None:
        weights = apply_adapter(
            model,
            config.adapter,
            config.adapter_settings,
            target_modules=config.target_modules,
            exclude=config.exclude,
            seed=config.seed,
        )
        if isinstance(recipe, (ReLoRA, PeriodicLoRA)):
            weights = restart_peft(weights.model, recipe, steps=config.steps, seed=config.seed)
    else:
        assert recipe is not None
        weights = recipe.apply(
            model,
            target_modules=config.target_modules,
            exclude=config.exclude,
            steps=config.steps,
            seed=config.seed,
        )
    weights.begin_step(0)
    if launched() > 1 and not all(factor.requires_grad for factor in weights.factors().values()):
        raise ValueError(
            f"{named_weights(config)} train whole matrices before their factors, which several processes (DDP) cannot: "
            "start one process, or train the factors from the first step on."
        )
    if config.project == "merged":
        for name, layer in weights.layers.items():
            weight = getattr(layer, "weight", None)
            if not isinstance(weight, nn.Parameter) or weight.requires_grad:
                raise ValueError(
                    f"project is 'merged', but {name} has no frozen weight beside its factors that could be trained: "
                    "choose another recipe of weights, or --project factors."
                )
            weight.requires_grad_(True)
    if config.chunked_loss and (type(model.get_output_embeddings()) is not nn.Linear or model._forward_pre_hooks):
        raise ValueError(
            f"chunked_loss is true, but weights {config.weights!r} have replaced the head of the model, or have to "
            "see each batch: leave chunked_loss out."
        )
    return weights.model, weights


def _factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The factors in a model by name, also those that wait to be trained."""
    found = {f"{name}.{key}": p for name, layer in low_rank_layers(model) for key, p in layer.factors().items()}
    return found | adapter_factors(model)


def weight_groups(model: nn.Module, config: PretrainConfig) -> list[dict[str, Any]]:
    """Parameter groups of a model with weights of low rank: factors, other matrices, vectors.

    Args:
        model: what `build_weights` returned.
        config: resolved settings.

    Raises:
        ValueError: nothing to project where the method projects.
    """
    ratio = config.adapter_settings.get("lora_plus_ratio", 1)
    owned = {parameter for parameter in _factors(model).values()}
    # Frozen weights that are trained: beside their factors, or for a while in their place.
    dense = {getattr(layer, "weight", None) for _, layer in low_rank_layers(model)}
    # One a head, where heads are parallel.
    biases = {layer.bias for _, layer in low_rank_layers(model)}
    kinds: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter in owned:
            kind = "factors" if parameter.ndim >= 2 else "factor vectors"
            kind += ", B" if ratio != 1 and "lora_B" in name else ""
        elif not parameter.requires_grad:
            continue
        elif parameter in dense:
            kind = "merged"
        else:
            kind = "others" if parameter.ndim >= 2 and parameter not in biases else "vectors"
        kinds.setdefault(kind, []).append((canonical_name(name), parameter))
    if config.project is not None:
        _check_projected(kinds, config)
    groups = []
    for kind in ("factors", "factors, B", "factor vectors", "factor vectors, B", "merged", "others", "vectors"):
        if kind not in kinds:
            continue
        scale = config.lr_scale if kind.startswith(("factor", "merged")) else config.other_lr_scale
        group: dict[str, Any] = {"params": kinds[kind], "name": kind}
        group["lr_scale"] = scale * ratio if kind.endswith(", B") else scale
        group["weight_decay"] = 0.0 if "vectors" in kind else config.weight_decay
        if config.project is not None and kind.startswith(config.project):
            group["rank"] = config.rank
        groups.append(group)
    return groups


def _check_projected(kinds: dict[str, list[tuple[str, nn.Parameter]]], config: PretrainConfig) -> None:
    assert config.project is not None and config.rank is not None
    chosen = [entry for kind in (config.project, f"{config.project}, B") for entry in kinds.get(kind, [])]
    if not chosen:
        raise ValueError(
            f"project is {config.project!r}, but there are none with {named_weights(config)}: choose others."
        )
    for name, parameter in chosen:
        if parameter.ndim > 3 or config.rank >= min(parameter.shape[-2:]):
            raise ValueError(
                f"project is {config.project!r} and rank is {config.rank}, but {name} is "
                f"{' × '.join(map(str, parameter.shape))}: the rank must be smaller than its sides; lower --rank."
            )


def describe(model: nn.Module, config: PretrainConfig) -> tuple[str, str]:
    """What the weights of a run are and which layers have them, for people."""
    unused = ("rank", "alpha", "dropout") if config.adapter is not None else ()  # they are the adapter's own
    settings = {name: value for name, value in config.weight_settings.items() if name not in unused and value}
    settings |= config.adapter_settings
    name = " + ".join(name for name in (config.adapter, config.weights) if name not in (None, "dense"))
    what = f"{name} ({', '.join(f'{key} {value}' for key, value in settings.items())})" if settings else name
    layers = [name for name, _ in low_rank_layers(model)] or adapter_layers(model)
    kinds = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name.removeprefix("base_model.model.")) for name in layers)
    return what, ", ".join(f"{count} × {pattern}" if count > 1 else pattern for pattern, count in kinds.items())


class WeightsCallback(TrainerCallback):
    """Tells the weights where the steps begin and end, and the log what they did.

    Args:
        weights: of the run.
        optimizer: without a wrapper.
        metrics: the lines go there as ``{"step": …, "weights": […]}``; None writes none.
        console: and there.
    """

    def __init__(
        self, weights: LowRankWeights, optimizer: LowRankOptimizer, metrics: MetricsFile | None, console: Console
    ) -> None:
        self.weights, self.optimizer = weights, optimizer
        self.metrics, self.console = metrics, console

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first forward pass of a step."""
        self.weights.begin_step(state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the optimizer, before gradients are forgotten."""
        unreached = _unreached(self.weights) if state.global_step == 0 else []
        lines = self.weights.end_step(state.global_step, self.optimizer)
        if unreached:
            lines.append(
                f"no gradient reached the factors of {', '.join(unreached[:3])}{', ...' * (len(unreached) > 3)} "
                f"({len(unreached)} of {len(self.weights.layers)} layers): leave them out with --exclude"
            )
        if not lines:
            return
        step = state.global_step + 1
        if self.metrics is not None:
            self.metrics.write({"step": step, "weights": lines})
        for line in lines:
            text = f"step {step:>{len(str(state.max_steps))}}/{state.max_steps}  {line}"
            self.console.print(text, style="cyan", markup=False, highlight=False)


def _unreached(weights: LowRankWeights) -> list[str]:
    """Layers whose factors are trained and have no gradient: their module reads a weight past them, as Mamba's does."""
    factors = {name: list(layer.factors().values()) for name, layer in weights.layers.items()}
    return [
        name
        for name, own in factors.items()
        if any(factor.requires_grad for factor in own) and all(factor.grad is None for factor in own)
    ]
