"""What a call takes in joules on a Jetson: a run of its own beside tegrastats, so that the meter disturbs no times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from devices.agent.protocol import Answer, Job
from devices.conditions.energy import Energy, beside_tegrastats
from devices.device import Device
from devices.errors import DeviceError
from devices.measuring import run_job
from devices.transports import Completed, Transport

INTERVAL_MS = 100  # between two readings
SECONDS = 5.0  # of calls: fifty readings
LOG_LIMIT = 2**24  # bytes


class MeteredTransport(Transport):
    """Another transport, whose commands run beside tegrastats; it writes to a file on the device."""

    def __init__(self, inner: Transport, log: str) -> None:
        self._inner, self._log = inner, log
        self.address = inner.address

    def run(self, command: Sequence[str], **options: Any) -> Completed:
        return self._inner.run(beside_tegrastats(command, self._log, interval_ms=INTERVAL_MS), **options)

    def push(self, local: Path, remote: str, *, executable: bool = False) -> None:
        self._inner.push(local, remote, executable=executable)

    def offer(self, local: Path, remote: str) -> None:
        self._inner.offer(local, remote)

    def pull(self, remote: str, local: Path, *, limit: int) -> None:
        self._inner.pull(remote, local, limit=limit)

    def workspace(self) -> AbstractContextManager[str]:
        return self._inner.workspace()


def check_meter(device: Device) -> None:
    """Check that a device can tell what it takes.

    Raises:
        DeviceError: it is no Jetson.
    """
    if device.kind != "jetson":
        raise DeviceError(f"{device.address} is no Jetson; energy is read from a Jetson's tegrastats alone.")


def joules_a_call(device: Device, jobs: Mapping[str, Job], *, agent: str = "native") -> dict[str, float | None]:
    """Energy of the whole module while a job's calls go on, per call, idle power included.

    Returns:
        Joules by the job's name; None on a board whose rails do not say what the whole takes.

    Raises:
        DeviceError: no Jetson, or tegrastats told of no power; a job failed.
    """
    check_meter(device)
    found = {}
    with device.transport.workspace() as folder, TemporaryDirectory(prefix="comp-edge.") as here:
        log, copy = f"{folder}/tegrastats.log", Path(here, "tegrastats.log")
        with Device(device.address, transport=MeteredTransport(device.transport, log)).agent(agent) as ready:
            for name, job in jobs.items():
                device.transport.run(["rm", "-f", log])
                answer = run_job(ready, replace(job, min_seconds=SECONDS))
                device.transport.pull(log, copy, limit=LOG_LIMIT)
                found[name] = _joules(copy.read_text(errors="replace").splitlines(), answer)
    return found


def _joules(lines: Sequence[str], answer: Answer) -> float | None:
    """Of a call; the counted ones come last, after loading and warming up."""
    readings = max(round(answer.total_ms / INTERVAL_MS), 2)
    energy = Energy.of_tegrastats(lines[-readings:], interval=INTERVAL_MS / 1000)
    if energy.board_joules is None:
        return None
    return energy.board_joules / energy.seconds * answer.total_ms / 1000 / len(answer.wall_ms)
