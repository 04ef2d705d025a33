"""The log of an XCTest run, as ExecuTorch's benchmark application for Apple devices and Xcode print it.

A line for each test and metric: `Test Case '-[Class test]' measured [Clock Monotonic Time, s] average: …, relative
standard deviation: …%, values: [seconds, …], …`. The application calls its tests
`test_WHAT_MODEL_pte_SYSTEM_VERSION_MACHINE`, WHAT being load, forward or generate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from devices.imports.model import Contents, ImportedDevice, ImportedTiming, Malformed, checked, of_samples

FORMAT = "XCTest log"

_STARTS = re.compile(r"Test Case '[^']{1,500}' measured \[(?P<metric>[^\],]{1,100})")
_LINE = re.compile(
    r"Test Case '(?:-\[)?(?P<test>[^'\]]{1,256})\]?' measured \[[^\],]{1,100}, (?P<unit>[^\],]{1,20})\] "
    r"average: (?P<average>\d{1,15}(?:\.\d{1,15})?), relative standard deviation: [^,%]{1,30}%, "
    r"values: \[(?P<values>\d[\d., ]*)\]"
)
_NAME = re.compile(
    r"test_(?P<what>[A-Za-z]+)_(?P<model>.+?)_pte(?:_\w+?)?_(?P<system>iOS|iPadOS|macOS|visionOS|tvOS)_"
    r"(?P<version>\d+(?:_\d+){0,2}?)_(?P<machine>[A-Za-z]\w*)"
)
_CLOCKS = ("Clock Monotonic Time", "Time")
_MEMORY, _RATE = "Memory Peak Physical", "Tokens Per Second"
_SECONDS = {"s": 1e3, "seconds": 1e3, "ms": 1.0}


@dataclass
class _Test:
    """Values of a test's metrics, with the line on which each stands."""

    name: str
    metrics: dict[str, tuple[int, str, list[float]]] = field(default_factory=dict)


def recognises(text: str) -> bool:
    """Whether a text is one."""
    return _STARTS.search(text) is not None


def parse(text: str) -> Contents:
    """The tests that have a clock.

    Raises:
        Malformed: a line is not as it should be, or contradicts itself; or nothing was timed.
    """
    tests: list[_Test] = []
    latest: dict[str, _Test] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        start = _STARTS.search(line)
        if start and (metric := start["metric"]) in (*_CLOCKS, _MEMORY, _RATE):
            name, unit, values = _measured(line, number)
            if name not in latest or metric in latest[name].metrics:  # it may be run once more
                latest[name] = _Test(name)
                tests.append(latest[name])
            latest[name].metrics[metric] = number, unit, values
    timed = [(test, clock) for test in tests for clock in _CLOCKS if clock in test.metrics]
    if not timed:
        raise Malformed("no test has a line 'measured [Clock Monotonic Time, s]'")
    names = {test.name: _NAME.fullmatch(re.split("[ .]", test.name)[-1]) for test, _ in timed}
    loads: dict[str, float] = {}
    timings: list[ImportedTiming] = []
    # A model's load belongs to its other tests, wherever it stands.
    for test, clock in sorted(timed, key=lambda item: not _is_load(names[item[0].name])):
        timing = _timing(test, clock, names[test.name], loads)
        timings.append(timing)
        match = names[test.name]
        if match and _is_load(match) and timing.mean is not None:
            loads[match["model"]] = timing.mean
    devices = {_device(match) for match in names.values() if match}
    return Contents(
        timings=timings,
        device=devices.pop() if len(devices) == 1 else None,
        notes=("Memory is XCTest's peak physical memory.",) if any(t.peak_memory_kb for t in timings) else (),
    )


def _measured(line: str, number: int) -> tuple[str, str, list[float]]:
    match = _LINE.search(line)
    if not match:
        raise Malformed(
            f"line {number}: expected 'measured [METRIC, UNIT] average: NUMBER, relative standard deviation: NUMBER%, "
            "values: [NUMBERS]'"
        )
    try:
        values = [float(word) for word in match["values"].split(",")]
    except ValueError:
        raise Malformed(f"line {number}: values must be numbers, not {match['values'][:60]!r}") from None
    mean = sum(values) / len(values)
    if abs(mean - float(match["average"])) > 0.002 * mean + 0.001:
        raise Malformed(f"line {number}: the average is {match['average']}, but that of the values is {mean:.6g}")
    return match["test"], match["unit"], values


def _timing(test: _Test, clock: str, match: re.Match[str] | None, loads: dict[str, float]) -> ImportedTiming:
    number, unit, values = test.metrics[clock]
    if unit not in _SECONDS:
        raise Malformed(f"line {number}: a clock's unit must be s, not {unit!r}")
    _, memory_unit, memory = test.metrics.get(_MEMORY, (0, "kB", []))
    _, _, rates = test.metrics.get(_RATE, (0, "t/s", []))
    return of_samples(
        f"{match['what']} {match['model']}" if match else test.name,
        (value * _SECONDS[unit] for value in values),
        place=f"line {number}",
        load_ms=loads.get(match["model"]) if match and not _is_load(match) else None,
        peak_memory_kb=round(max(memory)) if memory and memory_unit == "kB" else None,
        other={"tokens_per_second": sum(rates) / len(rates)} if rates else {},
    )


def _is_load(match: re.Match[str] | None) -> bool:
    return match is not None and match["what"] == "load"


def _device(match: re.Match[str]) -> ImportedDevice:
    # Punctuation has become underscores: iPhone15,4 is iPhone15_4.
    machine = re.sub(r"(?<=\d)_(?=\d+$)", ",", match["machine"])
    system = f"{match['system']} {match['version'].replace('_', '.')}"
    return checked(ImportedDevice, {"name": machine, "system": system}, place=f"test {match[0][:80]!r}")
