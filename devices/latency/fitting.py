"""Coefficients from few measurements: non-negative least squares on relative errors, with as many features as the data bears.

Every feature costs time or nothing, so that coefficients are not negative, and pruning units never predicts more. What cannot
be told from a method's own rows is pulled toward what all methods share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from devices.latency.features import FEATURES

# The last column: a whole model's weights do not stay in the caches from call to call, as those of a few layers do.
COLUMNS = (*FEATURES, "traffic")
FIXED = COLUMNS.index("fixed")
WEIGHTS, TRAFFIC = COLUMNS.index("weights"), COLUMNS.index("traffic")
# The second holds the first.
FEW = ("calls", "ffn", "projections", "products", "fixed", "cache", "weights", "traffic")
SETS = (FEW, COLUMNS)
OWN = ("calls", "fixed")  # columns that mean something else in every method, and are never shared
ALONE = "decode"  # a method of single tokens, bound by memory: it shares nothing with those of many
PULLS = (0.03, 0.3)  # how strongly shared coefficients hold, as the weight of rows
FLOOR = 0.01  # relative noise that every measurement has at least
USUAL = 0.05  # how far a method's scale may well be from 1, where whole models scatter about it more it is held there
RIDGE = 0.05  # of the slope, in squared units of log ms
BETTER = 0.95  # a richer fit must bring the error below this share of a poorer one's
CURVED = 0.9  # and a curve below this


@dataclass(frozen=True, eq=False)
class Rows:
    """What was measured of one method.

    Attributes:
        points: [n] which point each row is of.
        features: [n, features].
        ms, noise: [n] milliseconds a call, and their relative spread.
        whole: [n] whether the model had all its layers.
    """

    points: np.ndarray
    features: np.ndarray
    ms: np.ndarray
    noise: np.ndarray
    whole: np.ndarray

    def __len__(self) -> int:
        return len(self.ms)

    def take(self, keep: np.ndarray) -> Rows:
        """Those rows that a mask [n] keeps."""
        return Rows(self.points[keep], self.features[keep], self.ms[keep], self.noise[keep], self.whole[keep])

    @cached_property
    def columns(self) -> np.ndarray:
        """[n, COLUMNS]"""
        return np.c_[self.features, self.features[:, WEIGHTS] * self.whole]

    @cached_property
    def relative(self) -> np.ndarray:
        """[n, COLUMNS] per measured ms; without what is the same in all rows, which is part of a call."""
        found = self.columns / self.ms[:, None]
        found[:, FIXED] *= bool(np.ptp(self.features[:, FIXED]))
        return found

    @cached_property
    def certainty(self) -> np.ndarray:
        """[n] weights of rows, 1 where only the least noise is in them."""
        return FLOOR / np.maximum(self.noise, FLOOR)


Data = Mapping[str, Rows]


class Choice(NamedTuple):
    """How a method is fitted: index of `SETS`, strength of the pull, whether whole models get a curve of their own."""

    features: int
    pull: float
    curved: bool = False


@dataclass(frozen=True, eq=False)
class Fit:
    """A method's coefficients, and how whole models deviate from the sum of their parts.

    Attributes:
        coefficients: [COLUMNS]
        center, shift, slope: of a whole model `ms = sum * exp(shift + slope * (log sum - center))`, which rises with the sum.
    """

    coefficients: np.ndarray
    center: float = 0.0
    shift: float = 0.0
    slope: float = 0.0

    @property
    def per_feature(self) -> np.ndarray:
        """[features] coefficients of a whole model."""
        whole = self.coefficients[:-1].copy()
        whole[WEIGHTS] += self.coefficients[TRAFFIC]
        return whole

    def curve(self, total: float) -> float:
        """What a whole model takes whose parts sum to `total` ms."""
        if total <= 0:
            return 0.0
        return total * math.exp(self.shift + self.slope * (math.log(total) - self.center))

    def predict(self, rows: Rows) -> np.ndarray:
        """[n] milliseconds."""
        sums = rows.columns @ self.coefficients
        return np.array([self.curve(total) if whole else total for total, whole in zip(sums, rows.whole, strict=True)])


def fit(data: Data, choices: Mapping[str, Choice]) -> dict[str, Fit]:
    """Fit every method as chosen."""
    priors = {index: _shared(data, SETS[index]) for index in {choice.features for choice in choices.values()}}
    found = {}
    for method, choice in choices.items():
        coefficients = _solve(data[method], choice.features, choice.pull, priors[choice.features].get(method))
        found[method] = _curve(Fit(coefficients), data[method], curved=choice.curved)
    return found


def choose(data: Data) -> tuple[dict[str, Choice], dict[str, np.ndarray]]:
    """What leaving out one point after another says is best for each method.

    Returns:
        Choices, and [n] predictions of each method's rows by fits without their points.
    """
    options = [Choice(index, pull, curved) for curved in (False, True) for index in range(len(SETS)) for pull in PULLS]
    found = {method: {option: np.zeros(len(rows)) for option in options} for method, rows in data.items()}
    for point in sorted({int(point) for rows in data.values() for point in rows.points}):
        rest = {method: rows.take(rows.points != point) for method, rows in data.items()}
        for index, names in enumerate(SETS):
            priors = _shared(rest, names)
            for method, rows in data.items():
                left = rows.points == point
                if not left.any():
                    continue
                for pull in PULLS:
                    coefficients = _solve(rest[method], index, pull, priors.get(method))
                    for curved in (False, True):
                        fitted = _curve(Fit(coefficients), rest[method], curved=curved)
                        found[method][Choice(index, pull, curved)][left] = fitted.predict(rows.take(left))
    choices = {method: _best(data[method], found[method]) for method in data}
    return choices, {method: found[method][choice] for method, choice in choices.items()}


def score(rows: Rows, predicted: np.ndarray) -> float:
    """Mean relative error, rows counting by their certainty, and whole models as much as all points together."""
    errors, weight, whole = np.abs(predicted / rows.ms - 1), rows.certainty**2, rows.whole
    everything = np.average(errors, weights=weight)
    return float((everything + np.average(errors[whole], weights=weight[whole])) / 2 if whole.any() else everything)


def _best(rows: Rows, found: Mapping[Choice, np.ndarray]) -> Choice:
    best, least = None, np.inf
    for option, predicted in found.items():  # poorer ones come first
        value = score(rows, predicted)
        if best is None or value < least * (CURVED if option.curved > best.curved else BETTER):
            best, least = option, value
    return best


def _shared(data: Data, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Coefficients of all methods of many tokens in one fit, by method; nothing where there is one such method."""
    methods = [method for method, rows in data.items() if method != ALONE and len(rows)]
    if len(methods) < 2:
        return {}
    common = [COLUMNS.index(name) for name in names if name not in OWN]
    own = [COLUMNS.index(name) for name in names if name in OWN]
    width = len(common) + len(own) * len(methods)
    blocks, targets = [], []
    for number, method in enumerate(methods):
        rows = data[method]
        columns, weight = rows.relative, rows.certainty
        block = np.zeros((len(rows), width))
        block[:, : len(common)] = columns[:, common]
        start = len(common) + number * len(own)
        block[:, start : start + len(own)] = columns[:, own]
        blocks.append(block * weight[:, None])
        targets.append(weight)
    solution = _nnls(np.concatenate(blocks), np.concatenate(targets))
    found = {}
    for number, method in enumerate(methods):
        start = len(common) + number * len(own)
        coefficients = np.zeros(len(COLUMNS))
        coefficients[common] = solution[: len(common)]
        coefficients[own] = solution[start : start + len(own)]
        found[method] = coefficients
    return found


