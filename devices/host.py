"""This machine as a device."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from devices.errors import DeviceError

SCHEMES = ("host",)


@dataclass(frozen=True)
class DeviceInfo:
    """What is known of a device; None where the system does not say.

    Attributes:
        cores: logical cores that this process may use.
        memory_mb: physical memory.
        governor: the kernel's policy for the clock of core 0; anything but "performance" makes timings noisier.
    """

    name: str
    cpu: str
    machine: str
    system: str
    cores: int
    memory_mb: int | None
    governor: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class HostDevice:
    """The machine that this process runs on."""

    name = "host"

    def info(self) -> DeviceInfo:
        """Processor, cores, memory, clock policy."""
        return DeviceInfo(
            name=self.name,
            cpu=_cpu_name() or platform.processor() or platform.machine(),
            machine=platform.machine(),
            system=f"{platform.system()} {platform.release()}",
            cores=_cores(),
            memory_mb=_memory_mb(),
            governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        )


def connect(target: str) -> HostDevice:
    """A device by its address.

    Raises:
        DeviceError: an address of a kind that cannot be reached.
    """
    if target == "host":
        return HostDevice()
    raise DeviceError(f"device {target!r} cannot be reached; accepted: {', '.join(SCHEMES)} (this machine).")


def peak_memory_mb() -> float | None:
    """Most memory that this process has had resident (VmHWM), in MB; None where the system does not say."""
    return _status_mb("VmHWM")


def resident_memory_mb() -> float | None:
    """Memory of this process that is resident now (VmRSS), in MB."""
    return _status_mb("VmRSS")


def _status_mb(key: str) -> float | None:
    # Not resource.getrusage: a child inherits its parent's maximum.
    for line in (_read("/proc/self/status") or "").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1000
    return None


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def _cpu_name() -> str | None:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.lower().startswith(("model name", "hardware")):
            return line.split(":", 1)[1].strip()
    return None


def _memory_mb() -> int | None:
    for line in (_read("/proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) // 1000
    return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None
