"""The memory of a training run before it exists: a model, an optimizer and a batch, simulated and traced."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from subspan.memory.plan import PeakPlan, adamw_8bit_state_bytes
from subspan.memory.processes import ProcessPlan, ddp_layouts, one_of, sharded_layouts, trace_sharded, with_buckets
from subspan.memory.simulate import materialise, rehearse_step, simulated
from subspan.memory.training import trace_training
from subspan.nn.lowrank import LowRankWeights, list_weights, weight_recipe
from subspan.optim import LowRankOptimizer, create_optimizer, list_methods, method_info
from subspan.optim.groups import unknown_setting
from subspan.train.config import PretrainConfig
from subspan.train.optimizer import build_optimizer, check_settings, hold_weights, resolve
from subspan.train.plan_settings import PlanSettings
from subspan.train.presets import PRESETS, skeleton
from subspan.train.shard import shard_model
from subspan.train.weights import build_weights

__all__ = ["BASELINES", "Recipe", "largest_that_fits", "left_out", "plan_recipe", "recipes"]

#: Recipes that are no method of the registry, with what they are.
BASELINES = {
    "adamw_torch": "torch.optim.AdamW, fused: moments in the dtype of the weights",
    "adamw_8bit": "torchao AdamW8bit: moments of a byte, by formula; its step is taken to need nothing more",
    "lora": "peft, all linear layers, the other weights frozen; AdamW with float32 moments",
}

_WHOLE = "planned with whole models alone"


@dataclass(frozen=True)
class Recipe:
    """A planned way to train.

    Attributes:
        name: a method of the registry, or one of `BASELINES`.
        gradient: ``full``, ``fused`` or ``projected``.
        size: how much is projected (``rank 128``), or nothing.
        parameters: of the model, in all.
        trainable: of them, those that are trained.
        bytes: where they go; of several processes those of one, with its ``buffers``: buckets of DDP, or what is whole
            for a while of a model that `fully_shard` has divided.
        processes: what several processes hold and send; None where there is one.
    """

    name: str
    gradient: str
    size: str
    parameters: int
    trainable: int
    bytes: PeakPlan
    processes: ProcessPlan | None = None

    @property
    def title(self) -> str:
        """Name and variant, for people."""
        variant = [self.size] * bool(self.size) + [self.gradient] * (self.gradient != "full")
        return self.name + (f" ({', '.join(variant)})" if variant else "")


def recipes(settings: PlanSettings) -> Iterator[Recipe]:
    """Plan the chosen recipe, and then those of ``compare``.

    A method that cannot leave gradients unformed takes them in backward; one that cannot accumulate what it takes in
    backward keeps whole gradients.

    Raises:
        ValueError: an unknown name, or settings that the method does not have.
    """
    names = _compared(settings)
    yield plan_recipe(settings)
    for name in names:
        yield plan_recipe(_beside(settings, name))


def plan_recipe(settings: PlanSettings) -> Recipe:
    """Plan ``settings.method`` alone: trace two training steps of fake tensors.

    Raises:
        ValueError: unknown model or method, or settings that they do not have.
        FileNotFoundError: a model folder that does not exist.
    """
    config = _config(settings)
    if settings.method not in BASELINES:
        check_settings(config, settings.world_size)
    elif settings.shard != "none":
        raise ValueError(f"shard is {settings.shard!r}, but {settings.method!r}: {_WHOLE}; leave shard out.")
    if settings.weights == "lte" and settings.world_size > 1:
        raise ValueError(
            f"world_size is {settings.world_size}, but processes share parallel heads: plan one of them with its share "
            "of --weight_settings.heads, and leave world_size out."
        )
    config = dataclasses.replace(config, shard="none")  # what is divided, is divided here
    with torch.device("meta"):
        model: Any = skeleton(
            settings.model,
            vocab_size=settings.vocab_size,
            seq_len=settings.seq_len,
            dtype=torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32,
        )
        parameters, text = model.num_parameters(), model.config.get_text_config()
        hold_weights(model, config)
        prepare(model, settings.activation_checkpointing)
        if settings.method == "lora":
            model = _with_lora(model, settings, text.hidden_size)
        resolved = resolve(config, text.hidden_size) if config.low_rank else config
        model, weights = build_weights(model, resolved)
    trained: dict[str, Any] = {"grad_accumulation": settings.grad_accumulation, "logits_size": text.vocab_size}
    with contextlib.ExitStack() as stack:
        mesh = stack.enter_context(one_of(settings.world_size)) if settings.shard != "none" else None
        stack.enter_context(simulated(settings.device, number=1 if mesh is None else 0))
        materialise(model)
        optimizer, size = _optimizer(model, config, settings, text.hidden_size)
        loss, processes = _loss(model, settings), None
        if mesh is not None:
            if weights is not None:  # those that can be divided do no more between steps
                trained["before_step"] = weights.before_step
            plan, processes = _plan_sharded(model, optimizer, config, settings, mesh, loss, trained)
        else:
            step = functools.partial(rehearse_step, optimizer)
            if weights is not None:
                loss, step = _between_steps(weights, optimizer, loss, settings.grad_accumulation)
            plan = PeakPlan.of(trace_training(model, optimizer, loss, step=step, **trained))
            if settings.world_size > 1:
                plan = with_buckets(plan, model, settings.gradient != "full", optimizer)
                if isinstance(optimizer, LowRankOptimizer):
                    alone = sum(optimizer.planned_state_bytes().values())
                    processes = ProcessPlan(settings.world_size, "none", alone, ddp_layouts(model, optimizer))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Recipe(_name(settings), settings.gradient, size, parameters, trainable, plan, processes)


def _between_steps(
    weights: LowRankWeights, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], passes: int
) -> tuple[Callable[[], Tensor], functools.partial[None]]:
    """The loss and the step of a run in which the weights are called where its Trainer calls them."""
    passes, steps, done = min(passes, 2), itertools.count(), itertools.count()
    now = 0

    def begun() -> Tensor:
        nonlocal now
        if next(done) % passes == 0:
            now = next(steps)
            weights.begin_step(now)
        return loss()

    def step() -> None:
        weights.before_step(now)
        rehearse_step(optimizer)
        weights.end_step(now, optimizer)

    return begun, functools.partial(step)


def _name(settings: PlanSettings) -> str:
    """What the table calls the recipe."""
    kind = "+".join(name for name in (settings.adapter, settings.weights) if name not in (None, "dense"))
    if not kind:
        return settings.method
    return kind if settings.method == "adamw" else f"{kind}+{settings.method}"


def _plan_sharded(
    model: Any,
    whole: Any,
    config: PretrainConfig,
    settings: PlanSettings,
    mesh: DeviceMesh,
    loss: Callable[[], Tensor],
    trained: dict[str, Any],
) -> tuple[PeakPlan, ProcessPlan]:
    """Divide a simulated model, whose optimizer while it is ``whole`` tells what one process alone would hold."""
    alone, width = sum(whole.planned_state_bytes().values()), model.config.get_text_config().hidden_size

    def build() -> Any:
        return _optimizer(model, config, settings, width)[0]

    shard_model(model, mesh)
    optimizer = build()
    if settings.shard == "bases":
        optimizer.divide_bases()
    timeline, passes = trace_sharded(model, optimizer, loss, **trained)
    layouts = sharded_layouts(build, passes)
    return PeakPlan.of(timeline), ProcessPlan(settings.world_size, settings.shard, alone, layouts)


def prepare(model: PreTrainedModel, activation_checkpointing: bool) -> None:
    """Set a model up for training as a run does."""
    model.config.use_cache = False
    if activation_checkpointing:
        # transformers 5.23 renamed the method.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def largest_that_fits(
    settings: PlanSettings, progress: Callable[[int, int], None] = lambda value, peak: None
) -> tuple[PlanSettings, Recipe]:
    """Find the largest value of the setting ``settings.solve`` whose peak is within the budget.

    Args:
        settings: all other settings, and where the search begins.
        progress: called with each value and its peak.

    Returns:
        The settings with that value, and their plan.

    Raises:
        ValueError: the method has no such setting, or not even the least value fits.
    """
    assert settings.solve is not None
    name, budget = settings.solve, settings.budget_bytes
    if name == "rank" and not _takes_rank(settings.method):
        raise ValueError(f"solve is 'rank', but {settings.method!r} has none; solve for batch_size or seq_len.")
    most = _most(settings)
    plans: dict[int, Recipe] = {}

    def with_value(value: int) -> PlanSettings:
        changed: dict[str, Any] = {name: value}
        return dataclasses.replace(settings, **changed)

    def peak(value: int) -> int:
        if value not in plans:
            plans[value] = plan_recipe(with_value(value))
            progress(value, plans[value].bytes.peak)
        return plans[value].bytes.peak

    low = 2 if name == "seq_len" else 1
    if peak(low) > budget:
        raise ValueError(
            f"not even {name} {low} fits into {settings.budget}: the peak is {peak(low):,} bytes. Give a larger "
            "budget, bfloat16, activation checkpointing, another method or --gradient projected."
        )
    high = min(most, max(2 * low, getattr(settings, name) or 0))
    while peak(high) <= budget and low < high:
        low, high = high, min(most, 2 * high)
    chord = True
    while high - low > 1:
        # The peak is convex in batch and length, or nearly: the chord is close. Every second guess is the middle.
        share = (budget - peak(low)) / (peak(high) - peak(low)) if chord else 0.5
        middle = min(high - 1, max(low + 1, round(low + share * (high - low))))
        low, high = (middle, high) if peak(middle) <= budget else (low, middle)
        chord = not chord
    return with_value(low), plans[low]


def _most(settings: PlanSettings) -> int:
    with torch.device("meta"):
        model = skeleton(settings.model, vocab_size=settings.vocab_size, seq_len=2)
    if settings.solve == "rank":
        return int(model.config.get_text_config().hidden_size)
    longest = getattr(model.config, "max_position_embeddings", None)
    # A preset gets as many positions as are asked for.
    return 1 << 20 if settings.solve == "batch_size" or longest is None or settings.model in PRESETS else int(longest)


def _takes_rank(method: str) -> bool:
    return method == "lora" or (method not in BASELINES and method_info(method).size == "rank")


def _config(settings: PlanSettings) -> PretrainConfig:
    """The settings of a run, as far as they matter here."""
    shared = {field.name for field in dataclasses.fields(PretrainConfig)} & set(vars(settings))
    values = {name: getattr(settings, name) for name in shared - {"vocab_size", "output"}}
    if settings.method in BASELINES:
        if settings.gradient != "full":
            raise ValueError(f"gradient is {settings.gradient!r}, but {settings.method!r} keeps gradients: give full.")
        if settings.weights != "dense" or settings.adapter is not None:
            raise ValueError(
                f"method is {settings.method!r}, which trains dense weights: leave weights and adapter out"
            )
        if settings.weight_storage == "int8":
            raise ValueError(f"weight_storage is 'int8', which {settings.method!r} cannot train: give float.")
        values["method"] = "adamw"
    return PretrainConfig(**values, max_grad_norm=0.0)


def left_out(settings: PlanSettings) -> dict[str, str]:
    """Recipes of ``compare`` that train no divided model, and why."""
    if settings.shard == "none":
        return {}
    reasons = {name: _unshardable(name) for name in _asked(settings)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _unshardable(name: str) -> str | None:
    if name in BASELINES:
        return _WHOLE
    return weight_recipe(name).unshardable if name in list_weights() else method_info(name).unshardable


def _compared(settings: PlanSettings) -> list[str]:
    left = left_out(settings)
    return [name for name in _asked(settings) if name not in left]


def _asked(settings: PlanSettings) -> list[str]:
    if settings.compare is None:
        return []
    known = [*list_methods(), *BASELINES]
    if settings.compare.strip() == "all":
        names = known
    else:
        names = [name.strip() for name in settings.compare.split(",") if name.strip()]
        for name in names:
            if name not in (*known, *list_weights()):
                raise ValueError(unknown_setting(name, ["all", *known, *list_weights()], "recipe in compare"))
    return [name for name in names if name != _name(settings)]


def _beside(settings: PlanSettings, name: str) -> PlanSettings:
    """The settings of another recipe at the same rank and the most sparing treatment of gradients that it can."""
    plain: dict[str, Any] = {"weights": "dense", "weight_settings": {}, "adapter": None, "adapter_settings": {}}
    plain |= {"project": None, "optimizer": {}, "weight_storage": None}
    if name in list_weights():
        plain |= {"weights": name, "method": "adamw", "gradient": "full", "share_inputs": False, "rank": None}
        return dataclasses.replace(settings, **plain)
    gradient = settings.gradient
    if name in BASELINES:
        gradient = "full"
    elif gradient != "full" and not create_optimizer(name, nn.Linear(2, 2)).folds:
        gradient = "fused" if settings.grad_accumulation == 1 else "full"
    own = name not in BASELINES and method_info(name).default_size is not None
    rank = settings.rank if _takes_rank(name) and not own else None
    share = settings.share_inputs and gradient == "projected"
    changes: dict[str, Any] = {"gradient": gradient, "share_inputs": share, "rank": rank}
    return dataclasses.replace(settings, method=name, **plain | changes)


def _with_lora(model: PreTrainedModel, settings: PlanSettings, width: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    if settings.activation_checkpointing:
        model.enable_input_require_grads()
    rank = settings.rank or max(1, width // 4)
    return get_peft_model(model, LoraConfig(r=rank, target_modules=settings.target_modules))


def _optimizer(
    model: nn.Module, config: PretrainConfig, settings: PlanSettings, width: int
) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer, and how much it projects."""
    if settings.method == "adamw_torch":
        return torch.optim.AdamW(model.parameters(), fused=True), ""
    if settings.method == "adamw_8bit":
        return _HeldState(model.parameters(), adamw_8bit_state_bytes), ""
    if settings.method == "lora":
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return create_optimizer("adamw", trained), f"rank {settings.rank or max(1, width // 4)}"
    optimizer = build_optimizer(model, resolve(config, width))
    group = optimizer.param_groups[0]
    for key in ("rank", "density"):
        if group.get(key) is not None:
            return optimizer, f"{key} {group[key]}"
    return optimizer, ""


def _loss(model: Any, settings: PlanSettings) -> Callable[[], Tensor]:
    tokens = torch.zeros(settings.batch_size, settings.seq_len, dtype=torch.int64)
    if settings.dtype != "amp":
        return lambda: model(input_ids=tokens, labels=tokens).loss

    def mixed() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(input_ids=tokens, labels=tokens)
        outputs.logits.float()  # as accelerate does
        return outputs.loss

    return mixed


class _HeldState(torch.optim.Optimizer):
    """State that is a number of bytes and a step that does nothing."""

    def __init__(self, params: Any, state_bytes: Callable[[Any], dict[str, int]]) -> None:
        super().__init__(params, {})
        self.state_bytes = state_bytes

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        if not self.state:
            for key, count in self.state_bytes(parameters).items():
                self.state[parameters[0]][key] = torch.empty(count // 4, dtype=torch.float32)
