"""What NVIDIA's `nvpmodel`, its configuration, and `jetson_clocks --show` print."""

from __future__ import annotations

import re

from devices.conditions.model import Clock, PowerMode

_CLOCK = re.compile(
    r"^([A-Za-z][\w-]{0,31}):?\s[^\n]*?\bMinFreq=(\d{1,15}) MaxFreq=(\d{1,15}) CurrentFreq=(\d{1,15})", re.MULTILINE
)
_MODEL = re.compile(r"^<\s*POWER_MODEL\s+ID=(\d{1,3})\s+NAME=([\w.+-]{1,64})\s*>", re.MULTILINE)


def power_mode(text: str) -> PowerMode:
    """`nvpmodel -q`: the name after "NV Power Mode:", its number on the next line. Warnings may stand before it.

    Raises:
        ValueError: no mode is printed.
    """
    match = re.search(r"NV Power Mode:[ \t]*([\w.+-]{1,64})[ \t]*\r?(?:\n(\d{1,3})[ \t]*\r?$)?", text, re.MULTILINE)
    if not match:
        raise ValueError("no power mode")
    return PowerMode(name=match.group(1), id=None if match.group(2) is None else int(match.group(2)))


def power_modes(text: str) -> tuple[PowerMode, ...]:
    """The modes that `/etc/nvpmodel.conf` defines; their numbers differ from board to board."""
    return tuple(PowerMode(name=name, id=int(number)) for number, name in _MODEL.findall(text))


def clocks(text: str) -> tuple[Clock, ...]:
    """The lines of `jetson_clocks --show` that have a minimum, a maximum and what it is now.

    Raises:
        ValueError: there are none (only root may ask).
    """
    found = tuple(
        Clock(name=name, min=int(low), max=int(high), current=int(now)) for name, low, high, now in _CLOCK.findall(text)
    )
    if not found:
        raise ValueError("no clocks")
    return found
