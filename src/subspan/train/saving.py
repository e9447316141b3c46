"""The Trainer's checkpoints: written whole or not at all, and read without unpickling anything."""

from __future__ import annotations

import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

from subspan.checkpoint import read_optimizer, rotate, staged, verify, write_optimizer
from subspan.checkpoint.load import load_weights
from subspan.checkpoint.plain import read_plain, write_plain
from subspan.checkpoint.save import write_parts
from subspan.checkpoint.staging import STAGING
from subspan.checkpoint.states import is_sharded
from subspan.nn.lowrank import LowRankWeights
from subspan.nn.quantised import STEPS
from subspan.optim import LowRankOptimizer
from subspan.train.config import PretrainConfig, write_text
from subspan.train.low_rank_files import (
    read_divided_optimizer,
    read_low_rank,
    write_divided_optimizer,
    write_low_rank,
)
from subspan.train.presets import build_model
from subspan.train.processes import Processes

__all__ = ["PROGRESS_FILE", "STEPS_FILE", "SavingTrainer"]

#: What the Trainer's own files do not hold.
PROGRESS_FILE = "progress.json"
#: The steps of weights in int8, which the matrices in model.safetensors were multiplied by.
STEPS_FILE = "int8_steps.safetensors"
SCHEDULER_FILE = "scheduler.json"


