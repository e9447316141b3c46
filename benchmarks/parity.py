"""Follow galore-torch's GaLoreAdamW step by step with subspan's GaLore.

Exact SVD, all refreshes at once, ε before bias correction and weight decay after the update are galore-torch's rules;
what is left are the signs of singular vectors, which carry over into the moments that it keeps across a refresh. Its
SVD is therefore replaced by one with subspan's signs, and nothing else of it.

Example:
    python benchmarks/parity.py --steps 200 --gap 50
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from record import RESULTS, environment, import_peer, write_record

from subspan.linalg import canonical_signs
from subspan.optim import GaLore

SHAPES = {"wide": (48, 96), "tall": (96, 48), "square": (64, 64)}


def signed_svd(A: torch.Tensor, full_matrices: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SVD with canonical signs on the side that galore-torch projects: the short one, the right one of a square."""
    U, S, Vh = torch.linalg.svd(A, full_matrices=full_matrices)
    k = S.numel()
    signs = canonical_signs(Vh.mT if A.shape[0] >= A.shape[1] else U).squeeze(0)
    U, Vh = U.clone(), Vh.clone()
    U[:, :k] *= signs[:k]
    Vh[:k] *= signs[:k, None]
    return U, S, Vh


def follow(shape: tuple[int, int], *, steps: int, gap: int, rank: int, seed: int) -> dict[str, float]:
    """Train two copies of a matrix on one noisy quadratic; return how far they come apart and how far they move."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=generator)
    # Well separated singular values: where two nearly agree, rounding alone decides which direction is kept.
    directions = torch.randn(shape, generator=generator)
    U, S, Vh = torch.linalg.svd(directions, full_matrices=False)
    spectrum = 10.0 * 0.8 ** torch.arange(S.numel())
    target = start + (U * spectrum) @ Vh
    peer_weight, our_weight = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    keys = {"rank": rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
    settings = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-6}
    galore_torch = import_peer("galore_torch")
    peer = galore_torch.GaLoreAdamW([{"params": [peer_weight], **keys}], no_deprecation_warning=True, **settings)
    ours = GaLore(
        [{"params": [our_weight], **keys}],
        svd="exact",
        stagger=False,
        eps_placement="before",
        decay="after",
        **settings,
    )
    largest = 0.0
    for _ in range(steps):
        noise = 1e-3 * torch.randn(shape, generator=generator)
        for weight in (peer_weight, our_weight):
            weight.grad = weight.detach() - target + noise
        peer.step()
        ours.step()
        largest = max(largest, float((peer_weight - our_weight).detach().abs().max()))
    path = float((peer_weight - start).detach().abs().max())
    return {"largest_difference": largest, "largest_movement": path}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--gap", type=int, default=50)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(RESULTS / "parity.json"), help="record to write; empty: none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    projector = import_peer("galore_torch.galore_projector")
    # The projector calls torch.linalg.svd; it sees the signed one through its own name for torch.
    projector.torch = _TorchWithSignedSVD()
    results = {
        name: follow(shape, steps=args.steps, gap=args.gap, rank=args.rank, seed=args.seed)
        for name, shape in SHAPES.items()
    }
    for name, result in results.items():
        print(f"{name:8} {SHAPES[name]}: {result}")
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        record = {"benchmark": "parity", "settings": settings, "shapes": SHAPES, **environment(), "results": results}
        write_record(Path(args.output), record)


class _TorchWithSignedSVD:
    """torch, but for ``torch.linalg.svd``."""

    class linalg:
        svd = staticmethod(signed_svd)

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


if __name__ == "__main__":
    main()
