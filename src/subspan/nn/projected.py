"""Linear layers whose weight gradient is never formed: backward computes its projection.

For y = xWᵀ + b with x (b, in) and dY (b, out) the gradient of W is G = dYᵀx. A step needs R = QᵀG, a refresh the
sketch GΩ. Both are products of thin matrices: with the output side projected R = (dY·Q)ᵀx and GΩ = dYᵀ(xΩ), with the
input side R = (xQ)ᵀdY and GᵀΩ = xᵀ(dY·Ω). That saves the product dYᵀx, a third of a layer's work, and the gradient's
memory. With the input side projected, xQ (b, r) is kept for backward instead of x (b, in) while no refresh is due.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from subspan.nn.quantised import Int8Conv1D, Int8Linear, is_conv1d
from subspan.optim import LowRankOptimizer
from subspan.optim.names import canonical_name
from subspan.optim.slots import GradientSlots, Reader

__all__ = ["SAME_INPUT", "ProjectedConv1D", "ProjectedLinear", "ProjectedProduct", "project_gradients"]


#: Names of layers beside each other that have the same input, in the models of Hugging Face and their ancestors.
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))


def project_gradients(model: nn.Module, optimizer: LowRankOptimizer, *, share_inputs: bool = False) -> list[str]:
    """Let the linear layers of a model compute projected gradients in place of whole ones.

    ``nn.Linear`` and the ``Conv1D`` of Hugging Face whose weights ``optimizer`` projects become `ProjectedLinear` and
    `ProjectedConv1D`, in place: parameters, names and ``state_dict`` stay as they are. Other projected parameters
    (experts, convolutions, subclasses with a forward of their own) are folded as `fuse_into_backward` does, which this
    calls. Without its optimizer, in a copy, and frozen, a layer is an ordinary one again. A second call changes nothing
    but what was not converted or shared before.

    With more than one process call `subspan.distributed.exclude_from_ddp` then.

    Accumulation, checkpointing, autocast and ``torch.compile`` work as ever (compile with ``stagger=False``: a refresh
    changes the graph of its layer). Clip with ``optimizer.clip_grad_norm_``: the norm is that of the projections.

    Args:
        model: the model whose parameters the optimizer holds.
        optimizer: GaLore, Q-GaLore or GoLore; their refreshes become late ones.
        share_inputs: layers beside each other that have the same input (by their names, `SAME_INPUT`), with the input
            side projected, share a basis, so that xQ is computed and kept once. They train as one wide layer would.
            Layers of different groups, sides or dtypes do not share.

    Returns:
        Names of the weights whose gradients are not formed any more.

    Raises:
        ValueError: a method that needs the gradients, another model, no layer that can be converted, or none that can
            share a basis.
        RuntimeError: another optimizer takes the gradients.

    Example:
        >>> from subspan.optim import GaLore
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
        >>> optimizer = GaLore(model, rank=4)
        >>> project_gradients(model, optimizer)
        ['0.weight', '2.weight']
        >>> model(torch.randn(8, 32)).square().mean().backward()
        >>> model[0].weight.grad is None
        True
        >>> optimizer.step()

    Source: the projected activations are those of CompAct, arXiv 2410.15352; the cost of 4bmn is that of GoLore's
    ReLoRA-like implementation, arXiv 2410.11289.
    """
    projected = optimizer.projected_parameters()
    converted = []
    for prefix, module in model.named_modules():
        name = canonical_name(f"{prefix}.weight" if prefix else "weight")
        kind = _KINDS.get(type(module)) or (ProjectedConv1D if is_conv1d(module) else None)
        if kind is None or name not in projected or not module.weight.requires_grad:
            continue
        if module.weight is not projected[name]:
            raise ValueError(
                f"{name}: the optimizer holds another parameter of this name: pass the model that it was built for"
            )
        slots = optimizer.attach_slots(name)
        if slots is not None:
            module.gradient_slots = slots
            module.__class__ = kind
            converted.append(name)
    if not converted:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear or Conv1D whose weight {type(optimizer).__name__} projects below "
            "full rank: pass the model that the optimizer was built for, or a lower rank"
        )
    if share_inputs:
        together = _with_one_input(model, optimizer, converted)
        if not together:
            raise ValueError(
                f"share_inputs=True, but {type(model).__name__} has no layers beside each other that could share a "
                f"basis: their names have to be those of SAME_INPUT ({', '.join(SAME_INPUT[0])}, ...), their input "
                "sides projected (proj_type) and their group the same; leave share_inputs out"
            )
        for names in together:
            optimizer.share_basis(names)
    return converted


def _with_one_input(model: nn.Module, optimizer: LowRankOptimizer, converted: list[str]) -> list[list[str]]:
    """Names of the weights that can share a basis: layers of `SAME_INPUT` whose input sides are projected alike."""
    groups = {weight: number for number, group in enumerate(optimizer.param_groups) for weight in group["params"]}
    found = []
    for prefix, parent in model.named_modules():
        for together in SAME_INPUT:
            alike: dict[tuple[Any, ...], list[str]] = {}
            for child in together:
                layer: Any = getattr(parent, child, None)
                name = canonical_name(f"{prefix}.{child}.weight".lstrip("."))
                if name in converted and _projects_input(layer):
                    weight, shape = layer.weight, layer.gradient_slots.reader.basis.shape
                    alike.setdefault((groups[weight], shape, weight.dtype, weight.device), []).append(name)
            found += [names for names in alike.values() if len(names) > 1]
    return found


def _projects_input(layer: Any) -> bool:
    return bool(layer.gradient_slots.right) == isinstance(layer, ProjectedLinear)


class ProjectedLinear(Int8Linear):
    """A linear layer that leaves QᵀG in slots of the optimizer; made by `project_gradients`."""

    gradient_slots: GradientSlots

    def forward(self, input: Tensor) -> Tensor:
        """xWᵀ + b."""
        if not _projects(self.weight, self.gradient_slots):
            return super().forward(input)
        return _apply(input, self.weight, self.bias, self.gradient_slots, self.gradient_slots.right)


class ProjectedConv1D(Int8Conv1D):
    """Hugging Face's ``Conv1D``, a linear layer with the weight transposed, in the same way."""

    gradient_slots: GradientSlots
    bias: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """The product xW + b."""
        weight = self.weight.mT
        if not _projects(self.weight, self.gradient_slots):
            return nn.functional.linear(input, weight, self.bias)
        return _apply(input, weight, self.bias, self.gradient_slots, not self.gradient_slots.right)


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    **dict.fromkeys((nn.Linear, Int8Linear, ProjectedLinear), ProjectedLinear),
    **dict.fromkeys((Int8Conv1D, ProjectedConv1D), ProjectedConv1D),
}


