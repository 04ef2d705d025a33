"""Memory of this process."""

from __future__ import annotations

from pathlib import Path


def peak_memory_mb() -> float | None:
    """Most memory that this process has had resident (VmHWM), in MB; None where the system does not say."""
    return _status_mb("VmHWM")


def resident_memory_mb() -> float | None:
    """Memory of this process that is resident now (VmRSS), in MB."""
    return _status_mb("VmRSS")


def _status_mb(key: str) -> float | None:
    # Not resource.getrusage: a child inherits its parent's maximum.
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith(f"{key}:")), None)
