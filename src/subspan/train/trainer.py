"""The Hugging Face Trainer with whole checkpoints, an exact position and honest metrics."""

from __future__ import annotations

import math
import re
import statistics
import time
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from subspan.train.config import PretrainConfig
from subspan.train.data import StreamedDataset
from subspan.train.loss import chunked_loss
from subspan.train.optimizer import build_optimizer, check_optimizer
from subspan.train.ranks import varying_ranks
from subspan.train.saving import PROGRESS_FILE, STEPS_FILE, SavingTrainer

__all__ = ["CHECKPOINT", "PROGRESS_FILE", "STEPS_FILE", "PretrainTrainer", "peak_memory_bytes"]

CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def peak_memory_bytes() -> int:
    """Return the peak so far: allocated on the GPU where there is one, else the resident memory of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import psutil

    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return int(memory.peak_wset)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class PretrainTrainer(SavingTrainer):
    """Trainer that saves checkpoints whole or not at all and resumes to the very same numbers.

    On top of the Trainer's own files a checkpoint holds `PROGRESS_FILE`: the losses not yet logged, the seconds
    trained, the counted skips and the position in a streamed source.

    Args:
        config: resolved settings of the run.
        progress: what `PROGRESS_FILE` of the checkpoint holds from which the run continues.
        **kwargs: see `transformers.Trainer`.
    """

    def __init__(self, config: PretrainConfig, progress: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.config = config
        self.progress = progress
        self.seconds = 0.0
        self.gradient_bytes = 0
        self._mark = 0.0
        self._staging = False
        self._norm_is_exact = True
        # The factory receives the model: only the model tells embeddings and the head from other matrices.
        factory: Any = lambda: build_optimizer  # noqa: E731
        super().__init__(optimizer_cls_and_kwargs=(factory, {"config": config}), **kwargs)
        self.add_callback(_Bookkeeping(self))

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an optimizer step."""
        sequences = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return sequences * self.config.seq_len

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer through the Trainer and check that it is the one that was asked for."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if created:
            check_optimizer(optimizer, self.config, self.network)
            if self.config.gradient != "full":
                # The Trainer's own way to clip sees none of the gradients that were taken in backward.
                self.accelerator.clip_grad_norm_ = self._clip_fused
        return optimizer

    def _clip_fused(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        optimizer = self.low_rank_optimizer
        norm = optimizer.grad_norm() if math.isinf(max_norm) else optimizer.clip_grad_norm_(max_norm)
        self._norm_is_exact = norm.exact
        return torch.tensor(norm.value)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add tokens, speed, memory and perplexity to what the Trainer logs."""
        if "loss" in logs:
            tokens = self.state.global_step * self.tokens_per_step
            logs["tokens"] = tokens
            logs["tokens_per_second"] = tokens / self.seconds if self.seconds else 0.0
            logs["peak_memory_bytes"] = peak_memory_bytes()
            logs["skipped_steps"] = self.low_rank_optimizer.skipped_steps
            if ranks := varying_ranks(self.low_rank_optimizer):
                logs["mean_rank"] = statistics.fmean(ranks.values())
            if self.config.gradient != "full":
                logs["grad_norm_exact"] = self._norm_is_exact
        if "eval_loss" in logs:
            logs["eval_perplexity"] = perplexity(logs["eval_loss"])
        super().log(logs, *args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss, computed in chunks where that is asked for."""
        if not self.config.chunked_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.accelerator.autocast():  # which is around the model's own forward only
            assert isinstance(self.network, PreTrainedModel)
            loss = chunked_loss(self.network, inputs["input_ids"], inputs["labels"], num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, outside the seconds that count as training."""
        metrics = super().evaluate(*args, **kwargs)
        self._mark = time.perf_counter()
        return metrics

    def snapshot(self) -> dict[str, Any]:
        """Return what `PROGRESS_FILE` holds for the step that is reached."""
        data = self.train_dataset
        sequences = self.state.global_step * self.tokens_per_step // self.config.seq_len
        return {
            "loss_sum": self._tr_loss.item(),
            "last_logged_step": self._globalstep_last_logged,
            "seconds": self.seconds,
            "skipped_steps": self.low_rank_optimizer.skipped_steps,
            "state_bytes": self.low_rank_optimizer.state_bytes(),
            "planned_state_bytes": self.low_rank_optimizer.planned_state_bytes(),
            "gradient_bytes": self.gradient_bytes,
            "stream": data.state_at(sequences) if isinstance(data, StreamedDataset) else None,
        }


class _Bookkeeping(TrainerCallback):
    """Restores what the Trainer forgets when a run is continued, and measures seconds and gradients."""

    def __init__(self, trainer: PretrainTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        if (progress := trainer.progress) is not None:
            # Without these two the first loss that is logged after resuming would be the mean over fewer steps.
            sums = progress.get("loss_sums", [progress["loss_sum"]])
            own = sums[args.process_index] if len(sums) == args.world_size else statistics.fmean(sums)
            trainer._tr_loss = torch.tensor(own, device=args.device)
            trainer._globalstep_last_logged = progress["last_logged_step"]
            trainer.seconds = progress["seconds"]
            trainer.low_rank_optimizer.skipped_steps = progress["skipped_steps"]
            # The state of the checkpoint holds the intervals of the run that wrote it.
            state.compute_steps(args, state.max_steps)
        trainer._mark = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.trainer.gradient_bytes:
            self.trainer.gradient_bytes = self.trainer.low_rank_optimizer.gradient_bytes()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.trainer.seconds += now - self.trainer._mark
        self.trainer._mark = now
        if state.global_step >= state.max_steps:
            control.should_log = True


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite where that overflows."""
    return math.inf if loss > 700 else math.exp(loss)
