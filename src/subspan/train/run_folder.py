"""The folder of a run: where it is, whether it may be written to, and from which checkpoint it continues."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from subspan.checkpoint import latest, verify
from subspan.train.config import PretrainConfig, differences, read_config, write_text
from subspan.train.data import PackedDataset, TextData
from subspan.train.lock import LOCK_FILE, RunLock
from subspan.train.processes import launched
from subspan.train.trainer import CHECKPOINT, PROGRESS_FILE

__all__ = [
    "RunFolder",
    "check_space",
    "claim",
    "data_fingerprint",
    "open_run_folder",
    "run_path",
    "shared_batch",
    "started_with",
]

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
VERSIONS_FILE = "versions.json"
DATA_FILE = "data.json"
_LIBRARIES = ("subspan", "torch", "transformers", "accelerate", "tokenizers", "datasets", "safetensors")


def started_with(run: Path) -> int:
    """Return the number of processes that a run was started with.

    Args:
        run: its folder.

    Raises:
        ValueError: the file that says so cannot be used.
    """
    file = run / VERSIONS_FILE
    return _count(file, _read(file).get("processes", "1"))


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run folder that may be written to.

    Attributes:
        path: of the folder.
        checkpoint: whole checkpoint from which the run continues, or None for a run that starts.
        skipped: what is wrong with newer checkpoints that are passed over, one line each.
    """

    path: Path
    checkpoint: Path | None = None
    skipped: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Step at which the run continues."""
        return _step(self.checkpoint) if self.checkpoint is not None else 0

    @property
    def metrics(self) -> Path:
        """The metrics file."""
        return self.path / METRICS_FILE

    def progress(self) -> dict[str, Any] | None:
        """Return what `PretrainTrainer` keeps in the checkpoint beside the Trainer's own files."""
        if self.checkpoint is None:
            return None
        return json.loads((self.checkpoint / PROGRESS_FILE).read_text(encoding="utf-8"))

    def losses(self) -> list[dict[str, Any]]:
        """Return the Trainer's log up to the checkpoint."""
        if self.checkpoint is None:
            return []
        return json.loads((self.checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]

    @property
    def processes(self) -> int:
        """Processes that the run was started with."""
        return launched() if self.checkpoint is None else started_with(self.checkpoint.parent)

    def check(self, config: PretrainConfig, data: TextData) -> list[str]:
        """Compare the settings, the data and the library versions with those of the run so far; writes nothing.

        Args:
            config: resolved settings.
            data: what it trains on.

        Returns:
            Versions that changed since the run was started; bit-equal numbers are then not promised.

        Raises:
            ValueError: the settings differ in a way that changes the training, or the data is no longer the same.
        """
        file = self.path / CONFIG_FILE
        if file.exists() and (differing := differences(read_config(file), config)):
            raise ValueError(
                f"{self.path} holds a run with other settings ({'; '.join(differing)}). Continue it with its own: "
                f"subspan pretrain --config {file} --resume auto; or choose another --output."
            )
        if self.checkpoint is None:
            return []
        if changed := _changed(self.path / DATA_FILE, data_fingerprint(data)):
            raise ValueError(
                f"the data of the run in {self.path} has changed ({', '.join(changed)}), so it cannot be continued "
                "exactly. Bring the data back as it was, or start a new run with another --output."
            )
        # A run of before there were several processes does not say that it had one.
        versions = _changed(self.path / VERSIONS_FILE, _versions(), {"processes": "1"})
        return [f"{name}: {before} -> {now}" for name, (before, now) in versions.items()]

    def write(self, config: PretrainConfig, data: TextData) -> None:
        """Write the resolved settings, and for a run that starts the library versions and a fingerprint of the data."""
        settings = dataclasses.replace(config, output=str(self.path), resume="auto")
        write_text(self.path / CONFIG_FILE, settings.to_yaml())
        if self.checkpoint is None:
            write_text(self.path / VERSIONS_FILE, json.dumps(_versions(), indent=2) + "\n")
            write_text(self.path / DATA_FILE, json.dumps(data_fingerprint(data), indent=2) + "\n")


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError) as error:
        content = error
    if not isinstance(content, dict):
        found = content if isinstance(content, Exception) else f"it holds a {type(content).__name__}"
        raise ValueError(
            f"{file} cannot be used ({found}), so the run cannot be compared with how it was started. Bring the file "
            "back, or start a new run from a checkpoint with --carry_over and another --output."
        )
    return content


def _count(file: Path, value: object) -> int:
    if not str(value).isdecimal() or int(str(value)) < 1:
        raise ValueError(f"{file} says processes={value!r}; it must be a number of processes, such as '1'.")
    return int(str(value))


def _changed(file: Path, now: dict[str, Any], defaults: dict[str, Any] | None = None) -> dict[str, tuple[Any, Any]]:
    before = (defaults or {}) | _read(file)
    return {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}


def open_run_folder(config: PretrainConfig) -> RunFolder:
    """Find the folder of a run and the checkpoint to continue from; creates and changes nothing.

    Raises:
        FileNotFoundError: the checkpoint to continue from does not exist.
        ValueError: the folder holds another run or other files, or the checkpoint is not whole.
    """
    if config.resume not in ("auto", "none"):
        return _open_checkpoint(Path(config.resume).expanduser(), config.output)
    path = run_path(config)
    if path.exists() and not path.is_dir():
        raise ValueError(f"output {str(path)!r} is a file; give a folder.")
    if not path.exists() or not any(inside.name != LOCK_FILE for inside in path.iterdir()):
        return RunFolder(path)
    if not (path / CONFIG_FILE).exists():
        raise ValueError(f"output {str(path)!r} holds other files and no run; choose another folder.")
    if config.resume == "none":
        raise ValueError(
            f"output {str(path)!r} already holds a run, and a run is never overwritten. Continue it with "
            "--resume auto, or choose another --output."
        )
    skipped: list[str] = []
    whole = latest(path, skipped=skipped.append)
    if whole is None and skipped:
        raise ValueError(
            f"{path} has no checkpoint that is whole: {'; '.join(skipped)}. Bring one back, or start a new run with "
            "another --output."
        )
    return RunFolder(path, whole, tuple(skipped))


