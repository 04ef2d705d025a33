"""Reading a device's conditions: two commands on the device at most, whatever there is to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from devices.conditions import android, jetson, linux, tegrastats
from devices.conditions.model import Conditions, Kind
from devices.errors import DeviceError, DeviceGone
from devices.transports.base import Transport

OUTPUT_LIMIT = 512 * 2**10  # bytes of all that is read
TIMEOUT = 20.0  # seconds for a script; each command in it has 5

# $1 is put before every path. The shell itself reads the files: a process for each would take seconds on a phone.
_FILES = r"""
root=$1
show() {
    for file in "$@"; do
        line=
        { read -r line < "$file"; } 2> /dev/null
        [ -n "$line" ] && printf '%s\t%s\n' "${file#"$root"}" "$line"
    done
}
cd /
cpu=$root/sys/devices/system/cpu
show "$root/proc/loadavg" "$cpu/online" "$cpu/present"
for policy in "$cpu"/cpufreq/policy*; do
    show "$policy/related_cpus" "$policy/scaling_governor" "$policy/scaling_cur_freq" "$policy/scaling_min_freq" \
        "$policy/scaling_max_freq" "$policy/cpuinfo_max_freq"
done
for zone in "$root"/sys/class/thermal/thermal_zone*; do
    show "$zone/type" "$zone/temp"
done
for device in "$root"/sys/class/thermal/cooling_device*; do
    show "$device/type" "$device/cur_state" "$device/max_state"
