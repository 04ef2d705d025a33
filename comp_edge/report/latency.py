"""What the pruner's cost tells of a device in metrics.json, checked, and the section of the report that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, FiniteFloat

from comp_edge.correction import CLOSE
from comp_edge.plan import Plan
from comp_edge.report import theme, times, words
from comp_edge.report.device import Conditions, Count, Hardware, Part, Seconds, Settings, Text, compared, described
from comp_edge.report.times import LayerTime, Milliseconds

Positive = Annotated[FiniteFloat, Field(gt=0)]


class Accuracy(Part):
    """Errors of predicted milliseconds, as fractions; None where too few points can say."""

    n: Count
    mape: Milliseconds | None
    within_10pct: Milliseconds | None


class Predicted(Part):
    """Milliseconds of a request."""

    dense: Positive
    pruned: Positive


class Methods(Part):
    """Milliseconds of one call by method."""

    dense: dict[Text, Milliseconds]
    pruned: dict[Text, Milliseconds]


class Layers(Part):
    """Where they go."""

    dense: tuple[LayerTime, ...]
    pruned: tuple[LayerTime, ...]


class Measured(Part):
    """A plan that met the budget by prediction, measured after so many stages; in the unit of the cost."""

    stage: Count
    predicted: Positive
    measured: Positive


class OnDevice(Part):
    """The `device` of metrics.json.

    Attributes:
        decode_tokens: tokens of a request after the first.
        device_seconds, measurements: what the profile took, and how many methods were timed.
        held_out: of whole models that the predictions did not know.
        uncertainty_ms: of the pruned model's request, one standard deviation.
    """

    device: Hardware
    settings: Settings
    conditions: tuple[Conditions, ...] = ()
    decode_tokens: Count
    device_seconds: Seconds
    measurements: Count
    held_out: Accuracy
    warnings: tuple[Text, ...] = ()
    predicted_ms: Predicted
    uncertainty_ms: Milliseconds
    methods: Methods
    layers: Layers


def target_of(plan: Plan, dense: float) -> float | None:
    """The milliseconds that a request may take by a plan's budget; None where it is about something else.

    Args:
        dense: predicted milliseconds of the dense model.
    """
    for name, value in (("latency_ms", lambda v: v), ("speedup", lambda v: dense / v)):
        if isinstance(given := plan.budget.get(name), int | float) and given > 0:
            return float(value(given))
    return None


def section(told: OnDevice, measured: Sequence[Measured], *, target: float | None) -> dict[str, Any]:
    """What the template shows.

    Args:
        measured: plans that met the budget by prediction.
        target: what the budget allows, in milliseconds.
    """
    models = {"dense": told.layers.dense, "pruned": told.layers.pruned}
    methods = {"dense": told.methods.dense, "pruned": told.methods.pruned}
    with theme.style():
        by_method = theme.svg(times.method_figure(methods, models), label="Milliseconds of each method")
        by_layer = [
            (run, theme.svg(times.layer_figure(models, run), label=f"Milliseconds of the layers of {run.method}"))
            for run in times.runs(models)
        ]
    return {
        "terms": described(told.device, told.settings),
        "profile": f"{told.measurements} measurements, {told.device_seconds:.0f} s of the device's time",
        "requests": _requests(told),
        "rounds": [_round(one, target) for one in measured],
        "target": None if target is None else words.milliseconds(target),
        "accuracy": _accuracy(told.held_out),
        "warnings": told.warnings,
        "conditions": compared(told.conditions),
        "by_method": by_method,
        "by_layer": by_layer,
    }


def _requests(told: OnDevice) -> list[dict[str, str]]:
    """The request, and each method that is part of it."""
    rows = [("the request", told.predicted_ms.dense, told.predicted_ms.pruned, told.uncertainty_ms)]
    for name, ms in told.methods.dense.items():
        each = f", each of {told.decode_tokens} further tokens" if name == "decode" else ""
        rows.append((name + each, ms, told.methods.pruned.get(name, 0.0), None))
    return [
        {
            "name": name, "dense": words.milliseconds(dense), "pruned": words.milliseconds(pruned, off),
            "change": words.fewer(dense, pruned, "faster"),
        }
        for name, dense, pruned, off in rows
    ]  # fmt: skip


def _round(one: Measured, target: float | None) -> dict[str, Any]:
    return {
        "stage": one.stage, "predicted": words.milliseconds(one.predicted), "measured": words.milliseconds(one.measured),
        "share": words.DASH if target is None else words.percent(one.measured / target),
        "met": None if target is None else one.measured <= target * CLOSE,
    }  # fmt: skip


def _accuracy(found: Accuracy) -> str:
    """How far predictions can be trusted, a sentence."""
    if found.mape is None or found.within_10pct is None:
        return "No whole model was left out of the fit, so that nothing is known of the errors of predictions."
    return (
        f"Of {found.n} whole models that were left out of the fit one by one, predictions were off by "
        f"{words.percent(found.mape)} on average, and {words.percent(found.within_10pct, 0)} of them were within 10 %."
    )
