"""Planned and allocated bytes."""

from subspan.memory.plan import MemoryPlan, plan

__all__ = ["MemoryPlan", "plan"]
