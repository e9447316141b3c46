"""Gradients of a run, as it would take them: at its checkpoints, or while some of its steps are repeated."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from subspan.analysis.spectrum_sources import Checkpoint, Source
from subspan.linalg import seeded_generator
from subspan.optim import param_groups
from subspan.train.config import PretrainConfig
from subspan.train.data import StreamedDataset, TextData, load_data
from subspan.train.presets import build_model
from subspan.train.pretrain import build_trainer, load_run
from subspan.train.run_folder import RunFolder, started_with

__all__ = ["GradientSample", "batch_gradients", "projected_names", "repeated_gradients", "run_data"]


class GradientSample(NamedTuple):
    """Gradients at one point.

    Attributes:
        step: steps of training that the weights have had.
        batch: number of the batch, or None in training.
        parameters: by name, those that are trained, with their gradients. Valid until the next sample.
        projected: names of the parameters that the run projects.
    """

    step: int
    batch: int | None
    parameters: dict[str, nn.Parameter]
    projected: frozenset[str]


def run_data(source: Source, config: PretrainConfig) -> TextData:
    """Load the data of a run with the tokenizer of its checkpoint.

    Raises:
        ValueError: the data is gone or has changed.
    """
    try:
        data = load_data(
            config.data,
            tokenizer=str(source.checkpoints[-1].path),
            seq_len=config.seq_len,
            validation=config.validation,
            seed=config.seed,
            text_field=config.text_field,
        )
        _check(source, config, data)
    except (ValueError, FileNotFoundError) as error:
        raise _not_there(error) from error
    return data


def _check(source: Source, config: PretrainConfig, data: TextData) -> None:
    assert source.run is not None
    RunFolder(source.run, source.checkpoints[-1].path).check(config, data)


def _not_there(error: Exception) -> ValueError:
    return ValueError(
        f"gradients need what the run was trained on: {error} Without it there are --what weights and --what update."
    )


def batch_gradients(
    checkpoint: Checkpoint, config: PretrainConfig, data: TextData, batches: int
) -> Iterator[GradientSample]:
    """Take the gradient of each of some batches at the weights of a checkpoint.

    A batch is what an optimizer step takes. The batches depend on the seed of the run alone, so that every checkpoint
    gets the same ones. Nothing is clipped.

    Args:
        checkpoint: of the run.
        config: of the run.
        data: of the run.
        batches: how many.

    Raises:
        ValueError: too few sequences for a batch.
    """
    assert checkpoint.step is not None, "a checkpoint of a run has its step in its name"
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    model = build_model(str(checkpoint.path), seq_len=config.seq_len, dtype=dtype)
    nn.Module.to(model, device)
    projected = projected_names(model, config)
    size = config.batch_size * config.grad_accumulation
    sequences = _sequences(data, batches * size, config.seed)
    for batch in range(batches):
        model.zero_grad()
        with torch.random.fork_rng():
            torch.manual_seed(config.seed + batch)  # of the dropout
            for start in range(batch * size, (batch + 1) * size, config.batch_size):
                ids = torch.stack(sequences[start : start + config.batch_size]).to(device)
                amp = config.dtype == "amp"
                with torch.autocast(device.type, torch.bfloat16) if amp else contextlib.nullcontext():
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                (loss / config.grad_accumulation).backward()
        yield GradientSample(checkpoint.step, batch, _trained(model), projected)


def _sequences(data: TextData, count: int, seed: int) -> list[Tensor]:
    if isinstance(data.train, StreamedDataset):
        return [row["input_ids"] for row in itertools.islice(data.train, count)]
    if count > len(data.train):
        raise ValueError(
            f"the batches take {count} sequences and the training text has {len(data.train)}; take fewer --batches."
        )
    # In the order of the text, neighbours would come from one document.
    order = torch.randperm(len(data.train), generator=seeded_generator(seed, "spectrum"))[:count]
    return [data.train[i]["input_ids"] for i in order.tolist()]


def repeated_gradients(
    source: Source, config: PretrainConfig, steps: int, every: int, visit: Callable[[GradientSample], None]
) -> int:
    """Repeat steps of a run exactly, in memory, and take the gradient of every so many of them.

    The optimizer, its state, the data and the learning rates are those of the run. The gradient is the one that the
    optimizer is given, after clipping. The run folder is left alone.

    Args:
        source: the run, which is repeated from its newest point that leaves enough steps, or one of its checkpoints.
        config: of the run.
        steps: how many to repeat.
        every: steps between samples; the first step is sampled.
        visit: called with each sample.

    Returns:
        The step at which it started.

    Raises:
        ValueError: the run has not so many steps left, or never holds its gradients.
    """
    if config.gradient != "full":
        raise ValueError(
            f"steps is {steps}, but the run has gradient {config.gradient!r}: it keeps no gradients between backward "
            "and step. Take --batches, which needs the weights alone."
        )
    start = _start(source, config, steps)
    # A model that is loaded from the checkpoint has its experts as transformers fuses them; resuming alone does not.
    model_path = str(start.path) if start else config.model
    tokenizer = str(source.checkpoints[-1].path)
    settings = dataclasses.replace(config, model=model_path, tokenizer=tokenizer, report_to="none", resume="none")
    if start is None:
        # As many sequences in a step; a run that continues sees to it by itself.
        processes = started_with(source.checkpoints[-1].path.parent)
        settings = dataclasses.replace(settings, grad_accumulation=settings.grad_accumulation * processes)
    quiet = Console(file=io.StringIO())
    with tempfile.TemporaryDirectory() as scratch:
        try:
            data, model = load_run(settings, quiet)
            _check(source, config, data)
        except (ValueError, FileNotFoundError) as error:
            raise _not_there(error) from error
        trainer = build_trainer(settings, RunFolder(Path(scratch), start.path if start else None), data, model)
        first = (start.step or 0) if start else 0
        trainer.add_callback(_Sampler(model, projected_names(model, config), first, steps, every, visit))
        trainer.train(resume_from_checkpoint=str(start.path) if start else None)
    return first


def _start(source: Source, config: PretrainConfig, steps: int) -> Checkpoint | None:
    """The newest point of the run that leaves so many steps; None is its beginning."""
    for checkpoint in reversed(source.checkpoints):
        if checkpoint.step is not None and checkpoint.step + steps <= config.steps:
            return checkpoint
    if not source.whole_run:
        step = source.checkpoints[0].step
        raise ValueError(
            f"steps is {steps}, but the run has {config.steps} steps and {str(source.path)!r} is at {step}; "
            "give an earlier checkpoint or the run folder, or take --batches in place of --steps."
        )
    if steps > config.steps:
        raise ValueError(f"steps is {steps}, but the run has {config.steps}; it must be at most that.")
    return None


class _Sampler(TrainerCallback):
    """Hands on the gradients of some steps and ends the training after the last step wanted; nothing is saved."""

    def __init__(
        self,
        model: nn.Module,
        projected: frozenset[str],
        first: int,
        steps: int,
        every: int,
        visit: Callable[[GradientSample], None],
    ) -> None:
        self.model = model
        self.projected = projected
        self.first = first
        self.steps = steps
        self.every = every
        self.visit = visit

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (state.global_step - self.first) % self.every == 0:
            self.visit(GradientSample(state.global_step, None, _trained(self.model), self.projected))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save = control.should_evaluate = False
        if state.global_step >= self.first + self.steps:
            control.should_training_stop = True


def projected_names(model: nn.Module, config: PretrainConfig) -> frozenset[str]:
    """Return the names of the matrices that the run projects, or that a method without projection would."""
    groups = param_groups(model, rank=1, target_modules=config.target_modules, exclude=config.exclude)
    return frozenset(name for name, _ in groups[0]["params"])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
