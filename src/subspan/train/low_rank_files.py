"""Models with weights of low rank or adapters in checkpoints, and ordinary models made of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspan.checkpoint import latest, verify
from subspan.checkpoint.load import load_weights, read_document
from subspan.checkpoint.plain import read_plain, write_plain
from subspan.checkpoint.save import LOW_RANK, LOW_RANK_JSON, OPTIMIZER, OPTIMIZER_JSON, TIED
from subspan.checkpoint.states import is_sharded, model_tensors, optimizer_document, optimizer_state, state_names
from subspan.checkpoint.tensors import empty_like, held_tensors, read_tensors, write_whole
from subspan.nn.lowrank import LowRankWeights
from subspan.optim import LowRankOptimizer
from subspan.train.adapters import adapter_config
from subspan.train.config import PretrainConfig, write_text
from subspan.train.presets import build_model
from subspan.train.processes import Processes
from subspan.train.weights import build_weights, named_weights, recipe_settings

__all__ = [
    "Merged",
    "check_carried",
    "check_low_rank",
    "merge_run",
    "read_divided_optimizer",
    "read_low_rank",
    "write_divided_optimizer",
    "write_low_rank",
]

#: Folder in a checkpoint with what peft's own ``from_pretrained`` reads.
ADAPTER_FOLDER = "adapter"
_SCHEMA = 1
#: Settings of a run from which its model is built again.
_SETTINGS = (
    "weights", "weight_settings", "adapter", "adapter_settings", "project", "target_modules", "exclude", "steps",
    "seed", "dtype",
)  # fmt: skip
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")


def write_low_rank(
    folder: Path, model: nn.Module, weights: LowRankWeights, config: PretrainConfig, processes: Processes
) -> None:
    """Write a model as it is trained: all its tensors, and what its layers are made from.

    Every process calls it and the first one writes, also what the others have. What `fully_shard` has divided is
    written with the parts of the optimizer.
    """
    tensors, tied = model_tensors(model)
    if weights.divided:
        tensors = weights.collect(tensors)
        tied = {name: first for part in processes.gather(tied) for name, first in part.items()}
    if not processes.first:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not is_sharded(tensors):
        write_whole(folder / LOW_RANK, tensors)
        if tied:
            write_plain(folder / TIED, tied)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name in _SETTINGS}
    write_text(folder / LOW_RANK_JSON, json.dumps({"schema": _SCHEMA, **settings}, indent=2) + "\n")
    if config.adapter is not None:
        peft_model: Any = model
        # Else peft would ask the hub whether embeddings have grown.
        peft_model.save_pretrained(folder / ADAPTER_FOLDER, save_embedding_layers=False)


def read_low_rank(folder: Path, model: nn.Module, weights: LowRankWeights) -> None:
    """Load what `write_low_rank` wrote, each process its part.

    Raises:
        ValueError: other weights.
    """
    check_low_rank(folder)
    if not weights.divided:
        load_weights(folder, model)
        return
    held = {name: entry for name, entry in held_tensors(folder).items() if "/" not in name}
    saved = read_tensors(folder, {name: empty_like(entry, None) for name, entry in held.items()})
    tied = read_plain(folder / TIED) if (folder / TIED).is_file() else {}
    own = weights.own(saved | {name: saved[first] for name, first in tied.items()})
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(f"{folder} holds another model: {error}") from error


def write_divided_optimizer(
    folder: Path, optimizer: LowRankOptimizer, model: nn.Module, weights: LowRankWeights, processes: Processes
) -> None:
    """Write the optimizer of weights of which each process trains its own, as one process with all would have it."""
    document, state = optimizer_document(optimizer, state_names(optimizer, model))
    state = weights.collect(state)
    names = processes.gather([group["params"] for group in document["groups"]])
    if not processes.first:
        return
    for group, *same in zip(document["groups"], *names, strict=True):
        group["params"] = list(dict.fromkeys(name for part in same for name in part))
    document["tensors"] = sorted(state)
    write_whole(folder / OPTIMIZER, state)
    write_plain(folder / OPTIMIZER_JSON, document)


def read_divided_optimizer(
    folder: Path, optimizer: LowRankOptimizer, model: nn.Module, weights: LowRankWeights
) -> None:
    """Load this process's part of what `write_divided_optimizer`, or a process with all, wrote.

    Raises:
        ValueError: the state of another optimizer.
    """
    document, names = read_document(folder), state_names(optimizer, model)
    held = held_tensors(folder)
    missing = [key for key in document["tensors"] if key not in held]
    known = [name for group in document["groups"] for name in group["params"]]
    missing += [name for group in names for name in group if name not in known]
    if missing or len(names) != len(document["groups"]):
        raise ValueError(f"{folder} holds the state of another optimizer: {', '.join(missing[:5]) or 'other groups'}")
    tensors = read_tensors(folder, {key: empty_like(held[key], None) for key in document["tensors"]})
    for group, own in zip(document["groups"], names, strict=True):
        group["params"] = own
    kept = {name for group in names for name in group}
    mine = {key: t for key, t in weights.own(tensors).items() if key.rpartition("/")[0] in kept}
    try:
        optimizer.load_state_dict(optimizer_state(document, mine, names))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def check_low_rank(folder: Path) -> PretrainConfig:
    """The settings of the weights that a checkpoint holds.

    Raises:
        ValueError: it holds an ordinary model, or the file cannot be used.
    """
    file = folder / LOW_RANK_JSON
    if not file.is_file():
        raise ValueError(
            f"{folder} holds an ordinary model, with no weights of low rank or adapters: start from its weights with "
            "--model in place of --carry_over."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["schema"] > _SCHEMA:
            raise ValueError(f"it has format {content['schema']}, newer than {_SCHEMA}; update subspan")
        return PretrainConfig(**{name: content[name] for name in _SETTINGS})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be used: {error}") from error


def check_carried(config: PretrainConfig) -> None:
    """Refuse a checkpoint to start from that holds other weights than the run has, before any data is read.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is not whole, or holds other weights.
    """
    if config.carry_over is None:
        return
    folder = Path(config.carry_over).expanduser()
    verify(folder, files=()).raise_if_bad()
    if not config.low_rank and not (folder / LOW_RANK_JSON).is_file():
        return
    held = check_low_rank(folder)
    if (held.adapter, held.weights) != (config.adapter, config.weights):
        raise ValueError(
            f"carry_over is {str(folder)!r}, which holds {named_weights(held)}, and this run has "
            f"{named_weights(config)}: take the same, or make an ordinary model of it (subspan merge) and start from "
            "that with --model."
        )
    before, now = _scaling(held), _scaling(config)
    for name in before:
        if before[name] != now.get(name):
            raise ValueError(
                f"carry_over is {str(folder)!r}, whose {name} is {before[name]!r}, and this run has {now.get(name)!r}, "
                "which makes another model of its factors: take the same, or make an ordinary model of it (subspan "
                "merge) and start from that with --model."
            )


def _scaling(config: PretrainConfig) -> dict[str, Any]:
    """The settings that say which weights the factors of a run make, by name."""
    if config.adapter is None:  # sizes are compared with those of the tensors
        settings = recipe_settings(config)
        return {"weight_settings.alpha": settings["alpha"]} if "alpha" in settings else {}
    fields = adapter_config(config.adapter, config.adapter_settings, ["all"]).to_dict()
    kept = {name: value for name, value in fields.items() if "dropout" not in name and not name.startswith("init_")}
    return {f"adapter_settings.{name}": value for name, value in kept.items() if name != "target_modules"}


@dataclasses.dataclass(frozen=True)
class Merged:
    """What `merge_run` did.

    Attributes:
        output: folder of the model.
        layers: names of the layers that were merged.
        difference: the largest of the logits of the two models on the same tokens.
    """

    output: Path
    layers: list[str]
    difference: float


@torch.no_grad()
def merge_run(source: str | Path, output: str | Path | None = None) -> Merged:
    """Make an ordinary model, as transformers loads it, of a run with weights of low rank or an adapter.

    Args:
        source: folder of a run, whose newest whole checkpoint is taken, or a checkpoint.
        output: new folder. None: ``merged-STEP`` in the folder of the run.

    Returns:
        Where it is, and by how much its outputs differ from those of the model that was trained.

    Raises:
        FileNotFoundError: no such run or checkpoint.
        ValueError: it holds an ordinary model already or is not whole, ``output`` exists, or the outputs differ by more
            than rounding.
    """
    source = Path(source).expanduser()
    checkpoint = source
    if source.is_dir() and not (source / "manifest.json").is_file():
        newest = latest(source)
        if newest is None:
            raise FileNotFoundError(f"{source} holds no whole checkpoint; give the folder of a run, or a checkpoint.")
        checkpoint = newest
    manifest = verify(checkpoint).raise_if_bad()
    config = check_low_rank(checkpoint)
    step = manifest.step or 0
    target = checkpoint.resolve().parent / f"merged-{step}" if output is None else Path(output).expanduser()
    if target.exists():
        raise ValueError(f"output {str(target)!r} exists; a model is never overwritten: choose another folder.")
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    model = build_model(str(checkpoint / "config.json"), seq_len=2, dtype=dtype)
    trained, weights = build_weights(model, config)
    assert weights is not None
    load_weights(checkpoint, trained)
    weights.begin_step(step)
    before = _logits(trained)
    layers = weights.merge()
    ordinary: Any = weights.model
    ordinary = ordinary.get_base_model() if hasattr(ordinary, "get_base_model") else ordinary
    difference = float((_logits(ordinary) - before).abs().max())
    if not difference <= (0.05 if dtype == torch.bfloat16 else 1e-3) * float(before.abs().max().clamp(min=1.0)):
        raise ValueError(
            f"the merged model's logits differ by {difference:.3g} from those of the model in {checkpoint}, so nothing "
            "was written. A weight that several layers share (tie_word_embeddings) cannot take up what one of them has "
            "learnt: leave such a layer out with --exclude."
        )
    with _appearing(target) as folder:
        ordinary.config.use_cache = True
        ordinary.save_pretrained(folder)
        for pattern in _TOKENIZER:
            for file in checkpoint.glob(pattern):
                shutil.copyfile(file, folder / file.name)
    return Merged(target, layers, difference)


def _logits(model: nn.Module) -> Tensor:
    network: Any = model.eval()
    ids = torch.arange(16).remainder(network.config.get_text_config().vocab_size).view(2, 8)
    return network(input_ids=ids).logits.float()  # type: ignore[no-any-return]


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder that gets the name ``target`` when all is in it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
