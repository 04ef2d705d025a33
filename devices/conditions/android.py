"""What Android's `dumpsys` and `getprop` print."""

from __future__ import annotations

import math
import re

from devices.conditions.model import AndroidBuild, Battery, Cooler, Temperature

STATUSES = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")

_TEMPERATURE = re.compile(r"Temperature\{mValue=([^,}]+), mType=-?\d+, mName=([^,}]+), mStatus=\d+\}")
_COOLER = re.compile(r"CoolingDevice\{mValue=(\d{1,9}), mType=-?\d+, mName=([^,}]+)\}")
_BATTERY = {1: "unknown", 2: "charging", 3: "discharging", 4: "not charging", 5: "full"}


def thermal_status(text: str) -> int:
    """0 (none) to 6 (shutdown) of `dumpsys thermalservice`.

    Raises:
        ValueError: it is not printed.
    """
    match = re.search(r"^\s*Thermal Status: (\d)\s*$", text, re.MULTILINE)
    if not match:
        raise ValueError("no thermal status")
    return int(match.group(1))


def thermal_temperatures(text: str) -> tuple[Temperature, ...]:
    """Sensors of `dumpsys thermalservice`: as they are now, or those last reported where the HAL gives none."""
    for title in ("Current temperatures from HAL", "Cached temperatures"):
        found = []
        for value, name in _TEMPERATURE.findall(_part(text, title)):
            celsius = float(value)
            if math.isfinite(celsius) and -60 <= celsius <= 200:
                found.append(Temperature(name=name.strip(), celsius=celsius))
        if found:
            return tuple(found)
    return ()


def thermal_coolers(text: str) -> tuple[Cooler, ...]:
    """Cooling devices of `dumpsys thermalservice`."""
    part = _part(text, "Current cooling devices from HAL")
    return tuple(Cooler(name=name.strip(), state=int(state)) for state, name in _COOLER.findall(part))


def battery(text: str) -> Battery:
    """`dumpsys battery`; temperature in tenths of a degree, voltage in millivolts.

    Raises:
        ValueError: it has no level and no status.
    """
    values: dict[str, str] = {}
    # Some makers print a log of old values after the state.
    for line in re.split(r"^\[", text, maxsplit=1, flags=re.MULTILINE)[0].splitlines():
        key, colon, value = line.strip().partition(":")
        if colon:
            values.setdefault(key, value.strip())
    numbers = {key: int(value) for key, value in values.items() if re.fullmatch(r"-?\d{1,9}", value)}
    if "level" not in numbers and "status" not in numbers:
        raise ValueError("no battery level")
    plugs = [value == "true" for key, value in values.items() if key.endswith("powered")]
    level, scale = numbers.get("level"), numbers.get("scale", 100)
    return Battery(
        percent=None if level is None or scale <= 0 else round(100 * level / scale),
        status=_BATTERY.get(numbers.get("status", 1), "unknown"),
        plugged=any(plugs) if plugs else None,
        celsius=numbers["temperature"] / 10 if "temperature" in numbers else None,
        millivolts=numbers.get("voltage"),
    )


def build(text: str) -> AndroidBuild:
    """Lines of a property, a tab and its value.

    Raises:
        ValueError: none is set.
    """
    values = dict(line.split("\t", 1) for line in text.splitlines() if "\t" in line)
    properties = {key: value.strip() for key, value in values.items() if value.strip()}
    if not properties:
        raise ValueError("no properties")
    maker, soc = properties.get("ro.soc.manufacturer"), properties.get("ro.soc.model")
    sdk = properties.get("ro.build.version.sdk", "")
    return AndroidBuild(
        manufacturer=properties.get("ro.product.manufacturer"),
        model=properties.get("ro.product.model"),
        soc=f"{maker} {soc}" if maker and soc else soc,
        platform=properties.get("ro.board.platform"),
        release=properties.get("ro.build.version.release"),
        sdk=int(sdk) if re.fullmatch(r"\d{1,4}", sdk) else None,
        build=properties.get("ro.build.fingerprint"),
    )


def _part(text: str, title: str) -> str:
    """The indented lines under a title."""
    match = re.search(rf"^\s*{title}:[ \t]*\n((?:[ \t]+.*\n?)*)", text, re.MULTILINE)
    return match.group(1) if match else ""
