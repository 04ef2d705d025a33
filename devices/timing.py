"""Timing calls so that two of them can be compared on a machine that other work disturbs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# A round whose anchor is this much slower than the fastest anchor was disturbed.
ANCHOR_DRIFT = 0.05


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call, over `calls` calls in `rounds` rounds; `rejected` rounds were disturbed and not counted.

    `steady` is the median over rounds of a round's fastest call: what a call takes when nothing interrupts it, at the
    clock and cache state of the day. It is the number to compare by; the percentiles also tell what else ran.
    """

    steady: float
    p50: float
    p90: float
    p99: float
    min: float
    mean: float
    calls: int
    rounds: int
    rejected: int

    @classmethod
    def of(cls, rounds: Sequence[Sequence[float]], *, rejected: int = 0) -> Timing:
        """Summarize samples in milliseconds, by round."""
        ordered = sorted(sample for samples in rounds for sample in samples)
        return cls(
            steady=percentile(sorted(min(samples) for samples in rounds), 50),
            p50=percentile(ordered, 50),
            p90=percentile(ordered, 90),
            p99=percentile(ordered, 99),
            min=ordered[0],
            mean=sum(ordered) / len(ordered),
            calls=len(ordered),
            rounds=len(rounds),
            rejected=rejected,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of an ascending sequence."""
    return ordered[max(math.ceil(percent / 100 * len(ordered)) - 1, 0)]


def interleave(
    subjects: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 20,
    calls: int = 5,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time callables in turns: each round calls every subject `calls` times, after one call that is not counted.

    A fixed piece of work, the anchor, is timed around each round. A round whose anchor drifted by more than 5 % of the
    fastest is left out, unless fewer than a third of the rounds would remain: then all count, for a machine that is
    never quiet slows every subject alike.

    Args:
        subjects: what to time, by name.
        warmup: calls of each before the first round.
        clock: seconds; replaced in tests.
        progress: called after each round.
    """
    if rounds < 1 or calls < 1:
        raise ValueError(f"rounds {rounds} and calls {calls} must be at least 1")
    for run in subjects.values():
        for _ in range(warmup):
            run()
    anchors: list[float] = []
    samples: list[dict[str, list[float]]] = []
    before = _anchor(clock)
    for _ in range(rounds):
        taken: dict[str, list[float]] = {}
        for name, run in subjects.items():
            # The other subjects have used the caches since this one's last turn.
            run()
            taken[name] = []
            for _ in range(calls):
                start = clock()
                run()
                taken[name].append((clock() - start) * 1e3)
        after = _anchor(clock)
        anchors.append(max(before, after))
        before = after
        samples.append(taken)
        progress()
    quiet = [i for i, anchor in enumerate(anchors) if anchor <= min(anchors) * (1 + ANCHOR_DRIFT)]
    if len(quiet) * 3 < rounds:
        quiet = list(range(rounds))
    return {name: Timing.of([samples[i][name] for i in quiet], rejected=rounds - len(quiet)) for name in subjects}


def _anchor(clock: Callable[[], float]) -> float:
    """Seconds that a fixed piece of single-threaded work takes; the best of three, so that only a lasting change shows."""
    best = math.inf
    for _ in range(3):
        start = clock()
        total = 0
        for i in range(20_000):
            total += i * i
        best = min(best, clock() - start)
    return best
