"""The step of any method, from its parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from subspan.linalg import DenseOperator, seeded_generator
from subspan.optim.apply import apply_update
from subspan.optim.buckets import Task, Work, buckets, gather, scatter
from subspan.optim.dense import state_dtype, step_dense
from subspan.optim.fused import BackwardFusion, without_autocast
from subspan.optim.late import Folded, basis_from_sketch, fold, nonfinite_folded, random_start, test_matrix, turn
from subspan.optim.matrix import oriented, write_back
from subspan.optim.method import Found, State, Step
from subspan.optim.screen import nonfinite_gradients, nonfinite_projections
from subspan.optim.slots import GradientSlots
from subspan.optim.storage import close, gather_state, opened, rounded, scatter_state
from subspan.optim.stored import StoredOptimizer
from subspan.optim.transport import resized
from subspan.state import StateSpec
from subspan.state.host import on_host


class Executor(StoredOptimizer):
    """Steps parameters, together or one at a time, from their gradients or from what was folded of them."""

    nonfinite: Literal["skip", "raise"]
    _warned: set[str]
    _folded: dict[str, Folded]
    _stepped: dict[str, Tensor]
    _slots: dict[str, GradientSlots]
    _fusion: BackwardFusion | None

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
        if self._fusion is not None:
            self._fusion.bind()
            self._fusion.check_step()
        device = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
        with without_autocast(device):
            self._step()
        return loss

    def _step(self) -> None:
        self._take_slots()
        work = [
            self._look(name, parameter, group)
            for group in self.param_groups
            for name, parameter in self._named(group)
            if (parameter.grad is not None or name in self._folded) and parameter.numel() > 0
        ]
        if self.method.refresh is not None and self.method.refresh.late:
            if self.nonfinite == "raise":
                self._raise_nonfinite([(item.name, item.parameter) for item in work if item.gradient is not None])
            for item in work:
                if item.geometry is not None and item.gradient is not None:
                    self._fold(item.name, item.parameter, item.group)
        looked_at = [(item.name, item.parameter) for item in work if not self._shown_by_projection(item)]
        if self.nonfinite == "raise":
            self._raise_nonfinite(looked_at)
            bad = []
        else:
            bad = nonfinite_gradients(looked_at) + nonfinite_folded(self._folded)
        for name in bad:
            self._skip(name)
        good = [item for item in work if item.name not in bad]
        self._step_dense([item for item in good if item.geometry is None])
        tasks = [self._prepare(item) for item in good if item.geometry is not None]
        for bucket in buckets(task for task in tasks if task is not None):
            self._step_bucket(bucket)
        for item in good:
            self._refresh_late(item)
        self._folded.clear()
        self._stepped.clear()
        self._arm_slots([item.name for item in good if item.name in self._slots])

    def _raise_nonfinite(self, gradients: list[tuple[str, Tensor]]) -> None:
        bad = nonfinite_gradients(gradients) + nonfinite_folded(self._folded)
        if bad:
            self._folded.clear()
            raise FloatingPointError(f"{', '.join(bad[:5])}: the gradient holds NaN or Inf; nothing was changed")

    def _look(self, name: str, parameter: Tensor, group: dict[str, Any]) -> Work:
        """What there is to do for one parameter; changes nothing."""
        state = self._state(parameter)
        geometry = self._geometry(name, parameter, group, state)
        due = geometry is not None and (not state or int(state["step"]) >= int(state["next_refresh"]))
        return Work(name, parameter, parameter.grad, group, geometry, due)

    def _shown_by_projection(self, work: Work) -> bool:
        """Whether R will show that the gradient is not finite, early enough and without a look at the gradient.

        Not where nothing may be changed before all gradients are known, not where a look at R would wait for a device,
        and not where the gradient is used otherwise than through a projection that sees all of it.
        """
        if work.name in self._folded:
            return True
        if self.nonfinite == "raise" or not on_host(work.parameter.device) or work.due or work.geometry is None:
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
            tensors = [
                (work.parameter, work.gradient, self.state[work.parameter], self._rounding_key(work.name, group, age))
                for work in same
                if work.gradient is not None
            ]
            step_dense(self.method, tensors, age, group, beta=beta, alpha=alpha)

    def _prepare(self, work: Work) -> Task | None:
        """Step one projected parameter if its subspace is due for a refresh; else return what is to be done."""
        name, parameter, gradient, group, geometry = work.name, work.parameter, work.gradient, work.group, work.geometry
        assert geometry is not None and self.method.transport is not None
        state = self._ensure_state(name, parameter, group)
        step = int(state["step"])
        right = self._right(parameter, group)
        if name in self._folded:
            return self._prepare_folded(work, state, step, right)
        assert gradient is not None
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

    def _prepare_folded(self, work: Work, state: State, step: int, right: bool) -> Task:
        """What is to be done for a parameter whose projected gradient is there."""
        assert work.geometry is not None and self.method.transport is not None
        R = self._folded[work.name].projected
        if "turned" in state and not int(state["turned"]):
            specs = self._specs(work.name, work.parameter, work.group, state)
            tensors = opened(state, specs)
            # In place, since the turned ones of all matrices wait for their step together.
            R.copy_(turn(tensors, specs, R, self.method.transport, step))
            close(state, specs, tensors)
            state["turned"].fill_(1)
        age = self.method.transport.age(state, step + 1)
        return Task(work.name, work.parameter, work.gradient, work.group, work.geometry, right, age, state, R)

    def _fold(self, name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        """Keep of a gradient what this step and a late refresh need; a subspace without a gradient is found at once."""
        state = self._ensure_state(name, parameter, group)
        assert parameter.grad is not None and self.method.subspace is not None
        G = oriented(parameter.grad, self._right(parameter, group))
        geometry = self._geometry(name, parameter, group, state)
        assert geometry is not None
        step, refreshes = int(state["step"]), int(state["refreshes"])
        before = self._folded.get(name)
        Omega = None
        if step >= int(state["next_refresh"]):
            if geometry.projected and self.method.subspace.at(step, group).sees == "sketch":
                if refreshes == 0 and before is None and name not in self._slots:  # else it has been armed with one
                    random_start(state, geometry, self.seed, name)
                    state["turned"].fill_(1)
                Omega = test_matrix(geometry, self.seed, name, refreshes, G)
            elif before is None:
                self._refresh(name, parameter, G, group, step)
                if "turned" in state:
                    state["turned"].fill_(1)
        folded = fold(G, self.method.projection(state, geometry), Omega)
        if before is None:
            self._folded[name] = folded
        else:
            before.add(folded)

    def _take_slots(self) -> None:
        """Add what layers have left in slots to what was folded."""
        for name, slots in self._slots.items():
            if (left := slots.take()) is not None:
                if name in self._folded:
                    self._folded[name].add(left)
                else:
                    self._folded[name] = left

    @torch.no_grad()
    def _arm_slots(self, names: Collection[str]) -> None:
        """Give slots the basis and the test matrix of the next step; a subspace without a gradient is found now."""
        if not names:
            return
        for group in self.param_groups:
            for name, parameter in self._named(group):
                if name in names:
                    self._arm(name, parameter, group)

    def _arm(self, name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        state, slots = self._ensure_state(name, parameter, group), self._slots[name]
        geometry = self._geometry(name, parameter, group, state)
        assert geometry is not None and self.method.subspace is not None
        slots.test_matrix = None
        step, refreshes = int(state["step"]), int(state["refreshes"])
        if step >= int(state["next_refresh"]):
            shape = oriented(parameter, self._right(parameter, group))
            if self.method.subspace.at(step, group).sees == "sketch":
                if refreshes == 0:
                    random_start(state, geometry, self.seed, name)
                    state["turned"].fill_(1)
                slots.test_matrix = test_matrix(geometry, self.seed, name, refreshes, shape)
            else:
                self._refresh(name, parameter, shape, group, step)
                if "turned" in state:
                    state["turned"].fill_(1)
        slots.basis = state["basis"]

    def _loaded(self) -> None:
        self._arm_slots(self._slots.keys())

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
        basis_from_sketch(tensors, specs, folded.sketch, method.transport, step + 1)
        if not first:
            method.refresh.compare(tensors, old, tensors, work.group)
        close(state, specs, tensors)
        state["turned"].fill_(0)
        state["refreshes"] += 1
        due = method.refresh.next_refresh(step, first, lambda: self._places()[work.name], work.group, state)
        state["next_refresh"].fill_(due)

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
            generator = seeded_generator(self.seed, name, refreshes)
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
        due = method.refresh.next_refresh(step, refreshes == 0, lambda: self._places()[name], group, state)
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

    def _step_bucket(self, bucket: list[Task]) -> None:
        """One step of equal matrices: project, inner rule, lift, apply."""
        first, method = bucket[0], self.method
        assert method.subspace is not None and method.lift is not None
        group, geometry = first.group, first.geometry
        changed = method.moments(geometry, group) | method.lift.specs(geometry)
        tensors = self._subspace_tensors(bucket) if geometry.projected else {}
        parameters = [oriented(task.parameter, task.right) for task in bucket]
        W = gather(parameters)
        gradients = [oriented(task.gradient, task.right) for task in bucket if task.gradient is not None]
        G = gather(gradients) if gradients and (first.projected is None or method.lift.needs_gradient) else None

        projection = method.projection(tensors, geometry)
        if first.projected is None:
            assert G is not None
            R = projection.project(G)
        else:
            R = gather([task.projected for task in bucket if task.projected is not None])
        R = projection.without_round_off(R, geometry.m, first.parameter.dtype)
        bad = nonfinite_projections(R, len(bucket)) if on_host(R.device) else []
        if bad:
            for position in bad:
                self._skip(bucket[position].name)
            rest = [task for position, task in enumerate(bucket) if position not in bad]
            return self._step_bucket(rest) if rest else None
        for task in bucket:
            task.state["step"] += 1
        tensors |= gather_state(changed, [task.state for task in bucket])
        U = method.inner.direction(R, tensors, first.age, group) if geometry.rank > 0 else R
        correction = method.inner.correction(first.age, group)
        update = method.lift.lift(Step(G, R, U, projection, tensors, group, correction))
        beta, alpha = self._factors(group)
        keys = [self._rounding_key(task.name, group, int(task.state["step"])) for task in bucket]
        known = [key for key in keys if key is not None]
        apply_update(W, G, projection, update, beta=beta, alpha=alpha, keys=gather(known) if known else None)

        scatter_state(changed, tensors, [task.state for task in bucket])
        scatter(W, parameters)
        for task, matrix in zip(bucket, parameters, strict=True):
            write_back(matrix, task.parameter, task.right)

    def _subspace_tensors(self, bucket: list[Task]) -> State:
        """The subspaces in force: from the states, or found again from the seeds of the last refreshes."""
        subspace, first = self.method.subspace, bucket[0]
        assert subspace is not None
        specs = self.method.subspace_specs(first.geometry, first.group)
        if subspace.stored:
            return gather_state(specs, [task.state for task in bucket])
        found = []
        for task in bucket:
            generator = seeded_generator(self.seed, task.name, int(task.state["refreshes"]) - 1)
            operator = DenseOperator(oriented(task.parameter, task.right))  # for its shape alone
            found.append(subspace.find(operator, task.geometry, generator=generator, step=0, group=task.group).tensors)
        return {key: gather([tensors[key] for tensors in found]) for key in specs}

    def _rounding_key(self, name: str, group: dict[str, Any], step: int) -> Tensor | None:
        """Key of the random numbers that round one parameter in one step; None where it is rounded to nearest."""
        if group.get("rounding", "nearest") == "nearest":
            return None
        generator = seeded_generator(self.seed, name, "rounding", step)
        return torch.randint(-(1 << 63), (1 << 63) - 1, (), generator=generator)

    def _factors(self, group: dict[str, Any]) -> tuple[float, float]:
        """(beta, alpha) of W <- beta·W + alpha·D."""
        lr = float(group["lr"])
        beta = 1.0 - lr * group["weight_decay"]
        return beta, -lr * (beta if self.method.decay == "after" else 1.0)
