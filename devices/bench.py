"""`comp-edge bench latency`: how well a profile predicts whole pruned models that it has never seen.

A profile is measured as anybody would, a model is fitted, and then plans that it does not know are lowered, timed and compared.
Every program that was timed is on disk: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from comp_edge.cost import MacsCost
from comp_edge.errors import InputError
from comp_edge.files import read_json, write_bytes, write_json
from comp_edge.plan import Plan
from devices.device import Device, connect
from devices.errors import DeviceError
from devices.latency import LatencyModel, accuracy
from devices.latency.accuracy import proportional
from devices.loop import request_ms
from devices.lowering import Wanted
from devices.measuring import PRESETS
from devices.pictures import latency_png
from devices.points import held_out_plans
from devices.profiles import Measurement, Profile
from devices.profiling import profile
from devices.programs import Subject
from devices.sitting import sit

RESULTS_FILE, PICTURE_FILE, PROFILE_FILE, PLANS = "results.json", "latency.png", "profile.json", "plans"
MODELS = ("random:clip-vit-b-16", "random:smolvlm-256m")
QUICK_MODELS = ("clip-digits",)
HELD_OUT, QUICK_HELD_OUT = 24, 8  # plans of each model
SEED = 20261
DECODE_TOKENS = 16  # of models that generate
TWICE = 2.0  # how much better than in proportion to MACs predictions must be
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Compared:
    """A plan that no profile has seen: milliseconds of a request, measured, predicted, and in proportion to MACs.

    Attributes:
        dense: milliseconds of the dense model with the plan's own prompt.
        settled: whether the device was quiet enough for the measurement.
    """

    plan: Plan
    macs: float
    measured: float
    predicted: float
    proportional: float
    uncertainty: float
    dense: float
    settled: bool = True


def run(
    models: Sequence[str],
    *,
    out: Path,
    device: str = "host",
    plans: int | None = None,
    threads: int = 1,
    jobs: int = 1,
    quick: bool = False,
    on_progress: Progress = lambda done, total, text: None,
) -> dict[str, Any]:
    """Measure what is missing, compare, write `results.json` and `latency.png`; returns what the file holds.

    Args:
        models: dense ones; by default CLIP ViT-B/16 and the SmolVLM-256M shape (`quick`: clip-digits).
        plans: that are predicted, for each model.
        jobs: processes that lower programs; see `devices.profiling.profile`.

    Raises:
        InputError: a model or the device cannot be used.
    """
    names = list(models) or list(QUICK_MODELS if quick else MODELS)
    count = plans or (QUICK_HELD_OUT if quick else HELD_OUT)
    results = {}
    try:
        with connect(device) as connected:
            for index, name in enumerate(names):

                def tell(done: int, total: int, text: str, index: int = index, name: str = name) -> None:
                    on_progress(index * total + done, len(names) * total, f"{name}: {text}")

                folder = out / name.replace(":", "-").replace("/", "-")
                results[name] = _one(name, folder, connected, count=count, threads=threads, jobs=jobs, on_progress=tell)
    except DeviceError as error:
        raise InputError(str(error)) from None
    summary = summarize(results)
    write_json(out / RESULTS_FILE, summary)
    write_bytes(out / PICTURE_FILE, latency_png(summary))
    return summary


def summarize(results: dict[str, tuple[LatencyModel, list[Compared]]]) -> dict[str, Any]:
    """Errors over all models' plans (ranks are compared within a model), and of each model.

    `measurements`, `device_seconds` and `overhead` are of the most demanding profile. `overhead` is what they took
    longer than the raw measurements, as a share (see `Profile.overhead`).
    """
    models = {name: _judged(*result) for name, result in results.items()}
    everything = [row for _, rows in results.values() for row in rows]
    ours = _errors(everything, "predicted")
    plain = _errors(everything, "proportional")
    for pooled, key in ((ours, None), (plain, "macs_proportional")):
        ranks = [(m if key is None else m[key])["whole_model"]["spearman"] for m in models.values()]
        known = [rank for rank in ranks if rank is not None]
        pooled["whole_model"]["spearman"] = min(known) if known else None
    found = {
        **ours,
        "macs_proportional": plain,
        "measurements": max(m["measurements"] for m in models.values()),
        "device_seconds": max(m["device_seconds"] for m in models.values()),
        "overhead": max((m["overhead"] for m in models.values() if m["overhead"] is not None), default=None),
        "models": models,
    }
    error, other = ours["whole_model"]["mape"], plain["whole_model"]["mape"]
    worse = error * TWICE > other
    found["warnings"] = [f"{error:.1%} is not {TWICE:g} times better than MACs alone, {other:.1%}."] if worse else []
    if restless := [row for row in everything if not row.settled]:
        quiet = _errors([row for row in everything if row.settled], "predicted")
        error = quiet["whole_model"]["mape"]
        others = "none did" if error is None else f"the error of the others is {error:.1%}"
        found["warnings"].append(
            f"the device was never quiet enough to measure {len(restless)} of {len(everything)} plans; {others}."
        )
    return found


def _judged(model: LatencyModel, rows: list[Compared]) -> dict[str, Any]:
    plain = _errors(rows, "proportional")
    return {
        **_errors(rows, "predicted"),
        "macs_proportional": plain,
        "measurements": model.profile.measurements,
        "device_seconds": model.profile.seconds,
        "overhead": model.profile.overhead,
        "fit": model.report(),
        "plans": [
            {
                "macs": row.macs,
                "measured_ms": row.measured,
                "predicted_ms": row.predicted,
                "proportional_ms": row.proportional,
                "uncertainty_ms": row.uncertainty,
                "dense_ms": row.dense,
                "settled": row.settled,
            }
            for row in rows
        ],
    }


def _errors(rows: Sequence[Compared], guess: Literal["predicted", "proportional"]) -> dict[str, Any]:
    """Errors of one of a plan's guesses; what a plan saves is counted from its dense."""
    guesses = [getattr(row, guess) for row in rows]
    found = accuracy([row.measured for row in rows], guesses)
    saved = [abs(row.measured - ms) / abs(row.dense - row.measured) for row, ms in zip(rows, guesses, strict=True)]
    return {
        "whole_model": {name: found[name] for name in ("n", "mape", "within_10pct", "spearman")},
        "saved_ms": {"median_error": statistics.median(saved) if saved else None},
    }


