"""Where the time of a method goes: from a trace (ETDump) that an agent wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from devices.agent.quiet import quiet
from devices.errors import DeviceError

IDENTIFIER = b"ED00"  # of the file format, a FlatBuffer behind its size
# What ExecuTorch's tracer calls the things that it times.
EXECUTION = "Execute"  # the block of calls; another holds what happens while a method is loaded
WHOLE_CALL = "Method::execute"
KERNEL = "native_call_"


@dataclass(frozen=True)
class Part:
    """What one call of a method does once, in the order in which it is done.

    Attributes:
        kind: "delegated": a kernel of a backend such as XNNPACK; "portable": an operation that ExecuTorch runs itself;
            "rest": everything between them (delegate calls, dispatch, copies), in one part at the end.
        instruction: of the method; kernels of one delegate share it.
        ms: median over the calls of the trace; backends count whole microseconds.
    """

    kind: Literal["delegated", "portable", "rest"]
    name: str
    instruction: int
    ms: float


def attribute(path: Path) -> list[Part]:
    """The parts of a call; their times add up to a call's.

    Tracing takes time itself (a few percent): the shares are what counts, not the sum.

    Raises:
        DeviceError: there is no such file, or it is no trace of a method's calls.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DeviceError(
            f"trace {str(path)!r} cannot be read ({error.strerror}); a job that asks for one writes it."
        ) from None
    # ExecuTorch's parser prints pages of help at files of another kind.
    if content[8:12] != IDENTIFIER or int.from_bytes(content[:4], "little") != len(content) - 4:
        raise DeviceError(f"{str(path)!r} with {len(content)} bytes is no whole ETDump trace.")
    try:
        with quiet():
            from executorch.devtools import Inspector

            blocks = [block for block in Inspector(etdump_path=str(path)).event_blocks if block.name == EXECUTION]
        events = [event for block in blocks for event in block.events]
        parts = [part for event in events if (part := _part(event)) is not None]
        whole = median(time for event in events if event.name == WHOLE_CALL for time in event.perf_data.raw)
    except Exception as error:  # what its parser raises on a damaged file can be anything
        raise DeviceError(f"trace {str(path)!r} is damaged ({type(error).__name__}).") from None
    return [*parts, Part("rest", "rest", -1, max(whole - sum(part.ms for part in parts), 0.0))]


def _part(event: Any) -> Part | None:
    if event.perf_data is None or not event.perf_data.raw:
        return None
    ms, instruction = median(event.perf_data.raw), event._instruction_id
    if event.is_delegated_op:
        return Part("delegated", event.name, instruction, ms)
    if event.name.startswith(KERNEL):
        return Part("portable", event.name.removeprefix(KERNEL), instruction, ms)
    return None
