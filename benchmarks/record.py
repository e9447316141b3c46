"""Records of benchmark runs: what was measured, on which machine, with which versions."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "subspan", "transformers", "tokenizers", "galore-torch", "apollo-torch", "fira")
PEER_INSTALL = "pip install transformers bitsandbytes && pip install --no-deps galore-torch==1.0"


def cpu_model() -> str:
    """Return the model name of the first processor."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter here and are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """Return date, hardware, load average and versions, as they are now."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "load_average": [round(x, 2) for x in os.getloadavg()],
            "threads": torch.get_num_threads(),
            "device": "cpu",
        },
        "versions": versions(),
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write ``record`` as JSON to ``path``, to a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)
    print(f"wrote {path.name}")


def import_peer(module: str) -> ModuleType:
    """Import a package that we only compare with; it is no dependency of this project."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(
            f"{module} cannot be imported ({error}). It is only compared with; install it with\n    {PEER_INSTALL}"
        ) from error
