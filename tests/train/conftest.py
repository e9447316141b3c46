from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.micro import settings, write_model


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for trained tokenizers that belongs to this test session."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("SUBSPAN_CACHE", str(folder))
    return folder


@pytest.fixture
def one_layer(tmp_path: Path) -> None:
    """A text, and a model of a single layer."""
    settings(tmp_path)
    write_model(tmp_path, num_hidden_layers=1)
