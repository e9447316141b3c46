"""When is the subspace chosen anew?"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from subspan.optim.method import Group, Refresh, Roster, check_flag
from subspan.optim.names import natural_key


@dataclass(frozen=True)
class EveryGap(Refresh):
    """Every ``update_proj_gap`` steps, the first step included (GaLore, arXiv 2403.03507).

    Args:
        stagger: spread the refreshes of the parameters over the period, weighted by their cost, so that no step pays
            for all of them. Every parameter gets its first basis at its first step; its second comes within the first
            period at its own place, later ones every ``update_proj_gap`` steps. False: all at once, as the papers do.
        late: a subspace found from the gradient of one step serves from the next one on, so that no gradient has to be
            kept until it is known; the first one is random.
    """

    stagger: bool = True
    late: bool = False

    def __post_init__(self) -> None:
        check_flag("stagger", self.stagger)
        check_flag("late", self.late)

    def next_refresh(self, step: int, first: bool, place: Callable[[], float], group: Group) -> int:
        gap = group["update_proj_gap"]
        return step + (1 + int(place() * gap) if first and self.stagger else gap)


def every_gap(stagger: bool, refresh: str) -> EveryGap:
    """The rule named by a recipe's settings ``stagger`` and ``refresh``.

    Raises:
        ValueError: ``refresh`` is neither ``"now"`` nor ``"late"``.
    """
    if refresh not in ("now", "late"):
        raise ValueError(f"refresh={refresh!r}: choose 'now' or 'late'")
    return EveryGap(stagger, late=refresh == "late")


@functools.lru_cache(maxsize=4)
def places_in_period(roster: Roster) -> dict[str, float]:
    """For each parameter the share, in [0, 1), of all projected elements that come before it in natural order.

    Refreshes placed like this spread their cost evenly over the period, whatever order the parameters are given in.

    Args:
        roster: ((name, elements), ...).

    Example:
        >>> places_in_period((("b", 30), ("a", 10)))
        {'a': 0.0, 'b': 0.25}
    """
    total = sum(elements for _, elements in roster)
    places, before = {}, 0
    for name, elements in sorted(roster, key=lambda entry: natural_key(entry[0])):
        places[name] = before / total
        before += elements
    return places
