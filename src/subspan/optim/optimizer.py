"""The optimizer that users see: built from parameters and a method, stepped, clipped, fused into backward."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from subspan.optim.averaged import Average
from subspan.optim.executor import Executor
from subspan.optim.fused import BackwardFusion, refuse_processes
from subspan.optim.groups import check_group, is_projected, unknown_setting
from subspan.optim.late import Folded
from subspan.optim.method import Method, Roster
from subspan.optim.param_groups import GROUPING, param_groups
from subspan.optim.screen import nonfinite_gradients
from subspan.optim.sharding import squared_norms
from subspan.optim.shards import local
from subspan.optim.slots import GradientSlots


class GradNorm(NamedTuple):
    """A norm of gradients, and whether it is exact or that of their projections."""

    value: float
    exact: bool


Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]] | nn.Module


class LowRankOptimizer(Executor):
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
        self.divides_bases = False
        self._folded: dict[str, Folded] = {}
        self._local: dict[str, Folded] = {}
        self._average: Average | None = None
        self._stepped: dict[str, Tensor] = {}
        self._slots: dict[str, GradientSlots] = {}
        self._sharing: dict[str, tuple[str, ...]] = {}
        self._fusion: BackwardFusion | None = None
        super().__init__(params, defaults)
        if method.projects and not any(is_projected(group) for group in self.param_groups):
            raise ValueError(
                f"{method.name}: no parameter group has a rank, so nothing would be projected; pass a model, or groups "
                "from param_groups(model, rank=...), or set 'rank' in a group dict"
            )

    def fuse_into_backward(self) -> None:
        """Take each gradient as soon as backward has it, and free it; `step` stays as it is.

        Where the method needs no more of a gradient than its projection (GaLore, GoLore), the hook adds R = QᵀG, and at
        a refresh the sketch GΩ, to buffers of rank r, and `step` applies them: accumulation, schedulers and saving work
        as ever, and clipping through `clip_grad_norm_`. A basis found from the gradients of one step serves from the
        next one on (``refresh="late"`` gives the same numbers without fusion). Gradients of dense parameters stay.

        Methods that need the gradient itself (Fira, APOLLO, FRUGAL, SCALE, AdamW) update every parameter inside
        backward with the learning rate of that moment; a second backward before `step` and clipping raise.

        Call it once, before the first backward and before a state is loaded (a checkpoint says which refresh it was
        written with). A copy of the optimizer refreshes late and is not fused; what was folded is not copied.

        With more than one process call `subspan.distributed.exclude_from_ddp` too; methods that update inside backward
        are refused then.

        Raises:
            RuntimeError: more than one process, and a method that needs the gradient itself.
            ValueError: subspaces that need the whole gradient (``svd="exact"``, ``rank_policy="tolerance"``).

        Example:
            >>> from subspan.optim import GaLore
            >>> model = nn.Linear(64, 32)
            >>> optimizer = GaLore(model, rank=4)
            >>> optimizer.fuse_into_backward()
            >>> model(torch.randn(8, 64)).square().mean().backward()
            >>> model.weight.grad is None
            True
            >>> optimizer.step()
        """
        if self._fusion is not None:
            return
        method = self.method
        if not self.folds:
            refuse_processes(self.folds)
            self._fusion = BackwardFusion(self, self._everything, self._step_now)
            return
        assert method.subspace is not None and method.refresh is not None
        if method.subspace.sees != "nothing" and not method.refresh.late:
            method = replace(method, refresh=replace(method.refresh, late=True))  # type: ignore[type-var]
            for group in self.param_groups:
                check_group(group, method)
            self.method = method
            for state in self.state.values():
                if "refreshes" in state:
                    state["turned"] = torch.ones((), dtype=torch.int64)
        self._fusion = BackwardFusion(self, self._projected, self._fold_in_backward)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; where gradients are taken in backward, those of the group are too."""
        super().add_param_group(param_group)
        if self._fusion is not None:
            self._fusion.bind()

    def divide_bases(self) -> None:
        """Divide all bases over the processes of `fully_shard`, and gather each one when it is used.

        Without it every process holds the whole basis of a matrix that is projected from the right, which then steps
        without a word to the others. Divided, the state of a process is its share of all of it, for one gather of m·r
        numbers a step and matrix. A matrix that is projected from the left has a divided basis in any case.

        Call it before the first step and before a state is loaded.

        Raises:
            RuntimeError: there is a state already.
        """
        if self.state:
            raise RuntimeError(
                "divide_bases() comes too late: the state is there already; call it before the first step"
            )
        self.divides_bases = True

    def attach_slots(self, name: str) -> GradientSlots | None:
        """Slots in which a layer leaves the projected gradient of the parameter ``name`` in place of its gradient.

        `subspan.nn.project_gradients` calls it. The slots are armed with the basis in force, and, where a refresh is
        due, with the key of its test matrix, here, after every step, and when a state is loaded. A second call returns
        the same slots.

        Returns:
            The slots; None where the rank has reached the side, so that there is nothing to project.

        Raises:
            ValueError: no projected parameter of this name, or a method that needs the gradient itself.

        Example:
            >>> from subspan.optim import GaLore
            >>> model = nn.Linear(64, 32)
            >>> slots = GaLore(model, rank=4).attach_slots("weight")
            >>> tuple(slots.projected.shape)
            (4, 64)
        """
        if not self.folds:
            raise ValueError(
                f"{self.method.name} needs the gradients themselves, so they have to be formed; use GaLore or GoLore"
            )
        self.fuse_into_backward()
        entry = next((item for item in self._projected() if item[0] == name), None)
        if entry is None:
            raise ValueError(f"{name!r} is no projected parameter of this optimizer")
        _, parameter, group = entry
        before = self._slots.get(name)
        if before is not None and before.projected.device == parameter.device:
            return before
        state = self._ensure_state(name, parameter, group)
        geometry = self._geometry(name, parameter, group, state)
        assert geometry is not None
        if not geometry.projected or geometry.batch:
            return None
        basis = self.method.subspace_specs(geometry, group)["basis"]
        slots = self._slots[name] = GradientSlots(geometry, basis, self._right(parameter, group), parameter)
        slots.shared = None if before is None else before.shared
        weakref.finalize(self, slots.retire)
        self._arm_slots([name])
        return slots

    def projected_parameters(self) -> dict[str, Tensor]:
        """The projected parameters by name."""
        return {name: parameter for name, parameter, _ in self._projected()}

    def planned_gradient_bytes(self, micro_batches: int = 1) -> int:
        """Bytes of gradients before the first step, which needs the most: all sketches are due.

        Fused into backward, one whole gradient at a time comes on top while backward runs.

        Args:
            micro_batches: backward passes for each step; sums of projections are held in at least float32.
        """
        total = 0
        for name, parameter, group in self._everything():
            if not parameter.requires_grad or (self._fusion is not None and not self.folds):
                continue
            geometry = self._geometry(name, parameter, group, self._state(parameter))
            if self._fusion is None or geometry is None:
                total += local(parameter).numel() * parameter.itemsize
                continue
            assert self.method.subspace is not None
            sketched = geometry.projected and self.method.subspace.at(0, group).sees == "sketch"
            columns = geometry.n + (geometry.m if sketched else 0)
            slots = self._slots.get(name)
            held_as = geometry.dtype if slots is None else slots.projected.dtype
            if micro_batches > 1:
                held_as = torch.promote_types(held_as, torch.float32)
            total += math.prod(geometry.batch) * geometry.rank * columns * held_as.itemsize
        return total

    def gradient_bytes(self) -> int:
        """Bytes of gradients that are allocated now, whole ones and what was folded of them."""
        tensors = [parameter.grad for parameter in self._with_grad()] + self.folded_tensors()
        # Of parameters that fully_shard has divided together, gradients are pieces of one storage.
        storages = [local(tensor).untyped_storage() for tensor in tensors if tensor is not None]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    def folded_tensors(self) -> list[Tensor]:
        """What is held of gradients that are not in ``.grad``: projections and sketches, in no order."""
        tensors: list[Tensor | None] = []
        for item in [*self._folded.values(), *self._local.values()]:
            tensors += [item.projected, item.sketch]
        for slots in self._slots.values():
            tensors += [slots.R.value, slots.Y.value]
        return [tensor for tensor in tensors if tensor is not None]

    def _everything(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for name, parameter in self._named(group):
                yield name, parameter, group

    def _projected(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        return (item for item in self._everything() if is_projected(item[2]))

    def _fold_in_backward(self, name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        # Not where other processes would wait for this one: all of them see it in the average.
        if self.nonfinite == "raise" and self._average is None and nonfinite_gradients([(name, parameter)]):
            self._folded.clear()
            raise FloatingPointError(f"{name}: the gradient holds NaN or Inf; nothing was changed")
        self._fold(name, parameter, group)

    def _step_now(self, name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        """Step one parameter inside backward."""
        assert parameter.grad is not None
        if name in self._stepped:
            raise RuntimeError(
                f"{name}: a second backward before step(): {self.method.name} needs the gradient itself and has "
                "updated the weights already; accumulate without fuse_into_backward(), or use GaLore"
            )
        (self._stepped[name],) = squared_norms([parameter.grad])
        work = self._look(name, parameter, group)
        if nonfinite_gradients([(name, parameter)]):
            if self.nonfinite == "raise":
                raise FloatingPointError(
                    f"{name}: the gradient holds NaN or Inf; other parameters may have been stepped"
                )
            self._skip(name)
        elif work.geometry is None:
            self._step_dense([work])
        elif (task := self._prepare(work)) is not None:
            self._step_bucket([task])

    def grad_norm(self) -> GradNorm:
        """Norm of all gradients since the last step, wherever they are: in ``.grad``, folded, or used already.

        Returns:
            The norm, and whether it is that of the gradients themselves: several gradients that were folded one by
            one, and those that were never formed, are known in their subspaces alone.
        """
        self._take_slots()
        squares = squared_norms(p.grad for p in self._with_grad() if p.grad is not None)
        squares += [item.norm_squared() for item in self._folded.values()]
        squares += self._stepped.values()
        exact = all(item.norm_is_known for item in self._folded.values())
        total = torch.stack([square.cpu() for square in squares]).sum() if squares else torch.zeros(())
        return GradNorm(float(total.sqrt()), exact)

    def clip_grad_norm_(self, max_norm: float) -> GradNorm:
        """Scale all gradients so that their norm is at most ``max_norm``, as `torch.nn.utils.clip_grad_norm_` does.

        That function sees none of the gradients that were taken in backward.

        Returns:
            The norm before, see `grad_norm`.

        Raises:
            RuntimeError: the gradients were used in backward already.
        """
        if self._stepped:
            raise RuntimeError(
                f"{self.method.name} has used the gradients in backward, so they cannot be clipped any more; set "
                "max_grad_norm to 0, or leave fuse_into_backward() out"
            )
        norm = self.grad_norm()
        # By an infinite norm finite gradients would become zeros, and steps be of momentum alone: all are left out.
        finite = math.isfinite(norm.value)
        factor = torch.tensor(max_norm / (norm.value + 1e-6) if finite else math.nan).clamp(max=1.0)
        for parameter in self._with_grad():
            assert parameter.grad is not None
            parameter.grad.mul_(factor.to(parameter.device))
        for item in self._folded.values():
            item.scale_(factor.to(item.projected.device))
        return norm

    def _with_grad(self) -> list[Tensor]:
        return [parameter for _, parameter, _ in self._everything() if parameter.grad is not None]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, folded ones too; updates that were made in backward stay."""
        self._folded.clear()
        self._local.clear()
        for slots in self._slots.values():
            slots.clear()
        super().zero_grad(set_to_none)