class SavingTrainer(Trainer):
    """What a Trainer needs to save and to load; the Trainer's own pickles are neither written nor read."""

    config: PretrainConfig
    weights: LowRankWeights | None
    processes: Processes
    _staging: bool
    _mark: float

    @property
    def low_rank_optimizer(self) -> LowRankOptimizer:
        """The optimizer without accelerate's wrapper."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        assert isinstance(optimizer, LowRankOptimizer)
        return optimizer

    @property
    def network(self) -> nn.Module:
        """The model without a wrapper."""
        assert isinstance(self.model, nn.Module)
        return self.model

    def snapshot(self) -> dict[str, Any]:
        """Return what `PROGRESS_FILE` holds for the step that is reached."""
        raise NotImplementedError

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._staging else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint into a folder that is never resumed from, and rename it when it is complete."""
        run, step = Path(str(self.args.output_dir)), self.state.global_step
        together = self.args.world_size > 1
        # Off only while training; who loads the checkpoint generates with a cache.
        config = getattr(self.network, "config", None)
        if config is not None:
            config.use_cache = True
        self._staging = True
        try:
            with staged(run / f"checkpoint-{step}", step=step, together=together) as job:
                job.eval_loss = self._eval_loss()
                job.layout = "sharded" if self._is_sharded() else "single"
                super()._save_checkpoint(model, trial)
                progress = self.snapshot()
                if together:
                    progress["loss_sums"] = [0.0] * self.args.world_size
                    dist.all_gather_object(progress["loss_sums"], progress["loss_sum"])
                if self.args.should_save:
                    write_text(job.folder / PROGRESS_FILE, json.dumps(progress))
        finally:
            self._staging = False
            if config is not None:
                config.use_cache = False
        if self.args.should_save:
            rotate(run, self.config.keep_checkpoints, written=run / f"checkpoint-{step}")
        self._mark = time.perf_counter()

    def _eval_loss(self) -> float | None:
        """Loss on held-out data, where this step had an evaluation."""
        for entry in reversed(self.state.log_history):
            if "eval_loss" in entry and entry["step"] == self.state.global_step and math.isfinite(entry["eval_loss"]):
                return float(entry["eval_loss"])
        return None

    def _is_sharded(self) -> bool:
        return is_sharded(dict(self.network.named_parameters()))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; of one that is divided over processes what makes a model of its parts.

        One with weights of low rank is saved as it is trained, under names that nobody takes for an ordinary model's.
        """
        if not self._is_sharded() and self.weights is None:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        network: Any = self.network
        if self.weights is not None:
            write_low_rank(folder, network, self.weights, self.config, self.processes)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            network.config.save_pretrained(folder)
            if network.generation_config is not None:
                network.generation_config.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the model as an ordinary one, and what turns its matrices back into int8 beside it."""
        folder = Path(output_dir or str(self.args.output_dir))
        state_dict = dict(self.network.state_dict() if state_dict is None else state_dict)
        steps = {name: state_dict.pop(name) for name in list(state_dict) if name.endswith(f".weight{STEPS}")}
        super()._save(output_dir, state_dict)
        # A pickle that nothing reads.
        (folder / "training_args.bin").unlink(missing_ok=True)
        if steps:
            save_file(steps, folder / STEPS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights as transformers loads a model: the Trainer itself takes the names in the files for its own.

        A mixture of experts is saved under other names than it has in memory; the Trainer warns of missing keys, and
        goes on with the initial weights of its experts.
        """
        target, folder = self.network if model is None else model, Path(resume_from_checkpoint)
        manifest = verify(folder, files=()).raise_if_bad()
        if self.weights is not None:
            read_low_rank(folder, target, self.weights)
            return
        if manifest.layout == "sharded" or self._is_sharded():
            load_weights(folder, target)
            return
        dtype = next(target.parameters()).dtype
        saved = build_model(str(resume_from_checkpoint), seq_len=self.config.seq_len, dtype=dtype).state_dict()
        if self.config.weight_storage == "int8" and (folder / STEPS_FILE).is_file():
            saved |= load_file(folder / STEPS_FILE)
        target.load_state_dict(saved)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._is_sharded():
            write_parts(Path(output_dir), self.network, self.low_rank_optimizer)
        elif self.weights is not None and self.weights.divided:
            write_divided_optimizer(
                Path(output_dir), self.low_rank_optimizer, self.network, self.weights, self.processes
            )
        elif self.args.should_save:
            write_optimizer(Path(output_dir), self.low_rank_optimizer, self.network)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            write_plain(Path(output_dir) / SCHEDULER_FILE, self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            if self.weights is not None and self.weights.divided:
                read_divided_optimizer(Path(checkpoint), self.low_rank_optimizer, self.network, self.weights)
            else:
                read_optimizer(Path(checkpoint), self.low_rank_optimizer, self.network)
            assert self.lr_scheduler is not None
            self.lr_scheduler.load_state_dict(read_plain(Path(checkpoint) / SCHEDULER_FILE))

    def carry_over(self, checkpoint: str) -> None:
        """Start with the weights of a checkpoint and with its optimizer's state, as far as this run can use it.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: it is not whole, or holds another model.
        """
        if self.weights is not None and self.weights.divided:
            raise ValueError(
                "carry_over is given, but the processes train heads of their own: start one process that takes the "
                "checkpoint over, stop it, and continue with several."
            )
        folder = Path(checkpoint).expanduser()
        verify(folder).raise_if_bad()
        self._load_from_checkpoint(str(folder))
        read_optimizer(folder, self.low_rank_optimizer, self.network, carry_over=True)

    # bfloat16 needs no scaler of gradients, and other half precision is not offered.
    def _save_scaler(self, output_dir: str) -> None:
        return

    def _load_scaler(self, checkpoint: str | None) -> None:
        return

    def _save_rng_state(self, output_dir: str) -> None:
        algorithm, keys, *rest = np.random.get_state(legacy=True)
        states = {
            "python": random.getstate(),
            "numpy": (algorithm, np.asarray(keys).tolist(), *rest),
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        os.makedirs(output_dir, exist_ok=True)
        write_plain(self._rng_file(output_dir), states)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # With more processes than before, the new ones draw from their own seeds.
        if checkpoint is None or not self._rng_file(checkpoint).exists():
            return
        states = read_plain(self._rng_file(checkpoint))
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["torch"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])

    def _rng_file(self, folder: str) -> Path:
        return Path(folder) / f"rng_state_{self.args.process_index}.json"
