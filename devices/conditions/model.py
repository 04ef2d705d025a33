"""What is known of a device's state at one moment. Everything may be unknown: None or empty, and named in `missing`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["linux", "android", "jetson"]
Text = Annotated[str, Field(max_length=256)]
Celsius = Annotated[float, Field(ge=-60, le=200)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Core = Annotated[int, Field(ge=0, lt=2**16)]
Percent = Annotated[int, Field(ge=0, le=100)]
Load = Annotated[float, Field(ge=0, lt=1e6, allow_inf_nan=False)]
Milliwatts = Annotated[float, Field(allow_inf_nan=False, gt=-1e9, lt=1e9)]


class Reading(BaseModel):
    """A part of what was read."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Cluster(Reading):
    """Cores that share a clock (a policy of the kernel's cpufreq). Frequencies in kHz.

    Attributes:
        min_khz, max_khz: between which the governor may choose now.
        hardware_max_khz: what the cores could do.
    """

    name: Text
    cpus: tuple[Core, ...] = ()
    governor: Text | None = None
    current_khz: Count | None = None
    min_khz: Count | None = None
    max_khz: Count | None = None
    hardware_max_khz: Count | None = None


class Temperature(Reading):
    """A sensor that was on, in degrees Celsius."""

    name: Text
    celsius: Celsius


class Cooler(Reading):
    """Something the system does against heat; 0 is nothing. Fans, too."""

    name: Text
    state: Count
    max_state: Count | None = None


class Battery(Reading):
    """The battery, and whether it is being filled.

    Attributes:
        status: "charging", "discharging", "not charging", "full" or "unknown".
        plugged: there is power from outside.
    """

    percent: Percent | None = None
    status: Text | None = None
    plugged: bool | None = None
    celsius: Celsius | None = None
    millivolts: Count | None = None


class PowerMode(Reading):
    """The mode that `nvpmodel` has set: how many watts, and so how many cores and which clocks."""

    name: Text
    id: Annotated[int, Field(ge=0, lt=1000)] | None = None


class Clock(Reading):
    """A line of `jetson_clocks --show`, in Hz (processors: in kHz, as it prints them)."""

    name: Text
    min: Count
    max: Count
    current: Count


class Rail(Reading):
    """A power rail of a Jetson's INA sensors; sensors with an offset read a little below nothing.

    Attributes:
        now_mw: at this moment.
        average_mw: since tegrastats was started.
    """

    now_mw: Milliwatts
    average_mw: Milliwatts | None = None


class CoreLoad(Reading):
    """Load in percent and clock of a core; None for one that is off."""

    percent: Percent | None
    mhz: Count | None = None


class Tegrastats(Reading):
    """One line of tegrastats. Clocks in MHz, loads in percent.

    Attributes:
        stamp: seconds since 1970 of the line's own date, taken as UTC (from JetPack 5 on, whole seconds).
        cores: in order.
        gpu_mhz: of each part of the GPU that has a clock; empty where it is not printed.
    """

    stamp: Count | None = None
    ram_mb: Count
    ram_total_mb: Count
    swap_mb: Count | None = None
    cores: tuple[CoreLoad, ...] = ()
    gpu_percent: Percent | None = None
    gpu_mhz: tuple[Count, ...] = ()
    memory_percent: Percent | None = None
    memory_mhz: Count | None = None
    temperatures: tuple[Temperature, ...] = ()
    rails: dict[Text, Rail] = {}


class AndroidBuild(Reading):
    """Which phone; None where a property is not set."""

    manufacturer: Text | None = None
    model: Text | None = None
    soc: Text | None = None
    platform: Text | None = None
    release: Text | None = None
    sdk: Annotated[int, Field(ge=1, lt=10_000)] | None = None
    build: Text | None = None


class Conditions(BaseModel):
    """All that was read at one moment.

    Fields that are not named here are ignored: a profile keeps the time beside them.

    Attributes:
        cores: that exist; `online`: that are switched on.
        load: processes that ran or waited, on average over 1, 5 and 15 minutes; on Android also sleeping ones.
        thermal_status: Android's, 0 (none) to 6 (shutdown).
        throttle_events: since boot, of x86 cores and packages: how often heat slowed them down.
        missing: what this kind of device should have and was not there or could not be read.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: Kind
    cores: Count | None = None
    online: tuple[Core, ...] = ()
    load: tuple[Load, Load, Load] | None = None
    clusters: tuple[Cluster, ...] = ()
    temperatures: tuple[Temperature, ...] = ()
    coolers: tuple[Cooler, ...] = ()
    thermal_status: Annotated[int, Field(ge=0, le=6)] | None = None
    throttle_events: Count | None = None
    battery: Battery | None = None
    power_mode: PowerMode | None = None
    clocks: tuple[Clock, ...] = ()
    tegrastats: Tegrastats | None = None
    build: AndroidBuild | None = None
    missing: tuple[Text, ...] = ()
