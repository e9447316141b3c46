from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for trained tokenizers that belongs to this test session."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("SUBSPAN_CACHE", str(folder))
    return folder
