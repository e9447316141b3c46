"""The documentation says what the code does: code blocks run, and every method has its section and its defaults."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from subspan.optim import create_optimizer, list_methods, method_info

ROOT = Path(__file__).parents[1]
METHODS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
# What a method inherits from another one's list of keys, as the text says.
INHERITS = {
    "galore_8bit": ["galore"], "golore": ["galore"], "fira": ["galore"], "apollo_mini": ["apollo"],
    "q_apollo": ["apollo"], "q_apollo_mini": ["apollo", "apollo_mini"],
}  # fmt: skip


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Embedding(50, 160), torch.nn.Linear(160, 192), torch.nn.Linear(192, 160))


def keys_of(name: str) -> dict[str, object]:
    """``key=value`` pairs in the Keys paragraph of a method's section."""
    section = METHODS.split(f"\n## {method_info(name).title}\n")[1].split("\n## ")[0]
    paragraph = section.split("**Keys.**")[1].split("\n\n")[0].split("Published:")[0]
    return {key: ast.literal_eval(value) for key, value in re.findall(r"`(\w+)=(.+?)`", paragraph)}


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_python_blocks_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {"model": model()})
    assert "128" in capsys.readouterr().out


@pytest.mark.parametrize("name", list_methods())
def test_every_method_has_its_section_and_its_defaults(name: str) -> None:
    info = method_info(name)
    section = METHODS.split(f"\n## {info.title}\n")[1].split("\n## ")[0]
    assert info.arxiv in section
    for part in ("**Parts.**", "**Keys.**", "**State.**", "**Differences"):
        assert part in section
    stated = {key: value for page in [*INHERITS.get(name, []), name] for key, value in keys_of(page).items()}
    optimizer = create_optimizer(name, model(), **({"rank": 4} if info.size == "rank" else {}))
    # Matrices in SCALE have values of their own, vectors the defaults.
    group = optimizer.param_groups[-1 if name == "scale" else 0]
    if name.endswith("apollo_mini"):
        assert create_optimizer(name, model()).param_groups[0]["rank"] == stated.pop("rank")
    assert stated
    assert stated == {key: group[key] for key in stated}
    unstated = optimizer.defaults.keys() - stated.keys() - {"betas", "rank", "density"}
    common = {"eps", "weight_decay", "moments", "basis_storage", "min_quantized", "rounding", "warm_start"}
    assert unstated <= common, "keys that the section does not name"


@pytest.mark.parametrize("name", list_methods())
def test_the_readme_lists_every_method(name: str) -> None:
    assert f"| `{name}` |" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_between_pages_lead_somewhere() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "docs/index.md", "docs/methods.md"):
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
