"""Imports point downwards (docs/design.md, section 1), form no circle, and the core needs torch alone."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "subspan"
# From the bottom up; a folder may import itself and what stands before it.
LAYERS = ("linalg", "state", "optim", "distributed", "nn", "memory", "checkpoint", "train", "analysis", "cli")
TORCH_ALONE = ("linalg", "state", "optim", "distributed", "nn", "memory")


class Import(NamedTuple):
    line: int
    module: str
    at_import: bool  # executed when the importing module is; not inside a function or for type checkers only


def violations(source: Path) -> list[str]:
    """What is wrong with the imports of the package in the folder ``source``, one line each."""
    package = source.name
    modules = {_module_name(path, source): path for path in sorted(source.rglob("*.py"))}
    found: list[str] = []
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        layer = _layer(module)
        if layer not in ("", *LAYERS):
            found.append(f"{module}: folder {layer!r} is in no layer, add it to docs/design.md and to LAYERS")
            continue
        graph[module] = set()
        for line, target, at_import in _imports(path, module, modules):
            where = f"{module}:{line} imports {target}"
            if target.split(".")[0] != package:
                if (
                    at_import
                    and layer in TORCH_ALONE
                    and target.split(".")[0] not in ("torch", *sys.stdlib_module_names)
                ):
                    found.append(f"{where}: {layer} needs torch alone, import it where it is used or move the code")
                continue
            other = _layer(target)
            # The package itself holds the version alone and is below everything.
            if other and (not layer or LAYERS.index(other) > LAYERS.index(layer)):
                found.append(f"{where}: upward, from {layer or package} to {other}")
            elif at_import and target != module:
                graph[module].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("circle: " + " -> ".join(reversed(error.args[1])))
    return found


def _module_name(path: Path, source: Path) -> str:
    parts = path.relative_to(source.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _layer(module: str) -> str:
    layer = module.split(".")[1] if "." in module else ""
    return "cli" if layer == "__main__" else layer  # python -m subspan is the command line


def _imports(path: Path, module: str, modules: dict[str, Path]) -> Iterator[Import]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node, at_import in _import_statements(ast.parse(path.read_text(encoding="utf-8")), at_import=True):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, at_import)
            continue
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, base]).rstrip(".")
        for alias in node.names:
            # `from package import name` means the submodule where there is one.
            submodule = f"{base}.{alias.name}"
            yield Import(node.lineno, submodule if submodule in modules else base, at_import)


def _import_statements(node: ast.AST, *, at_import: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_import
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _import_statements(child, at_import=False)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            yield from _import_statements(ast.Module(child.body, []), at_import=False)
            yield from _import_statements(ast.Module(child.orelse, []), at_import=at_import)
        else:
            yield from _import_statements(child, at_import=at_import)


def test_the_package_keeps_its_layers() -> None:
    assert violations(SOURCE) == []


def test_every_layer_of_the_list_is_a_layer_of_the_design() -> None:
    design = (SOURCE.parents[1] / "docs" / "design.md").read_text(encoding="utf-8")
    section = design.split("## 1.")[1].split("## 2.")[0]
    lines = [line.split()[0] for line in section.splitlines() if line.startswith("    ")]
    assert tuple(reversed(lines)) == LAYERS


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"linalg/a.py": "from subspan.optim import GaLore"}, "subspan.linalg.a:1 imports subspan.optim: upward"),
        ({"linalg/a.py": "import subspan.optim.b"}, "upward, from linalg to optim"),
        ({"linalg/a.py": "from subspan import optim"}, "upward, from linalg to optim"),
        ({"linalg/a.py": "from ..optim import b"}, "imports subspan.optim.b: upward"),
        ({"linalg/__init__.py": "from ..optim.b import x"}, "subspan.linalg:1 imports subspan.optim.b: upward"),
        ({"linalg/a.py": "def f():\n    import subspan.optim"}, "subspan.linalg.a:2 imports subspan.optim: upward"),
        ({"linalg/a.py": "if TYPE_CHECKING:\n    from subspan.optim import b"}, "upward"),
        ({"__init__.py": "from subspan.optim import b"}, "upward, from subspan to optim"),
        ({"optim/a.py": "from . import b", "optim/b.py": "from .a import x"}, "circle: subspan.optim.a"),
        (
            {"optim/a.py": "from .b import x", "optim/b.py": "from .c import x", "optim/c.py": "from .a import x"},
            "circle",
        ),
        ({"optim/a.py": "import numpy as np"}, "imports numpy: optim needs torch alone"),
        ({"memory/a.py": "try:\n    import psutil.x\nexcept ImportError:\n    pass"}, "imports psutil.x: memory needs"),
        ({"helpers/a.py": ""}, "folder 'helpers' is in no layer"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    found = violations(_plant(tmp_path, files))
    assert len(found) == 1
    assert expected in found[0]


def test_what_is_allowed(tmp_path: Path) -> None:
    files = {
        "__init__.py": "__version__ = '1'",
        "linalg/a.py": "import math, torch.nn.functional as F\nfrom torch import Tensor",
        "optim/a.py": "from subspan.linalg.a import x\nfrom subspan.optim import b\nimport subspan",
        "optim/b.py": "def f():\n    import numpy\n    from subspan.optim.a import x",
        "optim/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers",
        "__main__.py": "from subspan.cli.main import main\nmain()",
        "train/a.py": "import transformers\nfrom ..optim import a, b\nfrom subspan import __version__",
    }
    assert violations(_plant(tmp_path, files)) == []


def _plant(folder: Path, files: dict[str, str]) -> Path:
    source = folder / "subspan"
    for name, text in {"__init__.py": "", "optim/__init__.py": "", "optim/b.py": "", **files}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text, encoding="utf-8")
    return source
