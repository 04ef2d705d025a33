"""A profile that Qualcomm AI Hub measured (`ProfileJob.download_profile`): microseconds and bytes."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

from pydantic import Field

from devices.imports.model import (
    MAX_SAMPLES,
    Contents,
    ImportedTiming,
    Number,
    Part,
    checked,
    of_samples,
    of_statistics,
)
from devices.profiles import Count, Name

FORMAT = "Qualcomm AI Hub profile"

_Positive = Annotated[Number, Field(ge=0)]
_Optional = _Positive | None  # old profiles have less in them


class _Summary(Part):
    estimated_inference_time: _Positive
    all_inference_times: Annotated[list[_Positive], Field(max_length=MAX_SAMPLES)] = []
    first_load_time: _Optional = None
    warm_load_time: _Optional = None
    compile_time: _Optional = None
    estimated_inference_peak_memory: _Optional = None
    inference_memory_peak_range: tuple[Count, Count] | _Optional = None


class _Layer(Part):
    compute_unit: Name = "unknown"


class _Profile(Part):
    execution_summary: _Summary
    execution_detail: Annotated[list[_Layer], Field(max_length=1_000_000)] = []


def recognises(value: Any) -> bool:
    """Whether decoded JSON is one."""
    return isinstance(value, dict) and "execution_summary" in value


def parse(value: dict[str, Any]) -> Contents:
    """The one model.

    Raises:
        Malformed: a field is not there, or no number.
    """
    profile = checked(_Profile, value, place="file")
    summary = profile.execution_summary
    peaks = summary.inference_memory_peak_range
    peak = peaks[1] if isinstance(peaks, tuple) else summary.estimated_inference_peak_memory
    other = {
        "estimated_ms": summary.estimated_inference_time / 1e3,
        "first_load_ms": _in(1e3, summary.first_load_time),
        "compile_ms": _in(1e3, summary.compile_time),
        **{
            f"layers on {unit}": n
            for unit, n in Counter(layer.compute_unit for layer in profile.execution_detail).items()
        },
    }
    warm = _in(1e3, summary.warm_load_time)
    kilobytes = _in(1024, peak)
    known: dict[str, Any] = {
        "place": "execution_summary",
        "load_ms": _in(1e3, summary.first_load_time) if warm is None else warm,
        "peak_memory_kb": None if kilobytes is None else round(kilobytes),
        "other": {name: number for name, number in other.items() if number is not None},
    }
    return Contents(
        timings=[_timing(summary, known)],
        notes=(
            "The profile does not say which device it is of.",
            "Loading is with what the first load has left in caches; memory is the upper end of a range.",
        ),
    )


def _timing(summary: _Summary, known: dict[str, Any]) -> ImportedTiming:
    if summary.all_inference_times:
        return of_samples("inference", (time / 1e3 for time in summary.all_inference_times), **known)
    return of_statistics("inference", min=summary.estimated_inference_time / 1e3, **known)  # the fastest of all


def _in(units: float, value: float | None) -> float | None:
    return None if value is None else value / units
