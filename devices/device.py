"""A device: a way to reach it, what it is, the state that it is in, and an agent that times programs on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from types import TracebackType
from typing import Any

from devices.agent.protocol import Agent
from devices.conditions import Kind, read_conditions
from devices.errors import DeviceAbsent, DeviceError, DeviceGone
from devices.record import DeviceRecord
from devices.transports import Transport, open_transport

# Fixed text, without a word of anybody else's; each answer on a line of its own, however much is missing.
_WHO = r"""
say() { printf '%s\t%s\n' "$1" "$2"; }
first() { { IFS= read -r line < "$1"; } 2> /dev/null && printf '%s' "$line" | tr -d '\000'; }
say machine "$(uname -m)"
say system "$(uname -s) $(uname -r)"
say cores "$(nproc --all 2> /dev/null)"
say memory "$(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo 2> /dev/null)"
say cpu "$(sed -n 's/^\(model name\|Hardware\)[[:space:]]*: //p' /proc/cpuinfo 2> /dev/null | head -n 1)"
say board "$(first /proc/device-tree/model)"
if command -v getprop > /dev/null 2>&1; then
    say android yes
    say model "$(getprop ro.product.manufacturer) $(getprop ro.product.model)"
    say soc "$(getprop ro.soc.model)"
fi
if [ -e /etc/nv_tegra_release ] || command -v tegrastats > /dev/null 2>&1; then say jetson yes; fi
exit 0
"""


class Device:
    """A device that programs can be timed on. A context manager: it lets go of the connection at its end.

    Args:
        address: `host`, `ssh://[user@]host[:port]` or `adb://SERIAL`.
        transport: how to reach it; by default what the address says.
    """

    def __init__(self, address: str, *, transport: Transport | None = None) -> None:
        self.transport = transport or open_transport(address)
        self.address = address

    @cached_property
    def _answers(self) -> dict[str, str]:
        try:
            done = self.transport.run(["sh", "-c", _WHO], timeout=20, limit=64 * 2**10)
        except DeviceGone as error:
            raise DeviceAbsent(str(error)) from None
        lines = (line.partition("\t") for line in done.stdout.splitlines())
        found = {name: value.strip()[:256] for name, _, value in lines if value.strip()}
        if "machine" not in found:
            raise DeviceError(f"{self.address} runs no commands: {(done.stderr or done.stdout).strip()[:120]!r}.")
        return found

    @property
    def kind(self) -> Kind:
        """What its sensors are asked for."""
        return "android" if "android" in self._answers else "jetson" if "jetson" in self._answers else "linux"

    def info(self) -> DeviceRecord:
        """Processor, cores, memory; None where the system does not say.

        Raises:
            DeviceAbsent: it cannot be reached.
            DeviceError: it runs no commands.
        """
        found = self._answers
        return DeviceRecord(
            address=self.address,
            name=found.get("model") or found.get("board") or self.address,
            cpu=found.get("soc") or found.get("cpu"),
            machine=found["machine"][:64],
            system=found.get("system"),
            cores=_number(found.get("cores")),
            memory_mb=None if (memory := _number(found.get("memory"))) is None else memory // 1000,
        )

    def conditions(self) -> dict[str, Any]:
        """The state that it is in now (see `devices.conditions`)."""
        return read_conditions(self.transport, self.kind)

    @contextmanager
    def agent(self, kind: str = "native") -> Iterator[Agent]:
        """An agent that is ready to time programs; it and all that it brought along are removed at the end.

        Args:
            kind: "native", the C++ program; "python", for boards with ExecuTorch's Python runtime; "trtexec", for the GPU of
                a Jetson.

        Raises:
            DeviceError: it cannot be built for this device's processor, or does not run there.
        """
        from devices.agent import agent_named

        made = agent_named(kind)
        with self.transport.workspace() as folder:
            agent = made(self.transport, folder)
            agent.install()
            yield agent

    def close(self) -> None:
        """Let go of the connection."""
        self.transport.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(address: str) -> Device:
    """A device by its address; it is only reached when something is asked of it.

    Args:
        address: `host`, `ssh://[user@]host[:port]` or `adb://SERIAL`.

    Raises:
        DeviceError: an address of a kind that cannot be reached.
    """
    return Device(address)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
