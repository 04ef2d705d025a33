"""Measuring with discipline: in turns, beside an anchor that tells whether the device was disturbed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from devices.agent.protocol import Agent, Answer, Job
from devices.errors import DeviceError
from devices.profiles import Measurement
from devices.timing import percentile

DRIFT = 0.05  # of the anchor's fastest call against the usual one: a round that drifts more is repeated
AGREEING = (
    3  # as many of the fastest rounds have to lie within `DRIFT`: a short disturbance between two anchors slows a round
)
SLOW_CALL = 60.0  # seconds that a single call may take at most
STARTING = 120.0  # seconds that loading a program may take


@dataclass(frozen=True)
class Preset:
    """How long to measure.

    Attributes:
        rounds: turns of each subject.
        iterations: calls of a turn, at least;
        min_seconds: and a turn goes on for at least so long.
        samples, seconds: further rounds are taken until a subject has so many samples, or has run for so long.
        patience: seconds that disturbed rounds, and those that are to find agreement, may take before what there is has to do.
    """

    name: str
    rounds: int
    iterations: int
    min_seconds: float
    warmup: int = 1
    samples: int = 0
    seconds: float = 0.0
    patience: float = 0.0


PRESETS = {
    "quick": Preset("quick", rounds=5, iterations=2, min_seconds=0.15, patience=10.0),
    # MLPerf Mobile's single stream: at least 1,024 samples and at least a minute; the 90th percentile counts.
    "report": Preset(
        "report", rounds=10, iterations=16, min_seconds=1.0, warmup=3, samples=1024, seconds=60.0, patience=120.0
    ),
}


@dataclass
class Drift:
    """What the anchor takes when nothing disturbs it: the lower quartile of what was seen. A machine that others share may be
    slow most of the time; and a process may be lucky with the memory that it gets, so that the fastest says little."""

    seen: list[float] = field(default_factory=list)

    def disturbed(self, before: float, after: float) -> bool:
        """Whether a round between two anchors was disturbed; takes note of both."""
        self.seen += [before, after]
        return max(before, after) > percentile(sorted(self.seen), 25) * (1 + DRIFT)


@dataclass
class _Turns:
    """Rounds of one subject, as they come."""

    rounds: list[tuple[tuple[float, ...], float]] = field(default_factory=list)  # samples, and the anchor's worse time
    disturbed: list[tuple[tuple[float, ...], float]] = field(default_factory=list)
    first: Answer | None = None
    peak: int = 0

    @property
    def agree(self) -> bool:
        """Whether the fastest rounds are about equally fast."""
        fastest = sorted(min(samples) for samples, _ in self.rounds)[:AGREEING]
        return fastest[-1] <= fastest[0] * (1 + DRIFT)

    def measurement(self, rejected: int, settled: bool) -> Measurement:
        return Measurement(
            rounds=tuple(samples for samples, _ in self.rounds),
            rejected=rejected,
            settled=settled,
            anchor_ms=tuple(anchor for _, anchor in self.rounds),
            load_ms=self.first.load_ms,
            first_ms=self.first.first_ms,
            peak_rss_kb=self.peak or None,
        )


def measure(
    agent: Agent,
    jobs: Mapping[str, Job],
    *,
    anchor: Job,
    preset: Preset,
    drift: Drift,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Measurement]:
    """Time jobs in turns: in each round every job once, between two runs of the anchor.

    A round whose anchor drifted by more than 5 % is repeated, and further ones are taken until of every job the three fastest
    lie within 5 %: both as often as there are rounds, and more often while the preset has patience. When even then there are
    not enough quiet ones, the quietest of the disturbed ones count, too; the measurement says that it is not settled.

    Args:
        jobs: by name; how long they run is the preset's to say.
        drift: of all measurements of one session: the anchor's usual time is known better and better.

    Raises:
        DeviceError: a job failed, or the device has gone.
    """
    turns = {name: _Turns() for name in jobs}
    rejected, wanted, spent = 0, preset.rounds, 0.0  # seconds beyond what a quiet device would need
    before = _anchor(agent, anchor)
    while True:
        taken: dict[str, Answer] = {}
        for name, job in jobs.items():
            progress(name)
            taken[name] = run_job(agent, _timed(job, preset))
        after = _anchor(agent, anchor)
        disturbed = drift.disturbed(before, after)
        for name, answer in taken.items():
            found = turns[name]
            found.first = found.first or answer
            found.peak = max(found.peak, answer.peak_rss_kb or 0)
            (found.disturbed if disturbed else found.rounds).append((answer.wall_ms, max(before, after)))
        before = after
        rejected += disturbed
        quiet = len(next(iter(turns.values())).rounds)
        complete = quiet >= wanted and all(_enough(found, preset) for found in turns.values())
        if complete and all(found.agree for found in turns.values()):
            return {name: found.measurement(rejected, True) for name, found in turns.items()}
        if disturbed or complete:
            spent += sum(answer.total_ms for answer in taken.values()) / 1000
        if spent >= preset.patience and (rejected > max(wanted, quiet) or (complete and quiet >= 2 * wanted)):
            return {name: _quietest(found, wanted).measurement(rejected, False) for name, found in turns.items()}


def run_job(agent: Agent, job: Job) -> Answer:
    """A job with the time-out that it needs."""
    calls = job.warmup + job.iterations
    return agent.run(job, timeout=STARTING + job.min_seconds + calls * SLOW_CALL)


def _timed(job: Job, preset: Preset) -> Job:
    return replace(job, warmup=preset.warmup, iterations=preset.iterations, min_seconds=preset.min_seconds)


def _anchor(agent: Agent, anchor: Job) -> float:
    """Milliseconds that the anchor takes: its fastest call."""
    return min(run_job(agent, anchor).wall_ms)


def _enough(turns: _Turns, preset: Preset) -> bool:
    samples = sum(len(samples) for samples, _ in turns.rounds)
    seconds = sum(sum(samples) for samples, _ in turns.rounds) / 1000
    return samples >= preset.samples or (preset.seconds > 0 and seconds >= preset.seconds)


def _quietest(turns: _Turns, wanted: int) -> _Turns:
    """With as many rounds as are wanted, completed by those beside the least disturbed anchors."""
    missing = max(wanted - len(turns.rounds), 0)
    chosen = sorted(turns.disturbed, key=lambda round_: round_[1])[:missing]
    return replace(turns, rounds=[*turns.rounds, *chosen])


class Stopwatch:
    """Seconds that an agent was at work, of all that passes through it."""

    def __init__(self, agent: Agent, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._agent, self._clock = agent, clock
        self.seconds = 0.0

    def install(self) -> None:
        self._agent.install()

    def run(self, job: Job, *, timeout: float) -> Answer:
        started = self._clock()
        try:
            return self._agent.run(job, timeout=timeout)
        finally:
            self.seconds += self._clock() - started

    def forget(self, program: Path) -> None:
        self._agent.forget(program)


def preset_named(name: str) -> Preset:
    """A preset.

    Raises:
        DeviceError: there is none of this name.
    """
    if name not in PRESETS:
        raise DeviceError(f"unknown preset {name!r}; accepted: {', '.join(PRESETS)}.")
    return PRESETS[name]
