"""The Hugging Face Trainer with whole checkpoints, an exact position and honest metrics."""

from __future__ import annotations

import functools
import math
import re
import statistics
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from subspan.distributed import Traffic
from subspan.linalg import seeded_generator
from subspan.nn.lowrank import LowRankWeights
from subspan.train.config import PretrainConfig
from subspan.train.data import StreamedDataset
from subspan.train.faults import FaultsCallback
from subspan.train.loss import chunked_loss
from subspan.train.optimizer import build_optimizer, check_optimizer
from subspan.train.processes import ALONE, Processes
from subspan.train.ranks import varying_ranks
from subspan.train.reduce import reduce_after_wrapping, reduce_before_wrapping, reduction
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
        processes: that train together.
        weights: of low rank, None where all are dense.
        **kwargs: see `transformers.Trainer`.
    """

    def __init__(
        self,
        config: PretrainConfig,
        progress: dict[str, Any] | None = None,
        processes: Processes = ALONE,
        weights: LowRankWeights | None = None,
        **kwargs: Any,
    ) -> None:
        self.config = config
        self.weights = weights
        self.progress = progress
        self.processes = processes
        self.step_loss: torch.Tensor | float = 0.0
        self.traffic: Traffic | None = None
        self._draws_from: Any = None
        self.seconds = 0.0
        self.gradient_bytes = 0
        self._mark = 0.0
        self._staging = False
        self._norm_is_exact = True
        # The factory receives the model: only the model tells embeddings and the head from other matrices.
        factory: Any = lambda: build_optimizer  # noqa: E731
        super().__init__(optimizer_cls_and_kwargs=(factory, {"config": config}), **kwargs)
        self.faults = FaultsCallback(self)
        self.add_callback(_Bookkeeping(self))
        self.add_callback(self.faults)

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
            # The Trainer's own way to clip sees none of the gradients that were taken in backward.
            self.accelerator.clip_grad_norm_ = self._clip_fused if self._norm_is_ours() else self._clip_whole
            if self._is_sharded() or (self.weights is not None and self.weights.divided):
                # Else it would wrap a model that is divided already.
                self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
            elif self.processes.size > 1:
                self.traffic = reduce_before_wrapping(self.config, self.network, self.low_rank_optimizer)
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Create the schedule, which the weights may change where they begin anew."""
        created = self.lr_scheduler is None
        scheduler: Any = super().create_scheduler(*args, **kwargs)
        if created and self.weights is not None:
            rates = [functools.partial(self.weights.rate, schedule=schedule) for schedule in scheduler.lr_lambdas]
            scheduler.lr_lambdas = rates
            for group, lr, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, rates, strict=True):
                group["lr"] = lr * rate(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
        return scheduler

    def _clip_grad_norm(self, model: Any) -> Any:
        self._before_step()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # nothing is clipped
            self._before_step()
        return super()._get_grad_norm(model, grad_norm)

    def _before_step(self) -> None:
        if self.weights is not None:
            self.weights.before_step(self.state.global_step)

    def _norm_is_ours(self) -> bool:
        if self.config.gradient != "full":
            return True
        wrapped = self.processes.size > 1 and not self._is_sharded()
        return wrapped and reduction(self.config, self.low_rank_optimizer) == "projected"

    def _clip_whole(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Any:
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        if self.weights is not None:
            norm = self.weights.clip_grad_norm_(max_norm)
        else:
            norm = Accelerator.clip_grad_norm_(self.accelerator, parameters, max_norm, norm_type)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not math.isinf(max_norm) and norm is not None and math.isinf(float(norm)):
            # Divided by an infinite norm the other gradients would be zeros, and steps be made of momentum alone.
            for parameter in parameters:
                parameter.grad.fill_(math.nan)
        return norm

    def _clip_fused(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        optimizer = self.low_rank_optimizer
        norm = optimizer.grad_norm() if math.isinf(max_norm) else optimizer.clip_grad_norm_(max_norm)
        self._norm_is_exact = norm.exact
        return torch.tensor(norm.value)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see `transformers.Trainer`."""
        self._draws_from = resume_from_checkpoint if isinstance(self.train_dataset, StreamedDataset) else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch the batches of a step; of a stream that is continued, the first ones without a trace."""
        batches = super().get_batch_samples(*args, **kwargs)
        if self._draws_from is not None:
            # The loader drew a number when it was started, which in the run of the checkpoint it did at step 0.
            self._load_rng_state(self._draws_from)
            self._draws_from = None
        return batches

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on one batch, and add its part to the loss of the step."""
        loss = super().training_step(*args, **kwargs)
        self.step_loss = self.step_loss + loss
        return loss

    def take_step_loss(self) -> float:
        """Return the loss of the step on this process, and begin the next."""
        loss, self.step_loss = float(self.step_loss), 0.0
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add tokens, speed, memory and perplexity to what the Trainer logs."""
        if "loss" in logs:
            self._tr_loss.zero_()  # the Trainer subtracts it from itself, which leaves NaN of NaN
            tokens = self.state.global_step * self.tokens_per_step
            logs["tokens"] = tokens
            logs["tokens_per_second"] = tokens / self.seconds if self.seconds else 0.0
            logs["peak_memory_bytes"] = peak_memory_bytes()
            logs["skipped_steps"] = self.low_rank_optimizer.skipped_steps
            logs["bad_steps"], logs["spikes"] = self.faults.bad_steps, self.faults.spikes
            if ranks := varying_ranks(self.low_rank_optimizer):
                logs["mean_rank"] = statistics.fmean(ranks.values())
            if self.traffic is not None:
                logs["reduced_bytes"] = self.traffic.total.total()
            if self._norm_is_ours():
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
        network = self.network
        assert isinstance(network, PreTrainedModel)

        def loss_of(*args: Any, **kwargs: Any) -> torch.Tensor:
            with self.accelerator.autocast():  # which is around the model's own forward only
                return chunked_loss(network, inputs["input_ids"], inputs["labels"], num_items_in_batch)

        if model is network and not isinstance(network, FSDPModule):
            loss = loss_of()
        else:
            # A wrapper, or FSDP's hooks, must see the pass begin, so they call this in place of the model's forward.
            before = vars(network).get("forward")
            network.forward = loss_of
            try:
                loss = model()
            finally:
                del network.forward
                if before is not None:
                    network.forward = before
        if num_items_in_batch is not None:
            # Divided by the tokens of all processes, whose gradients are averaged.
            loss = loss * self.processes.size
        return (loss, {"loss": loss}) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return this process's share of the batches: as many for each, the missing ones filled up with the first."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        batches = list(range(0, len(dataset), self.config.batch_size))
        starts = batches + batches[:1] * (-len(batches) % self.processes.size)
        own = [
            range(start, min(start + self.config.batch_size, len(dataset)))
            for start in starts[self.processes.rank :: self.processes.size]
        ]
        return DataLoader(dataset, batch_sampler=own, collate_fn=self.data_collator)  # type: ignore[arg-type]

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return the mean loss over the sequences.

        The batches are the same and summed up in the same order however many processes share them, so that equal
        weights give the same number. The Trainer would count sequences twice where the processes' shares are uneven.
        """
        size, rank = self.processes.size, self.processes.rank
        count = len(dataloader.dataset)  # type: ignore[arg-type]
        sums = [0.0] * -(-count // self.config.batch_size)
        self.network.eval()
        with torch.no_grad():
            losses = []
            for batch in dataloader:
                inputs = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    losses.append(self.compute_loss(self.network, inputs) * len(inputs["input_ids"]))
        # The last ones may be there only so that all processes have as many.
        own = range(rank, len(sums), size)
        for index, loss in zip(own, torch.stack(losses).double().tolist(), strict=False):
            sums[index] = loss
        return EvalLoopOutput(
            predictions=(),  # type: ignore[arg-type]
            label_ids=None,
            metrics={f"{metric_key_prefix}_loss": math.fsum(self.processes.sums(*sums)) / count},
            num_samples=count,
        )

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
            "faults": self.faults.snapshot(),
            "reduced_bytes": dict(self.traffic.total) if self.traffic is not None else {},
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
        progress, processes = trainer.progress, trainer.processes
        sums = [] if progress is None else progress.get("loss_sums", [progress["loss_sum"]])
        if processes.rank or (progress is not None and len(sums) != processes.size):
            # Else dropout would be the same everywhere. A generator that the checkpoint holds is restored after this.
            generator = seeded_generator(trainer.config.seed, "process", processes.rank, state.global_step)
            torch.manual_seed(generator.initial_seed())
        if isinstance(ddp := trainer.model_wrapped, DistributedDataParallel):
            trainer.traffic = reduce_after_wrapping(trainer.config, ddp, trainer.low_rank_optimizer, trainer.traffic)
        if progress is not None:
            if trainer.traffic is not None:
                trainer.traffic.total.update(progress["reduced_bytes"])
            # Without these two the first loss that is logged after resuming would be the mean over fewer steps.
            own = sums[args.process_index] if len(sums) == args.world_size else statistics.fmean(sums)
            trainer._tr_loss = torch.tensor(own, device=args.device)
            trainer._globalstep_last_logged = progress["last_logged_step"]
            trainer.seconds = progress["seconds"]
            trainer.low_rank_optimizer.skipped_steps = progress["skipped_steps"]
            trainer.faults.load(progress["faults"])
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
