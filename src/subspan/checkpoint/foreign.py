"""Optimizer states of galore-torch and apollo-torch, which hold objects, read without running any code of theirs."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspan.optim import APOLLO, GaLore, LowRankOptimizer, param_groups
from subspan.optim.matrix import projects_right

__all__ = ["PACKAGES", "foreign_optimizer"]

PACKAGES = ("galore-torch", "apollo-torch")
_PROJECTORS = (
    "galore_torch.galore_projector.GaLoreProjector",
    "apollo_torch.svd_projector.GaLoreProjector",
    "apollo_torch.random_projector.GradientProjector",
)


class _Projector:
    """Stands for the projector of another package: its attributes, and nothing that it does."""


def read_foreign(file: Path) -> dict[str, Any]:
    """The state dict of an optimizer in a file of `torch.save`.

    torch's restricted unpickler reads it, which builds tensors and plain containers and refuses whatever else a pickle
    asks for. The one more thing that it may build here is an object without methods for each projector.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, or one that asks for anything else.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; give the file with the optimizer's state, such as optimizer.pt"
        )
    if not zipfile.is_zipfile(file):
        raise ValueError(
            f"{file} is no file of torch.save in its present format; save the state again with torch >= 1.6"
        )
    # torch looks an object's class up under the name that the pickle has.
    allowed: list[Any] = [(type("_Projector", (_Projector,), {}), name) for name in _PROJECTORS]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(file, map_location="cpu", weights_only=True)
    # What a damaged pickle makes it stumble over is of any kind.
    except Exception as error:
        reason = str(error).strip().splitlines()
        asked = next(
            (line.strip() for line in reason if "GLOBAL" in line or "global" in line), reason[0] if reason else ""
        )
        raise ValueError(f"{file} is refused, since it asks for more than tensors and projectors: {asked}") from error
    if isinstance(content, Mapping) and "optimizer" in content:
        content = content["optimizer"]
    if not isinstance(content, Mapping) or not {"state", "param_groups"} <= content.keys():
        raise ValueError(f"{file} holds no state of an optimizer: 'state' and 'param_groups' are expected")
    return dict(content)


def foreign_optimizer(
    file: str | Path, package: str, model: nn.Module, target_modules: str | list[str] = "all-linear"
) -> LowRankOptimizer:
    """An optimizer of subspan that goes on where one of another package has stopped.

    It has the settings of the other one, and the parts with which it computes the same: exact SVD at the same steps for
    GaLore, ε before bias correction, weight decay after the step (before it for APOLLO). The subspaces in force are
    kept. The next ones differ: singular vectors have subspan's signs, and APOLLO's matrices come from its own seed.

    These files know parameters by their place. So ``model`` must have its parameters in the order in which the other
    optimizer got them: its projected ones in the order of the modules, the others in that of ``model.parameters()``, as
    the scripts of these packages and the Trainer of transformers do. Every shape is compared.

    Args:
        file: of `torch.save`, with a state dict or a dict that has one under ``optimizer``.
        package: ``galore-torch`` or ``apollo-torch``.
        model: with the weights of the same moment.
        target_modules: which matrices were projected, as for `param_groups`.

    Returns:
        The optimizer, for `save_checkpoint` or for training.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, states in 8 bits, or parameters that are not those of ``model``.
    """
    if package not in PACKAGES:
        raise ValueError(f"from={package!r} is not known; choose one of {', '.join(PACKAGES)}")
    saved = read_foreign(Path(file))
    try:
        return _optimizer(saved, package, model, target_modules)
    except ValueError as error:
        raise ValueError(f"{file} cannot be converted: {error}") from error
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{file} is not as {package} writes it ({type(error).__name__}: {error}); which optimizer wrote it?"
        ) from error


