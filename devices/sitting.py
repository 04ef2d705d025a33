"""A sitting: programs lowered and timed one after the other on one device, by one agent, beside one anchor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from comp_edge.plan import Plan
from devices.agent.protocol import Answer, Job
from devices.anchor import write_anchor
from devices.device import Device
from devices.lowering import Wanted, lowered_ahead
from devices.measuring import Drift, Preset, Stopwatch, measure, run_job
from devices.profiles import Measurement
from devices.programs import Program, Subject


@dataclass
class Sitting:
    """See `sit`.

    Attributes:
        agent: counts the seconds that it is at work.
        first: what the agent said of the anchor at the beginning.
        form: of the programs that it times, see `devices.programs.write_programs`.
        drift: what the anchor takes, known better and better.
    """

    agent: Stopwatch
    anchor: Job
    first: Answer
    form: str
    preset: Preset
    folder: Path
    drift: Drift = field(default_factory=Drift)

    def time(self, subject: Subject, plan: Plan) -> dict[str, Measurement]:
        """Lower a plan and time its methods, see `time_each`."""
        (found,) = self.time_each(subject, [Wanted(plan)])
        return found

    def time_each(
        self,
        subject: Subject,
        wanted: Sequence[Wanted],
        *,
        jobs: int = 1,
        progress: Callable[[int, str], None] = lambda index, text: None,
    ) -> Iterator[dict[str, Measurement]]:
        """Lower one plan after the other and time its methods in turns; nothing is left behind, here or on the device.

        Args:
            jobs: processes that lower; all of them rest while something is timed.
            progress: which plan it is, and what is done with it.

        Raises:
            DeviceError: a program does not run there, or the device has gone.
            InputError: a plan has no deployment form.
        """

        def lowering(index: int) -> None:
            if index < len(wanted):
                progress(index, "lower")

        lowering(0)
        with lowered_ahead(subject, wanted, self.folder, form=self.form, jobs=jobs) as each:
            for index, programs in enumerate(each):
                yield self._of_programs(programs, lambda method, at=index: progress(at, f"measure {method}"))
                lowering(index + 1)

    def measure(
        self, jobs: Mapping[str, Job], progress: Callable[[str], None] = lambda job: None
    ) -> dict[str, Measurement]:
        """Time jobs in turns, see `devices.measuring.measure`."""
        return measure(self.agent, jobs, anchor=self.anchor, preset=self.preset, drift=self.drift, progress=progress)

    def _of_programs(self, programs: Sequence[Program], progress: Callable[[str], None]) -> dict[str, Measurement]:
        jobs = {
            method: replace(self.anchor, program=program.path, method=method, inputs=inputs)
            for program in programs
            for method, inputs in program.inputs.items()
        }
        try:
            return self.measure(jobs, progress)
        finally:
            for program in programs:
                for path in (program.path, *program.inputs.values()):
                    self.agent.forget(path)


@contextmanager
def sit(
    device: Device, *, preset: Preset, agent: str = "native", threads: int = 1, cpus: tuple[int, ...] = ()
) -> Iterator[Sitting]:
    """Begin to time programs on a device.

    Args:
        agent: see `devices.agent.AGENTS`.

    Raises:
        DeviceAbsent: the device cannot be reached.
        DeviceError: the agent does not run there.
    """
    device.info()  # so that a device that is not there is told from one that goes
    with device.agent(agent) as installed, TemporaryDirectory(prefix="comp-edge.") as folder:
        watched = Stopwatch(installed)
        anchor = write_anchor(Path(folder), form=installed.form, threads=threads, cpus=cpus)
        yield Sitting(watched, anchor, run_job(watched, anchor), installed.form, preset, Path(folder))
