"""A line of tegrastats, in every layout from JetPack 4 (Nano, TX2, Xavier) to JetPack 7 (Thor).

Fields come in any order, and each board prints those that it has. Rails are in milliwatts, from JetPack 5 on with the unit.
"""

from __future__ import annotations

import re
from calendar import timegm

from devices.conditions.model import CoreLoad, Rail, Tegrastats, Temperature

_RAM = re.compile(r"\bRAM (\d{1,9})/(\d{1,9})MB")
_SWAP = re.compile(r"\bSWAP (\d{1,9})/\d{1,9}MB")
_CORES = re.compile(r"\bCPU \[([^\]]{0,4096})\](?:@(\d{1,6}))?", re.IGNORECASE)
_CORE = re.compile(r"(\d{1,3})%(?:@(\d{1,6}))?")
_ENGINE = r"\b{}(?:_FREQ)? (?:(\d{{1,3}})%)?(?:@(?:\[([\d,]{{1,64}})\]|(\d{{1,6}})))?"
_GPU = re.compile(_ENGINE.format("GR3D"))
_MEMORY = re.compile(_ENGINE.format("EMC"))
_TEMPERATURE = re.compile(r"\b([A-Za-z][\w-]{0,31})@(-?\d{1,4}(?:\.\d{1,6})?)C\b")
# NAME now, NAME now/average, NAME now/average/peak; the unit may be left out where there are two.
_RAIL = re.compile(
    r"(?<![\w/])([A-Z][A-Z0-9_]{1,31}) (-?\d{1,8})(?:mW(?:/(-?\d{1,8})mW)?(?:/-?\d{1,8}mW)?|/(-?\d{1,8}))(?![\w/.])"
)
_STAMP = re.compile(r"^\s*(\d{2})-(\d{2})-(\d{4}) (\d{2}):(\d{2}):(\d{2})\b")


def parse(line: str) -> Tegrastats:
    """Everything in a line that is known.

    Raises:
        ValueError: it has no RAM, which all layouts have.
    """
    ram = _RAM.search(line)
    if not ram:
        raise ValueError("no line of tegrastats")
    swap, gpu, memory, stamp = _SWAP.search(line), _GPU.search(line), _MEMORY.search(line), _STAMP.match(line)
    memory_mhz = _mhz(memory)
    return Tegrastats(
        stamp=None if stamp is None else _seconds(*(int(part) for part in stamp.groups())),
        ram_mb=int(ram.group(1)),
        ram_total_mb=int(ram.group(2)),
        swap_mb=None if swap is None else int(swap.group(1)),
        cores=_cores(line),
        gpu_percent=_percent(gpu),
        gpu_mhz=_mhz(gpu),
        memory_percent=_percent(memory),
        memory_mhz=memory_mhz[0] if memory_mhz else None,
        temperatures=tuple(
            Temperature(name=name, celsius=float(value))
            for name, value in _TEMPERATURE.findall(line)
            if -60 <= float(value) <= 200  # -256: the engine is off
        ),
        rails={
            name: Rail(now_mw=float(now), average_mw=float(average or older) if average or older else None)
            for name, now, average, older in _RAIL.findall(line)
            if name != "NC"  # not connected
        },
    )


def _cores(line: str) -> tuple[CoreLoad, ...]:
    match = _CORES.search(line)
    if not match:
        return ()
    shared = match.group(2)  # before JetPack 4, one clock stood after all loads
    cores = []
    for word in match.group(1).split(","):
        core = _CORE.fullmatch(word.strip())
        mhz = (core.group(2) or shared) if core else None
        cores.append(CoreLoad(percent=int(core.group(1)) if core else None, mhz=None if mhz is None else int(mhz)))
    return tuple(cores)


def _percent(match: re.Match[str] | None) -> int | None:
    return int(match.group(1)) if match and match.group(1) else None


def _mhz(match: re.Match[str] | None) -> tuple[int, ...]:
    clocks = (match.group(2) or match.group(3) or "") if match else ""
    return tuple(int(clock) for clock in clocks.split(",") if clock)


def _seconds(month: int, day: int, year: int, hour: int, minute: int, second: int) -> int | None:
    if not (1 <= month <= 12 and 1 <= day <= 31 and year >= 1970 and hour < 24 and minute < 60 and second < 61):
        return None
    return timegm((year, month, day, hour, minute, second))
