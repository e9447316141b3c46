"""Checkpoints on disk as matrices that are read one at a time, from safetensors only."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from subspan.checkpoint.save import OPTIMIZER
from subspan.nn.quantised import STEPS
from subspan.train.config import PretrainConfig, read_config
from subspan.train.run_folder import CONFIG_FILE
from subspan.train.trainer import CHECKPOINT, PROGRESS_FILE

__all__ = ["Checkpoint", "Source", "find_source", "output_folder"]

_INDEX = ".safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_ALLOWED = (
    "give a run folder of subspan pretrain, one of its checkpoints, a model folder with safetensors, or a "
    ".safetensors file"
)


class Checkpoint:
    """The tensors of a model on disk. Files are mapped into memory; a tensor is read when it is asked for.

    Args:
        path: of the folder or the file.
        step: of training, or None where the name does not tell it.

    Raises:
        ValueError: no safetensors, a damaged file, a missing shard, or a tensor that two files hold.
    """

    def __init__(self, path: Path, step: int | None = None) -> None:
        self.path = path
        self.step = step
        self._files: dict[str, Any] = {}
        for file in _weight_files(path):
            try:
                opened = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{str(file)!r} is not a whole safetensors file ({error}); copy or download it again."
                ) from error
            for name in opened.keys():  # noqa: SIM118
                if name in self._files:
                    raise ValueError(f"{str(path)!r} holds {name!r} in two files, one is {file.name!r}; give one file.")
                self._files[name] = opened
        # The steps of weights in int8 say how matrices were rounded; they are none of the model's.
        self._files = {
            name: file
            for name, file in self._files.items()
            if name.removesuffix(STEPS) not in self._files or not name.endswith(STEPS)
        }

    @property
    def names(self) -> list[str]:
        """Names of all tensors, numbers in them in numerical order."""
        return sorted(self._files, key=natural_order)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape_and_type(self, name: str) -> tuple[tuple[int, ...], str]:
        """Return the shape and the element type (``F32``, ``BF16``, ``I8``, ...) without reading the tensor."""
        part = self._files[name].get_slice(name)
        return tuple(part.get_shape()), str(part.get_dtype())

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


class Source(NamedTuple):
    """What there is to analyse.

    Attributes:
        path: as it was given.
        checkpoints: in the order of training.
        run: folder of the run that they belong to, if it is one of subspan's.
        whole_run: whether the run was given and not one of its checkpoints.
    """

    path: Path
    checkpoints: list[Checkpoint]
    run: Path | None
    whole_run: bool

    def config(self) -> PretrainConfig | None:
        """Return the settings of the run."""
        return None if self.run is None else read_config(self.run / CONFIG_FILE)


def find_source(given: str) -> Source:
    """Find the checkpoints that a path stands for.

    Raises:
        FileNotFoundError: no such path.
        ValueError: it holds no weights that can be read.
    """
    path = Path(os.path.abspath(Path(given).expanduser()))
    if not path.exists():
        raise FileNotFoundError(f"source {given!r}: no such file or folder; {_ALLOWED}.")
    is_run = (path / CONFIG_FILE).is_file()
    if path.is_dir():
        found = [(int(match[1]), folder) for folder in path.iterdir() if (match := CHECKPOINT.fullmatch(folder.name))]
        whole = sorted((step, folder) for step, folder in found if not is_run or (folder / PROGRESS_FILE).is_file())
        if whole:
            return Source(path, [Checkpoint(folder, step) for step, folder in whole], path if is_run else None, is_run)
        if is_run and not any(path.glob("*.safetensors")):
            raise ValueError(
                f"the run in {given!r} has no checkpoint yet; wait for the first, or save more often (--save_every)."
            )
    match = CHECKPOINT.fullmatch(path.name)
    run = path.parent if match and (path.parent / CONFIG_FILE).is_file() else None
    return Source(path, [Checkpoint(path, int(match[1]) if match else None)], run, False)


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix in _PICKLES:
            raise ValueError(f"{str(path)!r} is a pickle, which is never opened; {_ALLOWED}.")
        if path.suffix != ".safetensors":
            raise ValueError(f"{str(path)!r} is no .safetensors file; {_ALLOWED}.")
        return [path]
    if indexes := sorted(path.glob(f"*{_INDEX}")):
        main = path / f"model{_INDEX}"
        if main not in indexes and len(indexes) > 1:
            names = ", ".join(index.name for index in indexes)
            raise ValueError(f"{str(path)!r} holds more than one model ({names}); put one of them into a folder alone.")
        return _shards(main if main in indexes else indexes[0])
    files = sorted(file for file in path.glob("*.safetensors") if file.name != OPTIMIZER)
    if any(file.name.startswith("shard-") for file in files):
        raise ValueError(
            f"{str(path)!r} holds the parts that several processes wrote; make a model of them first: "
            f"subspan checkpoint convert {path} MODEL_FOLDER."
        )
    if not files:
        if pickles := sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES):
            raise ValueError(
                f"{str(path)!r} holds no safetensors, only pickles ({', '.join(pickles[:3])}), which are never opened. "
                "Convert the model: save_pretrained of transformers writes safetensors."
            )
        raise ValueError(f"{str(path)!r} holds neither a run nor safetensors; {_ALLOWED}.")
    return files


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{str(index)!r} is not an index of safetensors files: {error!r}.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{str(index)!r} names {name!r}, which is no file beside it.")
        if not (index.parent / name).is_file():
            raise ValueError(f"{str(index)!r} names {name!r}, which is not there; copy or download the whole model.")
    return [index.parent / name for name in names]


def output_folder(given: str | None, source: Source) -> Path:
    """Return the folder for the results, made if need be and known to be writable.

    By default ``spectrum`` in the run or the model folder, ``spectrum-STEP`` beside a checkpoint of a run, and
    ``NAME-spectrum`` beside a file.

    Raises:
        ValueError: a file, a folder in the cache of the hub, or one that cannot be written to.
    """
    path = source.path
    if given is not None:
        folder = Path(os.path.abspath(Path(given).expanduser()))
    elif source.run is not None and not source.whole_run:
        folder = source.run / f"spectrum-{source.checkpoints[0].step}"
    else:
        folder = path / "spectrum" if path.is_dir() else path.parent / f"{path.stem}-spectrum"
    if any(above.name == "snapshots" and above.parent.name.startswith("models--") for above in folder.parents):
        raise ValueError(
            f"output {str(folder)!r} lies in the cache of the Hugging Face hub, where nothing is written; "
            "give --output FOLDER."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"output {str(folder)!r} cannot be written to ({error.strerror}); give another --output FOLDER."
        ) from error
    return folder


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key under which layer 2 comes before layer 10.

    Example:
        >>> sorted(["h.10.w", "h.2.w"], key=natural_order)
        ['h.2.w', 'h.10.w']
    """
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
