"""Declarations of optimizer state."""

from subspan.state.spec import StateSpec

__all__ = ["StateSpec"]
