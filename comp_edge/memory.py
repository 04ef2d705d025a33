"""How much memory this process holds and has held, from the kernel."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

_M_MMAP_THRESHOLD = -3  # of malloc.h
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
    with suppress(OSError):
        _RESET.write_text("5")


def collect_garbage() -> None:
    """Free what nothing refers to any more, and give it back to the kernel (see `return_memory`)."""
    gc.collect()
    return_memory()


def return_memory() -> None:
    """Give back to the kernel what is free in the C library's heap, where it is glibc.

    For the end of a phase: what it leaves as holes, the next one, whose blocks have other sizes, can often not use. Takes
    milliseconds, where a search for garbage takes a quarter of a second.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def return_memory_at_once() -> None:
    """Let the C library give large blocks back to the kernel when they are freed, where it is glibc.

    By default it raises the size from which it does so with every block that it frees, and temporaries of some megabytes end
    up as holes in its heap: a gigabyte of them when a model of four is pruned.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _field(name: str) -> int:
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return 0
