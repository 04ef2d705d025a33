"""What the files of a Linux kernel say, Android's too. Files are given by path, each with its first line."""

from __future__ import annotations

import re
from collections.abc import Mapping

from devices.conditions.model import Battery, Cluster, Cooler, Temperature

CPU = "/sys/devices/system/cpu/"
THERMAL = "/sys/class/thermal/"
SUPPLY = "/sys/class/power_supply/"

Files = Mapping[str, str]


def parse_files(text: str) -> dict[str, str]:
    """Lines of a path, a tab and the file's first line; other lines are skipped."""
    files = {}
    for line in text.splitlines():
        path, tab, value = line.partition("\t")
        if tab and path.startswith("/"):
            files[path] = value.strip()
    return files


def core_list(text: str) -> tuple[int, ...]:
    """The kernel's notation for sets of cores: "0-3,6" or "0 1 2 3".

    Raises:
        ValueError: it is something else, or has more cores than there are.
    """
    cores: list[int] = []
    for part in re.split(r"[,\s]+", text.strip()):
        first, dash, last = part.partition("-")
        low, high = int(first), int(last) if dash else int(first)
        if not 0 <= low <= high < 2**16:
            raise ValueError(f"{part!r} is no range of cores")
        cores.extend(range(low, high + 1))
    return tuple(cores)


def clusters(files: Files) -> tuple[Cluster, ...]:
    """Cores by shared clock, from cpufreq's policies."""
    return tuple(
        Cluster(
            name=name,
            cpus=core_list(parts["related_cpus"]) if parts.get("related_cpus") else (),
            governor=parts.get("scaling_governor"),
            current_khz=_number(parts.get("scaling_cur_freq")),
            min_khz=_number(parts.get("scaling_min_freq")),
            max_khz=_number(parts.get("scaling_max_freq")),
            hardware_max_khz=_number(parts.get("cpuinfo_max_freq")),
        )
        for name, parts in _folders(files, CPU + "cpufreq/", "policy")
    )


def temperatures(files: Files) -> tuple[Temperature, ...]:
    """Thermal zones that are on. They are in thousandths of a degree, in some old kernels in degrees."""
    found = []
    for name, parts in _folders(files, THERMAL, "thermal_zone"):
        value = _number(parts.get("temp"))
        if value is None:
            continue
        celsius = value / 1000 if abs(value) >= 1000 else float(value)
        if -60 <= celsius <= 200:  # sensors that are off read -256 or -274
            found.append(Temperature(name=parts.get("type") or name, celsius=celsius))
    return tuple(found)


def coolers(files: Files) -> tuple[Cooler, ...]:
    """Cooling devices. One that is not in use may read -1, which is nothing as well."""
    found = []
    for name, parts in _folders(files, THERMAL, "cooling_device"):
        state, most = _number(parts.get("cur_state")), _number(parts.get("max_state"))
        if state is not None:
            found.append(
                Cooler(
                    name=parts.get("type") or name,
                    state=max(state, 0),
                    max_state=most if most is not None and most >= 0 else None,
                )
            )
    return tuple(found)


def throttle_events(files: Files) -> int | None:
    """How often x86 cores were slowed down by heat since boot; None where there are no counters.

    A package's counter is the same in each of its cores, so that the largest is taken of those.
    """
    counts = {"core": 0, "package": 0}
    seen = False
    for path, value in files.items():
        match = re.fullmatch(CPU + r"cpu\d+/thermal_throttle/(core|package)_throttle_count", path)
        count = _number(value)
        if match and count is not None:
            seen = True
            kind = match.group(1)
            counts[kind] = counts[kind] + count if kind == "core" else max(counts[kind], count)
    return sum(counts.values()) if seen else None


def battery(files: Files) -> Battery | None:
    """The first battery of the system's own; None where there is none."""
    supplies = _folders(files, SUPPLY, "")
    outside = [parts.get("online") == "1" for _, parts in supplies if parts.get("type") in ("Mains", "USB", "Wireless")]
    for _, parts in supplies:
        if parts.get("type") == "Battery" and parts.get("scope") != "Device":  # not a mouse's
            tenths, microvolts = _number(parts.get("temp")), _number(parts.get("voltage_now"))
            return Battery(
                percent=_number(parts.get("capacity")),
                status=(parts.get("status") or "unknown").lower(),
                plugged=any(outside) if outside else None,
                celsius=None if tenths is None else tenths / 10,
                millivolts=None if microvolts is None else microvolts // 1000,
            )
    return None


def load_average(files: Files) -> tuple[float, float, float]:
    """Over 1, 5 and 15 minutes.

    Raises:
        ValueError: the file is not there or is something else.
    """
    one, five, fifteen = (float(word) for word in files.get("/proc/loadavg", "").split()[:3])
    return one, five, fifteen


def _folders(files: Files, parent: str, prefix: str) -> list[tuple[str, dict[str, str]]]:
    """Folders in `parent`, each with its files, in the order of their numbers."""
    found: dict[str, dict[str, str]] = {}
    for path, value in files.items():
        if path.startswith(parent + prefix):
            name, slash, file = path[len(parent) :].partition("/")
            if slash:
                found.setdefault(name, {})[file] = value
    return sorted(found.items(), key=lambda item: [int(part) for part in re.findall(r"\d{1,9}", item[0])])


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"-?\d{1,18}", text) else None
