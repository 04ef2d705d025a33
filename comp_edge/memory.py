"""How much memory this process holds and has held, from the kernel."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Resident memory now; 0 where the kernel does not say."""
    return _field("VmRSS")


def peak_bytes() -> int:
    """The largest resident memory since the process began or `reset_peak`; 0 where the kernel does not say.

    VmHWM, because `ru_maxrss` is inherited from the parent process.
    """
    return _field("VmHWM")


def reset_peak() -> None:
    """Let `peak_bytes` begin anew, where the kernel allows it."""
    try:
        _RESET.write_text("5")
    except OSError:
        pass


def _field(name: str) -> int:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
