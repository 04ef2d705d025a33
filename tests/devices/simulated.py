"""A device that is a formula: an agent whose calls take what a function says, on a clock that only it moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from devices.agent.protocol import Answer, Job
from devices.record import DeviceRecord
from devices.transports import HostTransport

ANCHOR = "anchor.pte"


class SimulatedAgent:
    """Answers jobs without running anything.

    Args:
        takes: milliseconds of a call, from the job and how many jobs were asked before.
        anchor: milliseconds of the anchor, from how often it ran before.
        slow: by what factor a call of a job takes longer, from the job's number and the call's; beats beside it, too.
        fails: called before each job; may raise.
    """

    def __init__(
        self,
        takes: Callable[[Job, int], float],
        *,
        anchor: Callable[[int], float] = lambda number: 10.0,
        slow: Callable[[int, int], float] | None = None,
        fails: Callable[[Job], None] = lambda job: None,
    ) -> None:
        self.takes, self.anchor, self.slow, self.fails = takes, anchor, slow, fails
        self.jobs: list[Job] = []
        self.forgotten: list[str] = []
        self.installed = 0
        self.form = "pte"
        self.seconds = 0.0  # that it was at work, as a stopwatch would say

    def install(self) -> None:
        self.installed += 1

    def run(self, job: Job, *, timeout: float) -> Answer:
        self.fails(job)
        before = sum((other.program.name == ANCHOR) == (job.program.name == ANCHOR) for other in self.jobs)
        self.jobs.append(job)
        ms = self.anchor(before) if job.program.name == ANCHOR else self.takes(job, before)
        calls = max(job.iterations, int(job.min_seconds * 1000 / ms))
        factors, beats = [1.0] * calls, ()
        self.seconds += (1.0 + job.warmup * ms) / 1000
        if self.slow is not None and job.program.name != ANCHOR:
            factors = [self.slow(before, call) for call in range(calls)]
            beats = (1.0, *factors)
        self.seconds += ms * sum(factors) / 1000
        return Answer(
            schema=1,
            agent="simulated",
            runtime="formula 1",
            method=job.method,
            threads=job.threads,
            load_ms=1.0,
            first_ms=2 * ms,
            wall_ms=tuple(ms * factor for factor in factors),
            beat_ms=beats,
            total_ms=ms * sum(factors),
            peak_rss_kb=1000 + len(self.jobs),
        )

    def forget(self, program: Path) -> None:
        self.forgotten.append(program.name)


class SimulatedDevice:
    """Has an agent; its conditions are those of no sensor at all."""

    kind = "linux"
    address = "host"

    def __init__(self, agent: SimulatedAgent, *, name: str = "formula", cores: int = 2) -> None:
        self._agent, self.name, self.cores = agent, name, cores
        self.transport = HostTransport()

    def info(self) -> DeviceRecord:
        return DeviceRecord(address=self.address, name=self.name, machine="x86_64", cores=self.cores)

    def conditions(self) -> dict:
        return {"kind": "linux", "missing": ["cpufreq"]}

    @contextmanager
    def agent(self, kind: str = "native") -> Iterator[SimulatedAgent]:
        self._agent.install()
        yield self._agent
