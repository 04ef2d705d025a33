"""Clocks that do not follow the load, for as long as a measurement goes on; the one place that changes a device.

A Linux or Android device gets the governor 'performance'. A Jetson gets its mode without limits (MAXN) and fixed clocks
(`jetson_clocks`). Root is needed, or sudo without a password.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from devices.conditions import jetson
from devices.conditions.model import Kind, PowerMode
from devices.conditions.read import split_sections
from devices.errors import DeviceError
from devices.transports.base import Transport

TIMEOUT = 60.0  # seconds; nvpmodel switches cores off and on

# Who may not is not asked for a password, and no question of nvpmodel's ("reboot now?") is answered.
_AS_ROOT = r"""
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@" < /dev/null
    elif command -v sudo > /dev/null 2>&1; then sudo -n "$@" < /dev/null
    else return 1
    fi
}
"""

# $1 is put before the paths.
_READ_GOVERNORS = r"""
for policy in "$1"/sys/devices/system/cpu/cpufreq/policy*; do
    governor= preference= available=
    { read -r governor < "$policy/scaling_governor"; } 2> /dev/null
    { read -r preference < "$policy/energy_performance_preference"; } 2> /dev/null
    { read -r available < "$policy/scaling_available_governors"; } 2> /dev/null
    printf '%s %s %s %s\n' "${policy##*/}" "$governor" "${preference:--}" "$available"
done
exit 0
"""
# $1 as above; then a policy, its governor and its preference (- to leave it), again and again.
_SET_GOVERNORS = (
    _AS_ROOT
    + r"""
