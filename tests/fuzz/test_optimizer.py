"""Random sequences of operations on every recipe: never a wrong number, never an error without a message.

SUBSPAN_FUZZ=N runs N times as many sequences, drawn anew each time.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from torch import Tensor

from tests.fuzz.machine import CASES, Run

MORE = int(os.environ.get("SUBSPAN_FUZZ", "0"))
MATRICES = [(4, 6), (6, 4), (5, 5), (1, 7), (7, 1), (1, 1), (2, 4, 6), (2, 6, 4), (1, 5, 5), (3, 2, 3, 3), (6, 1, 2, 2)]
EMPTY = [(0, 4), (4, 0), (0, 4, 6)]
VECTORS = [(), (1,), (5,)]
RATES = [0.0, 1e-3, 1e-2, 0.1]
#: Gradients are products of small whole numbers, so that their rank is exact in every dtype.
KINDS = ["dense", "dense", "rank 1", "rank 2", "some columns", "zero"]
SIZES = [2.0**-40, 2.0**-10, 1.0, 1.0, 1.0, 2.0**10, 2.0**30]


def gradient(shape: tuple[int, ...], kind: str, size: float, generator: torch.Generator) -> Tensor:
    if len(shape) < 2 or 0 in shape:
        return size * (kind != "zero") * torch.randn(shape, generator=generator, dtype=torch.float64)
    *batch, m, n = shape if len(shape) == 3 else (shape[0], torch.Size(shape[1:]).numel())
    if kind.startswith("rank"):
        count = int(kind[-1])
        left = torch.randint(-4, 5, (*batch, m, count), generator=generator).double()
        right = torch.randint(-4, 5, (*batch, count, n), generator=generator).double()
        G = left @ right
    else:
        G = torch.randn(*batch, m, n, generator=generator, dtype=torch.float64)
    if kind == "some columns":
        G[..., : n // 2] = 0.0
    return (size * (kind != "zero") * G).reshape(shape)


class Sequences(RuleBasedStateMachine):
    case: str
    run: Run

    @initialize(data=st.data())
    def build(self, data: Any) -> None:
        _, own, folds, _ = CASES[self.case]
        dtype = data.draw(st.sampled_from([torch.float32] * 3 + [torch.float64, torch.bfloat16]))
        fused = data.draw(st.sampled_from(["plain", "plain", "fused"] + ["late"] * folds))
        if fused == "fused" and (own.get("svd") == "exact" or "rank_policy" in own or self.case == "golore later"):
            fused = "plain"
        nonfinite = data.draw(st.sampled_from(["skip", "skip", "raise"]))
        if fused == "fused" and not folds:
            nonfinite = "skip"  # others may have been stepped when backward raises
        self.run = Run(self.case, dtype, fused, nonfinite, data.draw(st.integers(0, 3)))
        self.add_group(data, projected=True)
        if data.draw(st.booleans()):
            self.add_group(data, projected=False)
        self.run.start()

    def add_group(self, data: Any, projected: bool) -> None:
        run, keys = self.run, {}
        shapes = MATRICES + EMPTY + ([] if projected else VECTORS)
        if run.method == "scale" and projected:
            keys["outputs"] = "rows"
        elif run.method != "adamw" and projected:
            gap = data.draw(st.sampled_from([2, 3, 5] if run.fused != "plain" else [1, 2, 3, 5]))
            keys |= {
                "update_proj_gap": gap,
                "proj_type": data.draw(st.sampled_from(["std", "reverse_std", "left", "right"])),
            }
            if run.method == "frugal":
                keys["density"] = data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
            else:
                keys["rank"] = data.draw(st.sampled_from([1, 2, 3, 100]))
        keys |= {"lr": data.draw(st.sampled_from(RATES)), "weight_decay": data.draw(st.sampled_from([0.0, 0.1]))}
        run.add(data.draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=3)), keys)

    def gradients(self, data: Any) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
        kind = data.draw(st.sampled_from(KINDS))
        size = data.draw(st.sampled_from(SIZES))
        named = self.run.named(self.run.optimizer)
        return {name: gradient(tuple(p.shape), kind, size, generator).to(p.dtype) for name, p in named.items()}

    @rule(data=st.data(), clip=st.sampled_from([None, None, 0.0, 0.5, 1e4]), more=st.integers(0, 2))
    def step(self, data: Any, clip: float | None, more: int) -> None:
        if self.run.immediate:
            clip, more = None, 0
        for _ in range(data.draw(st.integers(1, 3))):
            micro = [self.gradients(data)]
            for _ in range(more):
                micro.append({name: -0.5 * G.flip(0) if G.ndim else G for name, G in micro[0].items()})
            self.run.step(micro, clip, set())

    @rule(data=st.data(), value=st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    def step_with_nan(self, data: Any, value: float) -> None:
        gradients = self.gradients(data)
        some = [name for name, G in gradients.items() if G.numel()]
        bad = set(data.draw(st.lists(st.sampled_from(some), unique=True))) if some else set()
        for name in bad:
            gradients[name].view(-1)[data.draw(st.integers(0, gradients[name].numel() - 1))] = value
        self.run.step([gradients], None, bad)

    @rule(data=st.data())
    def step_with_some(self, data: Any) -> None:
        gradients = self.gradients(data)
        left_out = data.draw(st.lists(st.sampled_from(sorted(gradients)), unique=True))
        self.run.step([{name: G for name, G in gradients.items() if name not in left_out}], None, set())

    @precondition(lambda self: not self.run.immediate)
    @rule(data=st.data())
    def forget(self, data: Any) -> None:
        self.run.backward(self.gradients(data))
        self.run.zero_grad()

    @rule(through_file=st.booleans(), first=st.booleans())
    def save_and_load(self, through_file: bool, first: bool) -> None:
        self.run.reload(through_file, first)

    @precondition(lambda self: len(self.run.groups) < 4)
    @rule(data=st.data(), projected=st.booleans())
    def another_group(self, data: Any, projected: bool) -> None:
        self.add_group(data, projected)

    @rule(data=st.data(), lr=st.sampled_from(RATES), as_tensor=st.booleans())
    def change_rate(self, data: Any, lr: float, as_tensor: bool) -> None:
        number = data.draw(st.integers(0, len(self.run.groups) - 1))
        self.run.set(number, "lr", torch.tensor(lr) if as_tensor else lr)

    @rule(data=st.data(), gap=st.sampled_from([2, 3, 7]))
    def change_gap(self, data: Any, gap: int) -> None:
        number = data.draw(st.integers(0, len(self.run.groups) - 1))
        if "update_proj_gap" in self.run.optimizer.param_groups[number]:
            self.run.set(number, "update_proj_gap", gap)

    @rule()
    def refresh_now(self) -> None:
        self.run.force_refresh()

    @rule()
    def look(self) -> None:
        """What only looks must change nothing; the next step shows it."""
        for show in (self.run.optimizer.table, self.run.optimizer.ranks, self.run.optimizer.grad_norm):
            show()
        self.run.optimizer.state_dict()


@pytest.mark.parametrize("case", CASES)
def test_random_sequences(case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        run_state_machine_as_test(
            type("Sequences", (Sequences,), {"case": case}),
            settings=settings(
                derandomize=not MORE,
                database=None,
                deadline=None,
                max_examples=7 * max(MORE, 1),
                stateful_step_count=10,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
            ),
        )