def _projects(weight: Tensor, slots: GradientSlots) -> bool:
    return slots.active and weight.requires_grad and torch.is_grad_enabled()


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None, slots: GradientSlots, input_side: bool) -> Tensor:
    device, given = x.device.type, x
    # Without a graph to the weight: its gradient goes to the slots alone.
    weight = weight.detach()
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        xQ = _coordinates(x, given, slots) if input_side and slots.key is None else None
        return ProjectedProduct.apply(  # type: ignore[no-any-return]
            x, bias, slots.key, slots.projected, slots.sketch, input_side, slots.reader, None, xQ, weight, *slots.held
        )


def _coordinates(x: Tensor, given: Tensor, slots: GradientSlots) -> Tensor:
    """The product xQ (b, r), the same tensor for all layers that share Q and are ``given`` the same input."""
    if slots.shared is None or torch.compiler.is_compiling() or given.is_inference():
        with torch.no_grad():
            return x @ slots.basis.to(x.dtype)
    return slots.shared.take(given, x, slots)


class ProjectedProduct(torch.autograd.Function):
    """xWᵀ + b, or x(W + s·ΔW)ᵀ + b, whose backward gives R to one leaf, and the sketch to another.

    With a scale s the leaf of R is a factor T (r, k) itself, and ΔW = QT, or its transpose with the input side
    projected: a low-rank adapter whose one factor is frozen. Its gradient is s·R: projecting a gradient and training
    such an adapter are the same. Without a scale the leaf stands for T = 0, which an optimizer has merged already.

    What is coded is decoded and a test matrix drawn where they are used, and neither is kept from forward to backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        key: Tensor | None,
        projected: Tensor,
        sketch: Tensor | None,
        input_side: bool,
        reader: Reader,
        scale: float | None,
        coordinates: Tensor | None,
        *held: Tensor,
    ) -> Tensor:
        ctx.input_side, ctx.has_bias, ctx.reader, ctx.scale = input_side, bias is not None, reader, scale
        weight, behind = reader.read_weight(held, x.dtype)
        y = nn.functional.linear(x, weight, bias)
        if scale is not None:
            basis, T = reader.read_basis(behind).to(x.dtype), projected.to(x.dtype)
            thin = x @ (basis if input_side else T.mT)
            second = T if input_side else basis.mT
            y.view(-1, y.shape[-1]).addmm_(thin.view(-1, thin.shape[-1]), second, alpha=scale)
            coordinates = thin if input_side and key is None else None
        ctx.is_projected = coordinates is not None
        if ctx.is_projected and scale is None:
            ctx.save_for_backward(coordinates, None, None, *held[: len(held) - len(behind)])
        else:
            ctx.save_for_backward(
                coordinates if ctx.is_projected else x, None if scale is None else projected, key, *held
            )
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        kept, T, key, *held = ctx.saved_tensors
        scale, input_side, reader = ctx.scale, ctx.input_side, ctx.reader
        with torch.autocast(dY.device.type, enabled=False):
            weight, behind = reader.read_weight(held, dY.dtype)
            dX = dY @ weight if ctx.needs_input_grad[0] else None
            del weight
            rows = dY.reshape(-1, dY.shape[-1])
            bias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[1] else None
            x, sketch = kept.reshape(-1, kept.shape[-1]), None
            basis: Any = None if ctx.is_projected and scale is None else reader.read_basis(behind).to(rows.dtype)
            thin: Any = None if input_side else rows @ basis
            if dX is not None and scale is not None:
                T = T.to(rows.dtype)
                first, second = (rows @ T.mT, basis.mT) if input_side else (thin, T)
                dX.view(-1, dX.shape[-1]).addmm_(first, second, alpha=scale)
            if ctx.is_projected:
                R = x.mT @ rows
            else:
                R = (x @ basis).mT @ rows if input_side else thin.mT @ x
                if key is not None:
                    left, right = (x, rows) if input_side else (rows, x)
                    sketch = reader.sketch(key, behind, left, right)
            if scale is not None:
                R *= scale
        return dX, bias, None, R, sketch, *(None for _ in ctx.needs_input_grad[5:])
