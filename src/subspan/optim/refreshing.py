"""Subspaces that are chosen anew: at once, from a gradient, or late, from what was folded of those that are gone."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subspan.linalg import DenseOperator, seeded_generator
from subspan.optim.buckets import Work
from subspan.optim.dense import state_dtype
from subspan.optim.late import (
    Folded,
    basis_from_sketch,
    fold,
    random_start,
    refresh_key,
    test_matrix,
    turn,
    warm_start,
    widened,
)
from subspan.optim.matrix import oriented
from subspan.optim.method import Found, Geometry, State
from subspan.optim.slots import GradientSlots
from subspan.optim.storage import close, gather_state, opened, rounded
from subspan.optim.stored import StoredOptimizer
from subspan.optim.transport import resized
from subspan.state import StateSpec


class Refreshing(StoredOptimizer):
    """A stored optimizer that finds subspaces, and keeps what a late refresh needs of gradients that are not kept."""

    _folded: dict[str, Folded]
    _slots: dict[str, GradientSlots]
    _sharing: dict[str, tuple[str, ...]]

    def share_basis(self, names: Sequence[str]) -> None:
        """Let parameters with slots, whose layers have the same input, have one basis: that of their stacked gradients.

        The sketch is the sum of theirs, as for [G₁ G₂ …] with the test matrices stacked, and the basis is turned to the
        directions of [R₁ R₂ …]. So they train as one layer would that is as wide as all of them together. Each keeps
        the basis in its state; the first name decides on random starts and on the place in the period.

        Raises:
            ValueError: fewer than two names, parameters without slots, another group, side or rank, or states that have
                gone different ways.
        """
        if len(names) < 2 or any(name not in self._slots or name in self._sharing for name in names):
            raise ValueError(
                f"{list(names)!r} is not allowed: a basis is shared by two parameters or more that have slots and "
                "share with no others"
            )
        found = {name: (parameter, group) for group in self.param_groups for name, parameter in self._named(group)}
        kinds = set()
        for parameter, group in (found[name] for name in names):
            matrix = oriented(parameter, right := self._right(parameter, group))
            kinds.add((id(group), right, matrix.shape[0], matrix.dtype, matrix.device))
        if len(kinds) > 1:
            raise ValueError(f"{', '.join(names)}: a basis is shared within one group, on one side and of one length")
        states = {name: (found[name][0], self._state(found[name][0])) for name in names}
        if any(int(state["step"]) for _, state in states.values()):
            self._check_alike(names, states)
        else:
            first = states[names[0]][1]
            for parameter, state in states.values():
                for key in self._common_keys(parameter, state):
                    state[key].copy_(first[key])
        self._sharing |= dict.fromkeys(names, tuple(names))
        for name in names:
            self._slots[name].shared = True
        self._arm_slots(names)

    def _common_keys(self, parameter: Tensor, state: State) -> list[str]:
        """State keys of what parameters that share a basis have in common: all but the moments."""
        group, name = next(
            (group, name) for group in self.param_groups for name, other in self._named(group) if other is parameter
        )
        specs = self._specs(name, parameter, group, state)
        return [held for key, spec in specs.items() if spec.moment is None for held in spec.stored(key)]

    def _check_alike(self, names: Sequence[str], states: Mapping[str, tuple[Tensor, State]]) -> None:
        there = [states[name] for name in names if name in states]
        for parameter, state in there:
            common = self._common_keys(parameter, state)
            if len(there) < len(names) or any(not torch.equal(state[key], there[0][1][key]) for key in common):
                raise ValueError(
                    f"{', '.join(names)}: their states have different bases or clocks, so they cannot share a basis; "
                    "share before the first step, and load what a run wrote that shared the same ones"
                )

    def _check_loaded(self, loaded: Mapping[str, tuple[Tensor, State]]) -> None:
        for names in dict.fromkeys(self._sharing.values()):
            self._check_alike(names, loaded)

    def _partners(self, name: str) -> tuple[str, ...]:
        """The names that share a basis with ``name``, the deciding one first; itself alone where it does not share."""
        return self._sharing.get(name, (name,))

    def _place(self, name: str) -> float:
        """Place of a parameter in the period."""
        return self._places()[self._partners(name)[0]]

    def _refresh(self, name: str, parameter: Tensor, G: Tensor, group: dict[str, Any], step: int) -> Tensor | None:
        """Choose the subspace anew and carry the moments over; returns this step's projected gradient if known."""
        method, state = self.method, self.state[parameter]
        assert method.subspace is not None and method.refresh is not None and method.transport is not None
        refreshes = int(state["refreshes"])
        tensors = opened(state, self._specs(name, parameter, group, state))
        geometry = self._geometry(name, parameter, group, state, refresh=True)
        assert geometry is not None
        found = Found({})
        if geometry.projected:
            generator = seeded_generator(self.seed, self._partners(name)[0], refreshes)
            found = method.subspace.find(DenseOperator(G), geometry, generator=generator, step=step, group=group)
            if found.rank is not None:
                geometry = replace(geometry, rank=found.rank)
        specs = method.specs(geometry, parameter.shape, state_dtype(parameter), group)
        # What projects is what is held.
        new = {key: rounded(specs[key], X) for key, X in found.tensors.items()} if method.subspace.stored else {}
        if refreshes > 0:
            method.transport.carry(tensors, specs, new, step)
        if refreshes > 0 and new:
            method.refresh.compare(tensors, tensors, new, group)
        self._fit(tensors, specs, found.projected, parameter.device)
        for key, tensor in new.items():
            tensors[key].copy_(tensor)
        close(state, specs, tensors)
        if "rank" in state:
            state["rank"].fill_(geometry.rank)
        state["refreshes"] += 1
        due = method.refresh.next_refresh(step, refreshes == 0, lambda: self._place(name), group, state)
        state["next_refresh"].fill_(due)
        return None if any(specs[key].codec is not None for key in new) else found.projected

    @staticmethod
    def _fit(state: State, specs: dict[str, StateSpec], projected: Tensor | None, device: torch.device) -> None:
        """Give the state the shapes that a changed rank declares."""
        for key in [key for key in state if key not in specs]:
            del state[key]
        for key, spec in specs.items():
            if key not in state:
                state[key] = spec.allocate(device)
            elif tuple(state[key].shape) != spec.shape:
                resize = spec.moment is not None
                state[key] = resized(state[key], spec, projected) if resize else spec.allocate(device)

    def _fold(self, name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        """Keep of a gradient what this step and a late refresh need."""
        state = self._ensure_state(name, parameter, group)
        assert parameter.grad is not None
        G = oriented(parameter.grad, self._right(parameter, group))
        geometry = self._geometry(name, parameter, group, state)
        assert geometry is not None
        before = self._folded.get(name)
        if before is None and name not in self._slots:  # slots have been armed with it
            self._begin(name, parameter, G, group)
        sketched = self._sketches(state, geometry, group)
        Omega = None
        if sketched:
            shape = (*geometry.batch, geometry.n, geometry.rank)
            Omega = test_matrix(refresh_key(self.seed, name, int(state["refreshes"])), G, shape, geometry.dtype)
            if (warm := warm_start(self.method, geometry, group)) is not None:
                Omega = warm[1].apply(Omega, warm[1].moment.decode(warm[0], state))
        tensors = gather_state(self._held_subspace(geometry, group), [state])
        folded = fold(G, self.method.projection(tensors, geometry), Omega)
        if before is None:
            self._folded[name] = folded
        else:
            before.add(folded)

    def _begin(self, name: str, parameter: Tensor, matrix: Tensor, group: dict[str, Any]) -> None:
        """Before a step: a random basis where there is none yet, or a subspace that is found without a gradient.

        ``matrix`` is oriented and tells no more than its shape.
        """
        state = self._state(parameter)
        geometry = self._geometry(name, parameter, group, state)
        assert geometry is not None
        step = int(state["step"])
        if step < int(state["next_refresh"]):
            return
        if not self._sketches(state, geometry, group):
            self._refresh(name, parameter, matrix, group, step)
        elif int(state["refreshes"]) == 0:
            random_start(state, self._held_subspace(geometry, group), geometry, self.seed, self._partners(name)[0])
        else:
            return
        if "turned" in state:
            state["turned"].fill_(1)

    def _sketches(self, state: State, geometry: Geometry, group: dict[str, Any]) -> bool:
        """Whether the gradients of this step leave a sketch."""
        step = int(state["step"])
        due = step >= int(state["next_refresh"]) and geometry.projected
        assert self.method.subspace is not None
        return due and self.method.subspace.at(step, group).sees == "sketch"

    def _held_subspace(self, geometry: Geometry, group: dict[str, Any]) -> dict[str, StateSpec]:
        return self.method.subspace_specs(geometry, group) if geometry.projected else {}

    def _take_slots(self) -> None:
        """Add what layers have left in slots to what was folded."""
        for name, slots in self._slots.items():
            if (left := slots.take()) is not None:
                if name in self._folded:
                    self._folded[name].add(left)
                else:
                    self._folded[name] = left

    def _check_partners(self) -> None:
        """Refuse a step in which parameters that share a basis would go different ways."""
        for names in dict.fromkeys(self._sharing.values()):
            there = [name for name in names if name in self._folded]
            steps = {int(self._state(self._bound[name])["step"]) for name in names}
            if len(there) not in (0, len(names)) or len(steps) > 1:
                raise RuntimeError(
                    f"{', '.join(names)} share a basis, so they can only be stepped together, and "
                    + (f"{there} alone have gradients" if len(steps) == 1 else "one of them was skipped alone")
                    + "; leave share_inputs out where some of the layers may be left out or frozen"
                )

    @torch.no_grad()
    def _arm_slots(self, names: Collection[str]) -> None:
        """Arm slots for the next step; a subspace that needs no gradient is found now."""
        if not names:
            return
        armed = [
            (name, parameter, group)
            for group in self.param_groups
            for name, parameter in self._named(group)
            if name in names
        ]
        for name, parameter, group in armed:
            self._ensure_state(name, parameter, group)
            self._begin(name, parameter, oriented(parameter, self._right(parameter, group)), group)
        for name, parameter, group in armed:
            state = self._state(parameter)
            geometry = self._geometry(name, parameter, group, state)
            assert geometry is not None
            sketched = self._sketches(state, geometry, group)
            key = refresh_key(self.seed, name, int(state["refreshes"])) if sketched else None
            # Of those that share a basis all read the one of the first, so that its product with an input is known.
            first = self._state(self._bound[self._partners(name)[0]])
            self._slots[name].arm(first, state, key)

    def _loaded(self) -> None:
        self._arm_slots(self._slots.keys())

    def _turn(self, work: Work, state: State, R: Tensor) -> Tensor:
        """Turn a basis that came from a sketch to the directions of the first R that was taken with it."""
        assert self.method.transport is not None
        specs = self._specs(work.name, work.parameter, work.group, state)
        tensors = opened(state, specs)
        stacked = [self._folded[name].gradient() for name in self._partners(work.name) if name in self._folded]
        turned = turn(tensors, specs, R, stacked, self.method.transport, int(state["step"]))
        close(state, specs, tensors)
        state["turned"].fill_(1)
        return turned

    def _refresh_late(self, work: Work) -> None:
        """After a step: the subspace that the sketch of its gradients tells, for the next one."""
        folded = self._folded.get(work.name)
        if folded is None or folded.sketch is None:
            return
        method, state = self.method, self.state[work.parameter]
        assert method.refresh is not None and method.transport is not None
        step, first = int(state["step"]) - 1, int(state["refreshes"]) == 0
        specs = self._specs(work.name, work.parameter, work.group, state)
        tensors = opened(state, specs)
        old = {"basis": tensors["basis"].clone()}
        partners = [self._folded[name].sketch for name in self._partners(work.name) if name in self._folded]
        sketches = [widened(sketch) for sketch in partners if sketch is not None]
        Y = functools.reduce(torch.add, sketches)
        turned = basis_from_sketch(tensors, specs, Y, method.transport, step + 1)
        if not first:
            method.refresh.compare(tensors, old, tensors, work.group)
        close(state, specs, tensors)
        state["turned"].fill_(int(turned))
        state["refreshes"] += 1
        due = method.refresh.next_refresh(step, first, lambda: self._place(work.name), work.group, state)
        state["next_refresh"].fill_(due)
