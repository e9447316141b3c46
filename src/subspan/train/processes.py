"""The processes of a run, as torchrun or accelerate start them, and what they have to agree on."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

__all__ = ["ALONE", "LostProcess", "Processes", "first_to_say", "join", "launched"]

T = TypeVar("T")

#: Numbers of the groups that this process joined one after the other.
_GROUPS = itertools.count()
#: Seconds in which a process that waits in vain lets the others say that they are waiting too.
_ROLL_CALL = 5.0


#: A process that loads data, once for all, may take this many times as long as the others wait elsewhere.
_PATIENCE = 10


class LostProcess(ConnectionError):
    """A process of the run does not answer: it died or hangs."""


def launched() -> int:
    """Return the number of processes that this one was started with.

    Example:
        >>> launched()
        1
    """
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    What they say to each other here goes over the CPU (gloo), beside the gradients and whatever carries those.

    Attributes:
        rank: number of this process.
        size: how many there are.
        group: in which they agree; None where there is one.
        patient_group: for what may take long.
        timeout: seconds that one waits for the others.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    patient_group: Any = None
    timeout: float = 600.0

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def sums(self, *values: float) -> list[float]:
        """Return each value summed over the processes, in float64 and equal on all."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.group)
        return tensor.tolist()

    def most(self, value: int) -> int:
        """Return the largest of the processes' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return int(tensor)

    def gather(self, value: T) -> list[T]:
        """Return the plain value of every process, in their order, on all."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, function: Callable[[], T]) -> T:
        """Call a function in the first process and return its result in all; what it raises is raised in all."""
        return self._from_first(function, self.group)

    def _from_first(self, function: Callable[[], T], group: Any) -> T:
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = function()
            except Exception as error:
                # The others get its kind and its words, not the object: that may hold what cannot travel. And of a kind
                # that is made of words alone, which UnicodeDecodeError is not.
                kinds = (FileNotFoundError, ConnectionError, OSError, ValueError)
                kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
                answer[1] = (kind, str(error))
                dist.broadcast_object_list(answer, src=0, group=group)
                raise
        dist.broadcast_object_list(answer, src=0, group=group)
        if answer[1] is not None:
            kind, message = answer[1]
            raise kind(message)
        return answer[0]

    def first_then_all(self, function: Callable[[], T]) -> T:
        """Call a function in the first process, then in the others, which find what it left in caches.

        Nobody goes on before all are done: what no cache holds takes the others as long.
        """
        result: list[T] = []
        self._from_first(lambda: result.append(function()), self.patient_group)
        if not self.first:
            result.append(function())
        if self.size > 1:
            dist.barrier(group=self.patient_group)
        return result[0]

    def agree(self, what: str, value: str) -> None:
        """Check that a text is the same in all processes.

        Raises:
            ValueError: naming the processes that differ from the first.
        """
        values = self.gather(value)
        if differing := [str(rank) for rank, other in enumerate(values) if other != values[0]]:
            raise ValueError(
                f"{what} of process {', '.join(differing)} differ from those of process 0: start all processes with "
                "the same command, on the same files."
            )

    @contextlib.contextmanager
    def watched(self, where: Callable[[], str]) -> Iterator[None]:
        """Turn the failure of a collective into a message that names who is missing.

        Args:
            where: tells how far this process has come.

        Raises:
            LostProcess: another process died or did not come within the time-out.
        """
        try:
            yield
        except (dist.DistError, RuntimeError) as error:
            if self.size == 1 or not _is_lost_connection(error):
                raise
            raise LostProcess(self._roll_call(where(), error)) from error

    def _roll_call(self, where: str, error: Exception) -> str:
        """Say here that this process waits, and name those that do not say so."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        with contextlib.suppress(RuntimeError):
            store = _store()
            store.set(_key(f"waits/{self.rank}"), "")
            end = time.monotonic() + _ROLL_CALL
            while others and time.monotonic() < end:
                others = [rank for rank in others if not store.check([_key(f"waits/{rank}")])]
                time.sleep(0.1)
        if others:
            who = f"process {', '.join(map(str, others))} of {self.size} died or hangs"
        else:
            who = f"the connection between the processes failed ({str(error).splitlines()[0][:200]})"
        return (
            f"{where}: {who}. The others wait for at most {self.timeout:g} s (--timeout). The run continues from its "
            "last checkpoint with the same command and --resume auto."
        )


#: A run of one process.
ALONE = Processes()


@contextlib.contextmanager
def join(timeout: float) -> Iterator[Processes]:
    """Join the processes that were started together, for as long as the context lasts.

    The tensors' device decides what carries gradients: NCCL on NVIDIA GPUs, gloo on CPUs.

    Args:
        timeout: seconds to wait for another process, from here on.

    Raises:
        ValueError: more processes on this machine than devices.
    """
    if launched() == 1:
        yield ALONE
        return
    accelerator = torch.accelerator.current_accelerator()
    backend = "gloo"
    if accelerator is not None:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        devices = torch.accelerator.device_count()
        if local >= devices:
            raise ValueError(
                f"process {local} of this machine has no device of its own, there are {devices}: start at most that "
                "many (torchrun --nproc-per-node)."
            )
        torch.accelerator.set_device_index(local)
        backend = dist.get_default_backend_for_device(accelerator)
    mine = not dist.is_initialized()
    # Where gradients go another way than what is said here, it gives up later, so that the message comes from here.
    limit = datetime.timedelta(seconds=timeout)
    if mine:
        _connect(backend, limit if backend == "gloo" else 1.5 * limit)
    try:
        groups = [dist.new_group(backend="gloo", timeout=factor * limit) for factor in (1, _PATIENCE)]
        yield Processes(dist.get_rank(), dist.get_world_size(), groups[0], groups[1], timeout)
    except LostProcess:
        mine = False  # taking the group down would wait for the lost one
        raise
    finally:
        if mine:
            dist.destroy_process_group()


def _connect(backend: str, limit: datetime.timedelta) -> None:
    store, rank = None, int(os.environ["RANK"])
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # The store outlives a restart, and addresses of processes that are gone must not be read from it. (torch
            # does read them: its own first message then goes to a process that is no more.)
            store = dist.PrefixStore(_key(f"group/{next(_GROUPS)}"), _store())
        dist.init_process_group(backend, store=store, rank=rank, world_size=launched(), timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise LostProcess(f"process {rank} of {launched()} could not reach the others: {error}") from error


def first_to_say(message: str) -> bool:
    """Whether no other process of the run has said the same, so that an error they all meet is printed once.

    True where they cannot ask each other.
    """
    if launched() == 1:
        return True
    try:
        return _store().add(_key("said/" + hashlib.sha256(message.encode()).hexdigest()), 1) == 1
    except (RuntimeError, KeyError, ValueError):
        return True


def _store() -> dist.TCPStore:
    """The store that torchrun serves to its workers; it outlives them."""
    limit = datetime.timedelta(seconds=10)
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=limit)


def _key(name: str) -> str:
    return f"subspan/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


def _is_lost_connection(error: Exception) -> bool:
    text = str(error)
    signs = ("onnection", "imed out", "imeout", "NCCL", "peer", "Gloo", "gloo", "ProcessGroup")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)
