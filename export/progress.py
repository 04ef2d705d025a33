"""How builders tell what they are doing."""

from __future__ import annotations

import itertools
from collections.abc import Callable

Report = Callable[[int, int, str], None]
"""Called as (done, total, what)."""
Progress = Callable[[], None]
"""Called for each one that is done."""


def counter(report: Report, total: int, what: str) -> Progress:
    """A callable without arguments that reports one more of `total` each time."""
    report(0, total, what)
    counted = itertools.count(1)
    return lambda: report(next(counted), total, what)
