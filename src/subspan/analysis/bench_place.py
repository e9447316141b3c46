"""Where a benchmark works and what it writes to: device, threads, folder, terminal."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["device_named", "on_device", "progress", "threads_of_cpu", "writable"]


def device_named(name: str) -> torch.device:
    """The device of this name, if it is there."""
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not match:
        raise ValueError(f"device {name!r} is unknown; choose cpu, cuda, or cuda:1 for the second one.")
    if name != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not available: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
            " here. Choose cpu."
        )
    return torch.device(name)


def writable(folder: Path) -> Path:
    """The folder, made and tried before anything is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(f"output {str(folder)!r} cannot be written to ({error}); choose another --output.") from error


def progress(console: Console) -> Progress:
    """A bar for what is measured."""
    # Refreshed between the calls alone: a thread that draws would be timed along with them.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,
    )


@contextlib.contextmanager
def threads_of_cpu(number: int) -> Iterator[None]:
    """The number of threads of torch, and of other libraries where threadpoolctl is installed, as before afterwards."""
    before = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        try:
            from threadpoolctl import threadpool_limits
        except ModuleNotFoundError:
            pass
        else:
            stack.enter_context(threadpool_limits(number))
        torch.set_num_threads(number)
        stack.callback(torch.set_num_threads, before)
        yield


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """The device as the current one; torch's own random numbers from a fixed seed, and as before afterwards."""
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.cuda.device(devices[0]) if devices else contextlib.nullcontext():
        torch.manual_seed(0)
        yield
