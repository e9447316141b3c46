"""The executor: the only holder of mutable optimizer state."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from subspan.linalg import DenseOperator, seeded_generator
from subspan.optim import loading
from subspan.optim.apply import apply_update
from subspan.optim.buckets import Task, Work, buckets, gather, scatter
from subspan.optim.declared import DeclaredOptimizer
from subspan.optim.dense import state_dtype, step_dense
from subspan.optim.groups import is_projected, unknown_setting
from subspan.optim.matrix import oriented, write_back
from subspan.optim.method import Found, Method, Roster, State, Step
from subspan.optim.param_groups import GROUPING, param_groups
from subspan.optim.projection import drop_round_off
from subspan.optim.screen import nonfinite_gradients, nonfinite_projections
from subspan.optim.transport import resized
from subspan.state import StateSpec

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]] | nn.Module


class LowRankOptimizer(DeclaredOptimizer):
    """Executes any `Method`: W <- (1 − lr·wd)·W − lr·D with D from the method's parts.

    Args:
        params: a model (then `param_groups` is called with ``grouping``), parameters, named parameters, or group dicts.
            Groups with a ``rank`` (or ``density``) are projected; all others are dense.
        method: the parts.
        defaults: group keys with their defaults.
        seed: of all random draws; together with a parameter's name and its refresh count it determines them.
        nonfinite: what to do when a gradient holds NaN or Inf: ``"skip"`` leaves that parameter and its state alone,
            warns once a parameter and counts in `skipped_steps`; ``"raise"`` raises before anything is changed.
        grouping: settings for `param_groups`; only together with a model.

    Raises:
        ValueError: unknown or impossible settings; a projecting method with nothing to project.
        TypeError: ``grouping`` without a model.
    """

    def __init__(
        self,
        params: Params,
        method: Method,
        defaults: dict[str, Any],
        *,
        seed: int = 0,
        nonfinite: Literal["skip", "raise"] = "skip",
        grouping: dict[str, Any] | None = None,
    ) -> None:
        if nonfinite not in ("skip", "raise"):
            raise ValueError(f"nonfinite={nonfinite!r}: choose 'skip' or 'raise'")
        grouping = grouping or {}
        for name in grouping.keys() - GROUPING:
            recipes = [kind for kind in type(self).__mro__ if issubclass(kind, LowRankOptimizer)][:-1]
            known = {key for kind in recipes for key in inspect.signature(kind.__init__).parameters} | GROUPING
            raise TypeError(unknown_setting(name, known - {"self", "params", "grouping", "settings"}, "setting"))
        if isinstance(params, nn.Module):
            params = param_groups(params, **grouping)
        elif grouping:
            raise TypeError(
                f"{type(self).__name__} takes {', '.join(sorted(grouping))} only together with a model, since plain "
                "parameters do not tell embeddings from matrices: pass the model itself, the groups that "
                "param_groups(model, rank=...) makes, or group dicts such as {'params': matrices, 'rank': 128}"
            )
        self.method = method
        self.seed = seed
        self.nonfinite = nonfinite
        self.skipped_steps = 0
        self._warned: set[str] = set()
        self._bound: dict[str, Tensor] = {}
        self._cached_roster: Roster | None = None
        super().__init__(params, defaults)
        if method.projects and not any(is_projected(group) for group in self.param_groups):
            raise ValueError(
                f"{method.name}: no parameter group has a rank, so nothing would be projected; pass a model, or groups "
                "from param_groups(model, rank=...), or set 'rank' in a group dict"
            )

    # -- state --------------------------------------------------------------------------------------------------------

    def init_state(self) -> None:
        """Allocate the state of every trainable parameter now; a step would do it lazily."""
        self._rebind()
        for group in self.param_groups:
            for name, parameter in self._named(group):
                if parameter.requires_grad and parameter.numel() > 0:
                    self._ensure_state(name, parameter, group)

    def _ensure_state(self, name: str, parameter: Tensor, group: dict[str, Any]) -> State:
        state = self.state[parameter]
        if not state:
            for key, spec in self._specs(name, parameter, group, {}).items():
                state[key] = spec.allocate(parameter.device)
        self._bound[name] = parameter
        return state

    def _rebind(self) -> None:
        """Move state to the tensors that now stand under the same names: wrappers swap parameters but not state."""
        for group in self.param_groups:
            for name, parameter in self._named(group):
                old = self._bound.get(name)
                if old is not None and old is not parameter and parameter not in self.state and old in self.state:
                    self.state[parameter] = self.state.pop(old)
                    self._bound[name] = parameter

    # -- the step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step.

        Args:
            closure: re-evaluates the model and returns the loss; run with gradients enabled.

        Returns:
            What the closure returned, else None.

        Raises:
            FloatingPointError: a gradient is not finite and ``nonfinite="raise"``; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._rebind()
        work = [
            self._look(name, parameter, group)
            for group in self.param_groups
            for name, parameter in self._named(group)
            if parameter.grad is not None and parameter.numel() > 0
        ]
        bad = nonfinite_gradients([(item.name, item.parameter) for item in work if not self._shown_by_projection(item)])
        if bad and self.nonfinite == "raise":
            raise FloatingPointError(f"{', '.join(bad[:5])}: the gradient holds NaN or Inf; nothing was changed")
        for name in bad:
            self._skip(name)
        good = [item for item in work if item.name not in bad]
        self._step_dense([item for item in good if item.geometry is None])
        tasks = [self._prepare(item) for item in good if item.geometry is not None]
        for bucket in buckets(task for task in tasks if task is not None):
            self._step_bucket(bucket)
        return loss

    def _look(self, name: str, parameter: Tensor, group: dict[str, Any]) -> Work:
        """What there is to do for one parameter; changes nothing."""
        state = self._state(parameter)
        geometry = self._geometry(name, parameter, group, state)
        due = geometry is not None and (not state or int(state["step"]) >= int(state["next_refresh"]))
        assert parameter.grad is not None
        return Work(name, parameter, parameter.grad, group, geometry, due)

    def _shown_by_projection(self, work: Work) -> bool:
        """Whether R will show that the gradient is not finite, early enough and without a look at the gradient.

        Not where nothing may be changed before all gradients are known, not where a look at R would wait for a device,
        and not where the gradient is used otherwise than through a projection that sees all of it.
        """
        if self.nonfinite == "raise" or work.parameter.device.type != "cpu" or work.due or work.geometry is None:
            return False
        assert self.method.subspace is not None
        return work.geometry.projected and self.method.subspace.sees_all

    def _skip(self, name: str) -> None:
        if self.nonfinite == "raise":
            raise FloatingPointError(
                f"{name}: the projected gradient overflows; other parameters may have been stepped"
            )
        self.skipped_steps += 1
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"{name}: the gradient holds NaN or Inf, or its projection is too large to be squared; this parameter "
                "and its state are left alone in this step (counted in skipped_steps; shown once for each parameter)",
                RuntimeWarning,
                stacklevel=5,
            )

    def _step_dense(self, works: list[Work]) -> None:
        """Step all dense parameters, those of one group and age together."""
        alike: dict[tuple[int, int], list[Work]] = {}
        for work in works:
            state = self._ensure_state(work.name, work.parameter, work.group)
            state["step"] += 1
            alike.setdefault((id(work.group), int(state["step"])), []).append(work)
        for (_, age), same in alike.items():
            group = same[0].group
            beta, alpha = self._factors(group)
            tensors = [(work.parameter, work.gradient, self.state[work.parameter]) for work in same]
            step_dense(self.method.inner, tensors, age, group, beta=beta, alpha=alpha)

    def _prepare(self, work: Work) -> Task | None:
        """Step one projected parameter if its subspace is due for a refresh; else return what is to be done."""
        name, parameter, gradient, group, geometry = work.name, work.parameter, work.gradient, work.group, work.geometry
        assert geometry is not None and self.method.transport is not None
        state = self._ensure_state(name, parameter, group)
        step = int(state["step"])
        right = self._right(parameter, group)
        projected = None
        if work.due:
            projected = self._refresh(name, parameter, oriented(gradient, right), group, step)
            geometry = self._geometry(name, parameter, group, state)
            assert geometry is not None
        age = self.method.transport.age(state, step + 1)
        task = Task(name, parameter, gradient, group, geometry, right, age, state, projected)
        if not work.due:
            return task
        # At once, so that the projected gradients of a refresh of all parameters are not held together.
        self._step_bucket([task])
        return None

    def _refresh(self, name: str, parameter: Tensor, G: Tensor, group: dict[str, Any], step: int) -> Tensor | None:
        """Choose the subspace anew and carry the moments over; returns this step's projected gradient if known."""
        method, state = self.method, self.state[parameter]
        assert method.subspace is not None and method.refresh is not None and method.transport is not None
        refreshes = int(state["refreshes"])
        geometry = self._geometry(name, parameter, group, state, refresh=True)
        assert geometry is not None
        found = Found({})
        if geometry.projected:
            generator = seeded_generator(self.seed, name, refreshes)
            found = method.subspace.find(DenseOperator(G), geometry, generator=generator, step=step, group=group)
            if found.rank is not None:
                geometry = replace(geometry, rank=found.rank)
        new = found.tensors if method.subspace.stored else {}
        specs = method.specs(geometry, parameter.shape, state_dtype(parameter), group)
        if refreshes > 0:
            method.transport.carry(state, specs, new, step)
        self._fit(state, specs, found.projected, parameter.device)
        for key, tensor in new.items():
            state[key].copy_(tensor)
        if "rank" in state:
            state["rank"].fill_(geometry.rank)
        state["refreshes"] += 1
        due = method.refresh.next_refresh(step, refreshes == 0, lambda: self._places()[name], group)
        state["next_refresh"].fill_(due)
        return found.projected

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

    def _step_bucket(self, bucket: list[Task]) -> None:
        """One step of equal matrices: project, inner rule, lift, apply."""
        first, method = bucket[0], self.method
        assert method.subspace is not None and method.lift is not None
        group, geometry = first.group, first.geometry
        changed = [*method.moments(geometry, group), *method.lift.specs(geometry)]
        tensors = {key: gather([task.state[key] for task in bucket]) for key in changed}
        for key in method.subspace.specs(geometry) if geometry.projected else ():
            tensors[key] = gather([self._subspace_tensor(task, key) for task in bucket])
        parameters = [oriented(task.parameter, task.right) for task in bucket]
        W = gather(parameters)
        G = gather([oriented(task.gradient, task.right) for task in bucket])

        projection = method.projection(tensors, geometry)
        R = projection.project(G) if first.projected is None else drop_round_off(first.projected, G)
        bad = nonfinite_projections(R, len(bucket)) if R.device.type == "cpu" else []
        if bad:
            for position in bad:
                self._skip(bucket[position].name)
            rest = [task for position, task in enumerate(bucket) if position not in bad]
            return self._step_bucket(rest) if rest else None
        for task in bucket:
            task.state["step"] += 1
        U = method.inner.direction(R, tensors, first.age, group) if geometry.rank > 0 else R
        correction = method.inner.correction(first.age, group)
        update = method.lift.lift(Step(G, R, U, projection, tensors, group, correction))
        beta, alpha = self._factors(group)
        apply_update(W, G, projection, update, beta=beta, alpha=alpha)

        for key in changed:
            scatter(tensors[key], [task.state[key] for task in bucket])
        scatter(W, parameters)
        for task, matrix in zip(bucket, parameters, strict=True):
            write_back(matrix, task.parameter, task.right)

    def _subspace_tensor(self, task: Task, key: str) -> Tensor:
        """A tensor of the subspace in force: from the state, or found again from the seed of the last refresh."""
        subspace = self.method.subspace
        assert subspace is not None
        if subspace.stored:
            return task.state[key]
        generator = seeded_generator(self.seed, task.name, int(task.state["refreshes"]) - 1)
        operator = DenseOperator(oriented(task.gradient, task.right))
        found = subspace.find(operator, task.geometry, generator=generator, step=0, group=task.group)
        return found.tensors[key]

    def _factors(self, group: dict[str, Any]) -> tuple[float, float]:
        """(beta, alpha) of W <- beta·W + alpha·D."""
        lr = float(group["lr"])
        beta = 1.0 - lr * group["weight_decay"]
        return beta, -lr * (beta if self.method.decay == "after" else 1.0)

    # -- saving and loading ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State, groups and the origin (method, seed, format) as tensors and plain values."""
        self._rebind()
        origin = {
            "schema": loading.SCHEMA,
            "method": self.method.name,
            "parts": self.method.parts(),
            "seed": self.seed,
            "skipped_steps": self.skipped_steps,
        }
        return {**super().state_dict(), "subspan": origin}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; every tensor keeps its dtype, and nothing is changed when anything does not fit.

        Parameters are matched by name where both sides have names. Settings of the groups (learning rates, betas, ...)
        and the seed are taken from the checkpoint.

        Raises:
            ValueError: another method, rank, set of parameters or a newer format; the message says what differs.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        origin = loading.check_origin(state_dict, self.method)
        saved_groups = state_dict["param_groups"]
        loaded = loading.load_parameters(self.param_groups, saved_groups, state_dict["state"], self._specs)
        groups = []
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            settings = {
                key: copy.deepcopy(value) for key, value in saved.items() if key not in ("params", "param_names")
            }
            groups.append({**group, **settings})
        state: defaultdict[Tensor, State] = defaultdict(dict)
        state |= {parameter: tensors for parameter, tensors in loaded.values()}
        self._bound = {name: parameter for name, (parameter, _) in loaded.items()}
        if origin is not None:
            self.seed = origin["seed"]
            self.skipped_steps = origin["skipped_steps"]
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        own = ("method", "seed", "nonfinite", "skipped_steps", "_warned", "_bound", "_cached_roster")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in own}}
