"""When is the subspace chosen anew?"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from subspan.linalg import subspace_overlap
from subspan.optim.method import Group, Refresh, Roster, State, check_flag
from subspan.optim.names import natural_key
from subspan.state import StateSpec


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

    def next_refresh(self, step: int, first: bool, place: Callable[[], float], group: Group, state: State) -> int:
        gap = group["update_proj_gap"]
        return step + (1 + int(place() * gap) if first and self.stagger else gap)


@dataclass(frozen=True)
class LazyGap(EveryGap):
    """`EveryGap` whose period is multiplied by ``gamma_proj`` once the subspaces have stayed alike (Q-GaLore).

    Alike are two subspaces whose overlap ‖Q_oldᵀQ_new‖²_F/r is at least ``cos_threshold``. When that held
    ``queue_size`` times in a row the period is longer, and counting starts again. A stack has one period, from the mean
    of its overlaps.

    Args:
        official_code: as the official code has it: the cosine of the first directions in place of the overlap, its mean
            over the last ``queue_size`` refreshes, and no new count after a longer period, so that once it is longer it
            grows with each refresh. Not for late refreshes.

    Source: arXiv 2407.08296.
    """

    official_code: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("official_code", self.official_code)
        if self.official_code and self.late:
            raise ValueError(
                "official_code=True compares first directions at a refresh, and a late one knows them a step later; "
                "leave official_code out, or keep the gradients (refresh='now', no fuse_into_backward)"
            )

    def specs(self, group: Group) -> dict[str, StateSpec]:
        overlaps = StateSpec((group["queue_size"],), host=True)
        return {"gap": StateSpec((), torch.int64, host=True), "overlaps": overlaps}

    def compare(self, state: State, old: State, new: State, group: Group) -> None:
        overlaps, threshold = state["overlaps"], group["cos_threshold"]
        if self.official_code:
            overlap = (old["basis"][..., 0] * new["basis"][..., 0]).sum(dim=-1).mean()
        else:
            overlap = subspace_overlap(old["basis"], new["basis"]).mean()
        overlaps.copy_(torch.cat([overlaps[1:], overlap.reshape(1).to(overlaps)]))
        if float(overlaps.mean() if self.official_code else overlaps.min()) >= threshold:
            state["gap"].fill_(int(int(state["gap"]) * group["gamma_proj"]))
            if not self.official_code:
                overlaps.fill_(-torch.inf)

    def next_refresh(self, step: int, first: bool, place: Callable[[], float], group: Group, state: State) -> int:
        if first:
            state["gap"].fill_(group["update_proj_gap"])
            state["overlaps"].fill_(-torch.inf)
            return super().next_refresh(step, first, place, group, state)
        return step + int(state["gap"])


def is_late(refresh: str) -> bool:
    """What a recipe's setting ``refresh`` says.

    Raises:
        ValueError: it is neither ``"now"`` nor ``"late"``.
    """
    if refresh not in ("now", "late"):
        raise ValueError(f"refresh={refresh!r}: choose 'now' or 'late'")
    return refresh == "late"


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
