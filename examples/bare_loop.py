"""A low-rank optimizer in a training loop of one's own: a small transformer learns to add.

    python examples/bare_loop.py --steps 400

Nothing but torch is needed.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from subspan.optim import GaLore, param_groups


class Adder(nn.Module):
    """Reads two numbers of three digits and tells the four digits of their sum."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.position = nn.Parameter(torch.randn(6, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.digits = nn.Linear(6 * width, 4 * 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits (batch, 4, 10) of the digits of the sum."""
        hidden = self.encoder(self.embedding(ids) + self.position)
        return self.digits(hidden.flatten(1)).unflatten(1, (4, 10))


def digits(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """Return the decimal digits of each number, the last one first."""
    return torch.stack([numbers // 10**place % 10 for place in range(count)], dim=1)


def main() -> None:
    """Train and print the loss."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    model = Adder()
    # The matrices of attention and MLP are projected; embeddings, the head, biases and norms are not.
    targets = ["self_attn", "linear1", "linear2"]
    groups = param_groups(model, rank=arguments.rank, target_modules=targets, scale=1.0, update_proj_gap=50)
    optimizer = GaLore(groups, lr=5e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    print(optimizer.table())

    for step in range(1, arguments.steps + 1):
        first, second = torch.randint(0, 1000, (2, 128))
        logits = model(torch.cat([digits(first, 3), digits(second, 3)], dim=1))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), digits(first + second, 4).flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % max(1, arguments.steps // 10) == 0:
            print(f"step {step}  loss {loss.item():.4f}")
    print(f"optimizer state: {sum(optimizer.state_bytes().values()):,} bytes")


if __name__ == "__main__":
    main()
