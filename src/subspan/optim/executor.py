"""The step of any method, from its parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from subspan.linalg import seeded_generator
from subspan.optim.apply import apply_update
from subspan.optim.averaged import Averaged
from subspan.optim.buckets import Task, Work, buckets, gather, portions, scatter
from subspan.optim.dense import step_dense
from subspan.optim.fused import refuse_scaler, without_autocast
from subspan.optim.late import nonfinite_folded
from subspan.optim.matrix import oriented, write_back
from subspan.optim.method import State, Step
from subspan.optim.projection import Projection
from subspan.optim.screen import nonfinite_gradients, nonfinite_projections
from subspan.optim.shards import WHOLE, Shards, is_sharded, local
from subspan.optim.storage import gather_state, scatter_state
from subspan.state.host import on_host


class Executor(Averaged):
    """Steps parameters, together or one at a time, from their gradients or from what was folded of them."""

    nonfinite: Literal["skip", "raise"]

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
        refuse_scaler(self)
        device = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
        with without_autocast(device):
            self._step()
        return loss

    def _step(self) -> None:
        self._take_slots()
        self._check_partners()
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
            found = dict.fromkeys(nonfinite_gradients(looked_at) + nonfinite_folded(self._folded))
            for name in found:
                self._skip(name)
            bad = list(dict.fromkeys(partner for name in found for partner in self._partners(name)))
            self.skipped_steps += len(bad) - len(found)  # those that share a basis with one of them
        good = [item for item in work if item.name not in bad]
        self._step_dense([item for item in good if item.geometry is None])
        tasks = [self._prepare(item) for item in good if item.geometry is not None]
        for portion in portions([task for task in tasks if task is not None]):
            self._step_portion(portion)
        self._refresh_late(good)
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
        if is_sharded(work.parameter):
            return False
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
                f"{''.join(f'and {other} ' for other in self._partners(name) if other != name)}"
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
                (
                    local(work.parameter),
                    local(work.gradient),
                    self._state(work.parameter),
                    self._rounding_key(work.name, group, age, self._shards(work.name, work.parameter, group)),
                )
                for work in same
                if work.gradient is not None and local(work.parameter).numel()
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
        gradient, shards = local(gradient), self._shards(name, parameter, group)
        projected = None
        if work.due:
            operator = shards.operator(oriented(gradient, right))
            projected = self._refresh(name, parameter, operator, group, step)
            geometry = self._geometry(name, parameter, group, state)
            assert geometry is not None
        age = self.method.transport.age(state, step + 1)
        task = Task(name, local(parameter), gradient, group, geometry, right, age, state, projected, shards)
        assert self.method.subspace is not None
        held = shards.division is None or (self.method.subspace.stored and not shards.gathers_basis)
        if held and not work.due:
            return task
        # At once, so that neither the projected gradients of a refresh nor all bases are held together.
        self._step_portion([task])
        return None

    def _step_portion(self, portion: list[Task]) -> None:
        for bucket in buckets(self._screened(portion)):
            self._step_bucket(bucket)

    def _screened(self, tasks: list[Task]) -> list[Task]:
        """Project the gradients of divided parameters, and let all processes agree on round-off and on what is skipped.

        One collective call serves one of the `portions`: a sum of squared norms of rows, which no process knows alone.
        """
        divided = [task for task in tasks if task.shards.division is not None]
        if not divided:
            return tasks
        projections, projected, squares = [], [], []
        for task in divided:
            projection = self._projection([task])
            R = task.projected
            if R is None:
                assert task.gradient is not None
                R = task.shards.project(projection, oriented(task.gradient, task.right))
            rows = R.double().square().sum(dim=-1)
            projections.append(projection)
            projected.append(R)
            squares.append(rows if task.geometry.projected else rows.sum()[None])
        totals = divided[0].shards.total(torch.cat(squares)).split([len(rows) for rows in squares])
        result = [task for task in tasks if task.shards.division is None]
        sizes = torch.stack([rows.sum() for rows in totals]).tolist()  # the host waits once
        for task, projection, R, rows, size in zip(divided, projections, projected, totals, sizes, strict=True):
            if size <= torch.finfo(R.dtype).max:
                R = projection.divided_without_round_off(R, rows, task.geometry.m, task.parameter.dtype)
                result.append(replace(task, projected=R, projection=projection))
            else:
                self._skip(task.name)
        return result

    def _prepare_folded(self, work: Work, state: State, step: int, right: bool) -> Task | None:
        """Step a parameter whose projected gradient is there, or return what is to be done."""
        assert work.geometry is not None and self.method.transport is not None
        folded, geometry = self._folded[work.name], work.geometry
        if folded.found is not None:
            self._go_over(work.name, work.parameter, folded.found, work.group, step)
            geometry = self._found_geometry(work.name, work.parameter, folded.found, work.group)
        if "turned" in state and not int(state["turned"]):
            self._turn(work.name, work.group)
        R, folded.turn = folded.gradient(), None
        age = self.method.transport.age(state, step + 1)
        task = Task(work.name, work.parameter, work.gradient, work.group, geometry, right, age, state, R)
        if R is folded.projected:
            return task
        # At once, so that the copies of all matrices are not held together.
        self._step_bucket([task])
        return None

    def _step_bucket(self, bucket: list[Task]) -> None:
        """One step of equal matrices: project, inner rule, lift, apply."""
        first, method = bucket[0], self.method
        assert method.subspace is not None and method.lift is not None
        group, geometry = first.group, first.geometry
        changed = method.moments(geometry, group) | method.lift.specs(geometry)
        parameters = [oriented(task.parameter, task.right) for task in bucket]
        W = gather(parameters)
        gradients = [oriented(task.gradient, task.right) for task in bucket if task.gradient is not None]
        G = gather(gradients) if gradients and (first.projected is None or method.lift.needs_gradient) else None

        shards, projection = first.shards, self._projection(bucket)
        if first.projected is None:
            assert G is not None
            R = projection.project(G)
        else:
            R = gather([task.projected for task in bucket if task.projected is not None])
        bad = []
        if shards.division is None and R.numel():  # else all processes have looked at it together
            R = projection.without_round_off(R, geometry.m, first.parameter.dtype)
            # What one process alone would skip of a stack is stepped, as on a device.
            bad = nonfinite_projections(R, len(bucket)) if on_host(R.device) and shards.mesh is None else []
        if bad:
            for position in bad:
                self._skip(bucket[position].name)
            rest = [task for position, task in enumerate(bucket) if position not in bad]
            return self._step_bucket(rest) if rest else None
        for task in bucket:
            task.state["step"] += 1
        tensors = gather_state(changed, [task.state for task in bucket])
        U = method.inner.direction(R, tensors, first.age, group) if geometry.rank > 0 else R
        correction = method.inner.correction(first.age, group)
        update = method.lift.lift(Step(G, R, U, projection, tensors, group, correction, shards))
        update = shards.whole_update(update)
        beta, alpha = self._factors(group)
        keys = [self._rounding_key(task.name, group, int(task.state["step"]), task.shards) for task in bucket]
        known = [key for key in keys if key is not None]
        apply_update(W, G, projection, update, beta=beta, alpha=alpha, keys=gather(known) if known else None)

        scatter_state(changed, tensors, [task.state for task in bucket])
        scatter(W, parameters)
        for task, matrix in zip(bucket, parameters, strict=True):
            write_back(matrix, task.parameter, task.right)

    def _projection(self, bucket: list[Task]) -> Projection:
        """The projection in force, for the pieces of this process where the parameter is divided."""
        first = bucket[0]
        if first.projection is not None:
            return first.projection
        tensors = self._subspace_tensors(bucket) if first.geometry.projected else {}
        return first.shards.local_projection(self.method.projection(tensors, first.geometry))

    def _subspace_tensors(self, bucket: list[Task]) -> State:
        """The subspaces in force: from the states, or found again from the seeds of the last refreshes."""
        subspace, first = self.method.subspace, bucket[0]
        assert subspace is not None
        specs = self.method.subspace_specs(first.geometry, first.group)
        if subspace.stored and first.shards.gathers_basis:
            assert first.shards.division is not None
            whole = {"basis": first.shards.division.all_rows(first.state["basis"])}
            return {key: spec.decode(key, whole) for key, spec in specs.items()}
        if subspace.stored:
            return gather_state(specs, [task.state for task in bucket])
        found = []
        for task in bucket:
            generator = seeded_generator(self.seed, task.name, int(task.state["refreshes"]) - 1)
            operator = task.shards.operator(oriented(task.parameter, task.right))  # for its shape alone
            drawn = task.shards.find(subspace, operator, task.geometry, generator=generator, step=0, group=task.group)
            found.append({key: task.shards.piece(key, specs[key], X) for key, X in drawn.tensors.items()})
        return {key: gather([tensors[key] for tensors in found]) for key in specs}

    def _rounding_key(self, name: str, group: dict[str, Any], step: int, shards: Shards = WHOLE) -> Tensor | None:
        """Key of the random numbers that round one parameter in one step; None where it is rounded to nearest.

        Each piece of a divided parameter has its own.
        """
        if group.get("rounding", "nearest") == "nearest":
            return None
        piece = () if shards.mesh is None else ("piece", shards.mesh.get_local_rank(shards.mesh.ndim - 1))
        generator = seeded_generator(self.seed, name, "rounding", step, *piece)
        return torch.randint(-(1 << 63), (1 << 63) - 1, (), generator=generator)

    def _factors(self, group: dict[str, Any]) -> tuple[float, float]:
        """(beta, alpha) of W <- beta·W + alpha·D."""
        lr = float(group["lr"])
        beta = 1.0 - lr * group["weight_decay"]
        return beta, -lr * (beta if self.method.decay == "after" else 1.0)
