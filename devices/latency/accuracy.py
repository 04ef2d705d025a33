"""How good predictions are, in the terms that reports and benchmarks share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr


def accuracy(
    measured: Sequence[float], predicted: Sequence[float], groups: Sequence[Hashable] | None = None
) -> dict[str, Any]:
    """Errors of predicted milliseconds, as fractions of what was measured; None where too few points can say.

    Args:
        groups: points of one group are models of the same depth; what a point saves is counted against the slowest of its
            group. By default all are one group.

    Returns:
        `n`, `mape`, `within_10pct`, `spearman` (rank correlation), and of saved milliseconds the `median_error`.
    """
    true, guess = np.asarray(measured, float), np.asarray(predicted, float)
    if not len(true):
        return {"n": 0, "mape": None, "within_10pct": None, "spearman": None, "saved_ms": {"median_error": None}}
    errors = np.abs(guess / true - 1)
    ranked = len(true) > 2 and np.ptp(true) > 0 and np.ptp(guess) > 0
    saved = _saved(true, guess, list(groups or [0] * len(true)))
    return {
        "n": len(true),
        "mape": float(errors.mean()),
        "within_10pct": float((errors <= 0.1).mean()),
        "spearman": float(spearmanr(true, guess).statistic) if ranked else None,
        "saved_ms": {"median_error": float(np.median(saved)) if saved else None},
    }


def proportional(macs: Sequence[float], measured: Sequence[float]) -> float:
    """Milliseconds per MAC of a model that knows nothing else: least squares on relative errors."""
    rates = np.asarray(macs, float) / np.asarray(measured, float)
    return float(rates.sum() / (rates**2).sum())


def _saved(true: np.ndarray, guess: np.ndarray, groups: list[Hashable]) -> list[float]:
    errors = []
    for group in dict.fromkeys(groups):
        members = [i for i, other in enumerate(groups) if other == group]
        slowest = max(members, key=lambda i: true[i])
        for i in members:
            if (saved := true[slowest] - true[i]) > 0:
                errors.append(abs(guess[slowest] - guess[i] - saved) / saved)
    return errors