def claim(folder: RunFolder, lock: RunLock) -> None:
    """Take the folder for a run: create it, lock it, and see that it can be written to.

    Raises:
        ValueError: it cannot be written to, or another run has it.
    """
    path = folder.path
    late = not lock.held
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.take()
        # The lock's file may be there already in a folder where nothing can be added.
        with tempfile.NamedTemporaryFile(dir=path, suffix=".tmp"):
            pass
    except OSError as error:
        raise ValueError(
            f"the run folder {path} cannot be written to ({error.strerror}): choose another --output."
        ) from error
    if late and (path / CONFIG_FILE).exists():
        raise ValueError(f"another run has just been written to {path}: choose another --output.")


def check_space(folder: RunFolder, checkpoint_bytes: int, keep: int) -> None:
    """Check that the disk has room for the checkpoints.

    Args:
        folder: of the run.
        checkpoint_bytes: weights and optimizer state of one checkpoint.
        keep: checkpoints that are kept; there is one more while the newest is written.

    Raises:
        ValueError: it has not.
    """
    missing = max(0, keep + 1 - len(list(folder.path.glob("checkpoint-*"))))
    needed, free = missing * checkpoint_bytes, shutil.disk_usage(folder.path).free
    if needed > free:
        raise ValueError(
            f"{missing} more checkpoints take {needed:,} bytes and the disk of {folder.path} has {free:,} left: make "
            "room, lower --keep_checkpoints, or choose another --output."
        )


def run_path(config: PretrainConfig) -> Path:
    """Return where the folder of a run is or will be."""
    if config.resume not in ("auto", "none"):
        return Path(config.resume).expanduser().resolve().parent
    return Path(config.output).expanduser() if config.output is not None else _default_folder(config)


def _open_checkpoint(checkpoint: Path, output: str | None) -> RunFolder:
    if not checkpoint.is_dir():
        raise FileNotFoundError(
            f"resume {str(checkpoint)!r}: no such checkpoint folder; give one, or auto for the newest, or none."
        )
    _step(checkpoint)
    verify(checkpoint).raise_if_bad()
    folder = checkpoint.resolve().parent
    if output is not None and Path(output).expanduser().resolve() != folder:
        raise ValueError(
            f"a run is continued in its own folder: leave --output out, or make it {str(folder)!r}, not {output!r}."
        )
    return RunFolder(folder, checkpoint.resolve())


def shared_batch(config: PretrainConfig, then: int, now: int, shares: int = 1) -> tuple[int, int]:
    """Share the sequences of a step among another number of processes than a run was started with.

    Args:
        config: settings of the run.
        then: processes that it was started with.
        now: processes that it is continued with.
        shares: what the sequences of a forward pass have to be a multiple of now.

    Returns:
        Sequences in a forward pass, at most as many as the settings say (or the shares need), and passes in a step.

    Raises:
        ValueError: they cannot be shared evenly.

    Example:
        >>> shared_batch(PretrainConfig(batch_size=4), then=2, now=1)
        (4, 2)
    """
    if now == then:
        return config.batch_size, config.grad_accumulation
    sequences = config.batch_size * config.grad_accumulation * then
    each, left = divmod(sequences, now)
    if left:
        raise ValueError(
            f"a step of this run takes {sequences} sequences ({then} processes x batch_size {config.batch_size} x "
            f"grad_accumulation {config.grad_accumulation}), which {now} processes cannot share evenly; start a number "
            f"of processes that divides {sequences}."
        )
    most = max(config.batch_size, shares)
    batch = max(size for size in range(shares, most + 1, shares) if each % size == 0)
    return batch, each // batch


def _default_folder(config: PretrainConfig) -> Path:
    """``runs/METHOD-MODEL``; the newest one there is to continue, else the first number that is free."""
    base = Path("runs") / f"{config.title}-{Path(config.model).stem}"
    path, number = base, 1
    while path.exists():
        number += 1
        following = base.with_name(f"{base.name}-{number}")
        if config.resume == "auto" and not following.exists():
            return path
        path = following
    return path


def _step(checkpoint: Path) -> int:
    match = CHECKPOINT.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"resume {str(checkpoint)!r} is not called checkpoint-STEP; give a checkpoint of a run.")
    return int(match[1])


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for library in _LIBRARIES:
        versions[library] = importlib.metadata.version(library)
    versions["torch"] = torch.__version__
    versions["processes"] = str(launched())
    versions["threads"] = str(torch.get_num_threads())
    versions["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return versions


def data_fingerprint(data: TextData) -> dict[str, Any]:
    """Return what tells whether data is the same: digests of the tokenizer and the sequences."""

    def digest(dataset: PackedDataset) -> str:
        return hashlib.sha256(dataset.sequences.numpy().tobytes()).hexdigest()

    vocabulary = json.dumps(sorted(data.tokenizer.get_vocab().items()))
    return {
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "train": digest(data.train) if isinstance(data.train, PackedDataset) else "streamed",
        "train_sequences": len(data.train) if isinstance(data.train, PackedDataset) else None,
        "validation": digest(data.validation),
        "validation_sequences": len(data.validation),
    }
