"""A whole training step (forward, backward, optimizer) with gradients that are whole, folded or never formed.

A LLaMA of a few layers is trained on random tokens by torch's fused AdamW, by GaLore in its three modes, and by
APOLLO-Mini that updates in backward, with float weights and with int8 ones, in one process, taking turns. A step in
which every subspace is refreshed is measured apart; with a refresh every ``--gap`` steps a step costs
plain + (refresh - plain)/gap in the mean. Figures are medians of ratios to AdamW's step beside them. Bytes are those of
the gradients of the projected matrices at the end of backward, and of the optimizer's state.

Example:
    OMP_NUM_THREADS=1 python benchmarks/training_step.py
    OMP_NUM_THREADS=1 python benchmarks/training_step.py --layers 1 --rounds 2 --output ""
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, environment, write_record
from torch import Tensor, nn

from subspan.nn import project_gradients, quantize_weights
from subspan.optim import GaLore, create_optimizer, param_groups


class Contender:
    """A model with its optimizer."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(args.seed)
        config = LlamaConfig(
            hidden_size=args.hidden,
            intermediate_size=args.mlp,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            vocab_size=args.vocabulary,
            max_position_embeddings=args.seq_len,
            tie_word_embeddings=False,
        )
        self.name = name
        self.model: nn.Module = LlamaForCausalLM(config).to(args.device)
        self.matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and ".layers." in n]
        self.device = args.device
        if name == "adamw":
            self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
            return
        if name in ("apollo_mini", "q_apollo_mini"):
            if name == "q_apollo_mini":
                quantize_weights(self.model, group_size=128)
            self.optimizer = create_optimizer(name, self.model, lr=1e-4, update_proj_gap=10**9, stagger=False)
            self.optimizer.fuse_into_backward()
            return
        groups = param_groups(self.model, rank=args.rank, update_proj_gap=10**9)
        late = {} if name == "full" else {"refresh": "late"}
        self.optimizer = GaLore(groups, lr=1e-4, stagger=False, **late)
        if name == "fused":
            self.optimizer.fuse_into_backward()
        elif name == "projected":
            project_gradients(self.model, self.optimizer)

    def refresh_next(self) -> None:
        """Make every subspace due at the next step."""
        if self.name == "adamw":
            return
        for state in self.optimizer.state.values():
            if "next_refresh" in state:
                state["next_refresh"].copy_(state["step"])
        self.optimizer.load_state_dict(self.optimizer.state_dict())

    def step(self, batch: Tensor) -> tuple[float, int]:
        """Seconds of one step, and bytes of the gradients of the matrices after backward."""
        self._wait()
        start = self._now()
        self.model(input_ids=batch, labels=batch).loss.backward()
        paused = self._now()
        if self.name in ("fused", "projected"):
            self.optimizer.grad_norm()
            items = self.optimizer._folded.values()
            held = sum(t.numel() * t.itemsize for i in items for t in (i.projected, i.sketch) if t is not None)
        else:
            held = sum(p.grad.numel() * p.grad.itemsize for p in self.matrices if p.grad is not None)
        resumed = self._now()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        return self._now() - start - (resumed - paused), held

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _now(self) -> float:
        # On a CPU, processor time of the process: neighbours count less.
        return time.perf_counter() if self.device == "cuda" else time.process_time()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    names = ("adamw", "full", "fused", "projected", "apollo_mini", "q_apollo_mini")
    contenders = [Contender(name, args) for name in names]
    generator = torch.Generator().manual_seed(args.seed)
    seconds: dict[tuple[str, str], list[float]] = {}
    held: dict[tuple[str, str], int] = {}
    for kind in ["warm-up"] + ["plain"] * args.rounds + ["refresh"] * max(2, args.rounds // 2):
        batch = torch.randint(args.vocabulary, (args.batch_size, args.seq_len), generator=generator).to(args.device)
        for contender in contenders:
            if kind == "refresh":
                contender.refresh_next()
            took, count = contender.step(batch)
            seconds.setdefault((contender.name, kind), []).append(took)
            held[contender.name, kind] = count
        print(kind, {c.name: round(seconds[c.name, kind][-1], 2) for c in contenders}, flush=True)
    tokens = args.batch_size * args.seq_len
    result: dict[str, Any] = {}
    for contender in contenders:
        name = contender.name
        ratio = {
            kind: statistics.median(
                mine / theirs for mine, theirs in zip(seconds[name, kind], seconds["adamw", kind], strict=True)
            )
            for kind in ("plain", "refresh")
        }
        mean = ratio["plain"] + (ratio["refresh"] - ratio["plain"]) / args.gap
        result[name] = {
            "step_of_adamw": ratio["plain"],
            "refresh_step_of_adamw": ratio["refresh"],
            "tokens_per_second_of_adamw": 1 / mean,
            "tokens_per_second": tokens / statistics.median(seconds[name, "plain"]),
            "gradient_bytes_of_matrices": held[name, "plain"],
            "gradient_bytes_at_a_refresh": held[name, "refresh"],
            "state_bytes": sum(
                t.numel() * t.itemsize
                for state in contender.optimizer.state.values()
                for t in state.values()
                if isinstance(t, Tensor)
            ),
        }
    whole = result["adamw"]["gradient_bytes_of_matrices"]
    print(f"\n{'':13} tokens/s of AdamW's  refresh step  gradients of the matrices  state")
    for name, row in result.items():
        share = row["gradient_bytes_of_matrices"] / whole
        print(
            f"{name:13} {row['tokens_per_second_of_adamw']:18.3f} {row['refresh_step_of_adamw']:14.2f} {share:26.1%}"
            f" {row['state_bytes'] / 1e6:6.1f} MB"
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--mlp", type=int, default=2736)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--gap", type=int, default=200, help="steps between refreshes, for the mean")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", default=str(RESULTS), help="folder for the record; empty: none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    results = measure(args)
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        record = {"benchmark": "training step", "settings": settings, **environment(), "results": results}
        write_record(Path(args.output) / "training-step.json", record)


if __name__ == "__main__":
    main()
