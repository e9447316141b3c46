"""The guide says what the code does: its example runs, and every name in it exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import subspan.linalg as linalg

GUIDE = (Path(__file__).parents[2] / "docs" / "linalg.md").read_text(encoding="utf-8")


def test_python_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})
    assert capsys.readouterr().out == "20 True\n"


def test_every_function_and_class_of_the_guide_exists() -> None:
    names = set(re.findall(r"`([a-z]+_[a-z_]+|[A-Z]\w+)[`(]", GUIDE)) | set(re.findall(r"`(\w+)\(", GUIDE))
    methods = {"compact_wy", "from_vectors", "error_kind", "max_rank", "append", "basis", "n_iter"}
    missing = {name for name in names - methods if not hasattr(linalg, name)}
    assert len(names) > 20
    assert not missing


def test_every_public_name_is_exported_once() -> None:
    assert len(linalg.__all__) == len(set(linalg.__all__))
    assert all(hasattr(linalg, name) for name in linalg.__all__)
