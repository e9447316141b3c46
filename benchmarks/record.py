"""Records of benchmark runs: what was measured, on which machine, with which versions."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from subspan.analysis.environment import environment as environment_of

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "subspan", "transformers", "tokenizers", "galore-torch", "apollo-torch", "fira")
PEER_INSTALL = "pip install transformers bitsandbytes && pip install --no-deps galore-torch==1.0"


def environment() -> dict[str, Any]:
    """Return date, hardware, load average and versions, as they are now."""
    return environment_of(PACKAGES)


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
