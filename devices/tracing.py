"""Where the time of a call goes, by traces that an agent writes: runs of their own, since tracing takes time itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from devices.agent import AGENTS, agent_named
from devices.agent.etdump import Part, attribute
from devices.agent.protocol import Job
from devices.agent.remote import CommandAgent
from devices.device import Device
from devices.errors import DeviceError
from devices.measuring import run_job

SUFFIX = ".etdp"
NUMBER = re.compile(r" #\d+$")  # XNNPACK counts the kernels of one name in a delegate


@dataclass(frozen=True)
class Share:
    """All parts of a call that are of one kind and name.

    Attributes:
        kind, name: see `devices.agent.etdump.Part`; kernels are not numbered.
        count: how often it is done in one call.
        ms: of one call.
        share: of the call's time.
    """

    kind: str
    name: str
    count: int
    ms: float
    share: float


def check_tracer(agent: str) -> None:
    """Check that an agent can trace.

    Raises:
        DeviceError: it cannot, or there is no such agent.
    """
    if not issubclass(agent_named(agent), CommandAgent):
        able = [name for name, other in AGENTS.items() if issubclass(other, CommandAgent)]
        raise DeviceError(f"agent {agent!r} writes no traces of ExecuTorch's; accepted: {', '.join(able)}.")


def trace_calls(
    device: Device, jobs: Mapping[str, Job], folder: Path, *, agent: str = "native"
) -> dict[str, tuple[Path, list[Part]]]:
    """Trace every job once more, and leave its ETDump in a folder of this machine.

    Returns:
        By the job's name, the trace and what it says.

    Raises:
        DeviceError: the agent writes no traces, a job failed, or what came back is no trace.
    """
    check_tracer(agent)
    found = {}
    folder.mkdir(parents=True, exist_ok=True)
    with device.agent(agent) as ready:
        for index, (name, job) in enumerate(jobs.items(), 1):
            run_job(ready, replace(job, etdump=True))
            # Methods and programs may have any names: the number tells them apart, the rest is for people.
            path = folder / f"{index:02}-{job.program.stem}-{_plain(job.method)}{SUFFIX}"
            ready.pull_etdump(path)
            found[name] = (path, attribute(path))
    return found


def shares(parts: Iterable[Part]) -> list[Share]:
    """The parts of a call by kind and name, those that take longest first."""
    sums: dict[tuple[str, str], list[float]] = {}
    for part in parts:
        sums.setdefault((part.kind, NUMBER.sub("", part.name)), []).append(part.ms)
    whole = sum(map(sum, sums.values()))
    found = [
        Share(kind, name, len(each), sum(each), sum(each) / whole if whole else 0.0)
        for (kind, name), each in sums.items()
    ]
    return sorted(found, key=lambda share: -share.ms)


def _plain(text: str) -> str:
    return "".join(c if c.isalnum() or c in "_-" else "_" for c in text)[:64]
