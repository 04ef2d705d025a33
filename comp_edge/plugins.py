"""What other packages bring along: this one imports none of them, it finds them by their entry points."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from comp_edge.errors import InputError


def plugin(group: str, name: str) -> Any:
    """What is registered under a name, loaded.

    Raises:
        InputError: nothing is.
    """
    for found in entry_points(group=group, name=name):
        return found.load()
    raise InputError(
        f"nothing is installed as {name!r} of {group!r}; install comp-edge as a whole, with pip install -e ."
    )
