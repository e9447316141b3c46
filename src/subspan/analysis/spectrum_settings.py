"""The settings of ``subspan spectrum``; imports neither torch nor transformers, so that ``--help`` is quick."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from subspan.train.config import check_types

__all__ = ["DEFAULT_BATCHES", "SpectrumSettings"]

DEFAULT_BATCHES = 4


@dataclass
class SpectrumSettings:
    """What to analyse.

    Args:
        source: Run folder of ``subspan pretrain``, a folder of checkpoint-STEP folders, a model folder with safetensors
            (also sharded), or a .safetensors file. Several checkpoints are points in time.
        what: weights; gradients (needs a run and its data); update (what training has added to the weights, the basis
            for the rank of an adapter); or all three. Default: weights, and gradients too where a run is given.
        layers: Regular expression; only tensors whose name it is found in.
        batches: Gradients taken at each checkpoint, each of another batch (default: 4); the same for all checkpoints.
        steps: Instead of batches: repeat this many steps of the run, from its newest point that leaves so many, and
            take gradients on the way.
        every: With steps: steps between gradients (default: a tenth of steps).
        base: Checkpoint, model folder or file that an update is counted from. Default: the first checkpoint.
        output: Folder for tables, singular values and pictures. Default: a folder ``spectrum`` in the source.
        save_gradients: File (.safetensors) for the last gradient sampled of every matrix.
        full: A row for every tensor and point in time, instead of one for each kind of layer.
    """

    source: str
    what: Literal["weights", "gradients", "update", "all"] | None = None
    layers: str | None = None
    batches: int | None = None
    steps: int | None = None
    every: int | None = None
    base: str | None = None
    output: str | None = None
    save_gradients: str | None = None
    full: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: naming the setting, its value and what is allowed.
        """
        check_types(self)
        for name in ("batches", "steps", "every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if self.steps is not None and self.batches is not None:
            raise ValueError(
                f"batches is {self.batches} and steps is {self.steps}; give batches for gradients at the checkpoints, "
                "or steps for gradients while training goes on."
            )
        if self.every is not None and self.steps is None:
            raise ValueError(f"every is {self.every} without steps; give --steps N too.")
        if self.every is not None and self.steps is not None and self.every > self.steps:
            raise ValueError(f"every is {self.every}, more than the {self.steps} steps; it must be at most that.")
        if self.what in ("weights", "update"):
            for name in ("batches", "steps", "save_gradients"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(f"{name} is {value!r}, but with --what {self.what} no gradient is taken.")
        if self.base is not None and self.what not in ("update", "all"):
            raise ValueError(f"base is {self.base!r}; it is used with --what update or --what all.")
        if self.save_gradients is not None and not self.save_gradients.endswith(".safetensors"):
            raise ValueError(f"save_gradients is {self.save_gradients!r}; the file must end in .safetensors.")
        if self.layers is not None:
            try:
                re.compile(self.layers)
            except re.error as error:
                raise ValueError(f"layers is {self.layers!r}, which is not a regular expression: {error}.") from error
