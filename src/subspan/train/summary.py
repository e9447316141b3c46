"""What a run shows at its start and at its end, and the summary that it returns."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subspan.memory import MemoryPlan, plan
from subspan.optim import LowRankOptimizer
from subspan.optim.table import alike
from subspan.state import held
from subspan.train.config import PretrainConfig
from subspan.train.data import PackedDataset, TextData
from subspan.train.reduce import reduction
from subspan.train.trainer import PretrainTrainer
from subspan.train.weights import describe

__all__ = ["RunSummary", "finished_summary", "generate_sample", "measured_bytes", "show_end", "show_start"]


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What a run came to.

    Attributes:
        output: run folder.
        step: optimizer steps taken.
        finished: False when the run was stopped by a signal.
        eval_loss: mean cross-entropy on the held-out text, in nats a token; None when stopped.
        eval_perplexity: its exponential.
        tokens: tokens trained on.
        tokens_per_second: of training, without evaluations and checkpoints.
        state_bytes: optimizer state that is allocated.
        planned_state_bytes: optimizer state that was planned.
        peak_memory_bytes: of the GPU, or of the process.
        skipped_steps: steps of single parameters that were left out for gradients that are not finite.
        bad_records: records of the data that were left out.
        signal: number of the signal that came during the run, or None; one that came in the last step stopped nothing.
        mean_rank: over all projected matrices and all steps, where ranks change; else None.
        trained: elements of the parameters that are trained, copies once; None for runs of before they were counted.
    """

    output: str
    step: int
    finished: bool
    eval_loss: float | None
    eval_perplexity: float | None
    tokens: int
    tokens_per_second: float
    state_bytes: int
    planned_state_bytes: int
    peak_memory_bytes: int
    skipped_steps: int
    bad_records: int = 0
    signal: int | None = None
    mean_rank: float | None = None
    trained: int | None = None

    @property
    def loss_text(self) -> str:
        """The validation loss, for people."""
        return "-" if self.eval_loss is None else f"{self.eval_loss:.4f}"

    @property
    def perplexity_text(self) -> str:
        """The validation perplexity, for people."""
        return "-" if self.eval_perplexity is None else f"{self.eval_perplexity:.2f}"


def by_role(plan: MemoryPlan) -> dict[str, int]:
    """Return the bytes of a plan under the names that the tables show."""
    state = {f"state: {key}": count for key, count in plan.state.items()}
    return {"weights": plan.weights, "gradients": plan.gradients, **state}