def _solve(rows: Rows, features: int, pull: float, prior: np.ndarray | None) -> np.ndarray:
    """[COLUMNS] coefficients from a method's own rows, pulled toward `prior` where there is one."""
    index = [COLUMNS.index(name) for name in SETS[features]]
    columns, weight = rows.relative[:, index], rows.certainty
    matrix, target = columns * weight[:, None], weight
    if prior is not None:
        # A row for each coefficient: that its part of the time be what the shared one says.
        strength = pull * columns.mean(0)
        matrix = np.concatenate([matrix, np.diag(strength)])
        target = np.concatenate([target, strength * prior[index]])
    coefficients = np.zeros(len(COLUMNS))
    coefficients[index] = _nnls(matrix, target)
    return coefficients


def _curve(fitted: Fit, rows: Rows, *, curved: bool) -> Fit:
    """Scale and, if asked, slope from what whole models took."""
    sums = rows.columns @ fitted.coefficients
    used = rows.whole & (sums > 0)
    if not used.any():
        return fitted
    logs = np.log(sums[used])
    rest = np.log(rows.ms[used]) - logs
    # In points as certain as the most certain one: what never settled can only be too slow.
    weight = (rows.certainty[used] / rows.certainty[used].max()) ** 2
    center, mean = np.average(logs, weights=weight), np.average(rest, weights=weight)
    count = len(rest)
    scatter = max((weight * (rest - mean) ** 2).sum() / (count - 1), FLOOR**2) if count > 1 else USUAL**2
    held = scatter / USUAL**2  # in points that say 1
    fitted = replace(fitted, center=float(center), shift=float((weight * rest).sum() / (weight.sum() + held)))
    if not curved or count < 4:
        return fitted
    centered = logs - center
    slope = (weight * centered * rest).sum() / ((weight * centered**2).sum() + RIDGE)
    return replace(fitted, slope=float(np.clip(slope, -0.5, 0.5)))


def _nnls(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    scale = np.linalg.norm(matrix, axis=0)
    used = scale > 0
    solution = np.zeros(matrix.shape[1])
    solution[used] = nnls(matrix[:, used] / scale[used], target)[0] / scale[used]
    return solution


def describe(fitted: Fit) -> dict[str, dict[str, Any]]:
    """Coefficients that are not zero, with their units in words."""
    units = FEATURES | {"traffic": "million weights of layers, of a whole model"}
    named = zip(COLUMNS, fitted.coefficients.tolist(), strict=True)
    return {name: {"value": value, "unit": f"ms per {units[name]}"} for name, value in named if value > 0}
