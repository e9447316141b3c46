"""The settings of ``subspan plan``; imports neither torch nor transformers, so that ``--help`` is quick."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from subspan.train.config import check_types

__all__ = ["PlanSettings", "parse_bytes"]

_UNITS = {unit: 1000**power for power, unit in enumerate(("b", "kb", "mb", "gb", "tb"))}
_UNITS |= {unit: 1024**power for power, unit in enumerate(("", "kib", "mib", "gib", "tib"))}


@dataclass
class PlanSettings:
    """What to plan.

    Args:
        model: Preset (``llama_9m`` ... ``llama_7b``, ``llama_bench``, ``gpt2-124m``), a Hugging Face config.json, a
            model folder, or owner/name on the Hugging Face hub. Weights are neither made nor read.
        method: Optimizer, a name that ``subspan methods`` lists. auto: galore for dense weights, else adamw.
        rank: Directions kept of each projected matrix. None: the method's own, else a quarter of the hidden width.
        optimizer: Further settings of the method, such as ``--optimizer.svd exact``.
        target_modules: Which matrices to project: ``all-linear``, a regular expression, or a list of names.
        exclude: Names of modules that stay dense in spite of `target_modules`.
        weights: dense, or a recipe of low-rank weights, as in ``subspan pretrain``.
        weight_settings: Settings of the recipe.
        adapter: Adapter of peft, as in ``subspan pretrain``.
        adapter_settings: Settings of the adapter.
        project: What a method with projections projects where weights are of low rank, as in ``subspan pretrain``.
        steps: Of the whole run, where a recipe of weights depends on them.
        vocab_size: Tokens in the vocabulary. None: the model's own.
        dtype: float32; bfloat16 (weights and gradients in bfloat16); or amp (float32 weights, bfloat16 arithmetic).
        weight_storage: float or int8 for the weights of the linear layers. None: int8 for q_galore, q_apollo and
            q_apollo_mini, else float.
        batch_size: Sequences in a forward pass.
        seq_len: Tokens in a sequence.
        grad_accumulation: Forward passes in an optimizer step.
        gradient: full, fused (taken in backward and freed) or projected (never formed), as in ``subspan pretrain``.
        share_inputs: With gradient projected: layers with one input share a basis.
        activation_checkpointing: Recompute activations in the backward pass.
        world_size: Processes, each with a device and a batch of its own; the plan is that of one of them.
        shard: What they divide, as in ``subspan pretrain``: none, every process holds the model and the optimizer's
            state (DDP); full, each holds a share (FSDP2) and whole bases; or bases, a share of these too.
        compare: Other recipes to plan beside it: ``all``, or names separated by commas: those of ``subspan methods``,
            ``adamw_torch`` (moments in the dtype of the weights), ``adamw_8bit`` (torchao) and ``lora`` (peft); and by
            name alone recipes of low-rank weights, with adamw.
        budget: Memory of the device: 24GiB, 80GB, or a number of bytes.
        solve: Find the largest value of this setting that fits the budget.
        device: accelerator or cpu: where training will run. It decides in which pieces the optimizer works.
        json: Print JSON instead of a table.
        output: Folder for plan.json, plan.csv and plan.png.
    """

    model: str = "llama_bench"
    method: str = "auto"
    rank: int | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    target_modules: str | list[str] = "all-linear"
    exclude: list[str] = field(default_factory=list)
    weights: str = "dense"
    weight_settings: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    adapter_settings: dict[str, Any] = field(default_factory=dict)
    project: Literal["factors", "others", "merged"] | None = None
    steps: int = 800
    vocab_size: int | None = None
    dtype: Literal["float32", "bfloat16", "amp"] = "float32"
    weight_storage: Literal["float", "int8"] | None = None
    batch_size: int = 1
    seq_len: int = 256
    grad_accumulation: int = 1
    gradient: Literal["full", "fused", "projected"] = "full"
    share_inputs: bool = False
    activation_checkpointing: bool = False
    world_size: int = 1
    shard: Literal["none", "full", "bases"] = "none"
    compare: str | None = None
    budget: str = "24GiB"
    solve: Literal["rank", "batch_size", "seq_len"] | None = None
    device: Literal["accelerator", "cpu"] = "accelerator"
    json: bool = False
    output: str | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: naming the setting, its value and what is allowed.
        """
        check_types(self)
        if self.method == "auto":
            self.method = "galore" if self.weights == "dense" and self.adapter is None else "adamw"
        counts = ("batch_size", "grad_accumulation", "rank", "world_size", "steps")
        for name, minimum in {"seq_len": 2, "vocab_size": 2, **dict.fromkeys(counts, 1)}.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} is {value}; it must be at least {minimum}.")
        if self.shard not in ("none", "full", "bases"):
            raise ValueError(f"shard is {self.shard!r}; it must be none, full or bases.")
        if self.shard != "none" and self.world_size == 1:
            raise ValueError(f"shard is {self.shard!r}, but there is one process: give --world_size 2 or more.")
        if self.device not in ("accelerator", "cpu"):
            raise ValueError(f"device is {self.device!r}; it must be accelerator or cpu.")
        self.budget_bytes  # noqa: B018 - checks it

    @property
    def budget_bytes(self) -> int:
        """The budget in bytes."""
        return parse_bytes(self.budget)


def parse_bytes(text: str) -> int:
    """Bytes from a number with a unit: B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (of 1024).

    Raises:
        ValueError: no such number.

    Example:
        >>> parse_bytes("24GiB"), parse_bytes("80 GB"), parse_bytes("1e9")
        (25769803776, 80000000000, 1000000000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if match is None or match[2] not in _UNITS or (count := int(float(match[1]) * _UNITS[match[2]])) < 1:
        raise ValueError(f"budget is {text!r}; give a size such as 24GiB, 80GB or 500MiB.")
    return count
