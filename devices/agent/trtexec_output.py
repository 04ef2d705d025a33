"""What NVIDIA's `trtexec` writes: its log, and the times of single inferences (`--exportTimes`). Pure.

The formats are those of TensorRT 8.2 to 11.1, read from its published source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from devices.agent.protocol import MAX_SAMPLES
from devices.errors import DeviceError

AGREE = 0.01  # relative difference between the log's median and the file's, which are rounded to six digits

_STAMP = r"(?:\[[^\]\n]*\] \[[A-Z]\] )?"
_BANNER = re.compile(r"&&&& RUNNING TensorRT\.trtexec \[TensorRT v([0-9]{4,7})\]")
_FAILURE = re.compile(r"^(?:\[[^\]\n]*\] )?\[E\] (.+)$", re.MULTILINE)
# TensorRT 8.2 says once what later versions say in two steps: reading the file, and making an engine of it.
_LOADED = re.compile(rf"^{_STAMP}Engine loaded in ([0-9.e+-]+) sec\.", re.MULTILINE)
_DESERIALIZED = re.compile(rf"^{_STAMP}Engine deserialized in ([0-9.e+-]+) sec\.", re.MULTILINE)
_QUERIES = re.compile(rf"^{_STAMP}Timing trace has ([0-9]+) queries over", re.MULTILINE)
_WALLTIME = re.compile(rf"^{_STAMP}Total Host Walltime: ([0-9.e+-]+) s", re.MULTILINE)
_COMPUTE = re.compile(rf"^{_STAMP}GPU Compute Time: (.+)$", re.MULTILINE)
_STATISTIC = re.compile(r"(min|max|mean|median|percentile\([0-9.]+%\)) = ([0-9.e+-]+) ms")


@dataclass(frozen=True)
class Log:
    """What the log says of a run.

    Attributes:
        load_ms: reading an engine and making it ready; 0 where it was built instead.
        queries: inferences that were counted.
        total_ms: from the beginning of the first to the end of the last.
        compute: milliseconds of the GPU an inference: `min`, `max`, `mean`, `median`, `percentile(90%)`, ...
    """

    load_ms: float
    queries: int
    total_ms: float
    compute: Mapping[str, float]


def parse_version(log: str) -> tuple[int, int, int]:
    """TensorRT's version, from the first line of whatever trtexec prints.

    Raises:
        DeviceError: there is no such line; TensorRT 8.2 and later have it.
    """
    found = _BANNER.search(log)
    if found is None:
        raise DeviceError(f"trtexec does not say its version, but {log[:80]!r}; TensorRT 8.2 or newer is needed.")
    number = int(found[1])
    # 8.5.3 is 8503, 10.3.0 is 100300.
    return (
        (number // 10000, number // 100 % 100, number % 100)
        if number >= 100000
        else (number // 1000, number // 100 % 10, number % 100)
    )


def parse_log(log: str) -> Log:
    """
    Raises:
        DeviceError: the performance summary is not there, or not whole.
    """
    queries, walltime, compute = (pattern.search(log) for pattern in (_QUERIES, _WALLTIME, _COMPUTE))
    statistics = {name: _number(value) for name, value in _STATISTIC.findall(compute[1])} if compute else {}
    if not queries or not walltime or not {"min", "max", "mean", "median"} <= statistics.keys():
        raise DeviceError("trtexec's log has no performance summary that is whole; TensorRT 8.2 or newer writes one.")
    steps = [_number(found[1]) for pattern in (_LOADED, _DESERIALIZED) if (found := pattern.search(log))]
    return Log(sum(steps) * 1e3, int(queries[1]), _number(walltime[1]) * 1e3, statistics)


def parse_times(text: str, *, warmup_ms: float) -> tuple[float, ...]:
    """Milliseconds of the GPU of each counted inference, from the file of `--exportTimes`.

    Args:
        warmup_ms: as in the command; before TensorRT 8.5 the file has the inferences of the warm-up too.

    Raises:
        DeviceError: it is not such a file.
    """
    try:
        rows = json.loads(text)
        if not isinstance(rows, list) or len(rows) > MAX_SAMPLES:
            raise ValueError(f"a list of at most {MAX_SAMPLES} inferences is expected")
        times = tuple(_time(row, "computeMs") for row in rows if _time(row, "startComputeMs") >= warmup_ms)
    except (ValueError, RecursionError) as error:
        raise DeviceError(f"trtexec's file of times cannot be read: {str(error)[:200]}.") from None
    if not times:
        raise DeviceError("trtexec's file of times has no inference after the warm-up.")
    return times


def check_agreement(times: Sequence[float], log: Log) -> None:
    """The file and the log are two accounts of the same inferences.

    Raises:
        DeviceError: they differ.
    """
    # One inference may be just before the end of the warm-up in one, and after it in the other: times are rounded.
    found, said = median(times), log.compute["median"]
    if abs(len(times) - log.queries) > 1 or abs(found - said) > AGREE * said + 1e-3:
        raise DeviceError(
            f"trtexec's log tells of {log.queries} inferences with a median of {said:g} ms, its file of {len(times)} with "
            f"{found:g} ms."
        )


def reason_of(log: str) -> str:
    """Why a run failed, fit to be shown."""
    found = _FAILURE.findall(log)
    text = found[0] if found else (log.strip().splitlines() or ["it says nothing"])[-1]
    return "".join(c for c in text if c.isprintable())[:300].strip().rstrip(".")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DeviceError(f"trtexec's log has {text[:40]!r} where a number is expected.") from None


def _time(row: Any, key: str) -> float:
    value = row.get(key) if isinstance(row, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise ValueError(f"{key} of an inference is {str(value)[:40]!r}; milliseconds are expected")
    return float(value)
