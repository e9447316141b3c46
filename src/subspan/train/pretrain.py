"""A pretraining run from its settings to its summary."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments, default_data_collator

from subspan.memory import plan
from subspan.nn.lowrank import LowRankWeights
from subspan.nn.lowrank.count import count_trained
from subspan.train.bad_records import BadRecords
from subspan.train.callbacks import MetricsCallback, MetricsFile, ProgressCallback, StopCallback
from subspan.train.config import PretrainConfig, write_text
from subspan.train.data import PackedDataset, StreamedDataset, TextData, load_data
from subspan.train.lock import RunLock
from subspan.train.loss import check_chunked_loss
from subspan.train.low_rank_files import check_carried
from subspan.train.measure import MeasureCallback, plan_run, show_peaks
from subspan.train.optimizer import check_settings, hold_weights, resolve
from subspan.train.presets import MERGE_FIRST, build_model, model_tokenizer
from subspan.train.processes import ALONE, Processes, join
from subspan.train.ranks import RanksCallback, mean_rank, plot_ranks
from subspan.train.run_folder import (
    CONFIG_FILE,
    RunFolder,
    check_space,
    claim,
    data_fingerprint,
    open_run_folder,
    run_path,
    shared_batch,
)
from subspan.train.shard import launch_settings, shard_model
from subspan.train.summary import RunSummary, finished_summary, generate_sample, measured_bytes, show_end, show_start
from subspan.train.trainer import PretrainTrainer, peak_memory_bytes, perplexity
from subspan.train.weights import WeightsCallback, batch_shares, build_weights

__all__ = ["PretrainConfig", "RunSummary", "build_trainer", "load_run", "pretrain"]

_SCHEDULES: dict[str, tuple[str, dict[str, float]]] = {
    "cosine": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    "linear": ("linear", {}),
    "constant": ("constant_with_warmup", {}),
}


def pretrain(config: PretrainConfig, *, console: Console | None = None) -> RunSummary:
    """Train a causal language model with a low-rank optimizer, or continue a run that was stopped.

    A run stopped at any moment and continued gives bit by bit the losses of one that was never stopped. Started by
    torchrun or ``accelerate launch``, the processes share each step; the first one prints and writes. The run folder
    holds ``config.yaml``, ``versions.json``, ``data.json``, ``metrics.jsonl`` (one JSON object a line, the last one
    with the results), ``sample.txt``, ``ranks.png`` where ranks change, and ``checkpoint-STEP/`` folders, which
    `build_model` and transformers load.

    Args:
        config: settings of the run.
        console: where to print (default: standard output).

    Returns:
        The results; ``finished`` is False when SIGINT or SIGTERM stopped the run after saving it.

    Raises:
        ValueError: settings or data that cannot be honoured, or a run folder that holds another run.
        FileNotFoundError: data, model or checkpoint that does not exist.
        FloatingPointError: as many steps without a finite loss in a row as the settings allow.
        LostProcess: another process of the run died or hangs.

    Example:
        >>> summary = pretrain(PretrainConfig(model="llama_9m", steps=10, output="runs/try"))  # doctest: +SKIP
        >>> summary.eval_perplexity  # doctest: +SKIP
        3105.2
    """
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise ValueError(f"report_to is {config.report_to!r}, which is not installed: pip install {config.report_to}.")
    config = launch_settings(config)
    check_settings(config)
    with join(config.timeout) as processes, contextlib.ExitStack() as stack:
        lock = RunLock(processes.from_first(lambda: run_path(config)))
        if processes.first:
            stack.enter_context(lock)
            console = console or Console()
        else:
            console = Console(quiet=True)
        progress = _Progress()
        with processes.watched(progress.where):
            return _pretrain(config, processes, lock, console, progress)


class _Progress:
    """How far a run has come, for the message of a process that waits in vain."""

    trainer: PretrainTrainer | None = None

    def where(self) -> str:
        return "before training" if self.trainer is None else f"in step {self.trainer.state.global_step + 1}"


def _pretrain(
    config: PretrainConfig, processes: Processes, lock: RunLock, console: Console, reached: _Progress
) -> RunSummary:
    def open_folder() -> RunFolder:
        if (lock.folder / CONFIG_FILE).exists():  # else it is no run yet, and perhaps a folder of something else
            lock.take()
        return open_run_folder(config)

    folder = processes.from_first(open_folder)
    batch_size, passes = _shared_batch(config, folder, processes)
    check_settings(dataclasses.replace(config, batch_size=batch_size, grad_accumulation=passes, resume="none"))
    if folder.checkpoint is None:
        processes.from_first(lambda: check_carried(config))
    data, model = load_run(config, console, processes)
    config = resolve(config, _hidden_size(model))
    processes.agree("the settings", config.to_yaml())
    processes.agree("the data", json.dumps(data_fingerprint(data)))
    changed_versions = processes.from_first(lambda: folder.check(config, data))
    finished = finished_summary(folder.path, MetricsFile.read(folder.metrics))
    if finished is not None and finished.step == folder.step == config.steps:
        console.print(f"The run in {escape(str(folder.path))} is finished: perplexity {finished.perplexity_text}.")
        return finished

    model, weights = build_weights(model, config)
    if config.shard != "none" and processes.size > 1:
        shard_model(model)
    # The Trainer would create it with an error of its own, in the first process alone.
    processes.from_first(lambda: claim(folder, lock))
    trainer = reached.trainer = build_trainer(config, folder, data, model, processes, weights)
    trainer.create_optimizer()
    if config.carry_over is not None and folder.checkpoint is None:
        trainer.carry_over(config.carry_over)
    planned = plan(model, trainer.low_rank_optimizer, trainer.args.gradient_accumulation_steps)

    def write() -> MetricsFile:
        # Nothing is written before all that can be refused has been looked at.
        check_space(folder, planned.weights + sum(planned.state.values()), config.keep_checkpoints)
        lock.sign()
        folder.write(config, data)
        return MetricsFile(folder.metrics, folder.step)

    metrics = processes.from_first(write)
    if processes.first:
        trainer.add_callback(MetricsCallback(metrics, data.bad))
        trainer.add_callback(RanksCallback(metrics, trainer.low_rank_optimizer))
    if weights is not None:
        written = metrics if processes.first else None
        trainer.add_callback(WeightsCallback(weights, trainer.low_rank_optimizer, written, console))
    show_start(console, config, model, trainer, data, folder.path, folder.step)
    for message in folder.skipped:
        console.print(message, style="yellow", markup=False, highlight=False)
    if changed_versions:
        console.print(
            f"[yellow]Not the versions that the run was started with ({escape('; '.join(changed_versions))}): "
            "the numbers may differ in the last digits.[/]"
        )

    measure = None
    if config.measure_memory and processes.first:
        vocab_size = int(model.config.get_text_config().vocab_size)
        with console.status("Planning the memory ..."):
            peaks = plan_run(config, vocab_size)
        measure = MeasureCallback(trainer, vocab_size)
        trainer.add_callback(measure)
    progress, losses, signal = folder.progress(), folder.losses(), None
    if folder.step < config.steps:
        with StopCallback(processes) as stop, ProgressCallback(console) as bar:
            trainer.add_callback(stop)
            trainer.add_callback(bar)
            trainer.train(resume_from_checkpoint=str(folder.checkpoint) if folder.checkpoint else None)
        progress, losses, signal = trainer.snapshot(), trainer.state.log_history, stop.signal
        if trainer.state.global_step < config.steps:
            _say_how_to_continue(trainer, folder, console)
            return _summary(trainer, folder, trainer.state.global_step, progress, None, signal, data.bad)
    else:
        # Killed between the last checkpoint and the last line of the metrics.
        trainer._load_from_checkpoint(str(folder.checkpoint))
        if weights is not None:
            weights.begin_step(config.steps)

    assert progress is not None
    eval_loss = next(entry["eval_loss"] for entry in reversed(losses) if "eval_loss" in entry)
    lines = metrics.read(metrics.path)
    summary = _summary(trainer, folder, config.steps, progress, eval_loss, signal, data.bad)
    summary = dataclasses.replace(summary, mean_rank=mean_rank(lines, config.steps))
    sample = None
    if math.isfinite(eval_loss):
        # By all: of a model that is divided each holds a share.
        sample = generate_sample(model, data.tokenizer, data.validation, config.seed)
    if not processes.first:
        return summary
    picture = plot_ranks(lines, config.steps, folder.path)
    if sample is not None:
        write_text(folder.path / "sample.txt", f"{''.join(sample)}\n")
    last_line = dataclasses.asdict(summary)
    metrics.write({key: value for key, value in last_line.items() if key not in ("output", "finished", "signal")})
    measured = measured_bytes(model, progress["gradient_bytes"], progress["state_bytes"])
    show_end(console, summary, planned, measured, sample, picture)
    if measure is not None and measure.measured is not None:
        show_peaks(console, peaks, measure.measured)
        if processes.size > 1:
            console.print("The plan is that of one process: a whole model, and none of the buckets of DDP or FSDP.")
    return summary


def load_run(
    config: PretrainConfig, console: Console, processes: Processes = ALONE
) -> tuple[TextData, PreTrainedModel]:
    """Load the data of a run and build the model that it starts from."""

    def load() -> TextData:
        return load_data(
            config.data,
            tokenizer=config.tokenizer or model_tokenizer(config.model),
            vocab_size=config.vocab_size,
            seq_len=config.seq_len,
            validation=config.validation,
            seed=config.seed,
            bad_records=config.bad_records,
            text_field=config.text_field,
        )

    with console.status("Loading the data ..."):
        # A tokenizer is trained, and data of the hub is fetched, once.
        data = processes.first_then_all(load)
    with console.status("Building the model ..."):
        model = build_model(
            config.model,
            vocab_size=len(data.tokenizer),
            seq_len=config.seq_len,
            seed=config.seed,
            dtype=torch.bfloat16 if config.dtype == "bfloat16" else torch.float32,
        )
    hold_weights(model, config)
    model.config.use_cache = False
    if config.chunked_loss:
        check_chunked_loss(model)
    # The Trainer would do the same, with a warning.
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for settings in (model.config, model.generation_config):
            setattr(settings, token, getattr(data.tokenizer, token))
    if config.activation_checkpointing:
        # transformers 5.23 renamed the method.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return data, model


def _shared_batch(config: PretrainConfig, folder: RunFolder, processes: Processes) -> tuple[int, int]:
    """Sequences in a forward pass and passes in a step, however many processes started the run."""
    return shared_batch(config, folder.processes, processes.size, batch_shares(config, processes.size))


def _hidden_size(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().hidden_size)


def build_trainer(
    config: PretrainConfig,
    folder: RunFolder,
    data: TextData,
    model: PreTrainedModel,
    processes: Processes = ALONE,
    weights: LowRankWeights | None = None,
) -> PretrainTrainer:
    """Return the Trainer of a run; `config` is resolved, and a streamed source is moved to the folder's checkpoint.

    Raises:
        ValueError: settings that do not fit the data; weights of low rank that `build_weights` has not made.
    """
    if config.low_rank and weights is None:
        raise ValueError(f"the run has weights of low rank, which are not looked at here: {MERGE_FIRST}.")
    batch_size, grad_accumulation = _shared_batch(config, folder, processes)
    progress = folder.progress()
    streamed = isinstance(data.train, StreamedDataset)
    if isinstance(data.train, StreamedDataset) and progress is not None:
        data.train.load_state(progress["stream"])
    assert config.lr is not None, "resolve() fills it in"
    schedule, schedule_settings = _SCHEDULES[config.schedule]
    arguments = TrainingArguments(
        output_dir=str(folder.path),
        max_steps=config.steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=grad_accumulation,
        learning_rate=config.lr,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=schedule_settings,
        warmup_steps=round(config.warmup * config.steps) if config.warmup < 1 else int(config.warmup),
        max_grad_norm=config.max_grad_norm,
        bf16=config.dtype == "amp",
        use_cpu=not torch.accelerator.is_available(),
        eval_strategy="steps",
        eval_steps=config.eval_every or config.steps,
        prediction_loss_only=True,
        logging_steps=config.log_every,
        logging_first_step=True,
        # The filter would replace a loss that is not finite by the mean of the others.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_every or config.steps,
        # A stream continues at its own saved position; other data is skipped by the Trainer, without reading it.
        ignore_data_skip=streamed,
        seed=config.seed,
        data_seed=config.seed,
        # In memory all steps are whole already, and the evaluation must not lose its last, smaller batch.
        dataloader_drop_last=streamed,
        dataloader_pin_memory=torch.cuda.is_available(),
        # Every process reads a stream and takes its own batches, in the order of a single process.
        accelerator_config={"dispatch_batches": False},
        # Buffers of layers with weights of low rank are large, and equal everywhere by themselves.
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        report_to=config.report_to,
        run_name=folder.path.name,
        disable_tqdm=True,
    )
    trainer = PretrainTrainer(
        config,
        progress,
        processes,
        weights,
        model=model,
        args=arguments,
        train_dataset=_whole_steps(data, config, arguments),
        eval_dataset=_evaluated(data.validation, config),
        processing_class=data.tokenizer,
        data_collator=default_data_collator,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _whole_steps(data: TextData, config: PretrainConfig, arguments: TrainingArguments) -> Dataset[Any]:
    """Leave out the few last sequences that do not fill an optimizer step, so that all steps are alike."""
    if isinstance(data.train, StreamedDataset):
        return data.train
    step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    whole = len(data.train) // step * step
    if whole == 0:
        raise ValueError(
            f"a step takes {step} sequences (batch_size {config.batch_size} x grad_accumulation "
            f"{config.grad_accumulation} x {arguments.world_size} processes) and the training text has "
            f"{len(data.train)}; lower them, or give more text."
        )
    return Subset(data.train, range(whole))


def _evaluated(validation: PackedDataset, config: PretrainConfig) -> Dataset[Any]:
    """Sequences spread evenly over the held-out text."""
    wanted = min(len(validation), config.eval_batches * config.batch_size)
    return Subset(validation, [i * len(validation) // wanted for i in range(wanted)])


def _say_how_to_continue(trainer: PretrainTrainer, folder: RunFolder, console: Console) -> None:
    console.print(f"\nStopped and saved at step {trainer.state.global_step} of {trainer.config.steps}. Continue with")
    command = f"  subspan pretrain --config {folder.path / 'config.yaml'} --resume auto"
    console.print(command, markup=False, highlight=False, soft_wrap=True)


def _summary(
    trainer: PretrainTrainer,
    folder: RunFolder,
    step: int,
    progress: dict[str, Any],
    eval_loss: float | None,
    signal: int | None,
    bad: BadRecords,
) -> RunSummary:
    tokens = step * trainer.tokens_per_step
    return RunSummary(
        output=str(folder.path),
        step=step,
        finished=eval_loss is not None,
        eval_loss=eval_loss,
        eval_perplexity=None if eval_loss is None else perplexity(eval_loss),
        tokens=tokens,
        tokens_per_second=tokens / progress["seconds"],
        state_bytes=sum(progress["state_bytes"].values()),
        planned_state_bytes=sum(progress["planned_state_bytes"].values()),
        peak_memory_bytes=peak_memory_bytes(),
        skipped_steps=progress["skipped_steps"],
        bad_records=bad.count,
        signal=signal,
        trained=count_trained(trainer.network),
    )
