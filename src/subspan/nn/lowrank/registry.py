"""All recipes of low-rank weights by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from subspan.nn.lowrank.factored import Factored
from subspan.nn.lowrank.heads import MultiHeadLoRA
from subspan.nn.lowrank.loqt import LoQT
from subspan.nn.lowrank.lte import LTE
from subspan.nn.lowrank.periodic_lora import PeriodicLoRA
from subspan.nn.lowrank.relora import ReLoRA
from subspan.nn.lowrank.sltrain import SLTrain
from subspan.nn.lowrank.weights import WeightRecipe
from subspan.optim.groups import unknown_setting

__all__ = ["list_weights", "weight_recipe", "weight_recipe_class"]

_RECIPES: dict[str, type[WeightRecipe]] = {
    recipe.name: recipe for recipe in (MultiHeadLoRA, LTE, ReLoRA, PeriodicLoRA, Factored, SLTrain, LoQT)
}


def list_weights() -> list[str]:
    """Names of all recipes.

    >>> "mhlora" in list_weights()
    True
    """
    return list(_RECIPES)


def weight_recipe_class(name: str) -> type[WeightRecipe]:
    """The recipe of a name.

    Raises:
        ValueError: there is none; the closest one is named.
    """
    if name not in _RECIPES:
        raise ValueError(unknown_setting(name, list(_RECIPES), "recipe of weights"))
    return _RECIPES[name]


def weight_recipe(name: str, **settings: Any) -> WeightRecipe:
    """A recipe with some settings of its own.

    Raises:
        ValueError: an unknown name or setting, or a value that is not allowed.

    Example:
        >>> weight_recipe("mhlora", heads=2, rank=8).summary
        'several LoRA heads on a frozen weight, averaged'
    """
    recipe = weight_recipe_class(name)
    known = [field.name for field in dataclasses.fields(recipe)]
    for setting in settings:
        if setting not in known:
            raise ValueError(unknown_setting(setting, known, f"setting of {name}"))
    return recipe(**settings)
