"""Ways to a device: push, pull, run, and a private folder there. A new way is one new file, and one line here."""

from __future__ import annotations

from collections.abc import Callable

from devices.errors import DeviceError
from devices.transports.adb import AdbTransport
from devices.transports.base import OUTPUT_LIMIT, TIMEOUT, Completed, Transport
from devices.transports.host import HostTransport
from devices.transports.ssh import SshTransport

TRANSPORTS: dict[str, Callable[[str], Transport]] = {
    "host": HostTransport,
    "ssh": SshTransport,
    "adb": AdbTransport,
}

__all__ = [
    "OUTPUT_LIMIT",
    "TIMEOUT",
    "TRANSPORTS",
    "AdbTransport",
    "Completed",
    "HostTransport",
    "SshTransport",
    "Transport",
    "open_transport",
]


def open_transport(address: str) -> Transport:
    """The way to a device; it is only tried at the first use.

    Args:
        address: `host`, `ssh://[user@]host[:port]` or `adb://SERIAL`.

    Raises:
        DeviceError: an address of another form.
    """
    make = TRANSPORTS.get(address.partition("://")[0])
    if make is None:
        raise DeviceError(
            f"device {address!r} cannot be reached; accepted: host, ssh://[user@]host[:port], adb://SERIAL."
        )
    return make(address)
