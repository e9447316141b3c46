"""The lock on a run folder: one run at a time, released by the operating system however the process ends."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK_FILE", "RunLock"]

LOCK_FILE = ".lock"


class RunLock:
    """An advisory lock on a run folder, held until the process ends or the context is left.

    The lock is on the open file, not its existence: what a killed run leaves behind locks nobody out.

    Args:
        folder: of the run; it need not exist yet.

    Example:
        >>> import tempfile
        >>> with RunLock(Path(tempfile.mkdtemp())) as lock:
        ...     lock.take()
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def held(self) -> bool:
        """Whether this process has it."""
        return self._file is not None

    def take(self) -> None:
        """Take the lock; nothing is written, so a run that is refused later leaves no trace.

        Raises:
            ValueError: another process holds it.
            OSError: the folder cannot be written to.
        """
        if self.held:
            return
        file = (self.folder / LOCK_FILE).open("a+", encoding="utf-8")
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = _holder(file.read())
                file.close()
                raise ValueError(
                    f"another run ({holder}) is writing to {self.folder}: wait for it, stop it, or choose another "
                    "--output."
                ) from None
        self._file = file

    def sign(self) -> None:
        """Write down who holds it."""
        assert self._file is not None, "take() comes before"
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        self._file.flush()


def _holder(text: str) -> str:
    try:
        known = json.loads(text)
        return f"process {known['pid']} on {known['host']}"
    except (ValueError, KeyError, TypeError):
        return "which is starting"
