"""Griffe extension: show an ``Example:`` section of a docstring as code, as an ``Examples:`` section is.

Griffe knows the plural alone, and would read the brackets of ``groups[0]["rank"]`` as a link.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class ExampleSections(Extension):
    """Renames the section before docstrings are parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Called for each object that Griffe has loaded."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
