"""State bytes equal each method's formula to the byte, and a step forms no m×n temporary where it needs none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from subspan.optim import create_optimizer

SHORT, LONG, RANK = 24, 40, 6
FP32 = 4
STEP = 4  # step: 0-D float32
CLOCK = 8 + 8  # next_refresh and refreshes: 0-D int64
RESET = 8  # reset_step: 0-D int64, where the bias correction counts from the last refresh
MOMENTS = 2 * LONG * RANK * FP32
BASIS = SHORT * RANK * FP32
NORM = FP32


def blockwise(elements: int, bits: int, block: int) -> int:
    """Codes, two of 4 bits in a byte, and a scale for each block."""
    return -(-elements * bits // 8) + -(-elements // block) * FP32


FORMULAS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "adamw": ("adamw", {}, {}, 2 * SHORT * LONG * FP32 + STEP),
    "galore": ("galore", {"rank": RANK}, {}, BASIS + MOMENTS + STEP + CLOCK),
    "galore exact": ("galore", {"rank": RANK}, {"svd": "exact"}, BASIS + MOMENTS + STEP + CLOCK),
    "golore": ("golore", {"rank": RANK}, {}, BASIS + MOMENTS + STEP + CLOCK),
    "fira": ("fira", {"rank": RANK}, {}, BASIS + MOMENTS + NORM + STEP + CLOCK),
    "apollo": ("apollo", {"rank": RANK}, {}, BASIS + MOMENTS + NORM + STEP + CLOCK),
    "apollo from its seed": ("apollo", {"rank": RANK}, {"store_basis": False}, MOMENTS + NORM + STEP + CLOCK),
    "apollo_mini": ("apollo_mini", {"rank": 1}, {}, (SHORT + 2 * LONG) * FP32 + NORM + STEP + CLOCK),
    "apollo_mini from its seed": (
        "apollo_mini",
        {"rank": 1},
        {"store_basis": False},
        2 * LONG * FP32 + NORM + STEP + CLOCK,
    ),
    "galore_8bit": (
        "galore_8bit",
        {"rank": RANK, "min_quantized": 1},
        {},
        BASIS + 2 * blockwise(LONG * RANK, 8, 256) + STEP + CLOCK,
    ),
    "q_galore": (
        "q_galore",
        {"rank": RANK, "min_quantized": 1},
        {},
        # its period, and the overlaps of the last five refreshes
        blockwise(SHORT * RANK, 4, 256) + 2 * blockwise(LONG * RANK, 8, 256) + STEP + CLOCK + 8 + 5 * FP32,
    ),
    "galore in 4 bits": (
        "galore",
        {"rank": RANK, "min_quantized": 1, "moments": "4bit", "basis_storage": "int4"},
        {},
        blockwise(SHORT * RANK, 4, 256) + 2 * blockwise(LONG * RANK, 4, 128) + STEP + CLOCK,
    ),
    "fira in bfloat16": (
        "fira",
        {"rank": RANK, "min_quantized": 1, "moments": "bfloat16", "basis_storage": "bfloat16"},
        {},
        (BASIS + MOMENTS) // 2 + NORM + STEP + CLOCK,
    ),
    "apollo with an int8 basis": (
        "apollo",
        {"rank": RANK, "min_quantized": 1, "basis_storage": "int8"},
        {},
        blockwise(SHORT * RANK, 8, 256) + MOMENTS + NORM + STEP + CLOCK,
    ),
    "adamw in 8 bits": (
        "adamw",
        {"moments": "8bit", "min_quantized": 1},
        {},
        2 * blockwise(SHORT * LONG, 8, 256) + STEP,
    ),
    "scale": ("scale", {"outputs": "rows", "momentum": 0.0}, {}, STEP),
    "scale with a momentum": ("scale", {"outputs": "columns"}, {}, SHORT * LONG * FP32 + STEP),
    "scale with a momentum in 4 bits": (
        "scale",
        {"outputs": "columns"},
        {"moments": "4bit", "min_quantized": 1},
        blockwise(SHORT * LONG, 4, 128) + STEP,
    ),
    "too small for codecs": ("galore_8bit", {"rank": RANK}, {}, BASIS + MOMENTS + STEP + CLOCK),
    # rows are remembered by their int64 indices
    "frugal rows": ("frugal", {"density": 0.25}, {"subspace": "rows"}, 6 * 8 + MOMENTS + STEP + CLOCK + RESET),
    "frugal svd": ("frugal", {"density": 0.25}, {"subspace": "svd"}, BASIS + MOMENTS + STEP + CLOCK + RESET),
    "full rank": ("galore", {"rank": SHORT}, {}, 2 * SHORT * LONG * FP32 + STEP + CLOCK),
}


@pytest.mark.parametrize("shape", [(SHORT, LONG), (LONG, SHORT)], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_bytes_of_one_matrix(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    method, keys, settings, formula = FORMULAS[name]
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = create_optimizer(method, [{"params": [("a", p)], **keys}], lr=0.01, **settings)
    assert sum(optimizer.planned_state_bytes().values()) == formula
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    optimizer.step()
    assert sum(tensor.untyped_storage().nbytes() for tensor in optimizer.state[p].values()) == formula


def test_frugal_blocks_hold_moments_for_the_active_tensors_only() -> None:
    """2ρ·(all elements): with density ¼ one of four equal matrices holds moments, at any time."""
    params = [(f"layers.{i}", nn.Parameter(torch.zeros(SHORT, LONG))) for i in range(4)]
    groups = [{"params": params, "density": 0.25, "update_proj_gap": 2}]
    optimizer = create_optimizer("frugal", groups, lr=0.01)
    holders = set()
    for _ in range(8):
        for _, p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        held = [(name, p) for name, p in params if "exp_avg" in optimizer.state.get(p, {})]
        assert len(held) == 1
        holders.add(held[0][0])
        moments = sum(t.numel() for _, p in params for k, t in optimizer.state[p].items() if k.startswith("exp_avg"))
        assert moments == 2 * SHORT * LONG
        assert optimizer.state_bytes() == optimizer.planned_state_bytes()
    assert len(holders) == 4


class Allocations(TorchDispatchMode):
    """The most elements of any tensor that an operation newly allocated, and which operation it was."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.operation = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        seen = {x.untyped_storage().data_ptr() for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)}
        out = func(*args, **kwargs)
        for x in tree_flatten(out)[0]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in seen and x.numel() > self.largest:
                self.largest, self.operation = x.numel(), str(func)
        return out


