"""State that is allocated as declared, follows its parameters, and is saved and loaded whole."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor

from subspan.optim import loading
from subspan.optim.declared import DeclaredOptimizer
from subspan.optim.method import State
from subspan.optim.sharding import check_shardable
from subspan.optim.shards import is_sharded
from subspan.optim.storage import close, opened
from subspan.state import Int8Weight


class StoredOptimizer(DeclaredOptimizer):
    """A declared optimizer with its state."""

    seed: int
    skipped_steps: int
    _bound: dict[str, Tensor]

    def init_state(self) -> None:
        """Allocate the state of every trainable parameter now; a step would do it lazily."""
        self._rebind()
        for group in self.param_groups:
            for name, parameter in self._named(group):
                if parameter.requires_grad and parameter.numel() > 0:
                    self._ensure_state(name, parameter, group)

    def _ensure_state(self, name: str, parameter: Tensor, group: dict[str, Any]) -> State:
        state = self.state[parameter]
        if not state:
            if isinstance(parameter, Int8Weight) and group.get("rounding", "nearest") == "nearest":
                warnings.warn(
                    "weights that are held in int8 lose most steps when they are rounded to nearest; give the "
                    "optimizer rounding='stochastic'",
                    RuntimeWarning,
                    stacklevel=2,
                )
            check_shardable(name, parameter, group, self.method)
            shards = self._shards(name, parameter, group)
            for key, spec in self._stored_specs(name, parameter, group, {}).items():
                state[key] = shards.place(key, spec, shards.local_spec(key, spec).allocate(parameter.device))
        self._bound[name] = parameter
        return self._state(parameter)

    def _rebind(self) -> None:
        """Move state to the tensors that now stand under the same names: wrappers swap parameters but not state."""
        for group in self.param_groups:
            for name, parameter in self._named(group):
                old = self._bound.get(name)
                if old is not None and old is not parameter and parameter not in self.state and old in self.state:
                    self.state[parameter] = self._placed(name, parameter, group, self.state.pop(old))
                    self._bound[name] = parameter

    def _placed(self, name: str, parameter: Tensor, group: dict[str, Any], state: State) -> State:
        """A whole state as that of a parameter which has been divided since."""
        if not is_sharded(parameter):
            return state
        check_shardable(name, parameter, group, self.method)
        shards = self._shards(name, parameter, group)
        specs = self._stored_specs(name, parameter, group, state)
        return {key: shards.copied(key, spec, state[key], parameter.device) for key, spec in specs.items()}

    def edit_state(self, parameter: Tensor, edit: Callable[[State], None]) -> None:
        """Change the state of a parameter between two steps; nothing happens where there is none yet.

        Args:
            parameter: one of this optimizer.
            edit: changes the tensors of the state that it is given, in place; those that are held by a codec come
                decoded and are encoded anew.

        Raises:
            KeyError: the parameter is not in this optimizer.

        Example:
            >>> import torch
            >>> from subspan.optim import AdamW
            >>> layer = torch.nn.Linear(64, 64)
            >>> optimizer = AdamW(layer, moments="8bit")
            >>> layer(torch.ones(1, 64)).sum().backward()
            >>> optimizer.step()
            >>> optimizer.edit_state(layer.weight, lambda state: state["exp_avg"].zero_())
            >>> int(optimizer.state[layer.weight]["exp_avg"].count_nonzero())
            0
        """
        self._rebind()
        for group in self.param_groups:
            for name, candidate in self._named(group):
                if candidate is parameter:
                    if state := self._state(parameter):
                        specs = self._specs(name, parameter, group, state)
                        tensors = opened(state, specs)
                        edit(tensors)
                        close(state, specs, tensors)
                    return
        raise KeyError("this parameter is not in the optimizer")

    def state_dict(self) -> dict[str, Any]:
        """State, groups and the origin (method, seed, format) as tensors and plain values."""
        self._rebind()
        origin = {
            "schema": loading.SCHEMA,
            "method": self.method.name,
            "parts": self.method.parts(),
            "seed": self.seed,
            "skipped_steps": self.skipped_steps,
        }
        return {**super().state_dict(), "subspan": origin}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; every tensor keeps its dtype, and nothing is changed when anything does not fit.

        Parameters are matched by name where both sides have names. Settings of the groups (learning rates, betas, ...)
        and the seed are taken from the checkpoint.

        Raises:
            ValueError: another method, rank, set of parameters or a newer format; the message says what differs.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        origin = loading.check_origin(state_dict, self.method)
        saved_groups = state_dict["param_groups"]
        loaded = loading.load_parameters(
            self.param_groups, saved_groups, state_dict["state"], self._stored_specs, self._shards
        )
        self._check_loaded(loaded)
        groups = []
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            settings = {
                key: copy.deepcopy(value) for key, value in saved.items() if key not in ("params", "param_names")
            }
            groups.append({**group, **settings})
        state: defaultdict[Tensor, State] = defaultdict(dict)
        state |= {parameter: tensors for parameter, tensors in loaded.values()}
        self._bound = {name: parameter for name, (parameter, _) in loaded.items()}
        if origin is not None:
            self.seed = origin["seed"]
            self.skipped_steps = origin["skipped_steps"]
        self.__setstate__({"state": state, "param_groups": groups})
        self._loaded()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _check_loaded(self, loaded: dict[str, tuple[Tensor, State]]) -> None:
        """Called before a state replaces the one there is; an error refuses it."""

    def _loaded(self) -> None:
        """Called when a state has replaced the one before."""

    def __getstate__(self) -> dict[str, Any]:
        own = ("method", "seed", "nonfinite", "skipped_steps", "_warned", "_bound", "_cached_roster", "divides_bases")
        # Hooks belong to the parameters; what was folded is no state.
        nothing: dict[str, Any] = dict.fromkeys(("_fusion", "_average"))
        nothing |= {key: {} for key in ("_folded", "_local", "_stepped", "_slots", "_sharing")}
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in own}, **nothing}
