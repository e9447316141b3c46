"""An optimizer under random operations, a twin that is never saved, and the reference loops that both must follow."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import torch
from contract.cases import states
from references.adamw import AdamWReference
from references.apollo import APOLLOReference
from references.fira import FiraReference
from references.frugal import FRUGALReference, rows_basis
from references.galore import GaLoreReference
from references.golore import GoLoreReference
from references.parts import projects_left
from references.scale import SCALEReference
from torch import Tensor, nn

from subspan.linalg import gaussian_sketch, random_stiefel, seeded_generator
from subspan.optim import create_optimizer

NUMBERS: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-8}
SMALL = {"min_quantized": 1}
#: (method, structural settings, can gradients be folded, reference): None has no loop that follows it to rounding.
CASES: dict[str, tuple[str, dict[str, Any], bool, Callable[..., Any] | None]] = {
    "adamw": ("adamw", {}, False, AdamWReference),
    "adamw 8bit": ("adamw", {"moments": "8bit", **SMALL}, False, None),
    "galore": ("galore", {"stagger": False}, True, GaLoreReference),
    "galore staggered": ("galore", {}, True, GaLoreReference),
    "galore exact": ("galore", {"svd": "exact", "stagger": False}, False, GaLoreReference),
    "galore published": ("galore", {"svd": "exact", "eps_placement": "before", "decay": "after"}, False, None),
    "galore tolerance": ("galore", {"rank_policy": "tolerance"}, False, None),
    "galore 4bit": ("galore", {"moments": "4bit", "basis_storage": "int8", **SMALL}, True, None),
    "galore 8bit": ("galore_8bit", SMALL, True, None),
    "q_galore": ("q_galore", {**SMALL, "queue_size": 1, "cos_threshold": 0.0}, True, None),
    "golore": ("golore", {"stagger": False, "golore_after": 0}, True, GoLoreReference),
    "golore later": ("golore", {"golore_after": 3}, False, GoLoreReference),
    "fira": ("fira", {"stagger": False}, False, FiraReference),
    "fira 4bit": ("fira", {"moments": "4bit", "basis_storage": "int4", **SMALL}, False, None),
    "apollo": ("apollo", {"stagger": False}, False, APOLLOReference),
    "apollo drawn": ("apollo", {"store_basis": False}, False, APOLLOReference),
    "apollo_mini": ("apollo_mini", {}, False, APOLLOReference),
    "frugal rows": ("frugal", {"subspace": "rows"}, False, FRUGALReference),
    "frugal stiefel": ("frugal", {"subspace": "stiefel"}, False, FRUGALReference),
    "frugal blocks": ("frugal", {}, False, None),
    "scale": ("scale", {}, False, SCALEReference),
}


def steered(kind: type[GaLoreReference]) -> type[GaLoreReference]:
    """A reference whose subspaces are told to it: `told` is the one in force, `due` says that it is new."""

    class Steered(kind):  # type: ignore[valid-type, misc]
        told: Tensor
        due = False

        def refreshed(self, G: Tensor) -> Tensor:
            if self.due and self.Q is not None:
                self.carry(self.Q, self.told)
            self.Q = self.told
            return self.told

    return Steered


class Follower:
    """The reference loops of one parameter, one for each matrix of a stack."""

    refreshes = 0

    def __init__(self, kind: Callable[..., Any], method: str, p: Tensor, group: dict[str, Any]) -> None:
        self.stacked = p.ndim == 3
        numbers = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        projected = group.get("rank") is not None or group.get("density") is not None
        if kind is SCALEReference:
            self.loops = [kind(**numbers, outputs=group["outputs"], momentum=group["momentum"])]
            self.stacked = False
        elif not projected:
            self.loops = [AdamWReference(**numbers)]
            if kind is APOLLOReference:
                self.loops[0].adam.eps_placement = "before"  # as in its own space
            self.stacked = False
        else:
            shape = p.shape[1:] if p.ndim == 3 else p.flatten(1).shape
            left = projects_left(tuple(shape), group["proj_type"])
            keys = {"proj_type": group["proj_type"], "find": None} | numbers
            if kind is FRUGALReference:
                keys |= {"density": group["density"], "side": shape[0] if left else shape[1]}
            else:
                keys |= {"rank": group["rank"], "scale": group["scale"]}
            if kind is GoLoreReference:
                keys["draw"] = None
            if method == "apollo_mini":
                keys["tensor"] = True
            count = len(p) if self.stacked else 1
            self.loops = [steered(kind)(**keys) for _ in range(count)]  # type: ignore[arg-type]

    def set(self, **numbers: float) -> None:
        for loop in self.loops:
            for key, value in numbers.items():
                setattr(loop, key, value)

    def step(self, W: Tensor, G: Tensor, bases: Tensor | None, due: bool) -> Tensor:
        if bases is None:
            return self.loops[0].step(W, G)
        shape = W.shape
        W, G = (X if self.stacked else X.flatten(1).unsqueeze(0) for X in (W.double(), G.double()))
        bases = bases.double().reshape(len(W), *bases.shape[-2:])
        new = []
        for loop, w, g, Q in zip(self.loops, W, G, bases, strict=True):
            loop.told, loop.due = Q, due
            new.append(loop.step(w, g))
        return torch.stack(new).reshape(shape)


class Run:
    """An optimizer, its twin and its references; every operation is one that a training script may make."""

    def __init__(self, case: str, dtype: torch.dtype, fused: str, nonfinite: str, seed: int) -> None:
        self.method, self.settings, folds, self.kind = CASES[case]
        self.dtype, self.fused = dtype, fused
        if fused == "late":
            self.settings = {**self.settings, "refresh": "late"}
        self.immediate = fused == "fused" and not folds
        self.raises = nonfinite == "raise"
        self.nonfinite, self.seed = nonfinite, seed
        self.groups: list[dict[str, Any]] = []
        self.followers: dict[str, Follower | None] = {}
        self.optimizer: Any = None

    # -- building ----------------------------------------------------------------------------------------------------

    def add(self, shapes: list[tuple[int, ...]], keys: dict[str, Any]) -> None:
        """Add a group of parameters, to an optimizer that is there too."""
        number = len(self.groups)
        generator = torch.Generator().manual_seed(number)
        named = [
            (f"layers.{number}.{i}", torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype))
            for i, shape in enumerate(shapes)
        ]
        self.groups.append({"params": named, **keys})
        if self.optimizer is not None:
            for optimizer in (self.optimizer, self.twin):
                optimizer.add_param_group(self._group(self.groups[-1]))
            self._follow(self.optimizer.param_groups[-1])

    def _group(self, group: dict[str, Any]) -> dict[str, Any]:
        return {**group, "params": [(name, nn.Parameter(p.clone())) for name, p in group["params"]]}

    def _build(self, seed: int) -> Any:
        optimizer = create_optimizer(
            self.method,
            [self._group(group) for group in self.groups],
            seed=seed,
            nonfinite=self.nonfinite,
            **NUMBERS,
            **self.settings,
        )
        if self.fused == "fused":
            optimizer.fuse_into_backward()
        return optimizer

    def start(self) -> None:
        self.optimizer, self.twin = self._build(self.seed), self._build(self.seed)
        for group in self.optimizer.param_groups:
            self._follow(group)

    def _follow(self, group: dict[str, Any]) -> None:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            # What half-precision products round cannot be followed to rounding; the twin still is.
            exact = self.kind is not None and self.dtype in (torch.float32, torch.float64) and p.numel() > 0
            self.followers[name] = Follower(self.kind, self.method, p, group) if exact else None  # type: ignore[arg-type]

    @staticmethod
    def named(optimizer: Any) -> dict[str, nn.Parameter]:
        return {n: p for g in optimizer.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}

    # -- operations --------------------------------------------------------------------------------------------------

    def backward(self, gradients: dict[str, Tensor]) -> None:
        for optimizer in (self.optimizer, self.twin):
            named = self.named(optimizer)
            loss = sum((named[name] * G).sum() for name, G in gradients.items())
            if isinstance(loss, Tensor):
                loss.backward()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        self.twin.zero_grad(set_to_none=True)

    def step(self, micro: list[dict[str, Tensor]], clip: float | None, bad: set[str]) -> None:
        """One step from micro-batches of gradients; those of the parameters in `bad` hold NaN or infinity."""
        before = self._snapshot()
        skipped = self.optimizer.skipped_steps
        try:
            for gradients in micro:
                self.backward(gradients)
            factor = self._clip(micro, clip) if clip is not None else 1.0
            self.optimizer.step()
            assert not (self.raises and bad), "a gradient that is not finite was taken"
        except FloatingPointError as error:
            assert self.raises and bad and "NaN or Inf" in str(error)
            assert self._same(before, self._snapshot()), "nothing may change"
            self.zero_grad()
            return
        self.twin.step()
        self.zero_grad()
        after = self._snapshot()
        assert self.optimizer.skipped_steps - skipped == len(bad), (self.optimizer.skipped_steps, skipped, bad)
        for name in after:
            if name in bad or not any(name in gradients for gradients in micro):
                assert torch.equal(before[name][0], after[name][0]), f"{name} has moved"
                assert self._steps(before[name]) == self._steps(after[name])
                continue
            self._check(name, sum(gradients[name] for gradients in micro) * factor, before[name], after[name])
        self.check_twin()

    def _clip(self, micro: list[dict[str, Tensor]], clip: float) -> float:
        norms = [optimizer.clip_grad_norm_(clip) for optimizer in (self.optimizer, self.twin)]
        assert norms[0] == norms[1] or math.isnan(norms[0].value)
        names = {name for gradients in micro for name in gradients}
        sums = [sum(gradients[name].double() for gradients in micro) for name in names]
        whole = math.sqrt(sum(float(G.square().sum()) for G in sums))  # type: ignore[union-attr]
        if norms[0].exact and math.isfinite(whole):
            # In half precision the sum of micro-batches is rounded once more.
            assert math.isclose(norms[0].value, whole, rel_tol=1e-2 if self.dtype.itemsize < 4 else 1e-4, abs_tol=1e-30)
        return min(1.0, clip / (norms[0].value + 1e-6))

    def _check(self, name: str, G: Tensor, before: Any, after: Any) -> None:
        W, state = after
        assert W.isfinite().all(), f"{name} is not finite"
        assert all(value.isfinite().all() for key, value in state.items() if key != "overlaps"), f"state of {name}"
        assert self._steps(after) == self._steps(before) + (W.numel() > 0)
        follower = self.followers[name]
        if follower is None:
            return
        group = next(g for g in self.optimizer.param_groups if name in g["param_names"])
        refreshes = int(state.get("refreshes", 0))
        due = refreshes > follower.refreshes  # a random subspace is chosen before a gradient is known to be bad
        follower.refreshes = refreshes
        if due and not int(before[1].get("turned", 1)):
            self.followers[name] = None  # a basis that was turned in this step and replaced at its end is not kept
            return
        bases = self._bases(name, group, before[1], after)
        if not self._can_follow(G, bases, group):
            self.followers[name] = None
            return
        expected = follower.step(before[0], G, bases, due)
        error = (W.double() - expected).abs().max()
        exact = self.dtype == torch.float64 and self.kind not in (APOLLOReference, FiraReference)
        bound = (1e-9 if exact else 3e-5) * (1 + W.double().abs().max())
        assert error <= bound, f"{name}: {float(error):.2e} from the reference, {dict(group, params=W.shape)}"

    def _can_follow(self, G: Tensor, bases: Tensor | None, group: dict[str, Any]) -> bool:
        """Not where rounding decides on a full step, and not where a formula says 1e-8 or 0 and ours, on purpose, not.

        A basis that is turned is turned by rounding where it spans more than the gradient. Published codes add 1e-8 to
        ‖R_j‖, and let a norm of zero stop all growth.
        """
        if bases is None or self.kind is FRUGALReference:
            return True
        matrix = (G if G.ndim == 3 else G.flatten(1)).double()
        matrix = matrix if projects_left(tuple(matrix.shape[-2:]), group["proj_type"]) else matrix.mT
        bases = bases.double()
        R = bases.mT @ matrix
        rows = R.norm(dim=-1) / R.norm(dim=(-2, -1)).clamp_min(1e-300)[..., None]
        if self.kind is not APOLLOReference and bool(((rows > 1e-10) & (rows < 1e-5)).any()):
            return False
        if self.kind is GoLoreReference or (self.kind is GaLoreReference and self.fused == "plain"):
            return True
        if self.kind is GaLoreReference:
            values = torch.linalg.svdvals(R)
            return bool((values.amin(-1) > 1e-2 * values.amax(-1)).all())
        columns = R.norm(dim=-2)
        if bool((columns < 1e-2).any()):
            return False
        residual = (matrix - bases @ R).norm(dim=(-2, -1))
        return self.kind is not FiraReference or bool((residual > 1e-2 * matrix.norm(dim=(-2, -1))).all())

    def _bases(self, name: str, group: dict[str, Any], old: dict[str, Tensor], after: Any) -> Tensor | None:
        """The subspace in force in this step, (..., m, r)."""
        W, state = after
        if "refreshes" not in state:
            return None
        matrix = W if W.ndim == 3 else W.flatten(1)
        left = projects_left(tuple(matrix.shape[-2:]), group["proj_type"])
        m, batch = matrix.shape[-2 if left else -1], matrix.shape[:-2]
        if group["rank"] is None:
            rank = max(1, round(group["density"] * m)) if group["density"] > 0 else 0
        else:
            rank = min(group["rank"], m)
        if rank in (0, m):
            return torch.eye(m, rank, dtype=torch.float64).expand(*batch, m, rank)
        seed, draws = self.optimizer.seed, int(state["refreshes"])
        if self.kind is APOLLOReference:
            generator = seeded_generator(seed, name, draws - 1)
            like = torch.float64 if self.dtype == torch.float64 else torch.float32
            return gaussian_sketch(m, rank, generator=generator, batch_shape=batch, scale=rank**-0.5, dtype=like)
        if "rows" in state:
            rows = state["rows"].reshape(-1, rank)
            return torch.stack([rows_basis(each, m) for each in rows]).reshape(*batch, m, rank)
        basis = state["basis"]
        assert float((basis.mT @ basis - torch.eye(rank)).abs().max()) < 1e-5
        if "turned" in state and self.kind is GaLoreReference:
            if not old or int(old["refreshes"]) == 0:
                generator = seeded_generator(seed, name, "start")
                return random_stiefel(m, rank, generator=generator, batch_shape=batch, dtype=basis.dtype)
            if int(old["turned"]):
                return old["basis"]
            apart = basis - old["basis"] @ (old["basis"].mT @ basis)
            assert float(apart.abs().max()) < 1e-5, "a turned basis spans what it spanned before"
        return basis

    def reload(self, through_file: bool, first: bool) -> None:
        """Replace the optimizer by a fresh one with other weights, and load both."""
        weights = {name: p.detach().clone() for name, p in self.named(self.optimizer).items()}
        saved = copy.deepcopy(self.optimizer.state_dict())
        if through_file:
            file = io.BytesIO()
            torch.save(saved, file)
            saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        self.optimizer = self._build(self.seed + 1)
        if first:
            self.optimizer.init_state()
        with torch.no_grad():
            for name, p in self.named(self.optimizer).items():
                p.copy_(weights[name])
        self.optimizer.load_state_dict(saved)
        self.check_twin()

    def set(self, number: int, key: str, value: Any) -> None:
        for optimizer in (self.optimizer, self.twin):
            optimizer.param_groups[number][key] = value
        for name in self.optimizer.param_groups[number]["param_names"]:
            if (follower := self.followers[name]) is not None and key in ("lr", "weight_decay"):
                follower.set(**{key: float(value)})

    def force_refresh(self) -> None:
        """Make all subspaces due. A late basis that is still to be turned has its turn first."""
        for optimizer in (self.optimizer, self.twin):
            for state in states(optimizer).values():
                if "next_refresh" in state and int(state.get("turned", torch.ones(()))):
                    state["next_refresh"].copy_(state["step"].long())

    # -- what holds at any time --------------------------------------------------------------------------------------

    def _snapshot(self) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
        found = states(self.optimizer)
        return {
            name: (p.detach().clone(), {key: value.clone() for key, value in found[name].items()})
            for name, p in self.named(self.optimizer).items()
        }

    @staticmethod
    def _steps(entry: tuple[Tensor, dict[str, Tensor]]) -> int:
        return int(entry[1].get("step", 0))

    @staticmethod
    def _same(a: Any, b: Any) -> bool:
        return all(torch.equal(a[name][0], b[name][0]) and Run._steps(a[name]) == Run._steps(b[name]) for name in a)

    def check_twin(self) -> None:
        """Saving, loading and building anew change no bit."""
        ours, theirs = self.named(self.optimizer), self.named(self.twin)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        one, other = states(self.optimizer), states(self.twin)
        for name in one:
            if not (one[name] and other[name]):  # allocated early on one side
                assert all(int(state["step"]) == 0 for state in (one[name], other[name]) if state)
                continue
            assert one[name].keys() == other[name].keys(), name
            for key, value in one[name].items():
                assert torch.equal(value, other[name][key]), (name, key)
        assert self.optimizer.skipped_steps == self.twin.skipped_steps
        planned, held = self.optimizer.planned_state_bytes(), self.optimizer.state_bytes()
        assert all(held[key] <= planned.get(key, 0) for key in held), (planned, held)
