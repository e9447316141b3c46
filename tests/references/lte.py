"""LoRA-the-Explorer (arXiv 2402.16828) with plain dense weights and one optimizer a head."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


class LTEReference:
    """N workers, each with the effective weights W + Dₙ − Dₙ' of its layers and its own copy of all else.

    Args:
        model: the dense model.
        factors: name of a layer to its first (A, B) of all heads: (N, r, in) and (N, r, out).
        scale: s.
        merge_every: T.
        lr: of AdamW, without decay.
        fresh: draws A anew after a merge, from the name, the step and the head: the reset form; None: the other.
    """

    def __init__(
        self,
        model: nn.Module,
        factors: dict[str, tuple[Tensor, Tensor]],
        *,
        scale: float,
        merge_every: int,
        lr: float,
        fresh: Callable[[str, int, int], Tensor] | None = None,
    ) -> None:
        self.scale, self.T, self.fresh, self.lr = scale, merge_every, fresh, lr
        self.N = len(next(iter(factors.values()))[0])
        self.W = {name: model.get_submodule(name).weight.detach().clone() for name in factors}
        self.workers = [copy.deepcopy(model) for _ in range(self.N)]
        self.A = [{k: a[n].clone().requires_grad_() for k, (a, _) in factors.items()} for n in range(self.N)]
        self.B = [{k: b[n].clone().requires_grad_() for k, (_, b) in factors.items()} for n in range(self.N)]
        self.before = [{k: torch.zeros_like(self.W[k]) for k in self.W} for _ in range(self.N)]
        for worker in self.workers:
            for name in self.W:
                worker.get_submodule(name).weight.requires_grad_(False)
        self.optimizers = [torch.optim.AdamW(self.trained(n), lr=lr, weight_decay=0.0) for n in range(self.N)]

    def trained(self, n: int) -> list[Tensor]:
        own = [p for p in self.workers[n].parameters() if p.requires_grad]
        return [*self.A[n].values(), *self.B[n].values(), *own]

    def D(self, n: int, name: str) -> Tensor:
        return self.scale * self.B[n][name].T @ self.A[n][name]

    def step(self, t: int, shares: list[Tensor], loss: Callable[[nn.Module, Tensor], Tensor]) -> None:
        for n in range(self.N):
            weights = {f"{k}.weight": self.W[k] + self.D(n, k) - self.before[n][k] for k in self.W}

            def call(x: Tensor, n: int = n, weights: dict[str, Tensor] = weights) -> Tensor:
                return torch.func.functional_call(self.workers[n], weights, (x,))

            (loss(call, shares[n]) / self.N).backward()
            self.optimizers[n].step()
            self.optimizers[n].zero_grad()
        if (t + 1) % self.T == 0:
            self.merge(t)

    @torch.no_grad()
    def merge(self, t: int) -> None:
        for k in self.W:
            self.W[k] += sum(self.D(n, k) - self.before[n][k] for n in range(self.N)) / self.N
            for n in range(self.N):
                self.before[n][k] = self.D(n, k)
                if self.fresh is not None:
                    self.A[n][k].copy_(self.fresh(k, t, n))
                    self.B[n][k].zero_()
                    self.before[n][k] = torch.zeros_like(self.W[k])
                    for factor in (self.A[n][k], self.B[n][k]):
                        del self.optimizers[n].state[factor]
        for same in zip(*(worker.parameters() for worker in self.workers), strict=True):
            if same[0].requires_grad:
                mean = sum(same) / self.N
                for parameter in same:
                    parameter.copy_(mean)
