"""The state of one optimizer taken over by another: of another rank, of another method, or of a dense one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subspan.linalg import DenseOperator, orthogonality_error, orthonormalize, seeded_generator
from subspan.optim.dense import state_dtype
from subspan.optim.groups import is_projected
from subspan.optim.matrix import as_matrix, oriented, projects_right
from subspan.optim.method import Geometry, Group, State
from subspan.optim.projection import Linear
from subspan.optim.refreshing import Refreshing
from subspan.optim.shards import is_sharded
from subspan.optim.storage import opened
from subspan.optim.transport import resized
from subspan.state import StateSpec, stored

#: Settings of a saved group that say how its tensors are held.
_STORAGE = ("moments", "basis_storage", "min_quantized", "outputs", "queue_size")


@torch.no_grad()
def carried(
    optimizer: Refreshing,
    saved: Mapping[str, tuple[Mapping[str, Tensor], Group]],
    origin: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A state for ``optimizer`` made of what another one has learnt, for its ``load_state_dict``.

    - **The same shapes**: copied.
    - **Dense to low rank**: the subspace is found from the first moment, as from a gradient, M <- QᵀM, and
      V <- max((Q∘Q)ᵀV, (1−β2ᵗ)/(1−β1ᵗ)²·(QᵀM)²). The first is the second moment of QᵀG for entries of G without
      correlation; the second is what it is for one gradient that has not changed in t steps, and keeps the next step
      from being too large where the entries point one way. (QᵀM)² itself would be far too large for young moments.
    - **Another rank**, with a stored orthonormal basis: leading directions stay. New ones are drawn at random,
      orthogonal to those there; their first moments are zero, their second ones the mean of the weakest row that stays.
    - **Anything else** (another side, subspaces that cannot be compared, low rank to dense) starts anew, with a warning
      that names the parameters.

    The next refresh is at the parameter's own place in the period. Settings are those of ``optimizer``.

    Args:
        optimizer: with its settings; it is not changed.
        saved: by parameter name the state, and the settings of its group when it was saved.
        origin: what the state dict has under ``subspan``; without it, subspaces that are drawn from a seed start anew.

    Returns:
        A state dict.

    Raises:
        ValueError: parameters of other names or shapes, or parameters divided over processes.

    Example:
        >>> from subspan.optim import AdamW, GaLore
        >>> model = torch.nn.Linear(64, 32)
        >>> dense = AdamW(model)
        >>> model(torch.ones(1, 64)).sum().backward()
        >>> dense.step()
        >>> names = [name for name, _ in model.named_parameters()]
        >>> saved = {name: (dense.state[p], dense.param_groups[0]) for name, p in model.named_parameters()}
        >>> optimizer = GaLore(model, rank=4)
        >>> optimizer.load_state_dict(carried(optimizer, saved))
        >>> tuple(optimizer.state[model.weight]["exp_avg"].shape)
        (4, 64)
    """
    entries = optimizer._entries()
    if unknown := sorted(saved.keys() - entries.keys()):
        raise ValueError(f"the checkpoint has a state for {unknown[:5]}, which this optimizer does not train")
    drawn_alike = origin is not None and (origin["parts"]["subspace"], origin["seed"]) == (
        repr(optimizer.method.subspace),
        optimizer.seed,
    )
    states: dict[str, State] = {}
    anew = []
    for name, (parameter, group) in entries.items():
        if is_sharded(parameter):
            raise ValueError(
                f"{name} is divided over processes: carry the checkpoint over in one process first (subspan "
                "checkpoint convert), then load it"
            )
        old, settings = saved.get(name, ({}, {}))
        if not old or not parameter.requires_grad:
            continue
        state = _Carrier(optimizer, name, parameter, group, old, settings, drawn_alike).carry()
        if state is None:
            anew.append(name)
        else:
            states[name] = state
    if anew:
        more = f" and {len(anew) - 5} more" if len(anew) > 5 else ""
        warnings.warn(
            f"the states of {', '.join(anew[:5])}{more} cannot be taken over and start anew",
            RuntimeWarning,
            stacklevel=2,
        )
    whole = optimizer.state_dict()
    index = {
        name: number
        for group, packed in zip(optimizer.param_groups, whole["param_groups"], strict=True)
        for (name, _), number in zip(optimizer._named(group), packed["params"], strict=True)
    }
    return {**whole, "state": {index[name]: state for name, state in states.items()}}


