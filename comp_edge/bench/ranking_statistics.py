"""Rank correlation of an importance with what it should foresee. Pure: arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

import numpy as np
from scipy.stats import spearmanr

LEAST = 3  # a rank correlation of two points says nothing
Rho = dict[str, float | None]


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rho of two rows of numbers; None of fewer than three points, or where one of them is constant."""
    if len(a) < LEAST or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)


def fidelity(importance: np.ndarray, change: np.ndarray, layers: np.ndarray) -> Rho:
    """How well an importance ranks what removals change.

    Args:
        importance, change: [n], of each removal.
        layers: [n], in which ranking it stands.

    Returns:
        `within`: rho with the signed change, mean over the rankings; `across`: that of all removals at once.
        `within_size`, `across_size`: the same with the size of the change.
    """
    return _both(importance, change, layers) | {
        f"{name}_size": value for name, value in _both(importance, np.abs(change), layers).items()
    }


def agreement(halves: np.ndarray, layers: np.ndarray) -> Rho:
    """The same of changes [n, 2] that two halves of the evaluation set measure, with each other.

    No importance can be expected to rank one half's changes much better than the other half does.
    """
    first, second = halves.T
    return _both(first, second, layers) | {
        f"{name}_size": value for name, value in _both(np.abs(first), np.abs(second), layers).items()
    }


def _both(a: np.ndarray, b: np.ndarray, layers: np.ndarray) -> Rho:
    found = (spearman(a[layers == layer], b[layers == layer]) for layer in np.unique(layers))
    return {"within": mean(found), "across": spearman(a, b)}


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are there; None of none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
