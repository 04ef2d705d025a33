"""The text that TensorFlow Lite's (LiteRT's) `benchmark_model` prints, from a terminal or from logcat. Microseconds.

Of each run: the graph, a line of statistics of the warm-up and one of the calls that count, and a summary. Single calls
are not printed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from devices.imports.model import Contents, ImportedTiming, Malformed, of_statistics

FORMAT = "TFLite benchmark_model"

_NUMBER = r"(\d{1,18}(?:\.\d{1,18})?(?:e[+-]?\d{1,2})?)"
_STATISTICS = re.compile(r"(?:^|\s)count=\d")
_PAIR = re.compile(rf"\b(count|first|curr|min|max|avg|std|p5|median|p95)={_NUMBER}(?![\w.])")
_SUMMARY = "Inference timings in us:"
_SUMMARY_LINE = re.compile(
    rf"{_SUMMARY} Init: {_NUMBER}, First inference: {_NUMBER}, Warmup \(avg\): {_NUMBER}, Inference \(avg\): {_NUMBER}(?![\w.])"
)
_GRAPH = re.compile(r"\bGraph: \[([^\]]{1,1000})\]")
_THREADS = re.compile(r"\bNum threads: \[(\d{1,4})\]")
_PEAKS = (
    re.compile(rf"Overall peak memory footprint \(MB\) via periodic monitoring: {_NUMBER}(?![\w.])"),
    re.compile(rf"\bPeak memory footprint \(MB\): init={_NUMBER} overall={_NUMBER}(?![\w.])"),  # before 2.5
)
_DELTA = re.compile(
    rf"Memory footprint delta from the start of the tool \(MB\): init={_NUMBER} overall={_NUMBER}(?![\w.])"
)
_PERCENTS = {"p5": "5", "median": "50", "p95": "95"}


@dataclass
class _Run:
    """What was printed since the last summary, then the summary."""

    graph: str = "model"
    statistics: dict[str, float] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)
    other: dict[str, float] = field(default_factory=dict)
    line: int = 0


def recognises(text: str) -> bool:
    """Whether a text is one."""
    return (
        _SUMMARY in text
        or re.search(r"Log parameter values verbosely|The input model file size \(MB\)", text) is not None
    )


def parse(text: str) -> Contents:
    """A timing for each run.

    Raises:
        Malformed: a summary is missing or not as it should be.
    """
    done: list[_Run] = []
    run = _Run()
    for number, line in enumerate(text.splitlines(), start=1):
        if _SUMMARY in line:
            _summarize(run, line, number)
            done.append(run)
            run = _Run()
        elif _STATISTICS.search(line) and "Timings (microseconds)" not in line:
            run.statistics = {name: float(value) for name, value in _PAIR.findall(line)}
        elif match := _GRAPH.search(line):
            run.graph = match.group(1).replace("\\", "/").rpartition("/")[2] or "model"
        elif match := _THREADS.search(line):
            run.other["threads"] = float(match.group(1))
        elif done:
            _remember_memory(done[-1], line)
    if not done or run.statistics:
        raise Malformed(f"the text ends before a line {_SUMMARY!r}")
    return Contents(
        timings=[_timing(run) for run in done], notes=("Single calls are not known, only their statistics.",)
    )


def _summarize(run: _Run, line: str, number: int) -> None:
    match = _SUMMARY_LINE.search(line)
    if not match:
        raise Malformed(
            f"line {number}: expected '{_SUMMARY} Init: NUMBER, First inference: NUMBER, Warmup (avg): NUMBER, "
            "Inference (avg): NUMBER'"
        )
    init, first, _, average = (float(word) / 1e3 for word in match.groups())
    if not run.statistics.get("count", 1):
        raise Malformed(f"line {number}: the model was not called (count=0)")
    said = run.statistics.get("avg", run.statistics.get("curr"))
    if said is not None and abs(average * 1e3 - said) > 1e-3 * said:
        raise Malformed(
            f"line {number}: Inference (avg) is {average * 1e3:g}, but the statistics before it say {said:g}"
        )
    run.line = number
    run.known = {"load_ms": init, "first_ms": first, "mean": average}


def _remember_memory(run: _Run, line: str) -> None:
    for pattern in _PEAKS:
        if match := pattern.search(line):
            run.known["peak_memory_kb"] = round(float(match.groups()[-1]) * 1024)
    if match := _DELTA.search(line):
        run.other["memory_growth_mb"] = float(match.group(2))


def _timing(run: _Run) -> ImportedTiming:
    said = run.statistics
    # Where all calls took the same time, only the last one is printed.
    same = said.get("curr") if "avg" not in said else None
    return of_statistics(
        run.graph,
        place=f"line {run.line}",
        count=int(said["count"]) if "count" in said else None,
        min=_ms(said.get("min", same)),
        max=_ms(said.get("max", same)),
        std=_ms(said.get("std", None if same is None else 0.0)),
        percentiles={percent: said[name] / 1e3 for name, percent in _PERCENTS.items() if name in said},
        other=run.other,
        **run.known,
    )


def _ms(microseconds: float | None) -> float | None:
    return None if microseconds is None else microseconds / 1e3
