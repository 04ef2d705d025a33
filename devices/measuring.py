"""Measuring with discipline: in turns, beside an anchor that tells whether the device was disturbed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from devices.agent.protocol import Agent, Answer, Job
from devices.errors import DeviceError
from devices.profiles import Measurement
from devices.timing import percentile

DRIFT = 0.05  # of the anchor's fastest call against the usual one: a round that drifts more is repeated
# As many of the fastest rounds have to lie within `DRIFT`: a short disturbance between two anchors slows a round.
AGREEING = 3
SLOW_CALL = 60.0  # seconds that a single call may take at most
STARTING = 120.0  # seconds that loading a program may take


@dataclass(frozen=True)
class Preset:
    """How long to measure.

    Attributes:
        rounds: turns of each subject.
        iterations: calls of a turn, or as many as fit into `max_seconds`, but one at least;
        min_seconds: and a turn goes on for at least so long.
        samples, seconds: further rounds are taken until a subject has so many samples, or has run for so long.
        patience: seconds that disturbed rounds, and those that are to find agreement, may take before what there is has to do;
            starting, loading, warming up and the anchor included. As many rounds as are wanted are taken in any case.
    """

    name: str
    rounds: int
    iterations: int
    min_seconds: float
    max_seconds: float = 1.0
    warmup: int = 1
    samples: int = 0
    seconds: float = 0.0
    patience: float = 0.0


PRESETS = {
    "quick": Preset("quick", rounds=5, iterations=8, min_seconds=0.25, patience=20.0),
    # MLPerf Mobile's single stream: at least 1,024 samples and at least a minute; the 90th percentile counts.
    "report": Preset(
        "report", rounds=10, iterations=16, min_seconds=1.0, warmup=3, samples=1024, seconds=60.0, patience=120.0
    ),
}


@dataclass
class Drift:
    """What the anchor and a beat (see `Answer.beat_ms`) take when nothing disturbs them, known better and better.

    The anchor's usual time is the lower quartile of what was seen: a machine that others share may be slow most of the time,
    and a process may be lucky with the memory that it gets. Beats are many, and luck is no part of them: the lower decile.

    Attributes:
        anchors, beats: milliseconds that were seen, ascending.
    """

    anchors: list[float] = field(default_factory=list)
    beats: list[float] = field(default_factory=list)

    def disturbed(self, before: float | None, after: float | None) -> bool:
        """Whether a round between two anchors was disturbed; takes note of both. None had no quiet call, and says nothing."""
        known = [anchor for anchor in (before, after) if anchor is not None]
        self.anchors = sorted([*self.anchors, *known])
        return bool(known) and max(known) > percentile(self.anchors, 25) * (1 + DRIFT)

    def quiet(self, answer: Answer) -> tuple[float, ...]:
        """The calls that nothing disturbed, by the beats beside them; takes note of the beats. All, where there are none."""
        if not answer.beat_ms:
            return answer.wall_ms
        self.beats = sorted([*self.beats, *answer.beat_ms])  # nearly sorted already, which makes it cheap
        most = percentile(self.beats, 10) * (1 + DRIFT)
        beside = zip(answer.wall_ms, answer.beat_ms, answer.beat_ms[1:], strict=False)
        return tuple(ms for ms, before, after in beside if max(before, after) <= most)


_Round = tuple[tuple[float, ...], float | None]  # samples, and the anchor's worse time beside them, if it was quiet


@dataclass
class _Turns:
    """Rounds of one job, as they come."""

    preset: Preset
    rounds: list[_Round] = field(default_factory=list)
    disturbed: list[_Round] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)  # all, disturbed ones too
    taken: float = 0.0  # milliseconds of loading, warming up, calls and beats
    first: Answer | None = None
    peak: int = 0
    spent: float = 0.0  # seconds beyond what a quiet device would need

    def timed(self, job: Job) -> Job:
        """The job of the next round."""
        preset, calls = self.preset, self.preset.iterations
        if self.calls:  # of a job whose calls may take seconds the first round says so
            calls = min(calls, int(preset.max_seconds * 1000 / max(min(self.calls), 1e-6)))
        else:
            calls = 1
        return replace(job, warmup=preset.warmup, iterations=max(calls, 1), min_seconds=preset.min_seconds)

    def book(self, answer: Answer, quiet: tuple[float, ...], anchor: float | None, *, seconds: float) -> None:
        """Take note of a round, of which some calls, or none, were quiet, and which kept the device busy for so long."""
        self.first = self.first or answer
        self.peak = max(self.peak, answer.peak_rss_kb or 0)
        if self.complete or not quiet:
            self.spent += seconds
        self.calls.extend(answer.wall_ms)
        self.taken += answer.load_ms + answer.first_ms * self.preset.warmup + answer.total_ms
        if quiet:
            self.rounds.append((quiet, anchor))
        else:
            self.disturbed.append((answer.wall_ms, anchor))

    @property
    def complete(self) -> bool:
        """Whether there are as many quiet rounds, and as many samples, as the preset wants."""
        enough = len(self.calls) >= self.preset.samples
        if self.preset.seconds > 0:
            enough = enough or sum(self.calls) / 1000 >= self.preset.seconds
        return len(self.rounds) >= self.preset.rounds and enough

    @property
    def settled(self) -> bool:
        """Whether they are complete, and the fastest of them about equally fast."""
        fastest = sorted(min(samples) for samples, _ in self.rounds)[:AGREEING]
        return self.complete and fastest[-1] <= fastest[0] * (1 + DRIFT)

    @property
    def given_up(self) -> bool:
        """Whether there is no patience left."""
        return len(self.rounds) + len(self.disturbed) >= self.preset.rounds and self.spent > self.preset.patience

    def measurement(self) -> Measurement:
        """With as many rounds as are wanted, completed by the fastest of the disturbed ones."""
        missing = max(self.preset.rounds - len(self.rounds), 0)
        rounds = [*self.rounds, *sorted(self.disturbed, key=lambda round_: min(round_[0]))[:missing]]
        return Measurement(
            rounds=tuple(samples for samples, _ in rounds),
            rejected=len(self.disturbed),
            settled=self.settled,
            anchor_ms=tuple(anchor for _, anchor in rounds),
            disturbed=self._others(rounds),
            taken_ms=self.taken,
            load_ms=self.first.load_ms,
            first_ms=self.first.first_ms,
            peak_rss_kb=self.peak or None,
        )

    def _others(self, rounds: list[_Round]) -> tuple[float, ...]:
        """The calls that are in none of these rounds."""
        left = Counter(self.calls)
        left.subtract(ms for samples, _ in rounds for ms in samples)
        return tuple(left.elements())


def measure(
    agent: Stopwatch,
    jobs: Mapping[str, Job],
    *,
    anchor: Job,
    preset: Preset,
    drift: Drift,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Measurement]:
    """Time jobs in turns: in each round every job once, between two runs of the anchor.

    Of a round only the calls count whose beats were quiet. A round whose anchor drifted by more than 5 %, or that has no quiet
    call, is repeated, and further ones are taken until the three fastest of a job lie within 5 %: both while the preset has
    patience. When even then there are not enough quiet ones, the fastest of the disturbed ones count, too; the measurement
    says that it is not settled. Percentiles are of all calls, whatever disturbed them.

    Args:
        jobs: by name; how long they run is the preset's to say.
        drift: of all measurements of one session.

    Raises:
        DeviceError: a job failed, or the device has gone.
    """
    turns = {name: _Turns(preset) for name in jobs}
    before, spent = _anchor(agent, anchor, drift), dict.fromkeys(jobs, 0.0)
    while waiting := [name for name, found in turns.items() if not (found.settled or found.given_up)]:
        taken: dict[str, Answer] = {}
        for name in waiting:
            progress(name)
            started = agent.seconds
            taken[name] = run_job(agent, turns[name].timed(jobs[name]))
            spent[name] = agent.seconds - started
        started = agent.seconds
        after = _anchor(agent, anchor, drift)
        shared = (agent.seconds - started) / len(waiting)
        disturbed = drift.disturbed(before, after)
        worse = max((anchor for anchor in (before, after) if anchor is not None), default=None)
        for name, answer in taken.items():
            quiet = drift.quiet(answer)
            turns[name].book(answer, () if disturbed else quiet, worse, seconds=spent[name] + shared)
        before = after
    return {name: found.measurement() for name, found in turns.items()}


def run_job(agent: Agent | Stopwatch, job: Job) -> Answer:
    """A job with the time-out that it needs."""
    calls = job.warmup + job.iterations
    return agent.run(job, timeout=STARTING + job.min_seconds + calls * SLOW_CALL)


def _anchor(agent: Stopwatch, anchor: Job, drift: Drift) -> float | None:
    """Milliseconds that the anchor takes: its fastest call, if any was quiet."""
    return min(drift.quiet(run_job(agent, anchor)), default=None)


class Stopwatch:
    """Seconds that a device was kept busy: those of all that passes through an agent, and of what else is `running`."""

    def __init__(self, agent: Agent, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._agent, self._clock = agent, clock
        self.seconds = 0.0

    def install(self) -> None:
        self._agent.install()

    def run(self, job: Job, *, timeout: float) -> Answer:
        with self.running():
            return self._agent.run(job, timeout=timeout)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is done here."""
        started = self._clock()
        try:
            yield
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