def largest_allocation(
    method: str, shape: tuple[int, int], dtype: torch.dtype, keys: dict[str, Any], settings: dict[str, Any]
) -> tuple[int, str]:
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = create_optimizer(method, [{"params": [("a", p)], **keys}], lr=0.01, weight_decay=0.1, **settings)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # the first step refreshes
        p.grad = torch.randn(shape, generator=generator).to(dtype)
        optimizer.step()
    p.grad = torch.randn(shape, generator=generator).to(dtype)
    with Allocations() as allocations:
        optimizer.step()
    return allocations.largest, allocations.operation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1024, 3072), (3072, 1024), (1536, 1536)], ids=str)
@pytest.mark.parametrize(
    ("method", "keys", "settings"),
    [
        ("galore", {"rank": 8}, {"stagger": False}),
        ("golore", {"rank": 8}, {"stagger": False}),
        ("fira", {"rank": 8}, {"stagger": False}),
        ("apollo", {"rank": 8}, {"stagger": False}),
        ("apollo", {"rank": 8}, {"stagger": False, "scale_front": True}),
        ("apollo_mini", {"rank": 1}, {"stagger": False}),
        ("galore_8bit", {"rank": 8}, {"stagger": False}),
        ("galore", {"rank": 8}, {"stagger": False, "moments": "4bit", "basis_storage": "int4"}),
        ("scale", {"outputs": "rows"}, {}),
        ("scale", {"outputs": "columns", "momentum": 0.0}, {"rounding": "stochastic"}),
        ("scale", {"outputs": "columns"}, {"moments": "8bit"}),
    ],
    ids=str,
)
def test_a_step_forms_no_matrix_of_the_size_of_the_weight(
    method: str, shape: tuple[int, int], dtype: torch.dtype, keys: dict[str, Any], settings: dict[str, Any]
) -> None:
    largest, operation = largest_allocation(method, shape, dtype, keys, settings)
    assert 0 < largest <= shape[0] * shape[1] // 2, f"{operation} allocated {largest} elements"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("moments", ["8bit", "4bit", "bfloat16"])
def test_a_quantised_embedding_never_has_a_whole_moment(moments: str, dtype: torch.dtype) -> None:
    largest, operation = largest_allocation("adamw", (4096, 384), dtype, {}, {"moments": moments})
    assert 0 < largest <= 4096 * 384 // 4, f"{operation} allocated {largest} elements"


def test_the_measurement_sees_a_temporary() -> None:
    with Allocations() as allocations:
        x = torch.ones(64, 64)
        x.add_(1)
        x[1:].t()
        (x[:32] * 2).sum()
    assert allocations.largest == 64 * 64 and "ones" in allocations.operation
    with Allocations() as allocations:
        x.mul_(2).t().add_(1)
        (x[:32] * 2).sum()
    assert allocations.largest == 32 * 64 and "mul" in allocations.operation