def measured_bytes(model: nn.Module, gradients: int, state: dict[str, int]) -> MemoryPlan:
    """Return the bytes that are allocated in this process; whole storages are counted, each once.

    Args:
        model: for the weights and buffers.
        gradients: bytes seen before an optimizer step.
        state: allocated optimizer state by key.
    """
    if isinstance(model, FSDPModule):
        model.reshard()  # the last forward pass has left the outermost parameters whole
    whole = [*model.parameters(), *model.buffers()]
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in whole]
    tensors = [part for tensor in own for part in held(tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return MemoryPlan(sum(storages.values()), gradients, state)


def show_start(
    console: Console,
    config: PretrainConfig,
    model: PreTrainedModel,
    trainer: PretrainTrainer,
    data: TextData,
    output: Path,
    step: int,
) -> None:
    """Print the model, the data, the table of projected tensors and the planned bytes."""
    optimizer, arguments = trainer.low_rank_optimizer, trainer.args
    rows = optimizer.rows()
    total = sum(p.numel() for p in model.parameters())
    projected = sum(_numel(row.shape) for row in rows if row.rank is not None)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_row("model", f"{escape(config.model)}: {total:,} parameters, {projected / total:.0%} of them projected")
    if config.low_rank:
        what, layers = describe(model, config)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        facts.add_row("weights", escape(f"{what}: {trained:,} parameters trained ({trained / total:.1%})"))
        facts.add_row("", escape(f"replaced: {layers}"))
    sequences = f"{len(data.train):,} sequences" if isinstance(data.train, PackedDataset) else "streamed"
    held_out = f"{len(data.validation):,} held out for validation"
    text = escape(config.data or "Python standard library")
    facts.add_row("data", f"{text}: {sequences} of {config.seq_len} tokens, {held_out}")
    if data.bad.count:
        facts.add_row("", Text(str(data.bad)))
    tokens = trainer.tokens_per_step
    facts.add_row("steps", f"{config.steps:,} of {tokens:,} tokens, {config.schedule} schedule")
    if (processes := trainer.processes).size > 1:
        passes = f"{arguments.gradient_accumulation_steps} x {arguments.train_batch_size} sequences each"
        facts.add_row("processes", f"{processes.size}, {passes}, {_exchanged(config, trainer)}")
    facts.add_row("output", escape(str(output)) + (f" (continues at step {step})" if step else ""))
    console.print(facts)
    console.print()
    console.print(_table(optimizer))
    console.print()
    table = Table("planned memory", "bytes", box=None, pad_edge=False, header_style="bold")
    table.columns[1].justify = "right"
    planned = plan(model, optimizer, arguments.gradient_accumulation_steps)
    for name, count in by_role(planned).items():
        table.add_row(name, f"{count:,}")
    table.add_row("in all, without activations", f"{planned.total:,}", style="bold")
    console.print(table)
    console.print()


def _exchanged(config: PretrainConfig, trainer: PretrainTrainer) -> str:
    if config.shard != "none":
        return "each holds a share of the model"
    return {
        "projected": "projected gradients are reduced",
        "full": "whole gradients are reduced",
        "power_sgd": "gradients are reduced by PowerSGD, with other numbers after a resume",
    }[reduction(config, trainer.low_rank_optimizer)]


def _table(optimizer: LowRankOptimizer) -> Table:
    """Which tensors are projected, layers that differ only in their number on one line."""
    rows = optimizer.rows()
    table = Table(
        *("parameter", "count", "shape", "rank, side", "lr", "decay", "state bytes"),
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for pattern, same in alike(rows):
        row = same[0]
        kept = row.rank_text if row.rank is None else f"{row.rank_text} {row.side}"
        table.add_row(
            escape(pattern.removesuffix(".weight")),
            str(len(same)),
            "×".join(map(str, row.shape)),
            kept if row.trainable else "frozen",
            f"{row.lr:.3g}",
            f"{row.weight_decay:.3g}",
            f"{sum(other.state_bytes for other in same):,}",
            style=None if row.rank is not None else "dim",
        )
    projected = sum(row.rank is not None for row in rows)
    table.caption = f"{projected} of {len(rows)} tensors projected"
    table.caption_justify = "left"
    return table


def show_end(
    console: Console,
    summary: RunSummary,
    planned: MemoryPlan,
    measured: MemoryPlan,
    sample: tuple[str, str] | None,
    ranks: Path | None,
) -> None:
    """Print planned against measured bytes, the results, a sample (prompt, continuation), the ranks and the folder."""
    memory = Table("memory", "planned", "measured", box=None, pad_edge=False, header_style="bold")
    for column in memory.columns[1:]:
        column.justify = "right"
    before, after = by_role(planned), by_role(measured)
    for name in before | after:
        values = [before.get(name, 0), after.get(name, 0)]
        memory.add_row(name, *(f"{value:,}" for value in values), style=None if values[0] == values[1] else "yellow")
    memory.add_row("peak in all", "", f"{summary.peak_memory_bytes:,}")
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_row("validation", f"loss {summary.loss_text}, perplexity {summary.perplexity_text}")
    facts.add_row("speed", f"{summary.tokens_per_second:,.0f} tokens/s over {summary.tokens:,} tokens")
    if summary.skipped_steps:
        facts.add_row("skipped", f"{summary.skipped_steps} steps of single tensors, for gradients that are not finite")
    if summary.bad_records:
        facts.add_row("bad records", f"{summary.bad_records:,} left out")
    if summary.mean_rank is not None:
        memory.caption = "planned is the most, measured\nwhat the last ranks need"
        memory.caption_justify = "left"
        where = f"over time in {ranks}" if ranks else "a picture needs matplotlib: pip install 'subspan[report]'"
        facts.add_row("mean rank", escape(f"{summary.mean_rank:.1f}, {where}"))
    facts.add_row("run folder", escape(summary.output))
    console.print()
    console.print(memory)
    if sample is None:
        console.print("[red]The run diverged: its loss is not finite. A lower learning rate may help.[/]")
    else:
        text = Text.assemble((sample[0], "dim"), sample[1])
        console.print(Panel(text, title="sample: held-out text, continued by the model", title_align="left"))
    console.print(Group(facts))


def generate_sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, validation: PackedDataset, seed: int
) -> tuple[str, str]:
    """Continue the beginning of a held-out sequence by up to 64 tokens, and as far as the model has positions.

    Returns:
        The prompt and the continuation.
    """
    ids = validation.sequences[0].long()
    prompt = ids[: max(1, min(32, ids.numel() // 2))].unsqueeze(0).to(model.device)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.eval().generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=int(max(1, min(64, positions - prompt.shape[1]))),
            do_sample=True,
            temperature=0.8,
            top_k=50,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    length = prompt.shape[1]
    texts = (output[0, :length], output[0, length:])
    before, after = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in texts)
    return before, after


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def finished_summary(output: Path, lines: list[dict[str, Any]]) -> RunSummary | None:
    """Return the summary of a finished run from its metrics, or None when it is not finished."""
    if not lines or "planned_state_bytes" not in lines[-1]:
        return None
    names = {setting.name for setting in dataclasses.fields(RunSummary)}
    return RunSummary(output=str(output), finished=True, **{key: lines[-1][key] for key in names & lines[-1].keys()})
