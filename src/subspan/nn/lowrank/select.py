"""Which linear layers of a model get weights of low rank: by name, or as attention, MLP and logit layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from subspan.nn.quantised import is_conv1d
from subspan.optim import param_groups
from subspan.optim.names import canonical_name
from subspan.optim.param_groups import output_heads

__all__ = ["KINDS", "check_own", "check_rank", "check_untied", "layer_kind", "select_layers"]

#: Words that ``target_modules`` may join with ``+``, with parts of the names of such modules.
KINDS = {
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "ffn", "feed_forward", "feedforward"),
    "logit": (),
}


def layer_kind(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """``attention``, ``mlp`` or ``logit``: what a linear layer of a transformer belongs to; None for other layers.

    Example:
        >>> layer_kind(nn.Module(), "model.layers.0.self_attn.q_proj", nn.Linear(4, 4))
        'attention'
    """
    if getattr(module, "weight", None) in output_heads(model):
        return "logit"
    return next((kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts)), None)


def select_layers(
    model: nn.Module, target_modules: str | Sequence[str] = "all-linear", exclude: str | Sequence[str] = ()
) -> dict[str, nn.Module]:
    """The linear layers of a model that are meant, by name.

    Args:
        model: the model.
        target_modules: ``all-linear`` (heads are not in it), a regular expression, or a list of parts of names, as for
            `subspan.optim.param_groups`; or some of ``attention``, ``mlp`` and ``logit`` joined by ``+``.
        exclude: names that are left out, as there.

    Raises:
        ValueError: nothing is meant, or something that is no linear layer.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
        >>> [name.rpartition(".")[2] for name in select_layers(model, "mlp+logit")]
        ['gate_proj', 'up_proj', 'down_proj', 'lm_head']
    """
    modules = {name: module for name, module in model.named_modules() if _is_plain(module)}
    words = target_modules.split("+") if isinstance(target_modules, str) else []
    if len(words) > 1 and any(word in KINDS for word in words):
        for word in words:
            if word.isidentifier() and word not in KINDS:
                raise ValueError(f"target_modules={target_modules!r}: {word!r} is none of {', '.join(KINDS)}")
    if words and all(word in KINDS for word in words):
        chosen = [name for name, module in modules.items() if layer_kind(model, name, module) in words]
        for word in words:
            if not any(layer_kind(model, name, modules[name]) == word for name in chosen):
                raise ValueError(
                    f"target_modules={target_modules!r}: {type(model).__name__} has no linear layer that is "
                    f"recognised as {word}; name its layers, or give a regular expression"
                )
        if exclude:
            out = _named(model, modules, ".*", exclude)
            chosen = [name for name in chosen if name in out]
    else:
        chosen = _named(model, modules, target_modules, exclude)
    if not chosen:
        raise ValueError(
            f"target_modules={target_modules!r}, exclude={exclude!r} leave no linear layer of {type(model).__name__}; "
            "only nn.Linear and Conv1D can have weights of low rank"
        )
    return {name: modules[name] for name in chosen}


def check_rank(rank: int, chosen: Mapping[str, Any]) -> None:
    """Refuse a rank above a side of one of the chosen matrices: it would only be more to keep and to multiply.

    Raises:
        ValueError: naming the layer, and the largest rank that fits all.
    """
    shapes = {name: tuple(module.weight.shape) for name, module in chosen.items()}
    most = min(side for shape in shapes.values() for side in shape)
    for name, shape in shapes.items():
        if rank > min(shape):
            raise ValueError(
                f"rank is {rank}, but {name or 'the layer'} is a matrix {shape}; lower the rank, or exclude it "
                f"({most} is the largest rank that fits all layers that are chosen)"
            )


def check_untied(model: nn.Module, chosen: dict[str, nn.Module], allowed: Collection[str] = ()) -> None:
    """Refuse layers whose matrix is also another's: without it they would be tied in the configuration alone.

    Args:
        model: the model.
        chosen: the layers by name.
        allowed: names of parameters that they may be tied to.

    Raises:
        ValueError: there is one; both are named.
    """
    for name, others in _ties(model, chosen).items():
        if others := [other for other in others if other not in allowed]:
            raise ValueError(
                f"{_weight(name)} is tied to {', '.join(others)}, which cannot be given up for factors; untie them "
                "(tie_word_embeddings=False), or name the layer in exclude"
            )


def check_own(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """Refuse layers whose matrix is also another's, into which factors are to be merged.

    Raises:
        ValueError: there is one; both are named.
    """
    for name, others in _ties(model, chosen).items():
        raise ValueError(
            f"{name or 'the layer'} shares its weight with {', '.join(others)}: what is merged into it would change "
            "them too, or part it from them; leave it out with exclude, or untie the weights "
            "(tie_word_embeddings=False)"
        )


def _ties(model: nn.Module, chosen: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Of chosen layers whose weights are parameters elsewhere too: their names there."""
    owners: dict[Any, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    ties = {name: [o for o in owners[module.weight] if o != _weight(name)] for name, module in chosen.items()}
    return {name: others for name, others in ties.items() if others}


def _weight(name: str) -> str:
    """Name of the weight of a layer."""
    return f"{name}.weight" if name else "weight"


def _named(
    model: nn.Module, modules: dict[str, nn.Module], target: str | Sequence[str], exclude: str | Sequence[str]
) -> list[str]:
    groups = param_groups(model, rank=1, target_modules=target, exclude=exclude)
    names = {name for name, _ in groups[0]["params"]}
    return [name for name in modules if canonical_name(_weight(name)) in names]


def _is_plain(module: nn.Module) -> bool:
    """Whether this is a linear layer that does no more than multiply by its weight."""
    return type(module) is nn.Linear or is_conv1d(module)
