"""``subspan bench``: measurements on this machine."""

from __future__ import annotations

from typing import Any

__all__ = ["add_command", "run"]

_SIZES = ["512x512", "1024x2736"]
_EXAMPLES = """\
Time, energy, rank and orthogonality of every way to find a subspace, subspan's own and those of torch, scipy and
scikit-learn where installed. Without arguments: two sizes and two spectra, in about a minute.
Examples: subspan bench subspace --sizes 2048x2048 --spectra exp --rank 128.
subspan bench subspace --gradients gradients.safetensors --device cuda --output runs/gradients."""


def add_command(commands: Any, parser_class: Any) -> None:
    """Add the command and its own commands to the parser."""
    parser = parser_class(description="Measure on this machine. Example: subspan bench subspace.")
    commands.add_subcommand("bench", parser, help="measure the finders of subspaces on this machine")
    benchmarks = parser.add_subcommands(required=True, title="benchmarks")
    subspace = parser_class(usage="subspan bench subspace [--key value ...]", description=_EXAMPLES)
    add = subspace.add_argument
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
    add("--device", type=str, default="cpu", help="cpu, cuda, or cuda:1")
    add("--threads", type=int, default=1, help="of the CPU; with more than one, wall-clock time counts")
    add("--longest", type=float, default=60.0, help="seconds; a method that would take longer for a call is left out")
    add(
        "--output",
        type=str,
        default="runs/bench-subspace",
        help="folder of subspace.json, .csv and .png, in place of earlier ones",
    )
    benchmarks.add_subcommand("subspace", subspace, help="ways to find the subspace of a matrix")


def run(arguments: Any) -> int:
    """Measure."""
    settings = arguments[arguments.subcommand].as_dict()
    sizes, spectra = (_split(settings.pop(name)) for name in ("sizes", "spectra"))
    if not sizes and settings["gradients"] is None:
        sizes = _SIZES

    from subspan.analysis.bench import bench_subspace

    bench_subspace(sizes, spectra, **settings)
    return 0


def _split(values: list[str] | None) -> list[str]:
    """Values between spaces, commas or both."""
    return [part for value in values or [] for part in value.split(",") if part]
