"""`benchmark_results.json` of ExecuTorch's benchmark application for Android: a list of metrics, each with model and device.

The script of ExecuTorch that reads Apple devices' logs writes the same.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from devices.imports.model import (
    Contents,
    ImportedDevice,
    ImportedTiming,
    Malformed,
    Number,
    Part,
    checked,
    of_samples,
    of_statistics,
)
from devices.profiles import Name

FORMAT = "ExecuTorch benchmark_results.json"


class _Model(Part):
    name: Name
    backend: Name = ""
    quantization: Name = ""


class _Device(Part):
    device: Name = ""
    arch: Name = ""
    os: Name = ""
    total: Number = Field(default=0, alias="totalMem", ge=0, lt=2**60)


class _Metric(Part):
    model: _Model = Field(alias="benchmarkModel")
    device: _Device = Field(default=_Device(), alias="deviceInfo")
    name: Name = Field(alias="metric")
    value: Number = Field(alias="actualValue")


def recognises(value: Any) -> bool:
    """Whether decoded JSON is one."""
    return (
        isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "metric" in item for item in value)
    )


def parse(value: list[Any]) -> Contents:
    """A model's average call, and its generation of text.

    Raises:
        Malformed: an entry lacks a field, or nothing was timed.
    """
    metrics = [checked(_Metric, item, place=f"entry {index}") for index, item in enumerate(value)]
    groups: dict[tuple[_Model, _Device], dict[str, float]] = {}
    for metric in metrics:
        groups.setdefault((metric.model, metric.device), {})[metric.name] = metric.value
    timings = [timing for (model, _), found in groups.items() for timing in _timings(model, found)]
    if not timings:
        raise Malformed("there is neither 'avg_inference_latency(ms)' nor 'generate_time(ms)'")
    devices = {device for _, device in groups}
    return Contents(timings=timings, device=_device(devices.pop()) if len(devices) == 1 else None)


def _timings(model: _Model, found: dict[str, float]) -> list[ImportedTiming]:
    name = "_".join(part for part in (model.name, model.backend, model.quantization) if part)
    if found.get("load_status"):
        raise Malformed(f"model {name!r} was not loaded on the device (load_status {found['load_status']:g})")
    timings = []
    if "avg_inference_latency(ms)" in found:
        peak = found.get("peak_inference_mem_usage(mb)")
        timings.append(
            of_statistics(
                f"forward {name}",
                place=f"model {name!r}",
                mean=found["avg_inference_latency(ms)"],
                load_ms=found.get("model_load_time(ms)"),
                peak_memory_kb=None if peak is None else round(peak * 1024),
                other=_other(
                    found, {"trimmean_inference_latency(ms)": "trimmed_mean_ms", "ram_pss_usage(mb)": "pss_growth_mb"}
                ),
            )
        )
    if "generate_time(ms)" in found:  # one run
        timings.append(
            of_samples(
                f"generate {name}",
                [found["generate_time(ms)"]],
                place=f"model {name!r}",
                load_ms=found.get("llm_model_load_time(ms)"),
                other=_other(found, {"token_per_sec": "tokens_per_second"}),
            )
        )
    return timings


def _other(found: dict[str, float], names: dict[str, str]) -> dict[str, float]:
    return {ours: found[theirs] for theirs, ours in names.items() if theirs in found}


def _device(device: _Device) -> ImportedDevice | None:
    # `device` is the brand and `arch` the model; on Apple devices both are the machine.
    name = " ".join(dict.fromkeys(part for part in (device.device, device.arch) if part))
    if not name and not device.os:
        return None
    known = {"name": name or None, "system": device.os or None, "memory_mb": int(device.total / 1e6) or None}
    return checked(ImportedDevice, known, place="deviceInfo")
