"""Subspaces that are chosen anew: at once, from a gradient, or late, from what was folded of those that are gone."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subspan.linalg import DenseOperator, MatrixOperator, seeded_generator
from subspan.optim.buckets import Work
from subspan.optim.dense import state_dtype
from subspan.optim.late import (
    Folded,
    basis_from_sketch,
    fold,
    random_start,
    refresh_key,
    sketch_norms,
    test_matrix,
    turned,
    warm_start,
)
from subspan.optim.matrix import oriented
from subspan.optim.method import Found, Geometry, State
from subspan.optim.slots import GradientSlots, SharedProduct
from subspan.optim.storage import close, gather_state, opened, rounded
from subspan.optim.stored import StoredOptimizer
from subspan.optim.transport import resized
from subspan.state import StateSpec


class Refreshing(StoredOptimizer):
    """A stored optimizer that finds subspaces, and keeps what a late refresh needs of gradients that are not kept."""

    _folded: dict[str, Folded]
    _local: dict[str, Folded]
    _slots: dict[str, GradientSlots]
    _sharing: dict[str, tuple[str, ...]]
    _stepped: dict[str, Tensor]
    _warned: set[str]

    def share_basis(self, names: Sequence[str]) -> None:
        """Let parameters with slots, whose layers have the same input, have one basis: that of their stacked gradients.

        The sketch is the sum of theirs, as for [G₁ G₂ …] with the test matrices stacked, and the basis is turned to the
        directions of [R₁ R₂ …]. So they train as one layer would that is as wide as all of them together. Each keeps
        the basis in its state; the first name decides on random starts and on the place in the period.

        Raises:
            ValueError: fewer than two names, parameters without slots, another group, side or rank, or states that have
                gone different ways.

        Example:
            >>> from subspan.nn import project_gradients
            >>> from subspan.optim import GaLore
            >>> layers = torch.nn.ModuleList([torch.nn.Linear(16, width, bias=False) for width in (16, 32)])
            >>> optimizer = GaLore(layers, rank=4)
            >>> names = project_gradients(layers, optimizer)
            >>> optimizer.share_basis(names)
            >>> first, second = (optimizer.state[layer.weight]["basis"] for layer in layers)
            >>> torch.equal(first, second)
            True
        """
        if len(names) > 1 and all(self._sharing.get(name) == tuple(names) for name in names):
            return
        if len(names) < 2 or any(name not in self._slots or name in self._sharing for name in names):
            raise ValueError(
                f"{list(names)!r} is not allowed: a basis is shared by two parameters or more that have slots and "
                "share with no others"
            )
        found = self._entries()
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
            common = self._common_keys(names[0], *found[names[0]], first)
            for _, state in states.values():
                for key in common:
                    state[key].copy_(first[key])
        self._sharing |= dict.fromkeys(names, tuple(names))
        product = SharedProduct(len(names))
        for name in names:
            self._slots[name].shared = product
        self._arm_slots(names)

    def _entries(self) -> dict[str, tuple[Tensor, dict[str, Any]]]:
        return {name: (parameter, group) for group in self.param_groups for name, parameter in self._named(group)}

    def _common_keys(self, name: str, parameter: Tensor, group: dict[str, Any], state: State) -> list[str]:
        """State keys of what parameters that share a basis have in common: all but the moments."""
        specs = self._specs(name, parameter, group, state)
        return [held for key, spec in specs.items() if spec.moment is None for held in spec.stored(key)]

    def _check_alike(self, names: Sequence[str], states: Mapping[str, tuple[Tensor, State]]) -> None:
        there = [states[name][1] for name in names if name in states]
        if not there:
            return
        alike = len(there) == len(names)
        if alike:
            common = self._common_keys(names[0], *self._entries()[names[0]], there[0])
            alike = all(torch.equal(state[key], there[0][key]) for state in there for key in common)
        if not alike:
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

    def _refresh(
        self, name: str, parameter: Tensor, operator: MatrixOperator, group: dict[str, Any], step: int
    ) -> Tensor | None:
        """Choose the subspace anew and carry the moments over; returns this step's projected gradient if known.

        ``operator`` is the oriented gradient.
        """
        return self._go_over(name, parameter, self._find(name, parameter, operator, group, step), group, step)

    def _find(self, name: str, parameter: Tensor, operator: MatrixOperator, group: dict[str, Any], step: int) -> Found:
        """The subspace for the gradient behind ``operator``; changes nothing."""
        assert self.method.subspace is not None
        state, shards = self._state(parameter), self._shards(name, parameter, group)
        geometry = self._geometry(name, parameter, group, state, refresh=True)
        assert geometry is not None
        if not geometry.projected or 0 in operator.shape:  # this process may have none of a stack
            return Found({})
        generator = seeded_generator(self.seed, self._partners(name)[0], int(state["refreshes"]))
        return shards.find(self.method.subspace, operator, geometry, generator=generator, step=step, group=group)

    def _go_over(self, name: str, parameter: Tensor, found: Found, group: dict[str, Any], step: int) -> Tensor | None:
        """Go over to the subspace that was found, carrying the moments; returns its projected gradient if known."""
        method, state, shards = self.method, self._state(parameter), self._shards(name, parameter, group)
        assert method.subspace is not None and method.refresh is not None and method.transport is not None
        refreshes = int(state["refreshes"])
        tensors = opened(state, self._specs(name, parameter, group, state))
        geometry = self._found_geometry(name, parameter, found, group)
        specs = method.specs(geometry, parameter.shape, state_dtype(parameter), group)
        # What projects is what is held.
        new = {key: rounded(specs[key], X) for key, X in found.tensors.items()} if method.subspace.stored else {}
        new = {key: shards.piece(key, specs[key], X) for key, X in new.items()}
        if refreshes > 0:
            divided = "basis" in specs and shards.sharded_dim("basis", specs["basis"]) is not None
            method.transport.carry(tensors, specs, new, step, *((shards.total,) if divided else ()))
        if refreshes > 0 and new:
            method.refresh.compare(tensors, tensors, new, group)
        if shards.mesh is None:  # ranks of divided parameters do not change
            self._fit(tensors, specs, found.projected, parameter.device)
        for key, tensor in new.items():
            tensors[key].copy_(tensor)
        close(state, specs, tensors)
        if "rank" in state:
            state["rank"].fill_(geometry.rank)
        state["refreshes"] += 1
        due = method.refresh.next_refresh(step, refreshes == 0, lambda: self._place(name), group, state)
        state["next_refresh"].fill_(due)
        return None if any(specs[key].codec is not None for key in new) else shards.own_columns(found.projected)

    def _found_geometry(self, name: str, parameter: Tensor, found: Found, group: dict[str, Any]) -> Geometry:
        """Geometry from this refresh on."""
        geometry = self._geometry(name, parameter, group, self._state(parameter), refresh=True)
        assert geometry is not None
        return geometry if found.rank is None else replace(geometry, rank=found.rank)

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
        assert parameter.grad is not None
        self._keep(name, self._folded_from(name, parameter, parameter.grad, group))

    def _folded_from(self, name: str, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Folded:
        state = self._ensure_state(name, parameter, group)
        G = oriented(gradient, self._right(parameter, group))
        if name not in self._slots:
            self._begin(name, parameter, G, group)
        geometry = self._geometry(name, parameter, group, state)
        assert geometry is not None
        held = self._slots.get(name)
        Omega = self._test_matrix(name, G, state, geometry, group) if held is None else held.draw(G)
        tensors = gather_state(self._held_subspace(geometry, group), [state])
        return fold(G, self.method.projection(tensors, geometry), Omega)

    def _keep(self, name: str, folded: Folded) -> None:
        """Add what was folded to what there is."""
        if name in self._folded:
            self._folded[name].add(folded)
        else:
            self._folded[name] = folded

    def _test_matrix(
        self, name: str, G: Tensor, state: State, geometry: Geometry, group: dict[str, Any]
    ) -> Tensor | None:
        """Ω where a sketch is due."""
        if not self._sketches(state, geometry, group):
            return None
        shape = (*geometry.batch, geometry.n, geometry.rank)
        Omega = test_matrix(refresh_key(self.seed, name, int(state["refreshes"])), G, shape, geometry.dtype)
        if (warm := warm_start(self.method, geometry, group)) is None:
            return Omega
        key, start = warm
        M = start.moment.decode(key, state)
        return start.apply(Omega, M, start.lengths([M]))

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
            self._refresh(name, parameter, DenseOperator(matrix), group, step)
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
                self._keep(name, left)

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
        wanted = set(names)
        armed = [
            (name, parameter, group)
            for group in self.param_groups
            for name, parameter in self._named(group)
            if name in wanted
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
            warm = warm_start(self.method, geometry, group) if sketched else None
            # Of those that share a basis all read the one of the first, so that its product with an input is known.
            first = self._state(self._bound[self._partners(name)[0]])
            moments = None if warm is None else (*warm, warm[1].lengths(self._first_moments(name, group)))
            self._slots[name].arm(first, state, key, moments)

    def _first_moments(self, name: str, group: dict[str, Any]) -> list[Tensor]:
        """Decoded first moments of the parameters that share a basis with ``name``."""
        moments = []
        for partner in self._partners(name):
            state = self._state(self._bound[partner])
            geometry = self._geometry(partner, self._bound[partner], group, state)
            assert geometry is not None
            warm = warm_start(self.method, geometry, group)
            assert warm is not None
            moments.append(warm[1].moment.decode(warm[0], state))
        return moments

    def _loaded(self) -> None:
        # What was folded belongs to the bases before.
        self._folded.clear()
        self._local.clear()
        self._stepped.clear()
        for slots in self._slots.values():
            slots.clear()
        self._arm_slots(self._slots.keys())

    def _turn(self, name: str, group: dict[str, Any]) -> None:
        """Turn a basis that came from a sketch to the directions of the first R that was taken with it.

        All that share it are turned at once, so that the directions are found once.
        """
        partners = [partner for partner in self._partners(name) if partner in self._folded]
        stacked = [self._folded[partner].gradient() for partner in partners]
        state, dtype = self._state(self._bound[name]), self._bound[name].dtype
        generator = seeded_generator(self.seed, self._partners(name)[0], "turn", int(state["refreshes"]))
        Q, X = turned(state["basis"], stacked, dtype, generator)
        for partner in partners:
            self._take_basis(partner, group, Q, int(self._state(self._bound[partner])["step"]))
            self._state(self._bound[partner])["turned"].fill_(1)
            self._folded[partner].turn = X

    def _take_basis(self, name: str, group: dict[str, Any], Q: Tensor, step: int, compare: bool = False) -> None:
        """Replace the basis of one parameter, and carry its moments over."""
        method, parameter = self.method, self._bound[name]
        assert method.transport is not None and method.refresh is not None
        state = self.state[parameter]
        specs = self._specs(name, parameter, group, state)
        tensors = opened(state, specs)
        old = {"basis": tensors["basis"].clone()} if compare else {}
        new = {"basis": Q.to(tensors["basis"].dtype)}
        method.transport.carry(tensors, specs, new, step)
        tensors["basis"].copy_(new["basis"])
        if compare:
            method.refresh.compare(tensors, old, tensors, group)
        close(state, specs, tensors)

    def _refresh_late(self, works: Sequence[Work]) -> None:
        """After a step: the subspaces that the sketches of its gradients tell, for the next one.

        A sketch that tells none leaves its refresh due: one that overflowed where R did not, or one of no gradient.
        """
        norms, stepped = sketch_norms(self._folded), {work.name: work for work in works}
        for names in dict.fromkeys(self._partners(work.name) for work in works):
            overflowed = [name for name in names if not math.isfinite(norms.get(name, 0.0))]
            for name in overflowed:
                what = "the sketch for a new subspace overflows, so the one there is stays until one does not"
                self._warn(name, what)
            if not overflowed and any(norms.get(name) for name in names):
                self._refresh_from_sketch([stepped[name] for name in names if name in stepped])

    def _warn(self, name: str, what: str) -> None:
        """Warn once of each kind for each parameter."""
        if (message := f"{name}: {what}") not in self._warned:
            self._warned.add(message)
            warnings.warn(f"{message} (shown once for each parameter)", RuntimeWarning, stacklevel=6)

    def _refresh_from_sketch(self, works: Sequence[Work]) -> None:
        """Refresh one parameter, or those that share a basis, which is found once."""
        refresh, first = self.method.refresh, works[0]
        assert refresh is not None
        Ys = [Y for work in works if (Y := self._folded[work.name].whole_sketch()) is not None]
        spec = self._specs(first.name, first.parameter, first.group, self.state[first.parameter])["basis"]
        refreshes = int(self._state(first.parameter)["refreshes"])
        generator = seeded_generator(self.seed, self._partners(first.name)[0], "surplus", refreshes)
        Q, is_turned = basis_from_sketch(spec, functools.reduce(torch.add, Ys), first.parameter.dtype, generator)
        for work in works:
            state = self.state[work.parameter]
            step, none_before = int(state["step"]) - 1, int(state["refreshes"]) == 0
            self._take_basis(work.name, work.group, Q, step + 1, compare=not none_before)
            state["turned"].fill_(int(is_turned))
            state["refreshes"] += 1
            place = functools.partial(self._place, work.name)
            state["next_refresh"].fill_(refresh.next_refresh(step, none_before, place, work.group, state))
