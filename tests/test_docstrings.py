"""The examples in the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import subspan

MODULES = [module.name for module in pkgutil.walk_packages(subspan.__path__, "subspan.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0, "see the captured output"


def test_there_are_examples() -> None:
    assert "subspan.linalg.range_finder" in MODULES
    assert doctest.testmod(importlib.import_module("subspan.linalg.range_finder")).attempted > 3