put() {
    now=
    { read -r now < "$2"; } 2> /dev/null
    if [ "$now" = "$1" ]; then return 0; fi
    if [ -w "$2" ]; then printf '%s\n' "$1" > "$2"
    else as_root sh -c 'printf "%s\n" "$1" > "$2"' sh "$1" "$2"
    fi
}
root=$1
shift
while [ $# -ge 3 ]; do
    folder=$root/sys/devices/system/cpu/cpufreq/$1
    put "$2" "$folder/scaling_governor"
    [ "$3" = - ] || put "$3" "$folder/energy_performance_preference"
    shift 3
done 2> /dev/null
exit 0
"""
)

# $1 is put before the path of the configuration.
_READ_JETSON = (
    _AS_ROOT
    + r"""
command -v jetson_clocks > /dev/null 2>&1 || exit 3
printf '== clocks\n'
as_root jetson_clocks --show 2> /dev/null || exit 4
printf '\n== nvpmodel\n'
nvpmodel -q < /dev/null 2> /dev/null
printf '\n== modes\n'
cat "$1/etc/nvpmodel.conf" 2> /dev/null
exit 0
"""
)
_RUN_AS_ROOT = _AS_ROOT + 'as_root "$@" 2>&1\n'


@dataclass(frozen=True)
class _Setting:
    """What can be read of a device's clocks, and changed. `read` gives what must be the same again at the end."""

    read: Callable[[], Any]
    fix: Callable[[Any], None]
    restore: Callable[[Any], None]


@contextmanager
def fixed_clocks(transport: Transport, kind: Kind, *, root: str = "") -> Iterator[None]:
    """Fix a device's clocks in the block, and set them back to what they were, whatever ends it.

    Args:
        root: a folder on the device that stands for / of the kernel's files.

    Raises:
        DeviceError: the clocks cannot be set (nothing has changed then), or are not what they were afterwards.
    """
    with transport.workspace() as folder:
        setting = _jetson(transport, folder, root) if kind == "jetson" else _governors(transport, root)
        before = setting.read()
        try:
            setting.fix(before)
            yield
        finally:
            try:
                _set_back(transport, setting, before)
            except KeyboardInterrupt:  # an impatient second Ctrl-C; what must not be left is done first
                _set_back(transport, setting, before)
                raise


def _set_back(transport: Transport, setting: _Setting, before: Any) -> None:
    try:
        setting.restore(before)
        same = setting.read() == before
    except DeviceError as error:
        raise DeviceError(
            f"the clocks of {transport.address!r} may not be what they were, restart it to be sure: {error}"
        ) from None
    if not same:
        raise DeviceError(f"the clocks of {transport.address!r} are not what they were; restart it to set them back.")


def _governors(transport: Transport, root: str) -> _Setting:
    Governors = dict[str, tuple[str, str]]

    def read() -> Governors:
        found: Governors = {}
        for line in _run(transport, _READ_GOVERNORS, root).splitlines():
            match = re.fullmatch(r"(policy\d{1,5}) ([\w.-]{1,32}) ([\w.-]{1,32})((?: [\w.-]{1,32})*) ?", line)
            if not match:
                continue
            name, governor, preference, available = match.groups()
            if available and "performance" not in available.split():
                raise DeviceError(f"{name} of {transport.address!r} has governors{available} only, not 'performance'.")
            found[name] = governor, preference
        if not found:
            raise DeviceError(
                f"device {transport.address!r} has no clocks that can be set (no cpufreq, as in a virtual machine); "
                "measure without --set-clocks."
            )
        return found

    def put(wanted: Governors) -> None:
        words = [word for name, (governor, preference) in wanted.items() for word in (name, governor, preference)]
        _run(transport, _SET_GOVERNORS, root, *words)

    def fix(before: Governors) -> None:
        put({name: ("performance", "-") for name in before})
        if any(governor != "performance" for governor, _ in read().values()):
            raise _forbidden(transport)

    return _Setting(read, fix, restore=put)


def _jetson(transport: Transport, folder: str, root: str) -> _Setting:
    stored = f"{folder}/clocks.conf"

    def ask() -> dict[str, str]:
        completed = transport.run(["sh", "-c", _READ_JETSON, "sh", root], timeout=TIMEOUT)
        if completed.exit_code == 3:
            raise DeviceError(
                f"device {transport.address!r} has no jetson_clocks; it is no Jetson, or not set up as one."
            )
        if completed.exit_code:
            raise _forbidden(transport)
        return split_sections(completed.stdout)

    def mode(said: dict[str, str]) -> PowerMode | None:
        try:
            return jetson.power_mode(said.get("nvpmodel", ""))
        except ValueError:
            return None

    def read() -> tuple[PowerMode | None, dict[str, tuple[int, int]]]:
        said = ask()
        try:
            clocks = jetson.clocks(said.get("clocks", ""))
        except ValueError:
            raise DeviceError(f"jetson_clocks of {transport.address!r} shows no clocks.") from None
        return mode(said), {clock.name: (clock.min, clock.max) for clock in clocks}

    def run(*command: str) -> None:
        completed = transport.run(["sh", "-c", _RUN_AS_ROOT, "sh", *command], timeout=TIMEOUT)
        if completed.exit_code:
            said = " ".join(completed.stdout.split())[:200]
            raise DeviceError(f"{command[0]} on {transport.address!r} ended with {completed.exit_code}: {said!r}.")

    def fix(before: tuple[PowerMode | None, Any]) -> None:
        run("jetson_clocks", "--store", stored)
        modes = {found.name: found for found in jetson.power_modes(ask().get("modes", ""))}
        most = modes.get("MAXN_SUPER") or modes.get("MAXN")
        if most is not None and before[0] is not None and before[0].id != most.id:
            # It may refuse and yet end well, for modes that need a restart.
            transport.run(["sh", "-c", _RUN_AS_ROOT, "sh", "nvpmodel", "-m", str(most.id)], timeout=TIMEOUT)
            now = mode(ask())
            if now is None or now.id != most.id:
                raise DeviceError(
                    f"{transport.address!r} does not switch from power mode {before[0].name!r} to {most.name!r} without a "
                    f"restart; switch it yourself (nvpmodel -m {most.id}), or measure without --set-clocks."
                )
        run("jetson_clocks")

    def restore(before: tuple[PowerMode | None, Any]) -> None:
        if transport.run(["test", "-f", stored], timeout=TIMEOUT).exit_code:
            return  # nothing was stored, so nothing was changed
        run("jetson_clocks", "--restore", stored)
        was, now = before[0], mode(ask())
        if was is not None and was.id is not None and now is not None and now.id != was.id:
            # First the limits go back, so that the mode's own fit; then once more, for what the mode has set.
            run("nvpmodel", "-m", str(was.id))
            run("jetson_clocks", "--restore", stored)

    return _Setting(read, fix, restore)


def _forbidden(transport: Transport) -> DeviceError:
    return DeviceError(
        f"the clocks of {transport.address!r} can be set by root only; log in as root (adb root), allow sudo without a "
        "password, or measure without --set-clocks."
    )


def _run(transport: Transport, script: str, *arguments: str) -> str:
    return transport.run(["sh", "-c", script, "sh", *arguments], timeout=TIMEOUT).stdout
