"""What coremltools' `MLModelBenchmarker` measured, as JSON.

coremltools has no file for it. What is read here is `dataclasses.asdict` of its measurements: `{"statistics": {…},
"samples": [milliseconds, …]}`; alone, or as "predict" (and "load") of a model, or of each of several functions:

    {"device": {"name", "os_version"}, "functions": {"prefill": {"load": {…}, "predict": {…}}, …}}
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from devices.imports.model import MAX_SAMPLES, Contents, ImportedDevice, Number, Part, checked, of_samples
from devices.profiles import Name

FORMAT = "coremltools MLModelBenchmarker"


class _Statistics(Part):
    minimum: Number
    maximum: Number
    average: Number
    std_dev: Number
    median: Number


class _Measurement(Part):
    samples: Annotated[list[Number], Field(min_length=1, max_length=MAX_SAMPLES)]
    statistics: _Statistics | None = None

    @model_validator(mode="after")
    def _agrees(self) -> _Measurement:
        mean = sum(self.samples) / len(self.samples)
        if self.statistics is not None and abs(self.statistics.average - mean) > 1e-3 * abs(mean) + 1e-6:
            raise ValueError(f"the average is {self.statistics.average:g}, but that of the samples is {mean:g}")
        return self


class _Function(Part):
    predict: _Measurement
    load: _Measurement | None = None


class _Device(Part):
    name: Name | None = None
    os_version: Name | None = None


class _File(Part):
    functions: Annotated[dict[Name, _Function], Field(min_length=1, max_length=1000)]
    device: _Device | None = None


def recognises(value: Any) -> bool:
    """Whether decoded JSON is one."""
    return isinstance(value, dict) and any(key in value for key in ("functions", "predict", "samples"))


def parse(value: dict[str, Any]) -> Contents:
    """A timing for each function.

    Raises:
        Malformed: a measurement has no samples, or statistics that are not theirs.
    """
    if "functions" not in value:
        function = value if "predict" in value else {"predict": value}
        value = {"functions": {"predict": function}, "device": value.get("device")}
    file = checked(_File, value, place="file")
    timings = []
    for name, function in file.functions.items():
        loads = function.load.samples if function.load else []
        timings.append(
            of_samples(
                name,
                function.predict.samples,
                place=f"functions.{name}",
                load_ms=loads[0] if loads else None,  # later ones find the compiled model
            )
        )
    device = file.device
    known = device is not None and (device.name or device.os_version)
    return Contents(
        timings=timings,
        device=ImportedDevice(name=device.name, system=device.os_version) if device and known else None,
    )
