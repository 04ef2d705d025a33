"""A device, how it was measured and in which condition it was: checked, and in words.

It comes from metrics.json, or from a device's profile in the same form; what is not known is not said.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from comp_edge.report import words

Text = Annotated[str, Field(max_length=4096)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[FiniteFloat, Field(ge=0, lt=1e11)]  # since 1970, too


class Part(BaseModel):
    """A part of what was told; what this version does not know is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


# ---- the device, and how it was measured


class Hardware(Part):
    """Which device."""

    name: Text
    cpu: Text | None = None
    machine: Text | None = None
    system: Text | None = None
    cores: Count | None = None
    memory_mb: Count | None = None


class Settings(Part):
    """How it was measured."""

    preset: Text
    agent: Text
    runtime: Text
    threads: Count
    cpus: tuple[Count, ...] = ()
    backend: Text = ""
    precision: Text = ""
    clocks_set: bool = False


def described(hardware: Hardware, settings: Settings) -> list[tuple[str, str]]:
    """Terms and what they are, for a list of definitions. The address is not among them: pages are passed on."""
    cores = None if hardware.cores is None else _counted(hardware.cores, "core")
    memory = None if hardware.memory_mb is None else f"{hardware.memory_mb / 1024:.1f} GiB"
    clocks = "fixed for the measurement" if settings.clocks_set else "left as they were"
    bound = f", on core{'s' * (len(settings.cpus) > 1)} {_listed(settings.cpus)}" if settings.cpus else ""
    terms = [
        ("device", hardware.name),
        ("processor", _joined(hardware.cpu, hardware.machine, cores)),
        ("memory", memory),
        ("system", hardware.system),
        ("runtime", _joined(settings.runtime, settings.backend, settings.precision)),
        ("measured by", _joined(f"{settings.agent} agent", f"preset {settings.preset}")),
        ("threads", f"{settings.threads}{bound}"),
        ("clocks", clocks),
    ]
    return [(term, text) for term, text in terms if text]


# ---- conditions


class Cluster(Part):
    """Cores that share a clock; frequencies in kHz."""

    name: Text
    governor: Text | None = None
    current_khz: Count | None = None
    max_khz: Count | None = None


class Temperature(Part):
    """A sensor, in degrees Celsius."""

    name: Text
    celsius: FiniteFloat


class Cooler(Part):
    """Something the system does against heat; 0 is nothing."""

    name: Text
    state: Count


class Battery(Part):
    """The battery."""

    percent: Count | None = None
    status: Text | None = None
    plugged: bool | None = None


class PowerMode(Part):
    """What a Jetson's `nvpmodel` has set."""

    name: Text


class Rail(Part):
    """A power rail, in milliwatts."""

    now_mw: FiniteFloat


class Tegrastats(Part):
    """What a Jetson's own sampler says."""

    temperatures: tuple[Temperature, ...] = ()
    gpu_mhz: tuple[Count, ...] = ()
    rails: dict[Text, Rail] = {}


class Conditions(Part):
    """A device's state at one moment.

    Attributes:
        time: seconds since 1970.
        when: between which measurements.
        missing: what such a device should have and could not be read.
    """

    time: Seconds | None = None
    when: Text = ""
    cores: Count | None = None
    online: tuple[Count, ...] = ()
    load: tuple[FiniteFloat, FiniteFloat, FiniteFloat] | None = None
    clusters: tuple[Cluster, ...] = ()
    temperatures: tuple[Temperature, ...] = ()
    coolers: tuple[Cooler, ...] = ()
    thermal_status: Count | None = None
    throttle_events: Count | None = None
    battery: Battery | None = None
    power_mode: PowerMode | None = None
    tegrastats: Tegrastats | None = None
    missing: tuple[Text, ...] = ()


class Table(NamedTuple):
    """Conditions side by side.

    Attributes:
        rows: what was read, and its value in each column; empty where it was not read then.
    """

    columns: list[str]
    rows: list[tuple[str, list[str]]]


def compared(conditions: Sequence[Conditions]) -> Table:
    """Moments in columns, what was read of them in rows."""
    read = [_read(one) for one in conditions]
    names = list(dict.fromkeys(name for one in read for name in one))
    return Table([one.when for one in conditions], [(name, [one.get(name, "") for one in read]) for name in names])


def _read(one: Conditions) -> dict[str, str]:
    """What was read, in words."""
    found = {}
    if one.time is not None:
        found["time"] = f"{datetime.fromtimestamp(one.time, UTC):%Y-%m-%d %H:%M:%S} UTC"
    if one.online and one.cores is not None:
        found["cores online"] = f"{len(one.online)} of {one.cores}"
    if one.load is not None:
        found["load over 1, 5, 15 minutes"] = ", ".join(f"{value:.2f}" for value in one.load)
    for cluster in one.clusters:
        now, most = (None if khz is None else f"{khz / 1e6:.2f}" for khz in (cluster.current_khz, cluster.max_khz))
        clock = " of ".join(text for text in (now, most) if text)
        found[f"clock of {cluster.name}"] = _joined(cluster.governor, clock and f"{clock} GHz")
    if one.power_mode is not None:
        found["power mode"] = one.power_mode.name
    sample = one.tegrastats or Tegrastats()
    if sample.gpu_mhz:
        found["clock of the GPU"] = f"{max(sample.gpu_mhz)} MHz"
    if sensors := [*one.temperatures, *sample.temperatures]:
        hottest = max(sensors, key=lambda sensor: sensor.celsius)
        count = f", hottest of {len(sensors)}" if len(sensors) > 1 else ""
        found["temperature"] = words.signed(f"{hottest.celsius:.1f}") + f" °C ({hottest.name}{count})"
    if one.coolers:
        found["cooling at work"] = _listed([cooler.name for cooler in one.coolers if cooler.state]) or "none"
    if one.thermal_status is not None:
        found["thermal status"] = f"{one.thermal_status} of 6"
    if one.throttle_events is not None:
        found["throttled since boot"] = _counted(one.throttle_events, "time")
    if sample.rails:
        found["power"] = ", ".join(f"{name} {rail.now_mw / 1000:.2f} W" for name, rail in sample.rails.items())
    if (battery := one.battery) is not None:
        level = None if battery.percent is None else f"{battery.percent} %"
        found["battery"] = _joined(level, battery.status, {True: "plugged in", False: "unplugged"}.get(battery.plugged))
    if one.missing:
        found["not readable"] = _listed(one.missing)
    return {name: text for name, text in found.items() if text}


def _joined(*texts: str | None) -> str:
    return ", ".join(text for text in texts if text)


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in dict.fromkeys(values))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
