"""The page of a profile: which device, in which condition, what was measured there, and how far predictions can be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from comp_edge.files import write_text
from comp_edge.plan import Plan
from comp_edge.report import theme, times, words
from comp_edge.report.device import Conditions, Hardware, Settings, compared, described
from comp_edge.report.templates import render
from comp_edge.report.times import LayerTime
from comp_edge.structure import empty_model
from comp_edge.units import dense_plan
from devices.depth import config_from
from devices.errors import DeviceError
from devices.latency import LatencyModel
from devices.latency.accuracy import proportional
from devices.latency.features import FEATURES, MACS
from devices.pictures import predicted_against_measured
from devices.profiles import Profile
from devices.profiling import doubts

COUNTED = [list(FEATURES).index(name) for name in MACS]
DENSE = "dense"


def write_page(model: LatencyModel, plans: Mapping[str, Mapping[str, Any]], path: str | Path) -> Path:
    """Write one HTML page that needs nothing else.

    Args:
        plans: what is predicted for plans, by name: `ms`, `uncertainty_ms`, `methods`, `layers` (the fields of
            `LayerCost`) and `outside`, sentences about what was not measured.

    Raises:
        DeviceError: the profile's conditions are none.
        InputError: the file cannot be written.
    """
    path = Path(path)
    write_text(path, render("page.html.j2", page_context(model, plans), folder=Path(__file__).parent))
    return path


def page_context(model: LatencyModel, plans: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the template shows; see `write_page`."""
    profile, report, dense = model.profile, model.report(), _dense(model)
    models = {DENSE: predicted(model, dense), **plans}
    layers = {name: [LayerTime.model_validate(row) for row in one["layers"]] for name, one in models.items()}
    with theme.style():
        scatters = [
            (method, theme.svg(predicted_against_measured(rows), label=f"Predicted and measured {method}"))
            for method, rows in left_out(model).items()
        ]
        by_method = theme.svg(
            times.method_figure({name: one["methods"] for name, one in models.items()}, layers),
            label="Milliseconds of each method",
        )
        by_layer = [
            (run, theme.svg(times.layer_figure(layers, run), label=f"Milliseconds of the layers of {run.method}"))
            for run in times.runs(layers)
        ]
    return {
        "title": Path(profile.model.name).name or profile.model.model_type,
        "device": profile.device.name,
        "terms": _terms(profile),
        "warnings": [*doubts(profile), *report["warnings"]],
        "accuracy": _accuracy(report),
        "scatters": scatters,
        "requests": [_request(name, one) for name, one in models.items()],
        "decode_tokens": model.decode_tokens,
        "by_method": by_method,
        "by_layer": by_layer,
        "coefficients": _coefficients(model, report, dense),
        "step": model.steps.step,
        "measurements": _measurements(profile),
        "conditions": compared(_conditions(profile)),
    }


def left_out(model: LatencyModel) -> dict[str, list[dict[str, float]]]:
    """By method, what was measured of each point and what is predicted without it; see `predicted_against_measured`."""
    program, found = model.program.with_step(1), {}
    vectors = [program.vectors(point.parsed_plan()) for point in model.profile.points]
    for method, rows in model.data.items():
        macs = np.array([vectors[point][method][COUNTED].sum() for point in rows.points])
        plain = macs * proportional(macs, rows.ms)
        columns = np.c_[rows.ms, model.held_out[method], rows.noise * rows.ms, plain].tolist()
        names = ("measured_ms", "predicted_ms", "noise_ms", "proportional_ms")
        found[method] = [dict(zip(names, values, strict=True)) for values in columns]
    return found


def _dense(model: LatencyModel) -> Plan:
    """The plan that keeps everything, with the prompt that was profiled."""
    record = model.profile.model
    whole = empty_model(config_from(record.config, where=f"model {record.name!r} of the profile"))
    return dense_plan(whole, base=record.name, prompt_tokens=record.text_tokens)


