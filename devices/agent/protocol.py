"""What an agent is asked, and what it answers: one JSON object on its last line, whoever the agent is.

Agents are the C++ program of this package, the same in Python where a board has ExecuTorch's Python runtime, and an adapter
to `trtexec`. What they print comes from a device and is checked here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from devices.errors import DeviceError

MAX_SAMPLES = 1_000_000
Milliseconds = Annotated[float, Field(ge=0, lt=1e8, allow_inf_nan=False)]


@dataclass(frozen=True)
class Job:
    """One method of one program, to be timed.

    Attributes:
        program: a local .pte file (.onnx for trtexec).
        inputs: a local file with the raw little-endian bytes of all inputs, one after the other, in the method's order;
            None: floats are made up, integers are zero.
        threads: of the runtime's pool.
        cpus: cores that the process is bound to; empty for all.
        warmup: calls that are not counted, the first of which is reported as `first_ms`.
        iterations: calls that are counted, at least;
        min_seconds: and they go on for at least so long.
        etdump: also write a trace of single kernels (a run of its own should be taken for it: tracing costs time).
    """

    program: Path
    method: str = "forward"
    inputs: Path | None = None
    threads: int = 1
    cpus: tuple[int, ...] = ()
    warmup: int = 2
    iterations: int = 10
    min_seconds: float = 0.0
    etdump: bool = False


class Checksum(BaseModel):
    """An output tensor of the first call, to compare between machines: sums of its values and of their magnitudes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    sum: float
    abs: float


class Answer(BaseModel):
    """What an agent reports of a job. Times are of single calls, in the order in which they were made."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_: Literal[1] = Field(alias="schema")
    agent: str = Field(max_length=64)
    runtime: str = Field(max_length=128, description="name and version of what ran the program")
    method: str = Field(max_length=256)
    threads: Annotated[int, Field(ge=1, le=4096)]
    load_ms: Milliseconds
    first_ms: Milliseconds
    wall_ms: Annotated[tuple[Milliseconds, ...], Field(min_length=1, max_length=MAX_SAMPLES)]
    beat_ms: Annotated[tuple[Milliseconds, ...], Field(max_length=MAX_SAMPLES + 1)] = Field(
        default=(), description="of a small piece of work that is always the same, before the first call and after each"
    )
    total_ms: Milliseconds = Field(description="of all counted calls together, by a second reading of the clock")
    peak_rss_kb: Annotated[int, Field(ge=0)] | None = Field(default=None, description="VmHWM")
    outputs: tuple[Checksum, ...] = ()
    etdump_bytes: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _honest(self) -> Answer:
        if self.beat_ms and len(self.beat_ms) != len(self.wall_ms) + 1:
            raise ValueError(f"{len(self.wall_ms)} wall times but {len(self.beat_ms)} beats around them")
        # A clock that jumps, or samples that were not measured one after the other.
        if sum(self.wall_ms) > self.total_ms * 1.05 + 1:
            raise ValueError(f"calls of {sum(self.wall_ms):.1f} ms in all were made in {self.total_ms:.1f} ms")
        # A clock that stands still: reading it and the loop around the shortest call take no longer than the call.
        if sum(self.wall_ms) + sum(self.beat_ms) < self.total_ms * 0.2 - 50:
            raise ValueError(f"calls of {sum(self.wall_ms):.1f} ms in all took {self.total_ms:.1f} ms")
        return self


class AgentError(DeviceError):
    """The agent ran and says why it could not time the program."""


class Failure(BaseModel):
    """What an agent prints instead of an answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_: Literal[1] = Field(alias="schema")
    error: str = Field(max_length=2000)


def parse_answer(stdout: str, *, job: Job, where: str) -> Answer:
    """The answer on the last line of an agent's output.

    Args:
        where: the device's address, for messages.

    Raises:
        AgentError: the agent reports a failure.
        DeviceError: it is no answer, or not one to this job.
    """
    lines = [line for line in stdout.splitlines() if line.strip()]
    if not lines:
        raise DeviceError(f"the agent on {where} printed nothing; one JSON object was expected.")
    try:
        value = json.loads(lines[-1])
        if isinstance(value, dict) and "error" in value:
            said = "".join(c for c in Failure.model_validate(value).error if c.isprintable())
            raise AgentError(f"{job.program.name}: {said} (on {where})")
        answer = Answer.model_validate(value)
    except AgentError:
        raise
    except (ValueError, RecursionError) as error:  # pydantic's errors are ValueErrors
        reason = _reason(error)
        raise DeviceError(f"the agent on {where} printed {lines[-1][:80]!r}, which is no answer: {reason}.") from None
    if answer.method != job.method or answer.threads != job.threads:
        raise DeviceError(
            f"the agent on {where} answered for method {answer.method!r} with {answer.threads} threads; asked were "
            f"{job.method!r} and {job.threads}."
        )
    return answer


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error).splitlines()[0]
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}{': ' if place else ''}{first['msg'].removeprefix('Value error, ')}"


class Agent(Protocol):
    """Something on a device that times programs. `install` is called once in a workspace, before the first job.

    Attributes:
        form: of the programs that it takes: "pte" or "onnx".
    """

    form: str

    def install(self) -> None:
        """Bring what is needed to the device.

        Raises:
            DeviceError: it cannot be built, or does not run there (says which processor was found).
        """

    def run(self, job: Job, *, timeout: float) -> Answer:
        """Time a job; its files are pushed where they are not there yet (by content)."""

    def forget(self, program: Path) -> None:
        """Remove a program from the device that no job needs any more."""
