"""What all recipes of weights of low rank have in common, over the registry."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from subspan.nn.lowrank import LowRankWeights, WeightRecipe, list_weights, low_rank_layers, weight_recipe_class
from subspan.nn.lowrank.factored import FactoredLinear
from subspan.nn.lowrank.limits import Limit, at_least, or_none
from subspan.optim import AdamW
from tests.nn.lowrank_cases import gradients_flow, network, train

every_recipe = pytest.mark.parametrize("name", list_weights())
#: Settings with which a recipe takes a model as small as the one here, and a restart after every second step.
SMALL: dict[str, dict[str, Any]] = {
    "mhlora": {"alpha": 32.0},
    "lte": {"heads": 2, "alpha": 32.0, "merge_every": 2},
    "relora": {"restart_every": 2},
    "periodic_lora": {"restart_every": 2, "momentum": 0.5},
}


class Narrow(nn.Module):
    """A matrix with short sides after one with longer ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.narrow = nn.Linear(160, 192), nn.Linear(192, 40)


def made(name: str, **settings: Any) -> WeightRecipe:
    return weight_recipe_class(name)(**{**SMALL.get(name, {}), **settings})


@every_recipe
def test_every_setting_has_its_limit(name: str) -> None:
    kind = weight_recipe_class(name)
    settings = {field.name: field for field in dataclasses.fields(kind)}
    elsewhere = {  # of the parts that these make
        "relora": {"state", "prune", "rounding"},
        "periodic_lora": {"rounding"},
        "loqt": {"double_quantization"},
        "lte": {"reset"},
    }
    assert set(kind.limits) | elsewhere.get(name, set()) == set(settings)
    for setting, limit in kind.limits.items():
        assert limit.holds(settings[setting].default)
        for bad in (-1, math.nan):
            with pytest.raises(ValueError, match=rf"^{setting} is {bad!r}; .+\.$"):
                made(name, **{setting: bad})


#: Of each setting the values at the edge of what is allowed, and those beyond it; one list may belong to one recipe.
EDGES: dict[str, tuple[list[Any], list[Any]]] = {
    **dict.fromkeys(("rank", "heads", "merge_every", "first_gap", "restart_every"), ([1], [0, math.inf])),
    **dict.fromkeys(("compensation", "rewarm", "full_rank_steps"), ([0], [-1, math.inf])),
    **dict.fromkeys(("product_decay", "rebalance_gap", "momentum_reset_gap"), ([0], [-1, math.inf])),
    **dict.fromkeys(("ratio", "lazy", "delta"), ([1e-9, 1 - 1e-9], [0.0, 1.0])),
    **dict.fromkeys(("dropout", "momentum"), ([0.0, 1 - 1e-9], [-1e-9, 1.0])),
    **dict.fromkeys(("weight_bits", "projection_bits"), ([4, None], [2, 8])),
    "alpha": ([1e-9], [0.0, math.inf]),
    "growth": ([1.0], [1 - 1e-9, math.inf]),
    "svd": (["randomized", "exact"], ["other", None]),
    "init": (["spectral", "kaiming"], ["other", None]),
    "others": (["replicated", "shared"], ["other", None]),
    "rounding": (["nearest", "stochastic"], ["other", None]),
    "loqt.moments": (["rotate", "reset", "keep"], ["other", None]),
    "factored.moments": (["rotate", "reset"], ["keep", None]),
    **dict.fromkeys(("factored.rank", "relora.lazy"), ([None], [])),
}


@every_recipe
def test_limits_end_where_they_say(name: str) -> None:
    for setting, limit in weight_recipe_class(name).limits.items():
        edges = [EDGES[key] for key in (setting, f"{name}.{setting}") if key in EDGES]
        assert edges, setting
        for allowed, refused in edges:
            assert [value for value in allowed if not limit.holds(value)] == []
            assert [value for value in refused if limit.holds(value)] == []


@every_recipe
def test_a_rank_above_a_side_is_refused_before_anything_is_changed(name: str) -> None:
    model = Narrow()
    with pytest.raises(ValueError, match=r"^rank( is |=)41\b.* narrow\b"):
        made(name, rank=41).apply(model, steps=8)
    assert not list(low_rank_layers(model)) and all(parameter.requires_grad for parameter in model.parameters())
    made(name, rank=8).apply(model, steps=8)
    assert len(list(low_rank_layers(model))) == 2


@pytest.mark.parametrize("name", sorted({*list_weights()} - {"factored", "sltrain"}))  # which have to be smaller
def test_a_rank_as_large_as_a_side_is_trained(name: str) -> None:
    model = network()
    weights = made(name, rank=32).apply(model, steps=8)
    optimizer = AdamW([(key, parameter) for key, parameter in model.named_parameters() if parameter.requires_grad])
    losses = train(model, weights, optimizer, range(6))
    assert losses[-1] < losses[0] and gradients_flow(model, weights)


@pytest.mark.parametrize("kind", ["HeadsLinear", "LoQTLinear", "FactoredLinear"])
def test_layers_refuse_what_is_no_rank(kind: str) -> None:
    import subspan.nn.lowrank as lowrank

    given = {"HeadsLinear": {"heads": 1, "scale": 1.0}, "LoQTLinear": {"scale": 1.0}}.get(kind, {})
    for rank in (0, 41):
        with pytest.raises(ValueError, match=f"rank={rank} is not possible for a 40×192 matrix: give 1 to 40"):
            getattr(lowrank, kind)(Narrow().narrow, rank=rank, **given)


def test_a_new_recipe_is_its_limits_and_what_it_builds() -> None:
    @dataclasses.dataclass(frozen=True)
    class Plain(WeightRecipe):
        limits: ClassVar[Mapping[str, Limit]] = {"rank": or_none(at_least(1), "for 2")}

        rank: int | None = None

        def build(
            self, model: nn.Module, chosen: dict[str, nn.Module], *, steps: int | None, seed: int
        ) -> LowRankWeights:
            weights = LowRankWeights(model, {}, seed)
            for name, module in chosen.items():
                weights.install(name, FactoredLinear(module, rank=self.rank or 2))
            return weights

    with pytest.raises(ValueError, match=r"rank is 0; it must be at least 1, or None for 2\."):
        Plain(rank=0)
    models = Narrow(), Narrow()
    for model in models:
        assert list(Plain().apply(model, exclude="wide", seed=3).layers) == ["narrow"]
    assert isinstance(models[0].narrow, FactoredLinear) and models[0].narrow.factor_A.any()
    assert torch.equal(models[0].narrow.factor_A, models[1].narrow.factor_A)  # type: ignore[arg-type]
