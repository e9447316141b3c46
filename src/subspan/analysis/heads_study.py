"""How long an iteration with LoRA heads takes beside one with full weights, and how much of the model it trains."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from subspan.analysis.timing import Clock, in_units
from subspan.nn.lowrank import WeightRecipe, weight_recipe
from subspan.nn.lowrank.count import count_trained
from subspan.optim import AdamW
from subspan.train.presets import build_model, skeleton

__all__ = ["MODES", "Contender", "HeadsRow", "StudiedModel", "measure_heads", "recipe_of", "trained_parameters"]

Mode = Literal["sequential", "parallel"]

#: The recipe of each mode: all heads on the same data in one product, or each head on its share of the batch.
MODES: dict[Mode, str] = {"sequential": "mhlora", "parallel": "lte"}
#: So small that no loss can diverge: what is measured is time.
_LR = 1e-6


@dataclass(frozen=True)
class StudiedModel:
    """What all contenders train.

    Attributes:
        model: preset, config.json, folder or name on the hub.
        seq_len: tokens in a sequence.
        batch_size: sequences of an iteration.
        target_modules, exclude: layers that get heads, see `subspan.nn.lowrank.select_layers`.
        dtype: float32, bfloat16, or amp (float32 weights, bfloat16 arithmetic).
        device: where.
        seed: of weights and tokens.
        others: what has no heads: replicated, each parallel head trains a copy of it; or shared, there is one.
        vocab_size: of a preset or config; None: its own.
    """

    model: str
    seq_len: int
    batch_size: int
    target_modules: str | Sequence[str] = "all-linear"
    exclude: Sequence[str] = ()
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    others: str = "replicated"
    vocab_size: int | None = None

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def build(self) -> nn.Module:
        """The model with full weights.

        Raises:
            ValueError: a checkpoint, which keeps its own vocabulary, was to have another one.
        """
        model = build_model(
            self.model, vocab_size=self.vocab_size, seq_len=self.seq_len, seed=self.seed, dtype=self.weights_dtype
        )
        own = model.config.get_text_config().vocab_size
        if self.vocab_size not in (None, own):
            raise ValueError(
                f"vocab_size is {self.vocab_size}, but model {self.model!r} has weights for {own} tokens: leave "
                "vocab_size out, or give its config.json alone."
            )
        model.config.use_cache = False
        return model.to(self.device)  # type: ignore[arg-type]

    def batch(self, model: nn.Module) -> Tensor:
        """Random tokens: an iteration takes as long with them as with text."""
        vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(int(vocabulary), (self.batch_size, self.seq_len), generator=generator)
        return ids.to(self.device)


@dataclass(frozen=True)
class HeadsRow:
    """One way to train.

    Attributes:
        mode: ``full``, ``sequential`` or ``parallel``.
        heads, rank: N and r; None for the full weights.
        trained: parameters of the model that are trained; copies of one, such as parallel heads keep of what has no
            heads, count once.
        state_bytes: of the optimizer, all copies counted.
        iteration: time of an iteration over that of one with full weights right before it; median.
        least_iteration: the least of these.
        milliseconds: the same in milliseconds; median.
        merge: time of a merge over that of an iteration with full weights; None where nothing is merged.
        with_merges: ``iteration`` and the share of a merge that falls on one.
        rounds: iterations that were timed.
        reason: why there is no measurement.
    """

    mode: str
    heads: int | None
    rank: int | None
    trained: int
    state_bytes: int | None = None
    iteration: float | None = None
    least_iteration: float | None = None
    milliseconds: float | None = None
    merge: float | None = None
    with_merges: float | None = None
    rounds: int | None = None
    reason: str | None = None


def recipe_of(mode: Mode, heads: int, rank: int, others: str = "replicated") -> WeightRecipe:
    """The recipe that is timed; s is 1, and step 0 never merges but step 1 does, so that each is timed alone.

    Example:
        >>> recipe_of("sequential", 2, 8).rank
        8
    """
    own = {"merge_every": 2, "others": others} if mode == "parallel" else {}
    return weight_recipe(MODES[mode], heads=heads, rank=rank, alpha=float(rank), **own)


def trained_parameters(studied: StudiedModel, heads: int | None = None, rank: int | None = None) -> int:
    """Count what is trained of a model: all of it, or N heads of rank r and what has none.

    Nothing is allocated. Both modes train the same.

    Example:
        >>> full = trained_parameters(StudiedModel("llama_9m", 128, 1))
        >>> full - trained_parameters(StudiedModel("llama_9m", 128, 1, "attention"), heads=1, rank=4)
        245760
    """
    with torch.device("meta"):
        model = skeleton(studied.model, vocab_size=studied.vocab_size, seq_len=studied.seq_len)
        if heads is not None and rank is not None:
            recipe = recipe_of("sequential", heads, rank)
            recipe.apply(model, target_modules=studied.target_modules, exclude=studied.exclude)
    return count_trained(model)


class Contender:
    """A model with its optimizer, ready to be stepped.

    Args:
        studied: the model.
        recipe: of its weights; None for full ones.
    """

    def __init__(self, studied: StudiedModel, recipe: WeightRecipe | None = None) -> None:
        self.model = studied.build()
        self.studied, self.batch = studied, studied.batch(self.model)
        self.weights = None
        if recipe is not None:
            layers: dict[str, Any] = {"target_modules": studied.target_modules, "exclude": studied.exclude}
            self.weights = recipe.apply(self.model, **layers, seed=studied.seed)
        trained = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        self.optimizer = AdamW([{"params": trained}], lr=_LR)

    def iterate(self) -> Tensor:
        """One iteration without a merge; returns the loss."""
        device = self.batch.device.type
        if self.weights is not None:
            self.weights.begin_step(0)
        with torch.autocast(device, torch.bfloat16, enabled=self.studied.dtype == "amp"):
            loss: Tensor = self.model(input_ids=self.batch, labels=self.batch).loss
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.weights is not None:
            self.weights.end_step(0, self.optimizer)
        self.optimizer.zero_grad()
        return loss.detach()

    def merge(self) -> None:
        """What happens after a step that merges."""
        assert self.weights is not None
        self.weights.end_step(1, self.optimizer)

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        return sum(self.optimizer.state_bytes().values())


def measure_heads(
    studied: StudiedModel,
    full: Contender,
    mode: Mode,
    heads: int,
    rank: int,
    *,
    merge_every: int,
    rounds: int,
    clock: Clock,
) -> HeadsRow:
    """Time iterations with heads and with full weights in turns.

    Args:
        studied: the model.
        full: it, with full weights.
        mode, heads, rank: what is measured.
        merge_every: iterations between merges.
        rounds: iterations that count, after one that warms up.
        clock: how to time.

    Returns:
        The row; with the reason where this cannot be built or held.
    """
    row = HeadsRow(mode, heads, rank, trained_parameters(studied, heads, rank))
    try:
        contender = Contender(studied, recipe_of(mode, heads, rank, studied.others))
        timings = in_units({mode: contender.iterate}, full.iterate, rounds, clock=clock, unit_calls=1)[mode]
        merges = [clock.seconds(contender.merge)[0] for _ in range(rounds + 1)][1:] if mode == "parallel" else []
    except (ValueError, RuntimeError, MemoryError) as error:
        return dataclasses.replace(row, reason=str(error).partition("\n")[0] or type(error).__name__)
    # A step that is skipped would look fast.
    if contender.optimizer.skipped_steps or not math.isfinite(timings.result.item()):
        return dataclasses.replace(row, reason="its loss or gradients are not finite")
    iteration = statistics.median(timings.units)
    unit = statistics.median(s / u for s, u in zip(timings.seconds, timings.units, strict=True))
    merge = statistics.median(merges) / unit if merges else None
    return dataclasses.replace(
        row,
        state_bytes=contender.state_bytes(),
        iteration=iteration,
        least_iteration=min(timings.units),
        milliseconds=1e3 * statistics.median(timings.seconds),
        merge=merge,
        with_merges=iteration + (merge or 0.0) / merge_every,
        rounds=rounds,
    )


def combinations(ranks: Sequence[int], heads: Sequence[int]) -> Iterator[tuple[Mode, int, int]]:
    """Every mode, number of heads and rank, in the order of the table."""
    return ((mode, number, rank) for mode in MODES for number in heads for rank in ranks)