def _one(
    name: str, folder: Path, device: Device, *, count: int, threads: int, jobs: int, on_progress: Progress
) -> tuple[LatencyModel, list[Compared]]:
    """Profile a model, measure plans, predict them."""
    subject = Subject.of(name)

    def profiling(done: int, total: int, text: str) -> None:
        on_progress(done, total + count, f"profile: {text}")

    options = {"threads": threads, "jobs": jobs}
    measured = profile(device, subject, out=folder / PROFILE_FILE, **options, on_progress=profiling)
    points = len(measured.points)
    model = LatencyModel.fit(measured)
    if "decode" in model.fits and model.program.kind == "generative":
        model = model.with_decode_tokens(DECODE_TOKENS)
    plans = held_out_plans(subject, count, seed=SEED)

    def comparing(done: int, text: str) -> None:
        on_progress(points + done, points + count, text)

    timings = _timed(subject, plans, folder / PLANS, device, **options, on_progress=comparing)
    empty = subject.shallow(None)
    cost = MacsCost(empty, decode_tokens=model.decode_tokens)
    requests = whole_requests(measured, model)
    longest, took = requests[0]
    rate = ms_per_mac(requests, cost)
    rows = [
        Compared(
            plan=plan,
            macs=cost.predict(plan),
            measured=request_ms(model, plan, timing),
            predicted=model.predict(plan),
            proportional=rate * cost.predict(plan),
            uncertainty=model.uncertainty(plan),
            # As the longest prompt was measured, and what a shorter one saves of it by prediction: that is not pruning's merit.
            dense=took * model.predict(subject.with_prompt_of(empty, plan).dense(empty)) / model.predict(longest),
            settled=all(one.settled for one in timing.values()),
        )
        for plan, timing in zip(plans, timings, strict=True)
    ]
    return model, rows


def ms_per_mac(requests: Sequence[tuple[Plan, float]], cost: MacsCost) -> float:
    """What MACs alone would make of a profile's whole models; in `LatencyModel.report` they are given the same."""
    return proportional([cost.predict(plan) for plan, _ in requests], [ms for _, ms in requests])


def whole_requests(measured: Profile, model: LatencyModel) -> list[tuple[Plan, float]]:
    """The plans of a profile's whole models, the dense one first, and milliseconds of a request in each."""
    whole = [(point.parsed_plan(), point.methods) for point in measured.points if point.kind == "whole"]
    return [(plan, request_ms(model, plan, methods)) for plan, methods in whole]


def _timed(
    subject: Subject,
    plans: Sequence[Plan],
    folder: Path,
    device: Device,
    *,
    threads: int,
    jobs: int,
    on_progress: Callable[[int, str], None],
) -> list[dict[str, Measurement]]:
    """Measurements of plans by method; those that an earlier run took are read.

    Raises:
        DeviceError: what was measured before is of another plan.
    """
    found: list[dict[str, Measurement]] = []
    missing = [index for index in range(len(plans)) if not _file(folder, index).is_file()]
    if missing:
        with sit(device, preset=PRESETS["quick"], threads=threads) as sitting:

            def progress(number: int, text: str) -> None:
                on_progress(len(plans) - len(missing) + number, f"plan {missing[number] + 1}: {text}")

            wanted = [Wanted(plans[index]) for index in missing]
            timings = sitting.time_each(subject, wanted, jobs=jobs, progress=progress)
            for index, timing in zip(missing, timings, strict=True):
                record = {
                    "plan": plans[index].to_json(),
                    "methods": {method: one.model_dump(mode="json") for method, one in timing.items()},
                }
                write_json(_file(folder, index), record)
    for index, plan in enumerate(plans):
        record = read_json(_file(folder, index), what="measurement")
        if record["plan"] != plan.to_json():
            raise DeviceError(f"{str(_file(folder, index))!r} is of another plan; give another --out.")
        found.append({method: Measurement.model_validate(one) for method, one in record["methods"].items()})
    return found


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:03d}.json"
