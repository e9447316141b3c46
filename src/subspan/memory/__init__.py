"""Planned, traced and allocated bytes."""

from subspan.memory.plan import MemoryPlan, PeakPlan, plan
from subspan.memory.processes import Layout, ProcessPlan
from subspan.memory.simulate import simulated
from subspan.memory.trace import MemoryTrace
from subspan.memory.training import trace_training

__all__ = [
    "Layout",
    "MemoryPlan",
    "MemoryTrace",
    "PeakPlan",
    "ProcessPlan",
    "plan",
    "simulated",
    "trace_training",
]
