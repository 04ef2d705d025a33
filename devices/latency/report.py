"""How good a fitted latency model is: errors of what was left out, beside those of MACs alone, and warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from devices.latency.accuracy import accuracy, proportional
from devices.latency.features import FEATURES, MACS
from devices.latency.fitting import Data, choose, describe, fit

if TYPE_CHECKING:
    from devices.latency.model import LatencyModel

ENOUGH, ENOUGH_WHOLE = 8, 3  # points
NOISY = 0.03  # relative spread between rounds
TWICE = 2.0  # how much better than MACs alone it should be
IGNORED = ("token_embedding",)  # a look-up of microseconds
COUNTED = [list(FEATURES).index(name) for name in MACS]


def report(model: LatencyModel) -> dict[str, Any]:
    """Errors, coefficients, stairs, warnings.

    Errors are of points that everything was fitted without: which features, how strong, which curve. Only the step of a
    staircase is known from all points.

    Returns:
        `methods` and `whole` (whole requests) hold what `devices.latency.accuracy.accuracy` says, `macs_proportional` the
        same of a model that knows nothing but MACs. `whole_models`: by method, `scale * sum of parts ^ exponent` (about the
        middle of what was measured).
    """
    data, macs = model.data, _macs(model)
    ours, theirs = _left_out(data, macs)
    methods = {method: accuracy(rows.ms, ours[method], _groups(model, method)) for method, rows in data.items()}
    plain = {method: accuracy(rows.ms, theirs[method], _groups(model, method)) for method, rows in data.items()}
    whole, whole_plain = _requests(model, ours, macs)
    found = {
        "name": model.name,
        "points": len(model.profile.points),
        "measurements": model.profile.measurements,
        "device_seconds": model.profile.seconds,
        "decode_tokens": model.decode_tokens,
        "methods": methods,
        "whole": whole,
        "macs_proportional": {"methods": plain, "whole": whole_plain},
        "coefficients": {method: describe(fitted) for method, fitted in model.fits.items()},
        "whole_models": {
            method: {"scale": math.exp(fitted.shift), "exponent": 1 + fitted.slope}
            for method, fitted in model.fits.items()
        },
        "stairs": model.steps.to_json(),
    }
    return found | {"warnings": _warnings(model, found)}


def _macs(model: LatencyModel) -> dict[str, np.ndarray]:
    """[n] million multiply-accumulates of each method's rows, whatever the device makes of them."""
    program = model.program.with_step(1)
    vectors = [program.vectors(point.parsed_plan()) for point in model.profile.points]
    return {
        method: np.array([vectors[point][method][COUNTED].sum() for point in rows.points])
        for method, rows in model.data.items()
    }


def _left_out(data: Data, macs: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """[n] predictions of each method's rows without their points: ours, and in proportion to MACs."""
    ours = {method: np.zeros(len(rows)) for method, rows in data.items()}
    theirs = {method: np.zeros(len(rows)) for method, rows in data.items()}
    for point in sorted({int(point) for rows in data.values() for point in rows.points}):
        rest = {method: rows.take(rows.points != point) for method, rows in data.items()}
        fits = fit(rest, choose(rest)[0])
        for method, rows in data.items():
            left = rows.points == point
            if left.any():
                ours[method][left] = fits[method].predict(rows.take(left))
                theirs[method][left] = macs[method][left] * proportional(macs[method][~left], rows.ms[~left])
    return ours, theirs


def _groups(model: LatencyModel, method: str) -> list[Any]:
    points = [model.profile.points[index] for index in model.data[method].points]
    return [(point.kind, *sorted(point.layers.items())) for point in points]


def _requests(
    model: LatencyModel, ours: Mapping[str, np.ndarray], macs: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Errors of the request's time, ours and by MACs alone, for whole models of which all its methods were measured."""
    lines = []
    for index, point in enumerate(model.profile.points):
        calls = model.program.calls(point.parsed_plan(), model.decode_tokens)
        called = {method: count for method, count in calls.items() if count}
        if point.kind != "whole" or not called.keys() <= point.methods.keys():
            continue
        place = {method: int(np.flatnonzero(model.data[method].points == index)[0]) for method in called}
        lines.append(
            [
                sum(count * values[method][place[method]] for method, count in called.items())
                for values in ({method: rows.ms for method, rows in model.data.items()}, ours, macs)
            ]
        )
    table = np.array(lines).reshape(-1, 3)
    alone = (
        [row[2] * proportional(*np.delete(table, index, 0)[:, [2, 0]].T) for index, row in enumerate(table)]
        if len(table) > 1
        else []
    )
    return accuracy(table[:, 0], table[:, 1]), accuracy(table[: len(alone), 0], alone)


def _warnings(model: LatencyModel, found: Mapping[str, Any]) -> list[str]:
    profile, warnings = model.profile, []
    if not profile.complete:
        warnings.append("the profile is incomplete: not all points that were chosen have been measured.")
    for method, rows in model.data.items():
        if len(rows) < ENOUGH:
            warnings.append(f"{method!r} was measured in {len(rows)} points; {ENOUGH} or more are better.")
        noise = float(np.median([profile.points[point].methods[method].noise for point in rows.points]))
        if noise > NOISY:
            warnings.append(f"{method!r} was measured with a spread of {noise:.1%} between rounds.")
    whole = [point for point in profile.points if point.kind == "whole"]
    if len(whole) < ENOUGH_WHOLE:
        warnings.append(
            f"{len(whole)} whole models were measured; {ENOUGH_WHOLE} or more show what blocks of layers cannot."
        )
    unsettled = sum(not m.settled for point in profile.points for m in point.methods.values())
    if unsettled:
        warnings.append(f"{unsettled} measurements were still disturbed when they were ended.")
    for method in sorted({name for point in profile.points for name in point.methods} - set(model.data)):
        if method not in IGNORED:
            warnings.append(f"{method!r} was measured, but a request of this model does not call it.")
    if "decode" in model.program.methods and "decode" not in model.fits:
        warnings.append("'decode' was not measured: only requests up to the first token can be predicted.")
    ours, plain = found["whole"]["mape"], found["macs_proportional"]["whole"]["mape"]
    if found["whole"]["n"] >= ENOUGH_WHOLE and ours * TWICE > plain:
        warnings.append(
            f"whole models are predicted with an error of {ours:.1%}, in proportion to MACs with {plain:.1%}: not "
            f"{TWICE:g} times better."
        )
    return warnings
