"""Adapters of peft on the chosen layers of a model that is frozen otherwise."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from subspan.linalg import seeded_generator
from subspan.memory.simulate import real_indices
from subspan.nn.lowrank import LowRankWeights, select_layers
from subspan.optim.groups import unknown_setting

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["ADAPTERS", "AdapterWeights", "adapter_config", "apply_adapter", "check_adapter"]

#: Settings that make a kind of their own of peft's LoRA.
_KINDS_OF_LORA: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}
#: Names that ``--adapter`` takes; all but LoRA's kinds are those of peft.
ADAPTERS = (
    *_KINDS_OF_LORA,
    *("loha", "lokr", "vera", "randlora", "hra", "oft", "boft", "ia3", "fourierft", "vblora", "hira"),
)
#: Fields of peft's configs that are settled by the settings of the run, or by what a run is.
_SETTLED = {
    "target_modules": "target_modules", "exclude_modules": "exclude", "base_model_name_or_path": "model",
    "init_lora_weights": None, "task_type": None, "peft_type": None, "inference_mode": None, "revision": None,
    "auto_mapping": None, "peft_version": None,
}  # fmt: skip
_RATIO = "lora_plus_ratio"


class AdapterWeights(LowRankWeights):
    """The adapter layers of a model of peft.

    Args:
        model: a ``PeftModel``.
        seed: see `LowRankWeights`.
    """

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        super().__init__(model, {}, seed)

    def factors(self) -> dict[str, nn.Parameter]:
        """What the adapter layers train; copies of whole modules (``modules_to_save``) are not among it."""
        return adapter_factors(self.model)

    def merge(self) -> list[str]:
        """Merge the adapters: `model` is the ordinary model from then on.

        The sums are taken in float32, and rounded once to the dtype that the weights had.
        """
        peft_model: Any = self.model
        names = adapter_layers(self.model)
        dtypes = {name: parameter.dtype for name, parameter in peft_model.get_base_model().named_parameters()}
        dtype = next((dtype for name, dtype in dtypes.items() if name.endswith("base_layer.weight")), torch.float32)
        self.model = peft_model.float().merge_and_unload().to(dtype)
        return names


def adapter_layers(model: nn.Module) -> list[str]:
    """Names of the layers of a model that have adapters."""
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def adapter_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters of the adapters of a model by name; none where it has none."""
    layers = set(adapter_layers(model))
    if not layers:
        return {}
    # Parameters that all layers share (VB-LoRA's bank) are the model's own.
    saved = [name for name, module in model.named_modules() if type(module).__name__ == "ModulesToSaveWrapper"]
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(name.startswith(f"{module}.") for module in saved)
    }


def check_adapter(adapter: str, settings: dict[str, Any]) -> None:
    """Refuse an adapter that there is not, or settings that it does not have.

    Raises:
        ValueError: naming the closest one.
        ModuleNotFoundError: peft is not installed.
    """
    adapter_config(adapter, settings, ["all"])
    ratio = settings.get(_RATIO, 1)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not ratio > 0:
        raise ValueError(f"adapter_settings.{_RATIO} is {ratio!r}; it must be a number greater than 0.")
    if _RATIO in settings and adapter not in _KINDS_OF_LORA:
        raise ValueError(
            f"adapter_settings.{_RATIO} is for {', '.join(_KINDS_OF_LORA)}; {adapter!r} has no A and B of its own."
        )


def adapter_config(adapter: str, settings: dict[str, Any], layers: list[str], drawn: bool = True) -> PeftConfig:
    """The config of peft for an adapter.

    Args:
        adapter: one of `ADAPTERS`.
        settings: its fields, but for what the run says.
        layers: names of the layers.
        drawn: False leaves out first values that are found from the weights, which are not there.

    Raises:
        ValueError: an unknown adapter or setting, or a value that peft refuses.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

    if adapter not in ADAPTERS:
        raise ValueError(unknown_setting(adapter, list(ADAPTERS), "adapter"))
    kind = "lora" if adapter in _KINDS_OF_LORA else adapter
    found = {str(getattr(name, "value", name)).lower(): config for name, config in CONFIGS.items()}
    if kind not in found:
        raise ValueError(f"adapter {adapter!r} needs a newer peft: pip install --upgrade peft.")
    annotations = {field.name: field.type for field in dataclasses.fields(found[kind])}
    known = annotations.keys()
    own = _KINDS_OF_LORA.get(adapter, {})
    allowed = sorted(known - _SETTLED.keys() - own.keys()) + ["init_lora_weights"] * (adapter in ("lora", "rslora"))
    values = {name: value for name, value in settings.items() if name != _RATIO}
    for name in values:
        if instead := _SETTLED.get(name):
            raise ValueError(f"adapter_settings: {name} is a setting of the run; give --{instead} instead.")
        if name not in allowed:
            raise ValueError(unknown_setting(name, [*allowed, _RATIO], f"setting of {adapter}"))
        # peft compares and divides it, and says no more than that this cannot be.
        if isinstance(values[name], str) and annotations[name] in ("int", "float"):
            raise ValueError(f"adapter_settings.{name} is {values[name]!r}; it must be a number.")
    values |= own
    # What freezes B stays: peft finds no values for it on the meta device.
    if not drawn and isinstance(values.get("init_lora_weights"), str) and values["init_lora_weights"].lower() != "mica":
        values["init_lora_weights"] = True
    if adapter == "ia3":
        values.setdefault("feedforward_modules", [])
    try:
        values |= {"target_modules": layers, "task_type": "CAUSAL_LM"}
        return found[kind](**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"adapter_settings: {error}") from error


def apply_adapter(
    model: PreTrainedModel,
    adapter: str,
    settings: dict[str, Any],
    *,
    target_modules: str | list[str],
    exclude: list[str],
    seed: int,
) -> AdapterWeights:
    """Put an adapter on the chosen layers of a model, whose other weights are frozen; see `AdapterWeights.model`.

    What is drawn depends on ``seed`` alone. On the meta device nothing is computed but indices.

    Raises:
        ValueError: settings that do not fit the model, or no such layer.
    """
    from peft import get_peft_model

    layers = list(select_layers(model, target_modules, exclude))
    drawn = model.device.type != "meta"
    config = adapter_config(adapter, settings, layers, drawn)
    with torch.random.fork_rng(devices=[]), contextlib.nullcontext() if drawn else real_indices():
        torch.manual_seed(seeded_generator(seed, "adapter").initial_seed())
        try:
            wrapped: Any = get_peft_model(model, config)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"adapter {adapter!r} does not fit {type(model).__name__}: {error}") from error
    return AdapterWeights(wrapped, seed)
