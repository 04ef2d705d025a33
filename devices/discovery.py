"""What is attached to this machine, or configured to be reached from it. Nothing is started, and no host is called."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from devices.errors import DeviceError
from devices.transports.adb import SERIAL, running_server
from devices.transports.ssh import parse_address

CONFIG = Path("~/.ssh/config")
CONFIG_LIMIT = 2**20  # bytes
HOST_LINE = re.compile(r"host(?:\s*=\s*|\s+)(.*)", re.IGNORECASE)
READY = "ready"


@dataclass(frozen=True)
class Found:
    """A device, or what may be one.

    Attributes:
        address: what `devices.connect` takes.
        what: a few words about what it is.
        state: "ready", or why it is not, or not known to be.
        hint: what to do where it cannot be used as it is.
    """

    address: str
    what: str
    state: str
    hint: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def attached(*, ssh_config: Path = CONFIG) -> list[Found]:
    """This machine, what an adb server that runs already knows, and the hosts that the ssh configuration names.

    Args:
        ssh_config: of the user; files that it includes are not read.
    """
    return [Found("host", "this machine", READY), *_android(), *_boards(ssh_config)]


def _android() -> list[Found]:
    try:
        devices = running_server().list(extended=True)
    except DeviceError as error:
        # Who has no adb expects no phone here.
        return [Found("adb://", "Android devices", "not asked", str(error))] if shutil.which("adb") else []
    except Exception as error:  # adbutils raises what sockets and its parsing do
        return [Found("adb://", "Android devices", "the adb server gives no list", _shown(str(error)))]
    return [describe_android(device.serial, device.state, device.tags.get("model", "")) for device in devices]


def describe_android(serial: str, state: str, model: str = "") -> Found:
    """What a line of `adb devices -l` says; all of it comes from the device."""
    address, what = f"adb://{_shown(serial)}", _shown(model).replace("_", " ") or "Android device"
    if not SERIAL.fullmatch(serial):
        return Found(address, what, "unusable", "its serial number has characters that are not accepted.")
    match state:
        case "device":
            return Found(address, what, READY)
        case "unauthorized" | "authorizing":
            return Found(address, what, state, "unlock its screen and accept this computer there.")
        case "no":  # "no permissions", of which adbutils keeps a word
            return Found(address, what, "no permission", "add a udev rule for it, or yourself to the group plugdev.")
        case "offline":
            return Found(address, what, state, "plug it in again, or switch USB debugging off and on.")
    return Found(address, what, _shown(state), "restart it into Android.")


def _boards(config: Path) -> list[Found]:
    try:
        with config.expanduser().open("rb") as file:
            text = file.read(CONFIG_LIMIT).decode("utf-8", "replace")
    except (OSError, RuntimeError):  # none, or no home
        return []
    hint = "an `ssh` to it must get in without a question."
    return [Found(f"ssh://{name}", "ssh host", "configured, not tried", hint) for name in literal_hosts(text)]


def literal_hosts(config: str) -> list[str]:
    """The names that `Host` lines of an ssh configuration give, without patterns; in their order, each once."""
    names: dict[str, None] = {}
    for line in config.splitlines():
        found = HOST_LINE.fullmatch(line.strip())
        if not found:
            continue
        try:
            words = shlex.split(found[1], comments=True)
        except ValueError:  # an open quote
            continue
        for word in words:
            try:
                parse_address(f"ssh://{word}")
            except DeviceError:
                continue  # a pattern, or nothing that could be asked for
            names[word] = None
    return list(names)


def _shown(text: str) -> str:
    return "".join(c for c in text if c.isprintable())[:64]
