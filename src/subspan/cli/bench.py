"""``subspan bench``: measurements on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from subspan.cli.pretrain import config_from, exit_status
from subspan.train.config import PretrainConfig

__all__ = ["add_command", "run"]

_SIZES = ["512x512", "1024x2736"]
_SUBSPACE = """\
Time, energy, rank and orthogonality of every way to find a subspace, subspan's own and those of torch, scipy and
scikit-learn where installed. Without arguments: two sizes and two spectra, in about a minute.
Examples: subspan bench subspace --sizes 2048x2048 --spectra exp --rank 128.
subspan bench subspace --gradients gradients.safetensors --device cuda --output runs/gradients."""
_HEADS = """\
Trained parameters and time of an iteration with LoRA heads, for every rank and number of heads, beside an iteration
with full weights: sequential, all heads on the whole batch; parallel, each on its share of it. Without arguments: a
small LLaMA, in a few minutes on one core.
Example: subspan bench heads --model gpt2-124m --seq_len 512 --target_modules attention --device cuda --dtype amp."""
_LAYERS = """\
The same steps on the same data with heads in the attention (A), MLP (M) or logit (L) layers, in two kinds of them, in
all, and with full weights; the test losses beside the trained parameters. Each run has a folder of its own: called
again, finished ones are skipped and an unfinished one continues. All settings of subspan pretrain are taken.
Examples: subspan bench layers --layers A M full --steps 200 --weight_settings.rank 8.
subspan bench layers --model gpt2-124m --seq_len 512 --data hf:abisee/cnn_dailymail:3.0.0:train --text_field article
--steps 5000 --full.lr 6e-4 --output runs/layers."""


def add_command(commands: Any, parser_class: Any) -> None:
    """Add the command and its own commands to the parser."""
    parser = parser_class(description="Measure on this machine. Example: subspan bench subspace.")
    commands.add_subcommand("bench", parser, help="measure finders of subspaces and weights of low rank")
    benchmarks = parser.add_subcommands(required=True, title="benchmarks")
    benchmarks.add_subcommand("subspace", _subspace(parser_class), help="ways to find the subspace of a matrix")
    benchmarks.add_subcommand("heads", _heads(parser_class), help="iterations with LoRA heads against full weights")
    benchmarks.add_subcommand("layers", _layers(parser_class), help="test loss against the layers that have heads")


def _subspace(parser_class: Any) -> Any:
    parser = parser_class(usage="subspan bench subspace [--key value ...]", description=_SUBSPACE)
    add = parser.add_argument
    add("--sizes", type=str, nargs="+", help=f"rows and columns, MxN; {' '.join(_SIZES)} unless gradients are given")
    add(
        "--spectra",
        type=str,
        nargs="+",
        default=["pow-1/2", "exp"],
        help="singular values: pow-1/2 (1/sqrt(i)), pow-1 (1/i), exp (1 to e^-20), exp-below-rounding (1 to e^-80), "
        "flat, rank-4, zero",
    )
    add("--gradients", type=str, help="safetensors file: tensor name -> gradient")
    add("--rank", type=int, help="columns of a basis; without it, rank_share decides")
    add("--rank_share", type=float, default=0.25, help="rank over the shorter side")
    add("--rounds", type=int, default=3, help="timed calls of each method; above a second a call, it is one")
    _add_place(add)
    add("--longest", type=float, default=60.0, help="seconds; a method that would take longer for a call is left out")
    add(
        "--output",
        type=str,
        default="runs/bench-subspace",
        help="folder of subspace.json, .csv and .png, in place of earlier ones",
    )
    return parser


def _heads(parser_class: Any) -> Any:
    parser = parser_class(usage="subspan bench heads [--key value ...]", description=_HEADS)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 4, 16], help="of a head")
    add("--heads", type=int, nargs="+", default=[1, 2, 4], help="in parallel they divide the batch")
    add("--model", type=str, default="llama_bench", help="preset, config.json, folder, or name on the hub")
    add("--vocab_size", type=int, help="tokens in the vocabulary; that of the preset or config unless given")
    add("--seq_len", type=int, default=128, help="tokens in a sequence; they are random")
    add("--batch_size", type=int, default=4, help="sequences of an iteration")
    add(
        "--target_modules",
        type=str | list[str],
        default="all-linear",
        help="layers that get heads: all-linear, attention, mlp and logit joined by +, a regular expression, or names",
    )
    add("--exclude", type=str, nargs="+", default=[], help="names of layers that get none")
    add("--merge_every", type=int, default=10, help="iterations between merges of parallel heads")
    add(
        "--others",
        type=Literal["replicated", "shared"],
        default="replicated",
        help="what has no heads: each parallel head trains a copy of it, or there is one",
    )
    add("--dtype", type=Literal["float32", "bfloat16", "amp"], default="float32", help="amp: bfloat16 arithmetic")
    add("--rounds", type=int, default=5, help="timed iterations, each beside one with full weights")
    _add_place(add)
    add("--seed", type=int, default=0, help="of weights and tokens")
    add(
        "--output",
        type=str,
        default="runs/bench-heads",
        help="folder of heads.json, .csv and .png, in place of earlier ones",
    )
    return parser


def _layers(parser_class: Any) -> Any:
    parser = parser_class(usage="subspan bench layers [--config FILE.yaml] [--key value ...]", description=_LAYERS)
    parser.add_argument("--config", action="config", help="YAML file with settings; later arguments win over it.")
    parser.add_argument(
        "--layers", type=str, nargs="+", help="of A, M, L, A+M, A+L, M+L, A+M+L and full; all unless given"
    )
    parser.add_argument(
        "--full", type=dict[str, Any], default={}, help="settings that the run with full weights has instead"
    )
    parser.add_class_arguments(PretrainConfig, as_group=False, skip={"resume", "target_modules"})
    parser.set_defaults({"method": "adamw", "weights": "mhlora", "steps": 100, "eval_every": 0})
    return parser


def _add_place(add: Callable[..., Any]) -> None:
    add("--device", type=str, default="cpu", help="cpu, cuda, or cuda:1")
    add("--threads", type=int, default=1, help="of the CPU; with more than one, wall-clock time counts")


def run(arguments: Any) -> int:
    """Measure."""
    settings = arguments[arguments.subcommand]
    return {"subspace": _run_subspace, "heads": _run_heads, "layers": _run_layers}[arguments.subcommand](settings)


def _run_subspace(arguments: Any) -> int:
    settings = arguments.as_dict()
    sizes, spectra = (_split(settings.pop(name)) for name in ("sizes", "spectra"))
    if not sizes and settings["gradients"] is None:
        sizes = _SIZES

    from subspan.analysis.bench import bench_subspace

    bench_subspace(sizes, spectra, **settings)
    return 0


def _run_heads(arguments: Any) -> int:
    from subspan.analysis.heads_bench import bench_heads

    bench_heads(**arguments.as_dict())
    return 0


def _run_layers(arguments: Any) -> int:
    layers, full = arguments.pop("layers"), arguments.pop("full")
    config = config_from(arguments)

    from subspan.analysis.layers_bench import LAYERS, bench_layers

    return exit_status(bench_layers(config, layers or tuple(LAYERS), full=full).signal)


def _split(values: list[str] | None) -> list[str]:
    """Values between spaces, commas or both."""
    return [part for value in values or [] for part in value.split(",") if part]
