"""Groups that say where the outputs of each matrix are, and which of them are the head's."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from subspan.optim.param_groups import CONVOLUTIONS, NEVER, is_transposed, output_heads, owned, param_groups

Side = Literal["rows", "columns"]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def output_groups(model: nn.Module, *, experts: Side | None = None, **grouping: Any) -> list[dict[str, Any]]:
    """The groups of `param_groups`, divided further by ``outputs``, with a momentum of 0 for all but the head.

    The outputs of a linear layer and of a convolution are the rows of its matrix (out, in); those of Hugging Face's
    ``Conv1D`` (in, out) and of an embedding (entries, width), which is a linear layer of one-hot vectors, are columns.
    A head that is tied to an embedding is a head: rows. Norms of any shape and stacks of vectors have no outputs.

    Args:
        model: the model.
        experts: where the outputs of stacks of experts are which do not say it themselves, as those of Hugging Face's
            models do: ``"rows"``: (experts, out, in), ``"columns"``: (experts, in, out).
        **grouping: settings of `param_groups`.

    Returns:
        Group dicts; ``targets``, ``others`` and ``vectors`` as there, and ``head``.

    Raises:
        ValueError: a parameter that does not tell its outputs.

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 100))
        >>> for group in output_groups(model):
        ...     print(group["name"], group["outputs"], group.get("momentum"), [name for name, _ in group["params"]])
        targets rows 0.0 ['1.weight', '2.weight']
        others columns 0.0 ['0.weight']
        head rows None ['3.weight']
        vectors None None ['1.bias', '2.bias', '3.bias']
    """
    heads = output_heads(model)
    owners: dict[nn.Parameter, nn.Module] = {}
    for _, module, parameter in owned(model):
        # Of a weight that an embedding shares with a linear layer, the linear layer is the owner.
        if parameter not in owners or not isinstance(module, _EMBEDDINGS):
            owners[parameter] = module
    divided: list[dict[str, Any]] = []
    for group in param_groups(model, **{"rank": None, **grouping}):
        kinds: dict[tuple[Side | None, bool], list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in group["params"]:
            side = _outputs(name, parameter, owners[parameter], experts)
            kinds.setdefault((side, side is not None and parameter in heads), []).append((name, parameter))
        divided += [_part(group, params, *kind) for kind, params in kinds.items()]
    return divided


def _part(
    group: dict[str, Any], params: list[tuple[str, nn.Parameter]], side: Side | None, head: bool
) -> dict[str, Any]:
    """The parameters of a group that agree in where their outputs are and in being the head."""
    part = {**group, "params": params, "outputs": side}
    if head:
        return {**part, "name": "head"}
    if side is not None:
        part.pop("moments", None)
        part["momentum"] = 0.0
    return part


def _outputs(name: str, parameter: nn.Parameter, module: nn.Module, experts: Side | None) -> Side | None:
    """Where the outputs of ``parameter`` are in its matrix; None where it is no matrix.

    Raises:
        ValueError: they cannot be known.
    """
    transposed = getattr(module, "is_transposed", None)
    if isinstance(module, _EMBEDDINGS) or is_transposed(module):
        return "columns" if parameter.ndim == 2 else None
    if parameter.ndim < 2 or isinstance(module, NEVER):
        return None
    if isinstance(module, CONVOLUTIONS):
        if parameter.ndim == 3 or module.transposed:
            kind = "transposed" if module.transposed else "1-D"
            raise ValueError(
                f"{name}: the weight of a {kind} convolution is no matrix with its outputs first, so it cannot be "
                "normalised output by output; train it with Adam: pass groups, and this one without 'outputs'"
            )
        return "rows"
    if isinstance(transposed, bool) and parameter.ndim == 2:
        return None  # the biases of Hugging Face's experts
    if parameter.ndim == 2:
        return "rows"
    if parameter.ndim > 3 or min(parameter.shape) == 1:
        return None
    if isinstance(transposed, bool):
        return "columns" if transposed else "rows"
    if experts is None:
        raise ValueError(
            f"{name}: a stack of experts of shape {tuple(parameter.shape)} does not tell inputs from outputs; set "
            "experts='rows' where it is (experts, out, in), and experts='columns' where it is (experts, in, out)"
        )
    return experts