done
for supply in "$root"/sys/class/power_supply/*; do
    show "$supply/type" "$supply/scope" "$supply/status" "$supply/capacity" "$supply/online" "$supply/temp" \
        "$supply/voltage_now"
done
show "$cpu"/cpu*/thermal_throttle/*_throttle_count
exit 0
"""

# Sections begin with a line of two signs and a name. Nothing reads the terminal, nothing runs on.
_COMMANDS = r"""
ask() {
    name=$1
    shift
    command -v "$1" > /dev/null 2>&1 || return 0
    printf '\n== %s\n' "$name"
    if command -v timeout > /dev/null 2>&1; then set -- timeout 5 "$@"; fi
    "$@" < /dev/null 2> /dev/null | head -c 131072
}
"""
_ANDROID = _COMMANDS + (
    r"""
properties() {
    for name in ro.product.manufacturer ro.product.model ro.soc.manufacturer ro.soc.model ro.board.platform \
        ro.build.version.release ro.build.version.sdk ro.build.fingerprint; do
        printf '%s\t%s\n' "$name" "$(getprop "$name" < /dev/null 2> /dev/null)"
    done
}
ask thermalservice dumpsys thermalservice
ask battery dumpsys battery
printf '\n== properties\n'
properties
exit 0
"""
)
_JETSON = _COMMANDS + (
    r"""
ask nvpmodel nvpmodel -q
ask jetson_clocks jetson_clocks --show
tegra() { timeout 5 tegrastats --interval 200 | head -n 1; }
command -v tegrastats > /dev/null 2>&1 && printf '\n== tegrastats\n' && tegra < /dev/null 2> /dev/null
exit 0
"""
)


def read_conditions(transport: Transport, kind: Kind, *, root: str = "") -> dict[str, Any]:
    """What the device's sensors say now, as JSON (see `Conditions`).

    What cannot be read is named in `missing`; nothing is changed on the device.

    Args:
        kind: what to ask for: "linux", "android", or "jetson" (Linux with NVIDIA's tools).
        root: a folder on the device that stands for / of the kernel's files.

    Raises:
        DeviceGone: the device cannot be reached any more.
    """
    files = linux.parse_files(_run(transport, _FILES, root))
    script = {"android": _ANDROID, "jetson": _JETSON}.get(kind)
    said = {} if script is None else split_sections(_run(transport, script))
    return assemble(kind, files, said).model_dump(mode="json")


def split_sections(text: str) -> dict[str, str]:
    """Parts of a script's output by the name on the line "== NAME" before them."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("== "):
            lines = sections.setdefault(line[3:].strip(), [])
        else:
            lines.append(line)
    return {name: "\n".join(part) + "\n" for name, part in sections.items()}


class _Sensor(NamedTuple):
    """One thing to look for: its field, its name in `missing`, and on which kinds of device it should be."""

    field: str
    name: str
    kinds: tuple[Kind, ...]
    parse: Callable[[Mapping[str, str], Mapping[str, str]], Any]


_ALL: tuple[Kind, ...] = ("linux", "android", "jetson")
_SENSORS = (
    _Sensor("cores", "cores", _ALL, lambda files, _: len(linux.core_list(files.get(linux.CPU + "present", "")))),
    _Sensor("online", "online cores", _ALL, lambda files, _: linux.core_list(files.get(linux.CPU + "online", ""))),
    _Sensor("load", "load average", _ALL, lambda files, _: linux.load_average(files)),
    _Sensor("clusters", "cpufreq", _ALL, lambda files, _: linux.clusters(files)),
    _Sensor("temperatures", "thermal zones", _ALL, lambda files, _: linux.temperatures(files)),
    _Sensor("coolers", "cooling devices", _ALL, lambda files, _: linux.coolers(files)),
    _Sensor("throttle_events", "thermal_throttle", ("linux",), lambda files, _: linux.throttle_events(files)),
    _Sensor("battery", "power_supply", ("linux",), lambda files, _: linux.battery(files)),
    _Sensor(
        "thermal_status", "thermalservice", ("android",), lambda _, said: android.thermal_status(said["thermalservice"])
    ),
    # The kernel's own sensors are seldom readable on a phone; where they are, both are kept.
    _Sensor(
        "temperatures",
        "thermalservice temperatures",
        ("android",),
        lambda _, said: android.thermal_temperatures(said["thermalservice"]),
    ),
    _Sensor(
        "coolers",
        "thermalservice cooling devices",
        ("android",),
        lambda _, said: android.thermal_coolers(said["thermalservice"]),
    ),
    _Sensor("battery", "battery", ("android",), lambda _, said: android.battery(said["battery"])),
    _Sensor("build", "properties", ("android",), lambda _, said: android.build(said["properties"])),
    _Sensor("power_mode", "nvpmodel", ("jetson",), lambda _, said: jetson.power_mode(said["nvpmodel"])),
    _Sensor("clocks", "jetson_clocks", ("jetson",), lambda _, said: jetson.clocks(said["jetson_clocks"])),
    _Sensor("tegrastats", "tegrastats", ("jetson",), lambda _, said: tegrastats.parse(said["tegrastats"])),
)


def assemble(kind: Kind, files: Mapping[str, str], said: Mapping[str, str]) -> Conditions:
    """Conditions from what the scripts printed; a part that makes no sense is missing, like one that is not there.

    Args:
        files: first lines of files, by path.
        said: what commands printed, by name.
    """
    values: dict[str, Any] = {}
    missing = []
    for sensor in _SENSORS:
        if kind not in sensor.kinds:
            continue
        try:
            value = getattr(Conditions(kind=kind, **{sensor.field: sensor.parse(files, said)}), sensor.field)
        except (ValueError, KeyError):  # pydantic's errors are ValueErrors
            value = None
        if value is None or value == ():
            missing.append(sensor.name)
        else:
            values[sensor.field] = values[sensor.field] + value if sensor.field in values else value
    sample = values.get("tegrastats")
    if sample is not None and not sample.rails:  # some boards show them to root only
        missing.append("power rails")
    return Conditions(kind=kind, missing=tuple(missing), **values)


def _run(transport: Transport, script: str, *arguments: str) -> str:
    """A script's output; nothing where it failed, for then everything is missing."""
    try:
        return transport.run(["sh", "-c", script, "sh", *arguments], timeout=TIMEOUT, limit=OUTPUT_LIMIT).stdout
    except DeviceGone:
        raise
    except DeviceError:
        return ""
