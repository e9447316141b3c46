"""What a measurement was made with: date, hardware, load and versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

__all__ = ["cpu_model", "environment", "versions"]


def cpu_model() -> str:
    """Return the model name of the first processor."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the version of Python and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment(packages: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return date, hardware, load average and versions, as they are now.

    Args:
        packages: distributions whose versions matter.
        device: where the work is done; a CUDA device is recorded with its name.

    Returns:
        Values that JSON can hold.

    Example:
        >>> sorted(environment(["torch"]))
        ['date', 'hardware', 'versions']
    """
    device = torch.device(device)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "load_average": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        },
        "versions": versions(packages),
    }
