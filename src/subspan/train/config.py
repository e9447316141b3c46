"""The settings of a pretraining run; imports neither torch nor transformers, so that ``--help`` is quick."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from subspan.train.settings_file import read_settings

__all__ = ["PretrainConfig", "check_types", "differences", "read_config", "write_text"]

#: Settings that leave the training itself alone, so that a resumed run may change them.
_HARMLESS = frozenset(
    {
        "output",
        "resume",
        "report_to",
        "bad_records",
        "measure_memory",
        "log_every",
        "eval_every",
        "eval_batches",
        "save_every",
        "keep_checkpoints",
        "shard",
        "timeout",
        "max_bad_steps",
        "spike",
    }
)


@dataclass
class PretrainConfig:
    """Settings of a pretraining run.

    Args:
        method: Optimizer, a name that ``subspan methods`` lists. auto: galore for dense weights, adamw for weights of
            low rank and adapters.
        model: Preset (``llama_9m`` ... ``llama_7b``, ``llama_bench``, ``gpt2-124m``), a Hugging Face config.json, a
            local checkpoint folder with safetensors, or owner/name on the Hugging Face hub.
        data: Text to train on: a text file, .jsonl or .parquet, gzip or zstandard of these, a folder of them, or
            ``hf:NAME[:CONFIG][:SPLIT]`` to stream a data set of the hub. None: the source files of Python's own
            standard library.
        text_field: Field of a .jsonl object, a .parquet file or a data set of the hub that holds the text, such as
            ``article`` in ``hf:abisee/cnn_dailymail:3.0.0:train``.
        tokenizer: Folder, tokenizer.json or name on the hub. None: the model's own, else a byte-level BPE trained on
            the training text.
        vocab_size: Tokens of the BPE that is trained; the model gets the same vocabulary.
        validation: Share of the text that is held out for validation.
        bad_records: What becomes of records that cannot be used (no text, broken JSON, not UTF-8) and of files that
            cannot be read: error, which says where they are; or skip: they are left out and counted.
        rank: Directions kept of each projected matrix. None: the method's own, else a quarter of the hidden width.
            With ``--optimizer.rank_policy tolerance --optimizer.rtol 0.2`` each matrix gets as many as leave at most
            the share `rtol` of its gradient's norm outside, and `rank` is the most (None: half of the hidden width).
        target_modules: Which matrices to project, or which layers get weights of low rank or adapters: ``all-linear``,
            a regular expression, or a list of names; for layers also attention, mlp and logit, joined by ``+``.
        exclude: Names of modules that stay dense in spite of `target_modules`.
        weights: How the weights of the chosen layers are held: dense, or a recipe of low rank that ``subspan methods``
            lists.
        weight_settings: Settings of the recipe, such as ``--weight_settings.heads 4 --weight_settings.rank 32``.
        adapter: Adapter of peft on the chosen layers of a model that is otherwise frozen, such as lora, dora or vera;
            ``subspan methods`` lists them. With ``--weights relora`` or ``periodic_lora`` it is restarted.
        adapter_settings: Settings of the adapter, those of its config in peft; and for kinds of LoRA
            ``lora_plus_ratio``, the learning rate of B as a multiple of A's.
        project: Which gradients a method with projections projects where weights are of low rank: factors; others, the
            matrices that are trained beside them (embeddings, heads); or merged, those of the frozen weights, which are
            trained too then.
        optimizer: Further settings of the method, such as ``--optimizer.update_proj_gap 50 --optimizer.scale 0.25``.
            update_proj_gap is by default a tenth of the steps, at most the method's own.
        lr: Peak learning rate. None: the method's own.
        lr_scale: Factor on the learning rate of the projected matrices, which want a lower one than the embeddings and
            the head; with weights of low rank, of the factors.
        other_lr_scale: Factor on the learning rate of all other parameters.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Gradients are clipped to this norm; 0 clips nothing.
        max_bad_steps: Steps in a row whose loss or gradients are not finite, before the run gives up. A step whose
            loss is not finite changes nothing.
        spike: A loss this many standard deviations above the mean of the last 20 steps is counted and written to
            metrics.jsonl; 0 looks for none.
        schedule: Learning rate after the warm-up: cosine to a tenth of the peak, linear to zero, or constant.
        warmup: Steps of linear warm-up; below 1, a share of all steps.
        steps: Optimizer steps.
        batch_size: Sequences in a forward pass, on each device. A run that is continued on another number of devices
            keeps the sequences of a step: fewer in a pass, or more passes.
        grad_accumulation: Forward passes in an optimizer step.
        seq_len: Tokens in a sequence.
        dtype: float32; bfloat16 (weights and gradients in bfloat16); or amp (float32 weights, bfloat16 arithmetic).
        weight_storage: How the weights of the linear layers are held: float, as `dtype` says; or int8, rounded
            stochastically by methods with ``--optimizer.rounding stochastic``. None: int8 for q_galore, q_apollo and
            q_apollo_mini, else float.
        gradient: full; or fused: each gradient is taken in backward and freed. GaLore and GoLore then keep its
            projection only, and accumulate and clip that; the other methods update the weights in backward, which
            needs ``--max_grad_norm 0`` and no accumulation; or projected (GaLore, GoLore): linear layers compute the
            projection alone, which saves time too.
        share_inputs: With gradient projected: layers with one input (q, k, v; gate, up) share a basis, and their
            projected input is computed and kept once.
        chunked_loss: Compute the loss some tokens at a time, so that the logits of all of them never exist at once.
        activation_checkpointing: Recompute activations in the backward pass: less memory, more time.
        eval_every: Steps between evaluations on the held-out text; 0 evaluates at the end only.
        eval_batches: Batches in an evaluation, however many devices share them.
        log_every: Steps between lines in metrics.jsonl.
        save_every: Steps between checkpoints; 0 saves at the end only.
        keep_checkpoints: Newest checkpoints that are kept, beside the one with the lowest loss on held-out text.
        seed: Of the weights, the order of the data and the optimizer's draws.
        output: Run folder. None: ``runs/METHOD-MODEL``, with the weights before it where these are not dense, and a
            number after it when that exists.
        resume: ``auto`` continues from the newest checkpoint in the run folder, or starts when there is none; a path
            continues from that checkpoint; ``none`` starts afresh and never touches an existing run.
        carry_over: Checkpoint of another run to start from: its weights, and the state of its optimizer taken over by
            this run's method at this run's rank as far as it can be. Steps and the schedule begin anew.
        measure_memory: Trace the memory of the first two steps, and show it beside the plan at the end.
        reduce: What several processes (torchrun, accelerate launch) send each other of the gradients of projected
            matrices: projected, the projections, where the method needs no more (GaLore, GoLore and those in 8 bits),
            and clipping then goes by their norm; full, the gradients; or power_sgd, torch's lossy compression at the
            same rank. None: projected where that changes no number (``--max_grad_norm 0``, or a gradient that is
            fused or projected), else full.
        shard: none, every process holds the model and the optimizer's state; full, each holds a share (FSDP2) and
            whole bases; or bases, a share of these too, for one gather of each in a step.
        timeout: Seconds that a process waits for another one before the run ends with a message.
        report_to: Log to TensorBoard or Weights & Biases too.
    """

    method: str = "auto"
    model: str = "llama_bench"
    data: str | None = None
    text_field: str = "text"
    tokenizer: str | None = None
    vocab_size: int = 4096
    validation: float = 0.05
    bad_records: Literal["error", "skip"] = "error"
    rank: int | None = None
    target_modules: str | list[str] = "all-linear"
    exclude: list[str] = field(default_factory=list)
    optimizer: dict[str, Any] = field(default_factory=dict)
    weights: str = "dense"
    weight_settings: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    adapter_settings: dict[str, Any] = field(default_factory=dict)
    project: Literal["factors", "others", "merged"] | None = None
    lr: float | None = None
    lr_scale: float = 0.25
    other_lr_scale: float = 1.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_bad_steps: int = 10
    spike: float = 6.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1
    steps: int = 800
    batch_size: int = 4
    grad_accumulation: int = 1
    seq_len: int = 128
    dtype: Literal["float32", "bfloat16", "amp"] = "float32"
    weight_storage: Literal["float", "int8"] | None = None
    gradient: Literal["full", "fused", "projected"] = "full"
    share_inputs: bool = False
    chunked_loss: bool = False
    activation_checkpointing: bool = False
    eval_every: int = 200
    eval_batches: int = 40
    log_every: int = 10
    save_every: int = 200
    keep_checkpoints: int = 2
    seed: int = 0
    output: str | None = None
    resume: str = "none"
    carry_over: str | None = None
    measure_memory: bool = False
    reduce: Literal["projected", "full", "power_sgd"] | None = None
    shard: Literal["none", "full", "bases"] = "none"
    timeout: float = 600.0
    report_to: Literal["none", "tensorboard", "wandb"] = "none"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: naming the setting, its value and what is allowed.
        """
        check_types(self)
        if self.method == "auto":
            self.method = "adamw" if self.low_rank else "galore"
        self._demand("project", self.project in (None, "factors", "others", "merged"), "factors, others or merged")
        counts = ("steps", "batch_size", "grad_accumulation", "log_every", "eval_batches", "keep_checkpoints")
        for name in (*counts, "max_bad_steps"):
            self._demand(name, getattr(self, name) >= 1, "at least 1")
        for name in ("eval_every", "save_every", "seed", "weight_decay", "max_grad_norm", "warmup", "spike"):
            self._demand(name, getattr(self, name) >= 0, "at least 0")
        for name in ("lr_scale", "other_lr_scale", "timeout"):
            self._demand(name, getattr(self, name) > 0, "greater than 0")
        self._demand("lr", self.lr is None or self.lr > 0, "greater than 0, or null for the method's own")
        self._demand("warmup", self.warmup < 1 or self.warmup == int(self.warmup), "a whole number, or a share below 1")
        self._demand("seq_len", self.seq_len >= 2, "at least 2 tokens")
        self._demand("rank", self.rank is None or self.rank >= 1, "at least 1, or null for a quarter of the width")
        self._demand("validation", 0 < self.validation < 1, "between 0 and 1")
        self._demand("bad_records", self.bad_records in ("error", "skip"), "error or skip")
        self._demand("schedule", self.schedule in ("cosine", "linear", "constant"), "cosine, linear or constant")
        self._demand("dtype", self.dtype in ("float32", "bfloat16", "amp"), "float32, bfloat16 or amp")
        self._demand("weight_storage", self.weight_storage in (None, "float", "int8"), "float, int8 or null")
        self._demand("gradient", self.gradient in ("full", "fused", "projected"), "full, fused or projected")
        self._demand(
            "share_inputs",
            not self.share_inputs or self.gradient == "projected",
            "false where gradient is not projected",
        )
        reductions = (None, "projected", "full", "power_sgd")
        self._demand("reduce", self.reduce in reductions, "projected, full, power_sgd or null")
        self._demand("shard", self.shard in ("none", "full", "bases"), "none, full or bases")
        self._demand("report_to", self.report_to in ("none", "tensorboard", "wandb"), "none, tensorboard or wandb")

    @property
    def low_rank(self) -> bool:
        """Whether some weights are of low rank, or have adapters."""
        return self.weights != "dense" or self.adapter is not None

    @property
    def title(self) -> str:
        """What tells the run from others: its method, and before it the weights that are not dense.

        >>> PretrainConfig().title, PretrainConfig(weights="relora", adapter="dora").title
        ('galore', 'dora-relora-adamw')
        """
        kinds = [self.adapter, self.weights if self.weights != "dense" else None, self.method]
        return "-".join(kind for kind in kinds if kind is not None)

    def _demand(self, name: str, good: bool, allowed: str) -> None:
        if not good:
            raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {allowed}.")

    def to_yaml(self) -> str:
        """Return the settings as YAML that ``subspan pretrain --config`` reads."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def read_config(path: Path) -> PretrainConfig:
    """Read the settings of a run that `PretrainConfig.to_yaml` wrote.

    Raises:
        ValueError: not such a file; an unknown setting is named with the closest one.
    """
    content = read_settings(path)
    known = [setting.name for setting in dataclasses.fields(PretrainConfig)]
    for name in content:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f"{path}: unknown setting {name!r}{f'; did you mean {close[0]!r}?' if close else '.'}")
    return PretrainConfig(**content)


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a text"),
    "list[str]": ((list,), "a list of texts"),
    "str | list[str]": ((str, list), "a text or a list of texts"),
    "dict[str, Any]": ((dict,), "a mapping"),
}


def check_types(settings: Any, values: dict[str, Any] | None = None) -> None:
    """Check that the values of a dataclass of settings are what its annotations say, and that numbers are usable.

    Args:
        settings: the dataclass, or its class.
        values: those that are checked; None: what it holds.

    Raises:
        ValueError: naming the setting, its value and what is allowed.

    Example:
        >>> PretrainConfig(steps="many")
        Traceback (most recent call last):
        ValueError: steps is 'many'; it must be a whole number.
    """
    for setting in dataclasses.fields(settings):
        if values is not None and setting.name not in values:
            continue
        value = getattr(settings, setting.name) if values is None else values[setting.name]
        annotation = str(setting.type)
        kind = annotation.removesuffix(" | None")
        if kind not in _KINDS or (value is None and kind != annotation):
            continue
        types, allowed = _KINDS[kind]
        good = isinstance(value, types) and (types == (bool,) or not isinstance(value, bool))
        good = good and not (isinstance(value, list) and not all(isinstance(item, str) for item in value))
        if good and isinstance(value, int) and abs(value) >= 1 << 32:
            good, allowed = False, "smaller than 2^32"
        if good and isinstance(value, float) and not math.isfinite(value):
            good, allowed = False, "finite"
        if not good:
            raise ValueError(f"{setting.name} is {value!r}; it must be {allowed}.")


def differences(old: PretrainConfig, new: PretrainConfig) -> list[str]:
    """Return the settings that change the training and differ, as ``name: old -> new``.

    Example:
        >>> differences(PretrainConfig(lr=0.01), PretrainConfig(lr=0.02, log_every=5))
        ['lr: 0.01 -> 0.02']
    """
    before, after = _flat(old), _flat(new)
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in before | after
        if name not in _HARMLESS and before.get(name) != after.get(name)
    ]


def _flat(config: PretrainConfig) -> dict[str, Any]:
    settings = dataclasses.asdict(config)
    inside = {name: settings.pop(name) for name in ("optimizer", "weight_settings", "adapter_settings")}
    return settings | {f"{name}.{key}": value for name, values in inside.items() for key, value in values.items()}


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that it is never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)
