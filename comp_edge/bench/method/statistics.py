"""Means, spreads and paired differences of cells. Pure: records in, numbers out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from comp_edge import strategy

Record = Mapping[str, Any]
PAIR = ("model", "reduction", "dense_seed", "prune_seed")  # what two cells of a pair share


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of n values; the deviation of a single one is not a number."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences and its standard error; the error of a single one is not a number."""

    mean: float
    error: float
    n: int

    @property
    def errors(self) -> float:
        """The mean in standard errors; not a number without an error."""
        return self.mean / self.error if self.error > 0 else math.nan


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of at least one value."""
    values = np.asarray(values, dtype=float)
    std = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    return Spread(mean=float(values.mean()), std=std, n=len(values))


def paired_difference(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> Difference | None:
    """Ours minus theirs where both have a value under the same key; None where no key is common.

    With crossed seeds the pairs of one dense model are not independent; the error takes them as if they were.
    """
    common = [key for key in ours if key in theirs]
    if not common:
        return None
    found = spread([ours[key] - theirs[key] for key in common])
    return Difference(mean=found.mean, error=found.std / math.sqrt(found.n), n=found.n)


def summary(cells: Iterable[Record], value: str = "score") -> dict[tuple[str, str, float], Spread]:
    """Mean and deviation of a value over seeds, by (model, strategy, reduction), in the order of `in_order`."""
    groups: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    for cell in in_order(cells):
        groups[cell["model"], cell["strategy"], cell["reduction"]].append(cell[value])
    return {key: spread(values) for key, values in groups.items()}


def differences(cells: Iterable[Record], *, ours: str) -> dict[tuple[str, str, float], Difference]:
    """Paired differences of the score of one strategy and each other one, by (model, other strategy, reduction)."""
    scores: dict[tuple[str, str, float], dict[tuple, float]] = defaultdict(dict)
    for cell in in_order(cells):
        group = cell["model"], cell["strategy"], cell["reduction"]
        scores[group][tuple(cell[name] for name in PAIR)] = cell["score"]
    found = {}
    for (model, other, reduction), theirs in scores.items():
        difference = paired_difference(scores.get((model, ours, reduction), {}), theirs)
        if other != ours and difference is not None:
            found[model, other, reduction] = difference
    return found


def in_order(cells: Iterable[Record]) -> list[Record]:
    """By model, reduction, strategy and seeds."""

    def place(cell: Record) -> tuple:
        return (
            cell["model"],
            cell["reduction"],
            method_order(cell["strategy"]),
            cell["dense_seed"],
            cell["prune_seed"],
        )

    return sorted(cells, key=place)


def method_order(label: str) -> tuple[int, str]:
    """Sorts labels as `STRATEGIES` has them, those with options behind the plain one."""
    name = label.partition(":")[0]
    known = strategy.STRATEGIES
    return known.index(name) if name in known else len(known), label


def unique(cells: Iterable[Record], name: str) -> list[Any]:
    """The different values under a name, sorted; labels of strategies as `method_order` has them."""
    return sorted({cell[name] for cell in cells}, key=method_order if name == "strategy" else None)