def _optimizer(
    saved: dict[str, Any], package: str, model: nn.Module, target_modules: str | list[str]
) -> LowRankOptimizer:
    projecting = [group for group in saved["param_groups"] if "rank" in group]
    if len(projecting) != 1:
        raise ValueError(f"it has {len(projecting)} groups with a rank; one is expected")
    low = projecting[0]
    targets = [name for name, _ in param_groups(model, rank=1, target_modules=target_modules)[0]["params"]]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = [name for name in parameters if name not in set(targets)]
    groups: list[dict[str, Any]] = []
    names: dict[int, str] = {}
    for group in saved["param_groups"]:
        pool = targets if group is low else others
        count = len(group["params"])
        if count > len(pool):
            raise ValueError(
                f"it has {count} parameters {'with a rank' if group is low else 'without one'} where the model has "
                f"{len(pool)} left; is target_modules={target_modules!r} what was projected?"
            )
        names |= dict(zip(group["params"], pool, strict=False))
        if not group.get("correct_bias", True):
            raise ValueError("correct_bias=False is not converted: the moments of subspan's optimizers are corrected")
        settings = {key: group[key] for key in ("lr", "eps", "weight_decay")} | {"betas": tuple(group["betas"])}
        if group is low:
            settings |= {key: group[key] for key in ("rank", "update_proj_gap", "scale", "proj_type")}
        groups.append({"params": [(name, parameters[name]) for name in pool[:count]], **settings})
        del pool[:count]
    if targets or others:
        raise ValueError(
            f"it has no place for {', '.join((targets + others)[:5])}; another model, or other target_modules?"
        )
    optimizer = _build(package, groups, low)
    index = {name: number for number, name in enumerate(names.values())}
    state = {
        index[names[number]]: _converted(names[number], held, parameters[names[number]], low, optimizer)
        for number, held in saved["state"].items()
        if held  # none of a parameter that never had a gradient
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return optimizer


def _build(package: str, groups: list[dict[str, Any]], low: Mapping[str, Any]) -> LowRankOptimizer:
    if package == "galore-torch":
        return GaLore(groups, svd="exact", stagger=False, eps_placement="before", decay="after")
    if low.get("proj", "random") != "random":
        raise ValueError(f"proj={low['proj']!r} is not converted; APOLLO projects with proj='random'")
    return APOLLO(groups, scale_type=low.get("scale_type", "channel"), stagger=False)


def _converted(
    name: str, held: Mapping[str, Any], parameter: Tensor, low: Mapping[str, Any], optimizer: LowRankOptimizer
) -> dict[str, Tensor]:
    """The state of one parameter, the projected side first."""
    if "state1" in held or held["exp_avg"].dtype == torch.uint8:
        raise ValueError(f"{name}: states of bitsandbytes in 8 bits are not converted")
    step = int(held["step"])
    moments = {key: held[key] for key in ("exp_avg", "exp_avg_sq")}
    state: dict[str, Tensor] = {"step": torch.tensor(float(step))}
    shape = tuple(parameter.shape)
    if "projector" in held:
        right = projects_right(shape[0], shape[1], low["proj_type"])
        basis = getattr(held["projector"], "ortho_matrix", None)
        if not isinstance(basis, Tensor):
            raise ValueError(f"{name}: its projector holds no matrix (proj_type 'full' is not converted)")
        moments = {key: value.mT if right else value for key, value in moments.items()}
        rank = min(int(low["rank"]), shape[1 if right else 0])
        shape = (rank, shape[0 if right else 1])
        gap = int(low["update_proj_gap"])
        refreshes = max(1, -(-step // gap))
        state["basis"] = (basis.mT if right else basis).float().contiguous()
        state["refreshes"], state["next_refresh"] = torch.tensor(refreshes), torch.tensor(refreshes * gap)
        if isinstance(optimizer, APOLLO):
            norm = held.get("scaled_grad", 0.0)
            state["residual_norm"] = torch.as_tensor(norm, dtype=torch.float32).reshape(())
    for key, value in moments.items():
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{name}: its {key} has shape {tuple(value.shape)} where {shape} is expected; the parameters are in "
                "another order than those of the model, or of another model"
            )
        state[key] = value.float().contiguous()
    return state
