"""Weights of low rank: heads, restarts, factored layers."""

from subspan.nn.lowrank.factored import Factored, FactoredLinear, FactoredWeights
from subspan.nn.lowrank.heads import HeadsLinear, MultiHeadLoRA
from subspan.nn.lowrank.layer import LowRankLayer, add_product_, low_rank_layers, merge_layers
from subspan.nn.lowrank.lte import LTE, LTEWeights, ParallelHeadsLinear
from subspan.nn.lowrank.registry import list_weights, weight_recipe, weight_recipe_class
from subspan.nn.lowrank.select import select_layers
from subspan.nn.lowrank.sltrain import SLTrain, SLTrainLinear
from subspan.nn.lowrank.weights import LowRankWeights, WeightRecipe

__all__ = [
    "LTE",
    "Factored",
    "FactoredLinear",
    "FactoredWeights",
    "HeadsLinear",
    "LTEWeights",
    "LowRankLayer",
    "LowRankWeights",
    "MultiHeadLoRA",
    "ParallelHeadsLinear",
    "SLTrain",
    "SLTrainLinear",
    "WeightRecipe",
    "add_product_",
    "list_weights",
    "low_rank_layers",
    "merge_layers",
    "select_layers",
    "weight_recipe",
    "weight_recipe_class",
]
