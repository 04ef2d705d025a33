"""What agents on a device have in common: files that go there once, and a command line that answers with one JSON object."""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from devices.agent.protocol import MAX_SAMPLES, Answer, Job, parse_answer
from devices.errors import DeviceError
from devices.transports import Completed, Transport
from devices.transports.local import reading

ANSWER_LIMIT = 32 * MAX_SAMPLES  # bytes: two numbers a sample, with room
TRACE_LIMIT = 256 * 2**20  # bytes of a trace that is pulled
FAILED = 3  # exit code of an agent that says why
SIGNALS = {
    4: "an instruction that its processor does not have",
    6: "it gave up",
    7: "bus error",
    9: "killed, perhaps for lack of memory",
    11: "a fault in memory",
}


class RemoteFiles:
    """Local files on a device: one that is there already is not sent again, until it has changed.

    Args:
        folder: a private folder on the device.
    """

    def __init__(self, transport: Transport, folder: str) -> None:
        self._transport, self._folder = transport, folder
        self._names = itertools.count()
        self._sent: dict[Path, tuple[tuple[int, ...], str]] = {}

    def send(self, path: Path) -> str:
        """The path on the device of a file as it is now.

        Raises:
            DeviceError: it cannot be read here, or not be written there.
        """
        with reading(path) as file:
            status = os.fstat(file.fileno())
        # Programs of gigabytes are timed many times over, so that their content is not read to tell whether it is the same.
        state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        known, remote = self._sent.get(path.absolute(), (None, ""))
        if known != state:
            self.remove(path)
            remote = f"{self._folder}/file-{next(self._names)}"
            self._transport.offer(path, remote)
            self._sent[path.absolute()] = (state, remote)
        return remote

    def remove(self, path: Path) -> str | None:
        """Remove what a file was last sent as, and say where that was; None where it was not sent."""
        _, remote = self._sent.pop(path.absolute(), (None, None))
        if remote is not None:
            self._transport.run(["rm", "-f", remote])
        return remote


class CommandAgent(ABC):
    """An agent that is a program on the device with the command line of `agent.cpp` and of `python_agent.py`.

    Args:
        workspace: a private folder on the device.
    """

    form = "pte"

    def __init__(self, transport: Transport, workspace: str) -> None:
        self._transport, self._workspace = transport, workspace
        self._files = RemoteFiles(transport, workspace)
        self._command: Sequence[str] = ()  # of `install`

    @abstractmethod
    def install(self) -> None:
        """Bring what is needed to the device.

        Raises:
            DeviceError: it cannot be built, or does not run there (says which processor was found).
        """

    def run(self, job: Job, *, timeout: float) -> Answer:
        """Time a job; its files are pushed where they are not there yet.

        Raises:
            AgentError: the agent says why it cannot.
            DeviceError: it does not come to an end of its own, or what it prints is no answer to this job.
        """
        words = [
            *self._command,
            f"--model={self._files.send(job.program)}",
            f"--method={job.method}",
            f"--threads={job.threads}",
            f"--warmup={job.warmup}",
            f"--iterations={job.iterations}",
            f"--min-seconds={job.min_seconds:g}",
        ]
        if job.inputs is not None:
            words.append(f"--inputs={self._files.send(job.inputs)}")
        if job.cpus:
            words.append(f"--cpus={','.join(map(str, job.cpus))}")
        if job.etdump:
            words.append(f"--etdump={self._trace}")
        done = self._transport.run(words, timeout=timeout, limit=ANSWER_LIMIT)
        if done.exit_code not in (0, FAILED):
            raise DeviceError(f"the agent on {self._transport.address} {how_it_ended(done)} with {job.program.name!r}.")
        return parse_answer(done.stdout, job=job, where=self._transport.address)

    def forget(self, program: Path) -> None:
        """Remove a program from the device that no job needs any more."""
        self._files.remove(program)

    def pull_etdump(self, local: Path) -> None:
        """Copy the trace of the last job that asked for one.

        Raises:
            DeviceError: there is none, or it is too large.
        """
        self._transport.pull(self._trace, local, limit=TRACE_LIMIT)

    @property
    def _trace(self) -> str:
        return f"{self._workspace}/trace.etdp"


def how_it_ended(done: Completed) -> str:
    """How a command failed, to be part of a sentence: its exit code, what that means, and its last words."""
    meaning = SIGNALS.get(done.exit_code - 128)
    words = last_words(done)
    return f"ended with {done.exit_code}{f' ({meaning})' if meaning else ''}{f', saying {words!r},' if words else ''}"


def last_words(done: Completed) -> str:
    """The last line that a command wrote to stderr, or else to stdout, fit to be shown."""
    lines = [line for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    return "".join(c for c in lines[-1] if c.isprintable())[:200].strip() if lines else ""
