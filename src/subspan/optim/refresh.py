"""When is the subspace chosen anew?"""

from __future__ import annotations

from dataclasses import dataclass

from subspan.optim.method import Group, Refresh, Roster
from subspan.optim.names import natural_key


@dataclass(frozen=True)
class EveryGap(Refresh):
    """Every ``update_proj_gap`` steps, the first step included (GaLore, arXiv 2403.03507).

    Args:
        stagger: spread the refreshes of the parameters over the period, weighted by their cost, so that no step pays
            for all of them. Every parameter gets its first basis at its first step; its second comes within the first
            period at its own place, later ones every ``update_proj_gap`` steps. False: all at once, as the papers do.
    """

    stagger: bool = True

    def next_refresh(self, step: int, first: bool, phase: float, group: Group) -> int:
        gap = group["update_proj_gap"]
        return step + (1 + int(phase * gap) if first and self.stagger else gap)


def place_in_period(name: str, roster: Roster) -> float:
    """Share, in [0, 1), of the elements of all projected parameters that come before ``name`` in natural order.

    Refreshes placed like this spread their cost evenly over the period, whatever order the parameters are given in.

    Args:
        name: one of the roster's names.
        roster: ((name, elements), ...).

    Example:
        >>> place_in_period("b", (("b", 30), ("a", 10)))
        0.25
    """
    key = natural_key(name)
    before = sum(elements for other, elements in roster if natural_key(other) < key)
    return before / sum(elements for _, elements in roster)
