"""Bytes that two processes or more reduce in a step of a small LLaMA, and the losses that come of it.

The same model is trained on the same batches by one process with GaLore, and by ``--processes`` of them (gloo, one
thread each) with

* `plain`: DDP and GaLore; `hook`: with `compress_gradients`; `fused` and `projected`: gradients that are folded or
  never formed, with `exclude_from_ddp`;
* `adamw`: DDP and torch's AdamW; `power_sgd`: with torch's PowerSGD hook at the same rank.

Bytes are those that a process hands to collectives, by kind: in the mean over the run, and in a step without a refresh.
Losses are compared step by step with those of one process: GaLore as it is, or with the late refresh that the modes
without gradients have.

Example:
    OMP_NUM_THREADS=1 python benchmarks/ddp_bytes.py
    OMP_NUM_THREADS=1 python benchmarks/ddp_bytes.py --processes 4 --output ""
"""

from __future__ import annotations

import argparse
import os
import socket
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from record import RESULTS, environment, write_record
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from subspan.distributed import compress_gradients, count_traffic, exclude_from_ddp, power_sgd, traffic_table
from subspan.nn import project_gradients
from subspan.optim import GaLore, param_groups

CONTENDERS = ("plain", "hook", "fused", "projected", "adamw", "power_sgd")


def build(args: argparse.Namespace) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        vocab_size=512,
        max_position_embeddings=args.seq_len,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def batches(args: argparse.Namespace) -> Tensor:
    """Bytes of Python's standard library, (steps, sequences, tokens)."""
    size = args.steps * args.sequences * args.seq_len
    text = b""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            break
    return torch.frombuffer(bytearray(text[:size]), dtype=torch.uint8).long().view(args.steps, args.sequences, -1)


def train(name: str, args: argparse.Namespace, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Losses of the joint batches, and the bytes of each step."""
    model = build(args)
    call: Any = model
    traffic = None
    if name in ("adamw", "power_sgd"):
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        groups = param_groups(model, rank=args.rank, update_proj_gap=args.gap)
        optimizer = GaLore(groups, lr=args.lr, refresh="late" if name == "late" else "now")
    if name == "fused":
        optimizer.fuse_into_backward()
    if name == "projected":
        project_gradients(model, optimizer)
    if name in ("fused", "projected"):
        traffic = exclude_from_ddp(model, optimizer)
    if world > 1:
        call = DistributedDataParallel(model)
        if name == "hook":
            traffic = compress_gradients(call, optimizer)
        elif name == "power_sgd":
            traffic = power_sgd(call, args.rank, start_powerSGD_iter=2)
        else:
            traffic = count_traffic(call, traffic)
    losses, steps = [], []
    for joint in batches(args):
        tokens = joint.chunk(world)[rank]
        loss = call(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world
        if world > 1:
            assert traffic is not None
            steps.append(traffic.take())
            dist.all_reduce(mean)
        losses.append(float(mean))
    return {"losses": losses, "steps": steps}


def work(rank: int, port: int, folder: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=args.processes)
    found = {name: train(name, args, rank, args.processes) for name in args.contenders}
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def summary(run: dict[str, Any], alone: list[float]) -> dict[str, Any]:
    steps = run["steps"]
    total: Counter[str] = sum((Counter(step) for step in steps), Counter())
    away = [abs(loss - other) / other for loss, other in zip(run["losses"], alone, strict=True)]
    return {
        "bytes_per_step": {kind: round(number / len(steps)) for kind, number in total.items()},
        "bytes_between_refreshes": min(steps, key=lambda step: sum(step.values())),
        "bytes_of_first_step": steps[0],
        "largest_relative_difference_of_losses": max(away),
        "final_loss": run["losses"][-1],
        "losses": run["losses"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--mlp", type=int, default=344)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--gap", type=int, default=25, help="steps between refreshes")
    parser.add_argument("--lr", type=float, default=2e-3, help="of GaLore; AdamW has 1e-3")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--sequences", type=int, default=8, help="of the joint batch")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(RESULTS / "ddp-bytes.json"), help="record to write; empty: none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = build(args)
    projected = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n)
    share = projected / sum(p.numel() for p in model.parameters())
    print(f"{share:.0%} of the parameters are projected, r/min(m, n) = {args.rank / args.hidden}")
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        mp.spawn(work, args=(port, folder, args), nprocs=args.processes)
        found = torch.load(Path(folder) / "found.pt", weights_only=True)
    alone = {name: train(name, args)["losses"] for name in ("plain", "late", "adamw")}
    against = {"fused": "late", "projected": "late", "adamw": "adamw", "power_sgd": "adamw"}
    results = {name: summary(run, alone[against.get(name, "plain")]) for name, run in found.items()}
    for what in ("bytes_per_step", "bytes_between_refreshes"):
        print(f"\n{what}\n{traffic_table({name: result[what] for name, result in results.items()})}")
    print()
    for name, result in results.items():
        away = result["largest_relative_difference_of_losses"]
        print(f"{name:<12}{result['losses'][0]:.4f} -> {result['final_loss']:.4f}, at most {away:.1e} from one process")
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        write_record(
            Path(args.output),
            {
                "benchmark": "ddp_bytes",
                "settings": settings,
                "projected_share_of_parameters": share,
                "projected_parameter_bytes": projected * 4,
                **environment(),
                "losses_of_one_process": alone,
                "results": results,
            },
        )


if __name__ == "__main__":
    main()
