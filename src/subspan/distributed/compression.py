"""A communication hook of DDP that reduces projected gradients in place of whole ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from subspan.distributed.agreement import check_agreement
from subspan.distributed.traffic import Traffic, all_reduce
from subspan.linalg import DenseOperator, SummedOperator
from subspan.optim import LowRankOptimizer
from subspan.optim.averaged import Entry
from subspan.optim.fused import without_autocast
from subspan.optim.late import Folded, widened
from subspan.optim.matrix import oriented
from subspan.optim.method import Found


def compress_gradients(ddp: DistributedDataParallel, optimizer: LowRankOptimizer) -> Traffic:
    """Let DDP reduce the projected gradients of a low-rank optimizer, (r, n) numbers in place of (m, n).

    R = QᵀG is linear in G, so the mean of the projections is the projection of the mean, and training is that of plain
    DDP up to rounding. Each bucket is one asynchronous all-reduce, of the whole gradients of dense parameters and the
    projections of the others, in the dtype of the gradients. After backward the gradients of projected matrices are
    gone (``.grad`` is None, as with `fuse_into_backward`); clip with ``optimizer.clip_grad_norm_``, whose norm is then
    that of the projections.

    At a refresh sketches are reduced: (m + n)·r numbers for the range finder, at the end of backward. What needs the
    gradient itself (``svd="exact"``, ``rank_policy="tolerance"``) gets it: all of it is reduced to one process, the
    matrices in turn to all of them, which finds the subspace and broadcasts it. Random subspaces need nothing.

    Accumulate under ``ddp.no_sync()``. Where the lift rule needs the whole gradient (Fira, APOLLO, FRUGAL), and for
    dense methods, the hook reduces the whole gradient, and says so once. ``DDP.join()`` is not supported.

    Args:
        ddp: the wrapped model, without a communication hook.
        optimizer: built with the parameters of that model, with the same settings on all processes.

    Returns:
        The count of bytes.

    Raises:
        ValueError: settings that differ between processes.
        RuntimeError: an optimizer that takes its gradients in backward; call `exclude_from_ddp` for it.

    Example:
        >>> def train(model, batches):  # in each process, after init_process_group
        ...     ddp = DistributedDataParallel(model)
        ...     optimizer = GaLore(model, rank=128)
        ...     traffic = compress_gradients(ddp, optimizer)
        ...     for batch in batches:
        ...         ddp(batch).backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         print(traffic.take())
    """
    if optimizer.fused:
        raise RuntimeError(
            "this optimizer takes its gradients in backward, before DDP could reduce them: in place of "
            "compress_gradients() call exclude_from_ddp(model, optimizer) before DDP(model)"
        )
    check_agreement(optimizer, ddp.process_group)
    method = optimizer.method
    if not optimizer.folds and dist.get_rank(ddp.process_group) == 0:
        why = "projects nothing" if method.lift is None else f"needs them: {type(method.lift).__name__} uses all of G"
        warnings.warn(f"whole gradients are reduced, since {method.name} {why}", RuntimeWarning, stacklevel=2)
    hook = _Compression(optimizer, ddp.process_group)
    # A gradient scaler then hands itself to the optimizer, which refuses it: it would not see what is folded.
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    ddp.register_comm_hook(hook, lambda state, bucket: state.reduce(bucket))
    return hook.traffic


class _Compression:
    """The hook, and what it keeps from the first bucket of a backward pass to its end."""

    def __init__(self, optimizer: LowRankOptimizer, group: dist.ProcessGroup) -> None:
        self.traffic = Traffic()
        self._optimizer, self._group = optimizer, group
        self._arrived: dict[str, Folded] = {}
        self._due: set[str] = set()

    @torch.no_grad()
    def reduce(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Reduce one bucket."""
        if bucket.index() == 0:
            self._arrived, self._due = {}, set()
        if bucket.is_last():
            _after_backward(self._finish)
        buffer = bucket.buffer().div_(self._group.size())
        entries = {entry[1]: entry for entry in self._entries()}
        dense: list[Tensor] = []
        folded: dict[str, Folded] = {}
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            entry = entries.get(parameter)
            how = "whole" if entry is None else self._optimizer.takes(entry)
            if entry is None or how == "whole":
                start = gradient.storage_offset() - buffer.storage_offset()
                dense.append(buffer[start : start + gradient.numel()])
            elif how == "folded":
                with without_autocast(buffer.device):
                    folded[entry[0]] = self._optimizer.fold_local(entry, gradient)
            else:
                self._due.add(entry[0])
        if not folded and not self._due:
            self.traffic.count("dense", buffer)
            return all_reduce(buffer, self._group)
        return self._reduce_packed(buffer, dense, folded)

    def _reduce_packed(self, buffer: Tensor, dense: list[Tensor], folded: dict[str, Folded]) -> Future[Tensor]:
        """One all-reduce of all that is reduced of a bucket."""
        pieces = [("dense", slice) for slice in dense]
        for item in folded.values():
            pieces.append(("projected", item.projected))
            if item.sketch is not None:
                pieces.append(("sketch", item.sketch))
        for kind, piece in pieces:
            self.traffic.count(kind, piece.numel() * buffer.itemsize)
        if not pieces:
            done: Future[Tensor] = Future()
            done.set_result(buffer)
            return done
        flat = torch.cat([piece.flatten().to(buffer.dtype) for _, piece in pieces])

        def unpack(future: Future[Tensor]) -> Tensor:
            sums = iter(future.value().split([piece.numel() for _, piece in pieces]))
            for slice in dense:
                slice.copy_(next(sums))
            for name, item in folded.items():
                R = next(sums).view_as(item.projected)
                Y = None if item.sketch is None else next(sums).view_as(item.sketch)
                self._arrived[name] = Folded.unformed(R, Y)
            return buffer

        return all_reduce(flat, self._group).then(unpack)

    @torch.no_grad()
    def _finish(self) -> None:
        """After backward: hand over what was folded, find the subspaces that are due, and drop whole gradients."""
        due = []
        for entry in self._entries():
            name, parameter, _ = entry
            # DDP leaves no gradient where no process has used the parameter.
            if parameter.grad is not None and name in self._arrived:
                arrived, parameter.grad = self._arrived[name], None
                Y = None if arrived.sketch is None else widened(arrived.sketch.clone())
                self._optimizer.keep_average(name, Folded.unformed(widened(arrived.projected.clone()), Y))
            elif parameter.grad is not None and name in self._due:
                due.append((entry, parameter.grad))
                parameter.grad = None
        self._arrived, self._due = {}, set()
        if due:
            with without_autocast(due[0][1].device):
                self._refresh(due)

    def _refresh(self, due: list[tuple[Entry, Tensor]]) -> None:
        """Find subspaces from the gradients, divided by their number, of all processes."""
        shared = []
        for number, (entry, gradient) in enumerate(due):
            how = self._optimizer.takes(entry)
            if how == "gradient":
                owner, gradient = number % self._group.size(), gradient.contiguous()
                dist.reduce(gradient, group=self._group, group_dst=owner)
                self.traffic.count("dense", gradient)
                shared.append((entry, gradient, owner))
                continue
            G = oriented(gradient, self._optimizer.projects_right(entry))
            operator = _CountedSum(G, self._group, self.traffic)
            found = None
            if how == "nothing" or bool(operator.amax().isfinite().all()):
                found = self._optimizer.find_held(entry, operator)
                if found.projected is None:
                    R = operator.reduced(self._optimizer.project_with(entry, found, gradient), "projected")
                    found = replace(found, projected=R)
            self._keep(entry, found)
        if shared:
            self._refresh_divided(shared)

    def _refresh_divided(self, shared: list[tuple[Entry, Tensor, int]]) -> None:
        """Find subspaces for which a whole gradient is needed, each on the process that has it."""
        here = dist.get_rank(self._group)
        mine: dict[str, Found] = {}
        # The rank where the search decides on it, else 0; -1 where the gradient is not finite, so that there is none.
        answers = torch.zeros(len(shared), dtype=torch.int64, device=shared[0][1].device)
        for number, (entry, gradient, owner) in enumerate(shared):
            if owner != here:
                continue
            if not bool(gradient.isfinite().all()):
                answers[number] = -1
                continue
            G = DenseOperator(oriented(gradient, self._optimizer.projects_right(entry)))
            found = self._optimizer.find_held(entry, G)
            if found.projected is None:
                found = replace(found, projected=self._optimizer.project_with(entry, found, gradient))
            mine[entry[0]], answers[number] = found, found.rank or 0
        self.traffic.count("flags", answers)
        dist.all_reduce(answers, group=self._group)
        for (entry, _, owner), answer in zip(shared, answers.tolist(), strict=True):
            if answer < 0:
                self._keep(entry, None)
                continue
            found = mine[entry[0]] if owner == here else self._optimizer.room_for(entry, answer or None)
            assert found.projected is not None
            tensors = [*found.tensors.values(), found.projected]
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            self.traffic.count("basis", flat)
            dist.broadcast(flat, group=self._group, group_src=owner)
            pieces = [
                piece.view_as(tensor)
                for piece, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True)
            ]
            held = {key: piece.clone() for key, piece in zip(found.tensors, pieces, strict=False)}
            self._keep(entry, replace(found, tensors=held, projected=pieces[-1].clone()))

    def _keep(self, entry: Entry, found: Found | None) -> None:
        """Hand over what was found; None stands for gradients that are not finite."""
        if found is None:
            nothing = self._optimizer.nothing_folded(entry)
            self._optimizer.keep_average(entry[0], Folded.unformed(nothing.projected.fill_(torch.nan), None))
        else:
            assert found.projected is not None
            self._optimizer.keep_average(entry[0], Folded.unformed(found.projected, None, found))

    def _entries(self) -> list[Entry]:
        return self._optimizer.projected_entries() if self._optimizer.folds else []


class _CountedSum(SummedOperator):
    """The gradient of the joint batch; what is reduced of it is counted."""

    def __init__(self, local: Tensor, group: dist.ProcessGroup, traffic: Traffic) -> None:
        super().__init__(local, group)
        self._traffic = traffic

    def reduced(self, values: Tensor, kind: str = "sketch") -> Tensor:
        """The sum over all ranks."""
        self._traffic.count(kind, values)
        return super().reduced(values)


def _after_backward(finish: Callable[[], None]) -> None:
    """Call ``finish`` when DDP has written its gradients, which is what it queues after the hooks have been called."""
    engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
    engine.queue_callback(lambda: engine.queue_callback(finish))