def predicted(model: LatencyModel, plan: Plan) -> dict[str, Any]:
    """What `write_page` takes of a plan.

    Raises:
        DeviceError: the plan is not of the measured model.
    """
    return {
        "ms": model.predict(plan),
        "uncertainty_ms": model.uncertainty(plan),
        "methods": model.parts(plan),
        "layers": [cost._asdict() for cost in model.by_layer(plan)],
        "outside": model.check(plan),
    }


def _terms(profile: Profile) -> list[tuple[str, str]]:
    hardware = Hardware.model_validate(profile.device.model_dump())
    settings = Settings.model_validate(profile.settings.model_dump())
    asked = f"{profile.measurements} methods of {len(profile.points)} programs, {profile.seconds:.0f} s in all"
    request = f"prompts of up to {profile.model.text_tokens} text tokens, room for {profile.model.new_tokens} new ones"
    more = [("begun", profile.created), ("measurements", asked), ("request", request)]
    return [*described(hardware, settings), *more]


def _conditions(profile: Profile) -> list[Conditions]:
    """At the beginning and at the end."""
    try:
        return [Conditions.model_validate(entry) for entry in (*profile.conditions[:1], *profile.conditions[1:][-1:])]
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise DeviceError(f"conditions of the profile: {place}: {error.errors()[0]['msg']}.") from None


def _accuracy(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Errors of what was left out, by method and of whole requests, beside those of MACs alone."""
    plain = report["macs_proportional"]
    rows = [(name, found, plain["methods"][name]) for name, found in report["methods"].items()]
    rows.append(("whole requests", report["whole"], plain["whole"]))
    return [
        {
            "name": name, "n": str(ours["n"]), "mape": words.percent(ours["mape"]),
            "within": words.percent(ours["within_10pct"], 0), "plain": _percent(theirs["mape"]),
            "rank": words.DASH if ours["spearman"] is None else f"{ours['spearman']:.3f}",
        }
        for name, ours, theirs in rows
        if ours["mape"] is not None
    ]  # fmt: skip


def _percent(share: float | None) -> str:
    return words.DASH if share is None else words.percent(share)


def _request(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "ms": words.milliseconds(found["ms"], found["uncertainty_ms"]),
        "methods": {method: words.milliseconds(ms) for method, ms in found["methods"].items()},
        "outside": found["outside"],
    }


def _coefficients(model: LatencyModel, report: Mapping[str, Any], dense: Plan) -> list[dict[str, Any]]:
    """By method, what a unit of each feature takes, and the dense model's units together, the largest first."""
    vectors, found = model.program.vectors(dense), []
    for method, coefficients in report["coefficients"].items():
        amounts = dict(zip(FEATURES, vectors[method].tolist(), strict=True))
        amounts["traffic"] = amounts["weights"]
        taken = {name: one["value"] * amounts[name] for name, one in coefficients.items()}
        whole = report["whole_models"][method]
        exponent = "" if whole["exponent"] == 1 else f" to the power of {whole['exponent']:.3f}"
        lines = [
            {"value": f"{one['value']:.3g}", "unit": one["unit"], "dense": _spent(taken[name])}
            for name, one in sorted(coefficients.items(), key=lambda item: -taken[item[0]])
        ]
        found.append({"method": method, "lines": lines, "whole": f"{whole['scale']:.3f} times the sum{exponent}"})
    return found


def _spent(ms: float) -> str:
    return words.milliseconds(ms) if ms else words.DASH


def _measurements(profile: Profile) -> list[dict[str, Any]]:
    return [
        {
            "id": point.id, "method": method, "noise": words.percent(one.noise), "rejected": one.rejected,
            "settled": one.settled, "samples": len(one.samples),
            "steady": words.milliseconds(one.steady), "p50": words.milliseconds(one.percentile(50)),
            "p90": words.milliseconds(one.percentile(90)),
        }
        for point in profile.points
        for method, one in point.methods.items()
    ]  # fmt: skip
