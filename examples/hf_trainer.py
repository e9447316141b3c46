"""A low-rank optimizer in a script that uses the Hugging Face Trainer.

    python examples/hf_trainer.py --text my_text.txt --steps 200

The Trainer takes a factory: it is called without arguments and returns a function that gets the model. With the model
at hand, embeddings and the output head can be told from the matrices that are to be projected; a class with settings,
``optimizer_cls_and_kwargs=(GaLore, {...})``, would only see two lists of parameters.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from subspan.optim import GaLore, LowRankOptimizer


def build_optimizer(model: nn.Module, **settings: float) -> LowRankOptimizer:
    """Build the optimizer and show what it projects."""
    optimizer = GaLore(model, **settings)
    print(optimizer.table())
    return optimizer


def main() -> None:
    """Train a small LLaMA on the bytes of a text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, default=Path(__file__))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", default="runs/hf_trainer")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    tokens = torch.frombuffer(bytearray(arguments.text.read_bytes()), dtype=torch.uint8).long()
    sequences = tokens[: tokens.numel() // 64 * 64].view(-1, 64)
    dataset = [{"input_ids": ids, "labels": ids} for ids in sequences]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=arguments.output,
            max_steps=arguments.steps,
            per_device_train_batch_size=8,
            learning_rate=0.01,
            lr_scheduler_type="cosine",
            logging_steps=max(1, arguments.steps // 10),
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),
        ),
        train_dataset=dataset,
        optimizer_cls_and_kwargs=(lambda: build_optimizer, {"lr": 0.01, "rank": 16, "update_proj_gap": 50}),
    )
    trainer.train()


if __name__ == "__main__":
    main()
