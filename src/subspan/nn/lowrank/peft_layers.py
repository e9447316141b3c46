"""Restarts of the adapter layers of a PeftModel, whatever their kind."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from subspan.nn.lowrank.periodic_lora import PeriodicLoRA
from subspan.nn.lowrank.relora import ReLoRA
from subspan.nn.lowrank.restarts import Restarts
from subspan.optim.apply import store_span
from subspan.optim.tiling import Tile

__all__ = ["PeftLayer", "PeftRestarts", "peft_layers", "restart_peft"]

#: Ways to begin a LoRA layer that need more than its weight.
_NEED_DATA = ("eva", "corda", "loftq", "lora_ga")
#: Relative change of a weight by an adapter that has not learnt anything, in float32: rounding alone.
_ROUNDING = 1e-5


class PeftLayer:
    """One adapter layer, which `Restarts` can merge and begin anew.

    The new subspace is what peft itself makes of the merged weight: a fresh layer of the same configuration is built
    around it, and its tensors are copied. So principal components (PiSSA, OLoRA) are those of the merged weight, and
    what peft draws once for a whole model (the projections of VeRA and RandLoRA) stays.

    Args:
        tuner: what peft has put around the model.
        name: of the layer in the model inside ``tuner``.
        adapter: name of the adapter.
        shared: names of buffers in the layer that other layers have too; they stay.
    """

    def __init__(self, tuner: Any, name: str, adapter: str, shared: frozenset[str] = frozenset()) -> None:
        self.tuner, self.name, self.adapter, self.shared = tuner, name, adapter, shared
        self.layer: Any = tuner.model.get_submodule(name)
        self._merged: nn.Module | None = None
        self._key: Tensor | None = None

    def factors(self) -> dict[str, nn.Parameter]:
        """What is trained of the adapter, by name in the layer."""
        return {
            name: parameter
            for name, parameter in self.layer.named_parameters()
            if parameter.requires_grad and not _in_base(name)
        }

    def merge_(self, key: Tensor | None) -> None:
        """Sum the layer up in float32; `reset_` writes the weight, since the new factors may take a part of it."""
        self._merged, self._key = _merged(self.layer), key

    @torch.no_grad()
    def reset_(self, generator: torch.Generator) -> None:
        """New factors for the merged weight, which is rounded once."""
        if self._merged is None:
            self.merge_(None)
        assert self._merged is not None
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        self._adopt(_fresh(self.tuner, self.name, self._merged, self.adapter, seed))
        self._merged = None

    @torch.no_grad()
    def bake_(self) -> None:
        """Write the merged weight, rounded to nearest, and leave the adapter as it is."""
        merged = dict(_merged(self.layer).named_parameters())
        for name, parameter in self.layer.get_base_layer().named_parameters():
            parameter.copy_(merged[name])

    def _adopt(self, fresh: nn.Module) -> None:
        tensors = [*self.layer.named_parameters(), *self.layer.named_buffers()]
        new = {**dict(fresh.named_parameters()), **dict(fresh.named_buffers())}
        # What the fresh layer does not have belongs to other adapters.
        tensors = [(name, tensor) for name, tensor in tensors if name in new and name not in self.shared]
        for name, tensor in tensors:
            if tensor.shape != new[name].shape:
                raise RuntimeError(
                    f"{self.name}: {name} has the shape {tuple(tensor.shape)}, and that of a new layer is "
                    f"{tuple(new[name].shape)}: sizes that depend on the weight cannot be restarted"
                )
        for name, tensor in tensors:
            if tensor.ndim and tensor.is_floating_point():
                store_span(
                    tensor.data,
                    Tile(-1, 0, tensor.shape[-1]),
                    new[name].detach(),
                    self._key if _in_base(name) else None,
                    0,
                )
            else:
                tensor.copy_(new[name])


class PeftRestarts(Restarts):
    """`Restarts` of a PeftModel."""

    def merge(self) -> list[str]:
        """Merge all adapters in float32 and take them out of the model inside the PeftModel."""
        for layer in self.layers.values():
            assert isinstance(layer, PeftLayer)
            layer.bake_()
        self.model.unload()  # type: ignore[operator]
        return list(self.layers)


def restart_peft(
    model: nn.Module, recipe: ReLoRA | PeriodicLoRA, *, steps: int | None = None, seed: int = 0
) -> PeftRestarts:
    """Restart the adapters of a PeftModel: when, and what becomes of state and learning rate, is the recipe's.

    The layers, their rank and their dropout are the adapter's own. A checkpoint needs the weights of the model beside
    those of the adapter, since they take up what the adapter has learnt.

    Args:
        model: a ``PeftModel`` with one active adapter that can be merged.
        recipe: its rank, alpha and dropout are not used.
        steps: of the whole run, where a default depends on it.
        seed: of all that is drawn.

    Raises:
        ValueError: no such model, an adapter that cannot be merged and begun anew, or settings for other layers.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(16, 8)), LoraConfig(r=2, target_modules=["0"]))
        >>> sorted(restart_peft(model, ReLoRA(restart_every=10)).factors())
        ['base_model.model.0.lora_A.default.weight', 'base_model.model.0.lora_B.default.weight']
    """
    for setting in ("full_rank_steps", "lazy", "momentum"):
        if getattr(recipe, setting, None):
            raise ValueError(
                f"{setting} is a setting of layers that {recipe.name} makes itself; adapters from peft do not have it"
            )
    return PeftRestarts(model, peft_layers(model), seed, **recipe.parts(steps))


def peft_layers(model: nn.Module) -> dict[str, PeftLayer]:
    """The adapter layers of a PeftModel by name.

    Raises:
        ValueError: no such model, or adapters that cannot be restarted; the message says why.
    """
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    tuner: Any = getattr(model, "base_model", None)
    if not isinstance(tuner, BaseTuner):
        raise ValueError(
            f"{type(model).__name__} has no adapter layers; give the PeftModel of an adapter that has some"
        )
    if len(tuner.active_adapters) != 1:
        raise ValueError(f"the adapters {tuner.active_adapters} are active; restart one of them, with set_adapter(...)")
    adapter = tuner.active_adapters[0]
    config = tuner.peft_config[adapter]
    kind = getattr(config.peft_type, "value", config.peft_type)
    begun = getattr(config, "init_lora_weights", True)
    if getattr(config, "target_parameters", None):
        raise ValueError("target_parameters: only adapters of whole modules can be restarted; give target_modules")
    if isinstance(begun, str) and begun in _NEED_DATA:
        raise ValueError(
            f"init_lora_weights={begun!r} needs data, which a restart does not have; set it to True in the adapter's "
            "config once the model is made, and restarts draw A at random"
        )
    layers = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    owners = Counter(id(tensor) for _, tensor in tensors)
    tried = set()
    for name, module in tuner.model.named_modules():
        if not isinstance(module, BaseTunerLayer) or isinstance(getattr(module, "base_layer", None), BaseTunerLayer):
            continue
        own: Any = module
        layer = PeftLayer(
            tuner, name, adapter, frozenset(key for key, buffer in own.named_buffers() if owners[id(buffer)] > 1)
        )
        if not layer.factors():
            continue
        if module.merged:
            raise ValueError(f"{name} is merged; call unmerge_adapter() first")
        for key, parameter in own.named_parameters():
            if owners[id(parameter)] > 1:
                raise ValueError(
                    f"{name}: {key} is shared with another layer, which a restart would change too; {kind} adapters "
                    "cannot be restarted here: take another kind, or leave the layer out"
                )
        sizes = (type(module), *(parameter.shape for parameter in own.parameters()))
        if sizes not in tried:
            tried.add(sizes)
            _try(layer, str(kind))
        layers[f"base_model.model.{name}"] = layer
    if not layers:
        raise ValueError(f"the adapter {adapter!r} ({kind}) has no layers that are trained")
    return layers


def _try(layer: PeftLayer, kind: str) -> None:
    """Restart a copy of a layer as if it had learnt something, and refuse kinds for which this changes what it does."""
    if any(not parameter.is_floating_point() for parameter in layer.layer.get_base_layer().parameters()):
        raise ValueError(f"{layer.name}: restarts merge into float weights; load the model without quantisation")
    if any(parameter.is_meta for parameter in layer.layer.parameters()):
        return
    trial, generator = copy.copy(layer), torch.Generator().manual_seed(0)
    trial.layer = _widened(copy.deepcopy(layer.layer))
    with torch.no_grad():
        for factor in trial.factors().values():
            factor.add_(torch.randn(factor.shape, generator=generator).to(factor), alpha=0.01)
    base = trial.layer.get_base_layer()
    start = copy.deepcopy(base).state_dict()
    try:
        before = _merged(trial.layer).state_dict()
        trial.reset_(generator)
        after = _merged(trial.layer).state_dict()
    except (NotImplementedError, AttributeError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{layer.name}: {kind} adapters cannot be merged and begun anew: {error}") from error
    if all(torch.equal(value, start[name]) for name, value in before.items()):
        raise ValueError(f"{layer.name}: {kind} adapters are not merged into a weight, so there is nothing to restart")
    for name, value in after.items():
        if not (value - before[name]).norm() <= _ROUNDING * before[name].norm():
            raise ValueError(
                f"{layer.name}: a new {kind} adapter changes the model before it has learnt anything, and so would a "
                "restart; let its config begin it at zero (init_lora_weights=True, init_weights=True) or take another"
            )


def _merged(layer: nn.Module) -> nn.Module:
    """The base layer of a copy of an adapter layer, with the adapter merged in at least float32."""
    merged: Any = _widened(copy.deepcopy(layer))
    with torch.no_grad(), warnings.catch_warnings(), torch.autocast(_kind(merged), enabled=False):
        warnings.simplefilter("ignore")
        merged.merge()
    base: nn.Module = merged.get_base_layer()
    return base


def _fresh(tuner: Any, name: str, base: nn.Module, adapter: str, seed: int) -> nn.Module:
    """A new adapter layer around ``base``, drawn from a seed: peft draws from torch's own generator."""
    root = parent = nn.Module()
    *path, last = name.split(".")
    for part in path:
        parent.add_module(part, child := nn.Module())
        parent = child
    parent.add_module(last, base)
    config = copy.deepcopy(tuner.peft_config[adapter])
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        type(tuner)(root, config, adapter)
    return root.get_submodule(name)


def _widened(module: nn.Module) -> nn.Module:
    double = any(parameter.dtype == torch.float64 for parameter in module.parameters())
    return module.to(torch.float64 if double else torch.float32)


def _in_base(name: str) -> bool:
    return name.startswith("base_layer.")


def _kind(module: nn.Module) -> str:
    return next(module.parameters()).device.type
