"""What is known of measurements that somebody else's program made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from devices.profiles import Count, Milliseconds, Name, percentile

MAX_SAMPLES = 1_000_000
MAX_TIMINGS = 10_000
# Of somebody else's file; within these limits no arithmetic overflows.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=-1e18, lt=1e18)]

_T = TypeVar("_T", bound=BaseModel)


class Malformed(ValueError):
    """A place in a file and what was expected there; whoever knows the file's name makes a DeviceError of it."""


class Part(BaseModel):
    """A part of somebody else's file: fields that newer versions add are none of our business."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class Known(BaseModel):
    """A part of what is known."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ImportedDevice(Known):
    """Which device, as far as the file says."""

    name: Name | None = None
    system: Name | None = None
    memory_mb: Count | None = None


class ImportedTiming(Known):
    """Calls of one kind. What the file does not say is None.

    Attributes:
        samples: single calls, in the order of the file; None where only statistics are known.
        count: calls.
        std: of all calls (division by their number).
        percentiles: by percent, such as "50".
        first_ms: the first call of all, before any that counts.
        peak_memory_kb: what the program calls its peak. Each counts memory in its own way.
        other: what else it says, by a name with the unit.
    """

    name: Name
    unit: Literal["ms"] = "ms"
    samples: Annotated[tuple[Milliseconds, ...], Field(min_length=1, max_length=MAX_SAMPLES)] | None = None
    count: Count | None = None
    mean: Milliseconds | None = None
    min: Milliseconds | None = None
    max: Milliseconds | None = None
    std: Milliseconds | None = None
    percentiles: dict[Annotated[str, Field(pattern=r"^\d{1,2}$")], Milliseconds] = {}
    load_ms: Milliseconds | None = None
    first_ms: Milliseconds | None = None
    peak_memory_kb: Count | None = None
    other: dict[Name, Number] = {}


class Imported(Known):
    """A file of results.

    Attributes:
        format: which program wrote it; see `devices.imports`.
        sha256: of the file.
        notes: what a reader must know of how these numbers came about.
    """

    format: Name
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    device: ImportedDevice | None = None
    timings: Annotated[tuple[ImportedTiming, ...], Field(min_length=1, max_length=MAX_TIMINGS)]
    notes: tuple[str, ...] = ()


class Contents(NamedTuple):
    """What an importer finds in a file."""

    timings: Sequence[ImportedTiming]
    device: ImportedDevice | None = None
    notes: Sequence[str] = ()


def checked(model: type[_T], value: Any, *, place: str) -> _T:
    """A validated part of a file.

    Raises:
        Malformed: names the place, the field and what was expected.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ": ".join([place, *([".".join(str(part) for part in first["loc"])] if first["loc"] else [])])
        found = "" if first["type"] == "missing" else f", not {str(first['input'])[:60]!r}"
        raise Malformed(f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}{found}") from None


def of_samples(name: str, samples: Iterable[float], *, place: str, **known: Any) -> ImportedTiming:
    """A timing of which single calls are known, in milliseconds; its statistics are computed.

    Raises:
        Malformed: there are none, or one is no time.
    """
    calls = tuple(samples)
    values: Mapping[str, Any] = {}
    if calls and all(0 <= call < 1e8 for call in calls):  # what is wrong is said below
        ordered, mean = sorted(calls), sum(calls) / len(calls)
        values = {
            "mean": mean,
            "min": ordered[0],
            "max": ordered[-1],
            "std": math.sqrt(sum((call - mean) ** 2 for call in calls) / len(calls)),
            "percentiles": {str(percent): percentile(ordered, percent) for percent in (50, 90, 99)},
        }
    return checked(
        ImportedTiming, {"name": name, "samples": calls, "count": len(calls), **values, **known}, place=place
    )


def of_statistics(name: str, *, place: str, **known: Any) -> ImportedTiming:
    """A timing of which only statistics are known, in milliseconds.

    Raises:
        Malformed: one of them is no time.
    """
    return checked(ImportedTiming, {"name": name, **known}, place=place)
