"""Low-rank optimizers: published methods as recipes out of the same parts."""

from subspan.optim.inner import SGD, Adam
from subspan.optim.method import Method
from subspan.optim.methods.adamw import AdamW
from subspan.optim.methods.apollo import APOLLO, APOLLOMini
from subspan.optim.methods.fira import Fira
from subspan.optim.methods.frugal import FRUGAL
from subspan.optim.methods.galore import GaLore
from subspan.optim.methods.galore_8bit import GaLore8bit
from subspan.optim.methods.golore import GoLore
from subspan.optim.methods.q_apollo import QAPOLLO, QAPOLLOMini
from subspan.optim.methods.q_galore import QGaLore
from subspan.optim.methods.scale import SCALE
from subspan.optim.optimizer import LowRankOptimizer
from subspan.optim.param_groups import param_groups
from subspan.optim.registry import MethodInfo, create_optimizer, list_methods, method_info

__all__ = [
    "APOLLO",
    "FRUGAL",
    "QAPOLLO",
    "SCALE",
    "SGD",
    "APOLLOMini",
    "Adam",
    "AdamW",
    "Fira",
    "GaLore",
    "GaLore8bit",
    "GoLore",
    "LowRankOptimizer",
    "Method",
    "MethodInfo",
    "QAPOLLOMini",
    "QGaLore",
    "create_optimizer",
    "list_methods",
    "method_info",
    "param_groups",
]
