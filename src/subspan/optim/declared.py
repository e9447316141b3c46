"""What an optimizer holds: names, geometries, declarations and bytes, from its groups and its method alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from subspan.optim.dense import state_dtype
from subspan.optim.groups import check_group, complete_group, is_projected, keeps_whole_moments
from subspan.optim.matrix import matrix_shape, oriented_shape, projects_right
from subspan.optim.method import Geometry, Method, Roster, State
from subspan.optim.refresh import places_in_period
from subspan.optim.sharding import check_shardable, shards_of
from subspan.optim.shards import WHOLE, Shards, is_sharded, local, local_state
from subspan.optim.table import ParameterRow, format_table
from subspan.state import StateSpec, stored


class DeclaredOptimizer(torch.optim.Optimizer):
    """An optimizer whose state follows from declarations, so that it can be planned, shown and checked."""

    method: Method
    divides_bases: bool
    _cached_roster: Roster | None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its keys are checked, aliases resolved and ``lr_scale`` applied to its learning rate."""
        param_group = complete_group(param_group, self.defaults)
        if "moments" in self.defaults and keeps_whole_moments(param_group, self.method):
            param_group.setdefault("moments", "float32")
        super().add_param_group(param_group)
        self._cached_roster = None
        group = self.param_groups[-1]
        try:
            check_group(group, self.method)
            names = [name for other in self.param_groups for name, _ in self._named(other)]
            if len(set(names)) < len(names):
                twice = next(name for name, count in Counter(names).items() if count > 1)
                raise ValueError(
                    f"two parameters have the name {twice!r}; state and seeds go by name, so name them apart"
                )
            for name, parameter in self._named(group):
                check_shardable(name, parameter, group, self.method)
                if is_projected(group):
                    self._geometry(name, parameter, group, {})
        except Exception:
            self.param_groups.pop()
            self._cached_roster = None
            raise

    def _named(self, group: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        if "param_names" in group:
            yield from zip(group["param_names"], group["params"], strict=True)
        else:
            index = next(i for i, other in enumerate(self.param_groups) if other is group)
            for position, parameter in enumerate(group["params"]):
                yield f"{index}.{position}", parameter

    def _roster(self) -> Roster:
        """Names and sizes of all projected parameters; kept until a group is added."""
        if self._cached_roster is None:
            self._cached_roster = tuple(
                (name, parameter.numel())
                for group in self.param_groups
                if is_projected(group)
                for name, parameter in self._named(group)
            )
        return self._cached_roster

    def _places(self) -> dict[str, float]:
        return places_in_period(self._roster())

    def _geometry(
        self, name: str, parameter: Tensor, group: dict[str, Any], state: Mapping[str, Tensor], *, refresh: bool = False
    ) -> Geometry | None:
        """Oriented shape of a parameter, and the rank in force or, with ``refresh``, from now on; None when dense."""
        if not is_projected(group):
            return None
        if parameter.ndim < 2:
            raise ValueError(
                f"{name}: a parameter of shape {tuple(parameter.shape)} cannot be projected; put it into a group "
                "without rank, as param_groups(model, rank=...) does"
            )
        assert self.method.subspace is not None
        *batch, m, n = oriented_shape(parameter.shape, self._right(parameter, group))
        refreshes = int(state["refreshes"]) if state else 0
        if "rank" in state and refreshes > 0 and not refresh:
            rank = int(state["rank"])
        else:
            rank = self.method.subspace.rank(m, group, name=name, refreshes=refreshes, roster=self._roster)
        return Geometry(tuple(batch), m, n, rank, state_dtype(parameter))

    @staticmethod
    def _right(parameter: Tensor, group: dict[str, Any]) -> bool:
        rows, columns = matrix_shape(parameter.shape)[-2:]
        return projects_right(rows, columns, group["proj_type"])

    def _specs(
        self, name: str, parameter: Tensor, group: dict[str, Any], state: Mapping[str, Tensor]
    ) -> dict[str, StateSpec]:
        geometry = self._geometry(name, parameter, group, state)
        return self.method.specs(geometry, parameter.shape, state_dtype(parameter), group)

    def _stored_specs(
        self, name: str, parameter: Tensor, group: dict[str, Any], state: Mapping[str, Tensor]
    ) -> dict[str, StateSpec]:
        return stored(self._specs(name, parameter, group, state))

    def _state(self, parameter: Tensor) -> State:
        """The state of a parameter: of one that is divided the pieces of this process, which share its memory."""
        state = self.state.get(parameter, {})
        return local_state(state) if is_sharded(parameter) else state

    def _shards(self, name: str, parameter: Tensor, group: dict[str, Any]) -> Shards:
        if not is_sharded(parameter):
            part_of = getattr(parameter, "part_of", None)
            return WHOLE if part_of is None else Shards(part_of=part_of)
        geometry = self._geometry(name, parameter, group, self._state(parameter))
        # Bases that are drawn again in each step are not held.
        divides = self.divides_bases and self.method.subspace is not None and self.method.subspace.stored
        return shards_of(parameter, geometry, self._right(parameter, group) if geometry else False, divides)

    def _held_specs(
        self, name: str, parameter: Tensor, group: dict[str, Any], state: Mapping[str, Tensor]
    ) -> dict[str, StateSpec]:
        """What this process holds: all of the state, or of a divided parameter its piece."""
        shards, specs = self._shards(name, parameter, group), self._stored_specs(name, parameter, group, state)
        return {key: shards.local_spec(key, spec) for key, spec in specs.items()}

    def declared_state(self, parameter: Tensor) -> dict[str, StateSpec]:
        """Declarations of the state that ``parameter`` has, or will have once it is stepped.

        Raises:
            KeyError: the parameter is not in this optimizer.
        """
        for group in self.param_groups:
            for name, candidate in self._named(group):
                if candidate is parameter:
                    return self._stored_specs(name, parameter, group, self._state(parameter))
        raise KeyError("this parameter is not in the optimizer")

    def planned_state_bytes(self) -> dict[str, int]:
        """Bytes of optimizer state by key for all trainable parameters, computed from the declarations alone.

        Of parameters that are divided over processes, those of this process.

        Where the rank is found with the subspace, it is the most there can be before the first step, and what the
        ranks in force need after it.
        """
        total: Counter[str] = Counter()
        for group in self.param_groups:
            for name, parameter in self._named(group):
                if parameter.requires_grad and parameter.numel() > 0:
                    for key, spec in self._held_specs(name, parameter, group, self._state(parameter)).items():
                        total[key] += spec.nbytes
        return dict(total)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of optimizer state by key that are allocated now, whole storages counted."""
        total: Counter[str] = Counter()
        for state in self.state.values():
            for key, tensor in state.items():
                total[key] += local(tensor).untyped_storage().nbytes()
        return dict(total)

    def rows(self) -> list[ParameterRow]:
        """One row for each parameter: what is projected, at which rank, and its state bytes."""
        rows = []
        for group in self.param_groups:
            for name, parameter in self._named(group):
                state = self._state(parameter)
                geometry = self._geometry(name, parameter, group, state)
                specs = self._held_specs(name, parameter, group, state) if parameter.requires_grad else {}
                rows.append(
                    ParameterRow(
                        name=name,
                        shape=tuple(parameter.shape),
                        rank=None if geometry is None else geometry.rank,
                        at_most=geometry is not None and self._finds_rank() and not (state and state["refreshes"]),
                        side="-" if geometry is None else ("right" if self._right(parameter, group) else "left"),
                        lr=float(group["lr"]),
                        weight_decay=group["weight_decay"],
                        trainable=parameter.requires_grad,
                        state_bytes=sum(spec.nbytes for spec in specs.values()),
                    )
                )
        return rows

    def ranks(self) -> dict[str, int]:
        """Ranks in force by name, of all projected parameters; before the first step the most they may be."""
        return {row.name: row.rank for row in self.rows() if row.rank is not None}

    def _finds_rank(self) -> bool:
        return self.method.subspace is not None and self.method.subspace.finds_rank

    def table(self) -> str:
        """Which tensors are projected, at which rank, on which side, with learning rates and state bytes, as text."""
        return format_table(self.rows(), self.method.name)
