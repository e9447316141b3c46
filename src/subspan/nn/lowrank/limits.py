"""What the settings of a recipe may be: a test for each, and the same in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["BELOW_ONE", "BETWEEN", "POSITIVE", "Limit", "at_least", "one_of", "or_none"]


@dataclass(frozen=True)
class Limit:
    """What a setting may be.

    Args:
        holds: whether a value is allowed.
        words: what to do with one that is not.

    Example:
        >>> at_least(1).check("rank", 0)
        Traceback (most recent call last):
        ValueError: rank is 0; it must be at least 1.
    """

    holds: Callable[[Any], bool]
    words: str

    def check(self, name: str, value: Any) -> None:
        """Refuse a value that is not allowed.

        Raises:
            ValueError: naming the setting, its value and what is allowed.
        """
        if not self.holds(value):
            raise ValueError(f"{name} is {value!r}; {self.words}.")


def at_least(least: float) -> Limit:
    """Finite numbers from ``least`` on.

    >>> at_least(0).holds(0), at_least(0).holds(-1), at_least(0).holds(math.inf)
    (True, False, False)
    """
    finite = ", and finite" if isinstance(least, float) else ""
    return Limit(lambda value: least <= value < math.inf, f"it must be at least {least:g}{finite}")


#: Finite numbers above 0.
POSITIVE = Limit(lambda value: 0 < value < math.inf, "it must be greater than 0, and finite")
#: Numbers between 0 and 1, without both; and with 0.
BETWEEN = Limit(lambda value: 0 < value < 1, "it must be between 0 and 1, without both")
BELOW_ONE = Limit(lambda value: 0 <= value < 1, "it must be at least 0 and less than 1")


def one_of(*allowed: Any) -> Limit:
    """Some values.

    >>> one_of("nearest", "stochastic").words
    "choose 'nearest' or 'stochastic'"
    """
    return Limit(allowed.__contains__, f"choose {' or '.join(map(repr, allowed))}")


def or_none(limit: Limit, meaning: str) -> Limit:
    """None too, which has a meaning.

    >>> or_none(at_least(1), "for a quarter of the run").words
    'it must be at least 1, or None for a quarter of the run'
    """
    return Limit(lambda value: value is None or limit.holds(value), f"{limit.words}, or None {meaning}")
