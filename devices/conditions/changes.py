"""What makes a measurement doubtful, from the conditions before and after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from devices.conditions.android import STATUSES
from devices.conditions.model import Clock, Cluster, Conditions, Cooler, Temperature
from devices.errors import DeviceError

WARMER = 10.0  # degrees Celsius
LOW_BATTERY = 20  # percent; below, many phones save power
# Of the cores: what others may keep busy before a measurement begins.
OTHERS = 0.25

# Cooling devices that slow nothing down.
_HARMLESS = ("fan", "lcd", "backlight", "led", "flash", "charg", "wlan", "modem", "vibrator")


def changed(before: Mapping[str, Any], after: Mapping[str, Any], *, warmer: float = WARMER) -> list[str]:
    """Sentences about what a reader of the measurement must know; none is a good sign.

    Args:
        before, after: as `read_conditions` gives them (other keys are ignored).
        warmer: degrees Celsius that a sensor may rise.

    Raises:
        DeviceError: they are no conditions.
    """
    try:
        first, last = Conditions.model_validate(before), Conditions.model_validate(after)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise DeviceError(f"conditions: {place}: {error.errors()[0]['msg']}.") from None
    return [*_governors(first), *_caps(first, last), *_heat(first, last, warmer), *_power(first, last), *_others(first)]


def _governors(first: Conditions) -> Iterator[str]:
    """It is read before only: a governor does not change by itself."""
    loose: dict[str, list[str]] = {}
    for cluster in first.clusters:
        if cluster.governor not in (None, "performance") and not _fixed(cluster):
            loose.setdefault(cluster.governor, []).append(cluster.name)
    for governor, names in loose.items():
        yield f"The governor of {_listed(names)} is {governor!r}, not 'performance': clocks follow what ran before."


def _caps(first: Conditions, last: Conditions) -> Iterator[str]:
    capped_before = {cluster.name for cluster in first.clusters if _capped(cluster)}
    for cluster in last.clusters:
        if _capped(cluster):
            begun = "" if cluster.name in capped_before else " since the measurement began"
            yield (
                f"The clock of {cluster.name} may reach {(cluster.max_khz or 0) / 1e6:.2f} of "
                f"{(cluster.hardware_max_khz or 0) / 1e6:.2f} GHz only{begun}."
            )
    if first.online and last.online and first.online != last.online:
        yield f"{len(first.online)} cores were online before and {len(last.online)} afterwards."


def _heat(first: Conditions, last: Conditions, warmer: float) -> Iterator[str]:
    if last.thermal_status:
        was = "" if first.thermal_status is None else f", and {_status(first.thermal_status)} before"
        yield f"Android reported thermal status {_status(last.thermal_status)}{was}."
    begun = _risen(first.coolers, last.coolers)
    if begun:
        yield f"Throttling began or grew: {_listed(begun)}."
    events = (last.throttle_events or 0) - (first.throttle_events or 0)
    if first.throttle_events is not None and events > 0:
        yield f"Heat slowed the processor down {events} times."
    hottest = max(_rises(_sensors(first), _sensors(last)), default=None)
    if hottest is not None and hottest[0] > warmer:
        rise, name, old, new = hottest
        yield f"{name} rose by {rise:.1f} °C, from {old:.1f} to {new:.1f}."


def _power(first: Conditions, last: Conditions) -> Iterator[str]:
    old, new = first.battery, last.battery
    if new is not None and new.percent is not None and new.percent < LOW_BATTERY and not new.plugged:
        yield f"The battery was at {new.percent} %: below {LOW_BATTERY} % many devices save power."
    if old is not None and new is not None:
        if old.plugged != new.plugged and None not in (old.plugged, new.plugged):
            yield f"The device was {'plugged in' if new.plugged else 'unplugged'} in between."
        elif old.status != new.status:
            yield f"The battery was {old.status} before and {new.status} afterwards."
    if first.power_mode is not None and last.power_mode is not None and first.power_mode != last.power_mode:
        yield f"The power mode was {first.power_mode.name} before and {last.power_mode.name} afterwards."
    moved = _moved(first.clocks, last.clocks)
    if moved:
        yield f"The limits of clocks changed: {_listed(moved)}."


def _others(first: Conditions) -> Iterator[str]:
    # Afterwards the measurement itself is in the average; Android's counts sleeping threads of the kernel, too.
    cores = len(first.online) or first.cores
    if first.kind != "android" and first.load is not None and cores and first.load[0] > OTHERS * cores:
        yield f"Other processes kept {first.load[0]:.1f} of {cores} cores busy in the minute before."


def _fixed(cluster: Cluster) -> bool:
    """Whether the governor has no choice, as `jetson_clocks` leaves it."""
    return cluster.max_khz is not None and cluster.min_khz == cluster.max_khz == (
        cluster.hardware_max_khz or cluster.max_khz
    )


def _capped(cluster: Cluster) -> bool:
    return (
        cluster.max_khz is not None
        and cluster.hardware_max_khz is not None
        and cluster.max_khz < 0.99 * cluster.hardware_max_khz
    )


def _risen(before: Sequence[Cooler], after: Sequence[Cooler]) -> list[str]:
    """Names of what works harder against heat than before; devices of one name count in order."""
    names = []
    for (name, _), (old, new) in _pairs([(c.name, c.state) for c in before], [(c.name, c.state) for c in after]):
        if new > old and not any(word in name.lower() for word in _HARMLESS):
            names.append(name)
    return names


def _sensors(conditions: Conditions) -> list[Temperature]:
    sample = conditions.tegrastats
    return [*conditions.temperatures, *(sample.temperatures if sample else ())]


def _rises(before: Sequence[Temperature], after: Sequence[Temperature]) -> Iterator[tuple[float, str, float, float]]:
    for (name, _), (old, new) in _pairs([(t.name, t.celsius) for t in before], [(t.name, t.celsius) for t in after]):
        yield new - old, name, old, new


def _pairs(
    before: Sequence[tuple[str, float]], after: Sequence[tuple[str, float]]
) -> Iterator[tuple[tuple[str, int], tuple[float, float]]]:
    """Values of the same name and turn, before and after."""

    def numbered(values: Sequence[tuple[str, float]]) -> dict[tuple[str, int], float]:
        found: dict[tuple[str, int], float] = {}
        turns: dict[str, int] = {}
        for name, value in values:
            turns[name] = turns.get(name, -1) + 1
            found[name, turns[name]] = value
        return found

    old, new = numbered(before), numbered(after)
    for key in old.keys() & new.keys():
        yield key, (old[key], new[key])


def _moved(before: Sequence[Clock], after: Sequence[Clock]) -> list[str]:
    limits = {clock.name: (clock.min, clock.max) for clock in before}
    return [clock.name for clock in after if limits.get(clock.name, (clock.min, clock.max)) != (clock.min, clock.max)]


def _status(status: int) -> str:
    return f"{status} ({STATUSES[status]})"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(sorted(set(names)))
