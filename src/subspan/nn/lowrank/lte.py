"""LoRA-the-Explorer: heads that train apart, each on its own share of the data, and are merged by averaging."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from subspan.nn.lowrank.heads import HeadsLinear, HeadsWeights, MultiHeadLoRA, rows_of
from subspan.nn.lowrank.layer import add_product_, replace_module
from subspan.nn.lowrank.replicas import Batch, Replicas, replicate
from subspan.nn.lowrank.select import select_layers

__all__ = ["LTE", "LTEWeights", "ParallelHeadsLinear"]


class ParallelHeadsLinear(HeadsLinear):
    """Heads of which each sees its own share of a batch, with the weight W + Dₙ − Dₙ', where Dₙ = s·BₙᵀAₙ.

    Dₙ' is what of head n is in W already: Dₙ as it was at the last merge. In evaluation all sequences see the mean of
    the heads.

    Args:
        layer: the linear layer.
        rank, scale: r and s of each head.
        batch: how batches are divided, and how many heads there are here.
        reset: heads begin anew after each merge, so that there is no Dₙ'.
        own_bias: whether each head trains a bias of its own.

    Attributes:
        merged_A, merged_B: the factors of Dₙ'.
    """

    merged_A: Tensor | None
    merged_B: Tensor | None

    def __init__(self, layer: nn.Module, *, rank: int, scale: float, batch: Batch, reset: bool, own_bias: bool) -> None:
        super().__init__(layer, heads=batch.heads, rank=rank, scale=scale)
        self.batch = batch
        self.register_buffer("merged_A", None if reset else torch.empty_like(self.lora_A.detach()))
        self.register_buffer("merged_B", None if reset else torch.zeros_like(self.lora_B.detach()))
        if own_bias and self.bias is not None:
            self.bias = nn.Parameter(self.bias.detach().expand(batch.heads, -1).clone(), self.bias.requires_grad)

    @torch.no_grad()
    def reset_(self, generator: torch.Generator) -> None:
        """Aₙ orthogonal times √(in/r), Bₙ = 0, each head drawn as it is where one process has all."""
        self._reset(generator, range(self.batch.first, self.batch.first + self.heads))
        self.remember()

    @torch.no_grad()
    def remember(self) -> None:
        """What the heads are now is in W."""
        if self.merged_A is not None and self.merged_B is not None:
            self.merged_A.copy_(self.lora_A)
            self.merged_B.copy_(self.lora_B)

    def news(self) -> tuple[Tensor, Tensor]:
        """Factors L (k, out) and R (k, in) of Σ(Dₙ − Dₙ') = s·LᵀR."""
        A, B = _stacked(self.lora_A, self.lora_B, self.merged_A, self.merged_B)
        return B.flatten(0, 1), A.flatten(0, 1)

    def effective_weight(self) -> Tensor:
        """W and the mean of what the heads have found since the last merge."""
        L, R = self.news()
        return torch.addmm(self.W.float(), L.float().mT, R.float(), alpha=self.scale / self.heads)

    def dense(self) -> nn.Module:
        layer: Any = super().dense()
        if (bias := self.mean_bias()) is not None:
            layer.bias = nn.Parameter(bias)
        return layer  # type: ignore[no-any-return]

    def embed(self, ids: Tensor, embedding: nn.Embedding) -> Tensor:
        """Rows of the weight of each head, for an embedding that is tied to this layer."""
        A, B = _stacked(self.lora_A, self.lora_B, self.merged_A, self.merged_B)
        if not self.training:
            return rows_of(ids, self.weight, A.flatten(0, 1), B.flatten(0, 1), self.scale / self.heads, embedding)
        self.batch.check(ids)
        shares = zip(ids.chunk(self.heads), A, B, strict=True)
        return torch.cat([rows_of(part, self.weight, a, b, self.scale, embedding) for part, a, b in shares])

    def mean_bias(self) -> Tensor | None:
        """The mean of the heads' own biases; None where they have none."""
        return None if self.bias is None or self.bias.ndim == 1 else self.batch.mean(self.bias.detach().unbind())

    def forward(self, input: Tensor) -> Tensor:
        """Each share of the batch times the weight of its head."""
        x, bias = input, cast(Tensor | None, self.bias)
        if not self.training:
            L, R = self.news()
            return self._sum(x, R, L, bias if bias is None or bias.ndim == 1 else self.mean_bias())
        self.batch.check(x)
        device = x.device.type
        parts: list[Any] = [x, self.W, self.lora_A, self.lora_B, self.merged_A, self.merged_B]
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            parts = [None if part is None else part.to(dtype) for part in parts]
            bias = None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            y = _ParallelProduct.apply(*parts, self.scale)
            if bias is None:
                return y  # type: ignore[no-any-return]
            if bias.ndim == 1:
                return y + bias  # type: ignore[no-any-return]
            return (y.view(self.heads, -1, self.out_features) + bias.unsqueeze(1)).view(y.shape)  # type: ignore[no-any-return]


def _stacked(A: Tensor, B: Tensor, merged_A: Tensor | None, merged_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """[A A'] (N, k, in) and [B −B'] (N, k, out)."""
    if merged_A is None or merged_B is None:
        return A, B
    return torch.cat([A, merged_A], 1), torch.cat([B, -merged_B], 1)


class _ParallelProduct(torch.autograd.Function):
    """xₙ(W + s·BₙᵀAₙ − s·B'ₙᵀA'ₙ)ᵀ; what is merged takes part as more directions, and gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, merged_A: Tensor | None, merged_B: Tensor | None, s: float
    ) -> Tensor:
        ctx.scale = s
        As, Bs = _stacked(A, B, merged_A, merged_B)
        rows = x.reshape(A.shape[0], -1, x.shape[-1])
        H = rows @ As.mT
        y = (rows.flatten(0, 1) @ W.mT).view(*rows.shape[:2], -1).baddbmm_(H, Bs, alpha=s)
        ctx.save_for_backward(x, W, H[..., : A.shape[1]] if merged_A is not None else H, As, Bs)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, W, H, As, Bs = ctx.saved_tensors
        rank, s = H.shape[-1], ctx.scale
        with torch.autocast(dY.device.type, enabled=False):
            dy, rows = (t.reshape(As.shape[0], -1, t.shape[-1]) for t in (dY, x))
            dH = (dy @ Bs.mT).mul_(s)
            dX = None
            if ctx.needs_input_grad[0]:
                dX = (dy.flatten(0, 1) @ W).view(rows.shape).baddbmm_(dH, As).view(x.shape)
            gA = dH[..., :rank].mT @ rows
            gB = (H.mT @ dy).mul_(s)
            gW = dy.flatten(0, 1).mT @ rows.flatten(0, 1) if ctx.needs_input_grad[1] else None
        return dX, gW, gA, gB, None, None, None


class LTEWeights(HeadsWeights):
    """Merges the heads every T steps.

    Args:
        recipe: settings.
        batch: how batches are divided.
        replicas: the copies of what has no heads, by name.
        **kwargs: see `HeadsWeights`.
    """

    def __init__(self, recipe: LTE, batch: Batch, replicas: dict[str, Replicas], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recipe, self.batch, self.replicas = recipe, batch, replicas
        self._hook = self.model.register_forward_pre_hook(batch.see, with_kwargs=True)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """With several processes make gradients those of the mean loss of all heads, as they are where one has all."""
        if self.batch.processes == 1:
            return
        alone, shared = self._gradients()
        for gradient in itertools.chain(shared, *alone):
            gradient.div_(self.batch.processes)
        for gradient in shared:
            dist.all_reduce(gradient)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradients of each head's own loss by their norm, and those of what is shared by theirs.

        Returns:
            Root mean square of the heads' norms before.
        """
        alone, shared = self._gradients()
        # Of the mean loss a head's gradient is an N-th of that of its own.
        norms = [self.batch.total * _clip(part, max_norm / self.batch.total) for part in alone]
        _clip(shared, max_norm)
        squares = torch.stack(norms).square().sum()
        if self.batch.processes > 1:
            dist.all_reduce(squares)
        return (squares / self.batch.total).sqrt()

    def _gradients(self) -> tuple[list[list[Tensor]], list[Tensor]]:
        """The gradients of each head, slices of those that heads have together, and those of what is shared."""
        alone: list[list[Tensor]] = [[] for _ in range(self.batch.heads)]
        taken = set()
        for layer in self.layers.values():
            own_bias = [layer.bias] if layer.bias is not None and layer.bias.ndim > 1 else []
            for parameter in (*layer.factors().values(), *own_bias):
                taken.add(parameter)
                if parameter.grad is not None:
                    for part, gradient in zip(alone, parameter.grad, strict=True):
                        part.append(gradient)
        for replicas in self.replicas.values():
            for part, module in zip(alone, replicas.copies.values(), strict=True):
                own = [parameter for parameter in module.parameters() if parameter not in taken]
                taken.update(own)
                part += [parameter.grad for parameter in own if parameter.grad is not None]
        rest = (parameter for parameter in self.model.parameters() if parameter not in taken)
        return alone, [parameter.grad for parameter in rest if parameter.grad is not None]

    def end_step(self, step: int, optimizer: torch.optim.Optimizer) -> list[str]:
        """Merge, after every T-th step."""
        if (step + 1) % self.recipe.merge_every:
            return []
        self.merge_heads(step, optimizer)
        return [f"merge {(step + 1) // self.recipe.merge_every}: {self.batch.total} heads averaged"]

    @torch.no_grad()
    def merge_heads(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """W <- W + (1/N)·Σ(Dₙ − Dₙ'), and the mean of all else."""
        for name, layer in self.layers.items():
            assert isinstance(layer, ParallelHeadsLinear)
            key = None
            if self.recipe.rounding == "stochastic":
                key = torch.randint(1 << 62, (), generator=self.generator(f"{name}.weight", step))
            L, R = layer.news()
            L, R = self.batch.gather(L), self.batch.gather(R)
            add_product_(layer.W, L.mT, R, alpha=layer.scale / self.batch.total, key=key)
            if self.recipe.reset:
                layer.reset_(self.generator(name, step))
                for parameter in layer.factors().values():
                    optimizer.state.pop(parameter, None)
            layer.remember()
            if (bias := layer.mean_bias()) is not None and layer.bias is not None:
                layer.bias.copy_(bias)
        for replicas in self.replicas.values():
            replicas.average_()

    def merge(self) -> list[str]:
        """Turn the model into an ordinary one that computes what this one does in evaluation."""
        names = super().merge()
        self._hook.remove()
        for name, replicas in self.replicas.items():
            replicas.average_()
            replace_module(self.model, name, next(iter(replicas.copies.values())))
        return names


def _clip(gradients: list[Tensor], max_norm: float) -> Tensor:
    """Clip by the norm of all, which is returned."""
    if not gradients:
        return torch.zeros(())
    norm = nn.utils.get_total_norm(gradients)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))
    return norm


@dataclass(frozen=True)
class LTE(MultiHeadLoRA):
    """LoRA-the-Explorer: parallel heads, each on its own share of every batch, averaged every T steps.

    Head n trains with the weight W + Dₙ − Dₙ', Dₙ = s·BₙAₙ, on its share; every ``merge_every`` steps
    W <- W + (1/N)·Σ(Dₙ − Dₙ') in float32 and Dₙ' = Dₙ, so that every head starts from the same W and keeps its factors
    and moments. With ``reset`` Bₙ = 0, Aₙ is drawn anew and the moments are forgotten instead. What has no heads
    (embeddings, norms, biases, heads of the model that are not replaced) is trained as N copies, averaged too.

    The batch of a step is divided into N equal shares. Weight decay acts on Dₙ and not on Dₙ', so on W too.

    Args:
        heads, rank, alpha: see `MultiHeadLoRA`.
        merge_every: T.
        reset: begin anew after each merge.
        others: ``replicated``, or ``shared``: one copy of what has no heads, trained on the whole batch.
        rounding: of merges into bfloat16 weights: ``nearest`` loses small ones, ``stochastic`` keeps them in the mean.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
        >>> weights = LTE(heads=2, rank=4, merge_every=1).apply(model)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.randn(8, 16)).square().mean().backward()
        >>> optimizer.step()
        >>> weights.end_step(0, optimizer)
        ['merge 1: 2 heads averaged']

    Source: arXiv 2402.16828.
    """

    name: ClassVar[str] = "lte"
    title: ClassVar[str] = "LoRA-the-Explorer"
    summary: ClassVar[str] = "parallel heads on shares of the data, merged by averaging"

    merge_every: int = 10
    reset: bool = False
    others: Literal["replicated", "shared"] = "replicated"
    rounding: Literal["nearest", "stochastic"] = "stochastic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge_every < 1:
            raise ValueError(f"merge_every is {self.merge_every!r}; it must be at least 1.")
        for name, allowed in (("others", ("replicated", "shared")), ("rounding", ("nearest", "stochastic"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {' or '.join(allowed)}.")

    def apply(
        self,
        model: nn.Module,
        *,
        target_modules: str | Sequence[str] = "all-linear",
        exclude: str | Sequence[str] = (),
        steps: int | None = None,
        seed: int = 0,
    ) -> LTEWeights:
        """Replace linear layers by `ParallelHeadsLinear`, and what has no heads by `Replicas`."""
        batch = Batch(self.heads)
        layers, embeddings = self.replace(
            model,
            select_layers(model, target_modules, exclude),
            lambda module: ParallelHeadsLinear(
                module,
                rank=self.rank,
                scale=self.alpha / self.rank,
                batch=batch,
                reset=self.reset,
                own_bias=self.others == "replicated",
            ),
        )
        replicas = replicate(model, batch) if self.others == "replicated" else {}
        weights = LTEWeights(self, batch, replicas, model=model, layers=layers, embeddings=embeddings, seed=seed)
        weights.begin()
        return weights
