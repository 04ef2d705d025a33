"""Whether a device's latency is a staircase in the number of tokens, as it is on GPUs, which compute in tiles.

See "Pruning One More Token Is Enough" (WACV 2025): tokens up to the next step are free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from devices.latency.fitting import ALONE, Data, choose

STEPS = (8, 16, 32, 48, 64, 96, 128, 192, 256)
DECISIVE = 0.7  # of the error without steps
MOST = 2 / 3  # of the rows must be predicted better
LEAST = 0.005  # the mean error must fall by more than this, and by more than the noise
FEWEST = 4  # rows must have tokens between two steps


@dataclass(frozen=True)
class Stairs:
    """What was found.

    Attributes:
        step: token counts cost as much as the next multiple of it; 1 for no stairs.
        errors: mean relative leave-one-out error by step that was tried.
    """

    step: int = 1
    errors: dict[int, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For reports."""
        return {"step": self.step, "errors": {str(step): error for step, error in self.errors.items()}}


def find(data_of: Callable[[int], Data]) -> Stairs:
    """The step that explains the measurements decisively better than none: by 30 % and by more than noise.

    Args:
        data_of: measurements with features of token counts that are rounded up to multiples of a step.
    """
    data = {step: _of_many(data_of(step)) for step in (1, *STEPS)}
    errors = {step: _errors(data[step]) for step in data}
    if not errors[1]:
        return Stairs()
    means = {step: float(np.concatenate(list(found.values())).mean()) for step, found in errors.items()}
    best = min(means, key=lambda step: means[step])
    return Stairs(best if best > 1 and _decisive(data, errors, best) else 1, means)


def _decisive(data: Mapping[int, Data], errors: Mapping[int, Mapping[str, np.ndarray]], step: int) -> bool:
    """Whether the methods whose token counts lie between two steps are predicted decisively better."""
    between = {
        method: int((rows.features != data[step][method].features).any(1).sum()) for method, rows in data[1].items()
    }
    methods = [method for method, count in between.items() if count]
    if sum(between.values()) < FEWEST:
        return False
    smooth, stepped = (np.concatenate([errors[s][method] for method in methods]) for s in (1, step))
    noise = float(np.median(np.concatenate([data[1][method].noise for method in methods])))
    gain = smooth.mean() - stepped.mean()
    return bool(
        stepped.mean() <= DECISIVE * smooth.mean() and gain > max(noise, LEAST) and (stepped < smooth).mean() >= MOST
    )


def _of_many(data: Data) -> Data:
    """Without the method of single tokens, which have no steps."""
    return {method: rows for method, rows in data.items() if method != ALONE}


def _errors(data: Data) -> dict[str, np.ndarray]:
    """By method, [n] relative errors of each row by fits without its point."""
    predicted = choose(data)[1]
    return {method: np.abs(predicted[method] / rows.ms - 1) for method, rows in data.items()}