class _Carrier:
    """One parameter: what it has, and what it is to have."""

    def __init__(
        self,
        optimizer: Refreshing,
        name: str,
        parameter: Tensor,
        group: dict[str, Any],
        old: Mapping[str, Tensor],
        settings: Group,
        drawn_alike: bool,
    ) -> None:
        self.drawn_alike, self.settings = drawn_alike, settings
        self.optimizer, self.method = optimizer, optimizer.method
        self.name, self.parameter, self.group = name, parameter, group
        self.geometry = optimizer._geometry(name, parameter, group, {})
        self.right = None if self.geometry is None else optimizer._right(parameter, group)
        self.was_right = self.before = None
        if is_projected(settings):
            rows, columns = as_matrix(parameter).shape[-2:]
            self.was_right = projects_right(rows, columns, settings["proj_type"])
            *batch, m, n = oriented(parameter, self.was_right).shape
            self.before = Geometry(tuple(batch), m, n, _rank(old, settings, m), state_dtype(parameter))
            if self.geometry is not None and self.method.subspace is not None and not self.method.subspace.fixed_rank:
                self.geometry = replace(self.geometry, rank=min(self.geometry.rank, self.before.rank))
        held = {**group, **{key: settings[key] for key in _STORAGE if key in settings}}
        self.old = self._opened(old, held)

    def _specs(self, geometry: Geometry | None, group: Group) -> dict[str, StateSpec]:
        return self.method.specs(geometry, self.parameter.shape, state_dtype(self.parameter), group)

    def _opened(self, old: Mapping[str, Tensor], held: Group) -> State:
        """The saved tensors, decoded; those that are not as this method would hold them are left out."""
        method_projects = self.method.projects or self.before is None
        specs = self._specs(self.before, held) if method_projects else {}
        # What the other method held by a codec is known by its name; scalars and plain tensors need no declaration.
        fitting = {
            key: spec
            for key, spec in specs.items()
            if all(
                name in old and (tuple(old[name].shape), old[name].dtype) == (each.shape, each.dtype)
                for name, each in stored({key: spec}).items()
            )
        }
        return {**{key: X for key, X in old.items() if X.ndim == 0}, **opened(dict(old), fitting)}

    def carry(self) -> State | None:
        """The new state as it is held; None where it starts anew."""
        if "step" not in self.old:
            return None
        if self.geometry is None:
            return None if self.before is not None else self._kept(self._specs(None, self.group))
        specs = self._specs(self.geometry, self.group)
        if self.before is None:
            return self._projected(specs)
        if (self.was_right, self.before.m) != (self.right, self.geometry.m):
            return None
        if self.before.rank == self.geometry.rank:
            return self._kept(specs)
        return self._resized(specs)

    def _close(self, specs: Mapping[str, StateSpec], tensors: Mapping[str, Tensor], *, refreshed: bool) -> State:
        """The whole state, with a clock that goes on."""
        state = {
            key: tensors[key].clone() if key in tensors else spec.allocate(self.parameter.device)
            for key, spec in specs.items()
        }
        if self.geometry is not None:
            assert self.method.refresh is not None
            step = int(state["step"])
            gap = self.group["update_proj_gap"]
            if refreshed or any(key not in tensors for key in self.method.refresh.specs(self.group)):
                place = self.optimizer._place(self.name)
                due = self.method.refresh.next_refresh(step - 1, True, lambda: place, self.group, state)
                # Its moments would be in other coordinates at once.
                state["next_refresh"].fill_(due + gap if due <= step else due)
            state["next_refresh"].clamp_(max=step + gap)
            state["refreshes"].clamp_(min=1)
            if "turned" in state:
                state["turned"].fill_(1)
            if "rank" in state:
                state["rank"].fill_(self.geometry.rank)
        return {held: X for key, spec in specs.items() for held, X in spec.encode(key, state[key]).items()}

    def _kept(self, specs: Mapping[str, StateSpec]) -> State | None:
        """The same shapes: what is there under the same names; None where a moment or the subspace is not."""
        fitting = {
            key: X for key, X in self.old.items() if key in specs and (tuple(X.shape), X.dtype) == _kind(specs[key])
        }
        needed = {
            key for key, spec in specs.items() if spec.moment is not None or key in ("basis", "rows", "reset_step")
        }
        if not needed <= fitting.keys():
            return None
        subspace = self.method.subspace
        if self.geometry is not None and self.geometry.projected and subspace is not None:
            # A matrix of another method under the same name may be no basis; one that is not kept is drawn again.
            if "basis" in fitting and subspace.orthonormal and float(orthogonality_error(fitting["basis"]).max()) > 0.1:
                return None
            if not subspace.stored and not self.drawn_alike:
                return None
        return self._close(specs, fitting, refreshed=False)

    def _projected(self, specs: Mapping[str, StateSpec]) -> State | None:
        """Moments of a dense parameter in a subspace of the first one."""
        assert self.geometry is not None and self.right is not None and self.method.subspace is not None
        moments = {key: spec.moment for key, spec in specs.items() if spec.moment is not None}
        if not moments.keys() <= self.old.keys():
            return None
        first = next((key for key, moment in moments.items() if moment == 1), None)
        if first is None:
            return None
        matrices = {key: oriented(self.old[key], self.right).to(self.geometry.dtype) for key in moments}
        tensors: State = {"step": self.old["step"]}
        found: State = {}
        if self.geometry.projected:
            generator = seeded_generator(self.optimizer.seed, self.name, 0)
            subspace = self.method.subspace
            answer = subspace.find(
                DenseOperator(matrices[first]), self.geometry, generator=generator, step=int(self.old["step"]),
                group=self.group,
            )  # fmt: skip
            found = answer.tensors
            if answer.rank is not None:
                self.geometry = replace(self.geometry, rank=answer.rank)
                specs = self._specs(self.geometry, self.group)
        projection = self.method.projection(found, self.geometry)
        squared = Linear(found["basis"].square()) if "basis" in found else projection
        R = projection.project(matrices[first])
        for key, moment in moments.items():
            if moment == 1:
                tensors[key] = R
            else:
                least = self._least_second_moment() * R.square()
                tensors[key] = torch.maximum(squared.project(matrices[key]), least)
        tensors |= {key: X for key, X in found.items() if key in specs}
        return self._close(specs, tensors, refreshed=True)

    def _least_second_moment(self) -> float:
        """V/M² of a gradient that has been the same in all steps so far."""
        beta1, beta2 = self.settings.get("betas", self.group["betas"])
        step = max(1, int(self.old["step"]))
        return float((1 - beta2**step) / (1 - beta1**step) ** 2)

    def _resized(self, specs: Mapping[str, StateSpec]) -> State | None:
        """Another rank in the same coordinates, of which leading ones stay."""
        assert self.geometry is not None and self.before is not None and self.method.subspace is not None
        if not self.method.subspace.orthonormal or "basis" not in self.old or "basis" not in specs:
            return None
        tensors: State = {}
        kept = min(self.before.rank, self.geometry.rank)
        for key, spec in specs.items():
            if spec.moment is not None:
                if key not in self.old:
                    return None
                tensors[key] = resized(self.old[key], replace(spec, codec=None), None)
                if spec.moment == 2:
                    weakest = self.old[key][..., kept - 1 : kept, :].mean(dim=-1, keepdim=True)
                    tensors[key][..., kept:, :] = weakest
            elif key in self.old and (tuple(self.old[key].shape), self.old[key].dtype) == _kind(spec):
                tensors[key] = self.old[key]
        Q = self.old["basis"][..., :kept]
        if (more := self.geometry.rank - kept) > 0:
            generator = seeded_generator(self.optimizer.seed, self.name, "carried")
            drawn = torch.randn(*Q.shape[:-1], more, generator=generator, dtype=Q.dtype).to(Q.device)
            for _ in range(2):  # the second time takes out what rounding left
                drawn = orthonormalize(drawn - Q @ (Q.mT @ drawn))
            Q = torch.cat([Q, drawn], dim=-1)
        return self._close(specs, {**tensors, "basis": Q}, refreshed=False)


def _kind(spec: StateSpec) -> tuple[tuple[int, ...], torch.dtype]:
    return spec.shape, spec.dtype


def _rank(old: Mapping[str, Tensor], settings: Group, m: int) -> int:
    """The rank in force when the state was saved."""
    if "rank" in old:
        return int(old["rank"])
    if settings.get("rank") is not None:
        return min(int(settings["rank"]), m)
    density = float(settings["density"])
    return min(m, max(1, round(density * m))) if density > 0 else 0
