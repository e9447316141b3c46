"""Weights of low rank: heads, restarts, factored layers."""

from subspan.nn.lowrank.factored import Factored, FactoredLinear, FactoredWeights
from subspan.nn.lowrank.heads import HeadsLinear, MultiHeadLoRA
from subspan.nn.lowrank.layer import LowRankLayer, add_product_, low_rank_layers, merge_layers
from subspan.nn.lowrank.loqt import LoQT
from subspan.nn.lowrank.loqt_layer import LoQTLinear
from subspan.nn.lowrank.lte import LTE, LTEWeights
from subspan.nn.lowrank.parallel import ParallelHeadsLinear
from subspan.nn.lowrank.peft_layers import PeftLayer, PeftRestarts, peft_layers, restart_peft
from subspan.nn.lowrank.periodic_lora import PeriodicLinear, PeriodicLoRA
from subspan.nn.lowrank.registry import list_weights, weight_recipe, weight_recipe_class
from subspan.nn.lowrank.relora import ReLoRA, RestartedLinear
from subspan.nn.lowrank.restarts import Every, GrowingGap, Never, Restartable, Restarts, Rewarm, When
from subspan.nn.lowrank.select import select_layers
from subspan.nn.lowrank.sltrain import SLTrain, SLTrainLinear
from subspan.nn.lowrank.state_transform import Keep, MagnitudePrune, RandomPrune, ResetState, StateTransform
from subspan.nn.lowrank.weights import LowRankWeights, WeightRecipe

__all__ = [
    "LTE",
    "Every",
    "Factored",
    "FactoredLinear",
    "FactoredWeights",
    "GrowingGap",
    "HeadsLinear",
    "Keep",
    "LTEWeights",
    "LoQT",
    "LoQTLinear",
    "LowRankLayer",
    "LowRankWeights",
    "MagnitudePrune",
    "MultiHeadLoRA",
    "Never",
    "ParallelHeadsLinear",
    "PeftLayer",
    "PeftRestarts",
    "PeriodicLinear",
    "PeriodicLoRA",
    "RandomPrune",
    "ReLoRA",
    "ResetState",
    "Restartable",
    "RestartedLinear",
    "Restarts",
    "Rewarm",
    "SLTrain",
    "SLTrainLinear",
    "StateTransform",
    "WeightRecipe",
    "When",
    "add_product_",
    "list_weights",
    "low_rank_layers",
    "merge_layers",
    "peft_layers",
    "restart_peft",
    "select_layers",
    "weight_recipe",
    "weight_recipe_class",
]
