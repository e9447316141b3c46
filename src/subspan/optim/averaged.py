"""What was folded on several processes, averaged before anything looks at it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from subspan.linalg import MatrixOperator
from subspan.optim.fused import BackwardFusion, refuse_processes
from subspan.optim.groups import is_projected
from subspan.optim.late import Folded
from subspan.optim.matrix import oriented
from subspan.optim.method import Found
from subspan.optim.refreshing import Refreshing
from subspan.optim.storage import rounded
from subspan.state import StateSpec

Entry = tuple[str, Tensor, dict[str, Any]]

#: Averages over processes what each of them has folded, by name: the same names and numbers on all of them.
Average = Callable[["Averaged", Mapping[str, Folded]], Mapping[str, Folded]]


class Averaged(Refreshing):
    """A refreshing optimizer whose gradients may come from several processes, folded.

    `subspan.distributed` calls it, with what a communication hook has averaged, or to average what was folded in
    backward. An `Entry` is the name, the parameter and the group of a projected parameter.
    """

    _fusion: BackwardFusion | None
    _average: Average | None

    @property
    def folds(self) -> bool:
        """Whether a step needs no more of gradients than their projections; `fuse_into_backward` then folds them."""
        return self.method.lift is not None and not self.method.lift.needs_gradient

    @property
    def fused(self) -> bool:
        """Whether gradients are taken in backward."""
        return self._fusion is not None

    def projected_entries(self) -> list[Entry]:
        """All projected parameters, in the order of the groups."""
        groups = [group for group in self.param_groups if is_projected(group)]
        return [(name, parameter, group) for group in groups for name, parameter in self._named(group)]

    def projects_right(self, entry: Entry) -> bool:
        """Whether the columns of a parameter are its projected side."""
        return self._right(entry[1], entry[2])

    def average_with(self, average: Average) -> None:
        """From now on ``average`` is called with what was folded in backward, whenever it is looked at."""
        self._average = average

    def takes(self, entry: Entry) -> Literal["whole", "folded", "gradient", "sketch", "nothing"]:
        """How the coming step takes a gradient.

        Whole, where nothing is projected; folded with the subspace in force; or with one that is found first, from the
        gradient, from a sketch of it, or from nothing of it.
        """
        name, parameter, group = entry
        state = self._ensure_state(name, parameter, group)
        geometry = self._geometry(name, parameter, group, state, refresh=True)
        assert self.method.subspace is not None and self.method.refresh is not None
        if geometry is None or not geometry.projected:
            return "whole"
        step = int(state["step"])
        if self.method.refresh.late or step < int(state["next_refresh"]):
            return "folded"
        return self.method.subspace.at(step, group).sees

    def fold_local(self, entry: Entry, gradient: Tensor) -> Folded:
        """R, and where one is due the sketch, of the gradient of this process; it is not kept."""
        name, parameter, group = entry
        return self._folded_from(name, parameter, gradient, group)

    def keep_average(self, name: str, folded: Folded) -> None:
        """Keep what the averaged gradient left, for `step`."""
        before = self._folded.get(name)
        if before is not None and (before.found is not None or folded.found is not None):
            raise RuntimeError(
                f"{name}: its subspace was found from an earlier backward of this step, whose gradients are gone; run "
                "all micro-batches but the last one under no_sync()"
            )
        super()._keep(name, folded)

    def nothing_folded(self, entry: Entry) -> Folded:
        """What gradients of zero leave, for a process that has none where others have some."""
        name, parameter, group = entry
        state = self._ensure_state(name, parameter, group)
        geometry = self._geometry(name, parameter, group, state)
        assert geometry is not None
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        R = torch.zeros(*geometry.batch, geometry.rank, geometry.n, dtype=dtype, device=parameter.device)
        Y = R.new_zeros(*geometry.batch, geometry.m, geometry.rank) if self._sketches(state, geometry, group) else None
        return Folded.unformed(R, Y)

    def find_held(self, entry: Entry, operator: MatrixOperator) -> Found:
        """The subspace for the gradient behind ``operator`` as it will be held; changes nothing."""
        name, parameter, group = entry
        found = self._find(name, parameter, operator, group, int(self._state(parameter)["step"]))
        specs = self._found_specs(entry, found.rank)
        held = {key: rounded(specs[key], X) for key, X in found.tensors.items()}
        as_found = all(specs[key].codec is None for key in held)
        return replace(found, tensors=held, projected=found.projected if as_found else None)

    def room_for(self, entry: Entry, rank: int | None) -> Found:
        """Tensors for a subspace that another process finds, and for R; the rank where the search decides on it."""
        name, parameter, group = entry
        geometry = self._found_geometry(name, parameter, Found({}, rank=rank), group)
        specs, device = self._found_specs(entry, rank), parameter.device
        tensors = {key: replace(spec, codec=None).allocate(device) for key, spec in specs.items()}
        R = torch.zeros(*geometry.batch, geometry.rank, geometry.n, dtype=geometry.dtype, device=device)
        return Found(tensors, R, rank)

    def project_with(self, entry: Entry, found: Found, gradient: Tensor) -> Tensor:
        """R of the gradient of this process in a subspace that was found, and is not in force yet."""
        name, parameter, group = entry
        projection = self.method.projection(found.tensors, self._found_geometry(name, parameter, found, group))
        return projection.project(oriented(gradient, self._right(parameter, group)))

    def _found_specs(self, entry: Entry, rank: int | None) -> dict[str, StateSpec]:
        name, parameter, group = entry
        return self.method.subspace_specs(self._found_geometry(name, parameter, Found({}, rank=rank), group), group)

    def _keep(self, name: str, folded: Folded) -> None:
        if self._average is None:
            super()._keep(name, folded)
        elif name in self._local:
            self._local[name].add(folded)
        else:
            self._local[name] = folded

    def _take_slots(self) -> None:
        super()._take_slots()
        if self._average is not None:
            local, self._local = self._local, {}
            for name, folded in self._average(self, local).items():
                self.keep_average(name, folded)
        elif self._fusion is not None:
            refuse_processes(self.folds)
