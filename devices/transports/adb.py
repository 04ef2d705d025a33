"""Android devices, through the user's adb server."""

from __future__ import annotations

import re
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from devices.errors import DeviceError, DeviceGone
from devices.transports.local import Capture, feeding
from devices.transports.shell import ShellTransport, last_line

if TYPE_CHECKING:
    from adbutils import AdbClient, AdbConnection

SERIAL = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9._:%\[\]-]{0,127}")
LONGEST_SERVICE = 2**15  # bytes; a service's length is told to the server in four hex digits, and old servers take less
ANSWER_SECONDS = 10.0  # for what the server knows by itself

# Packets of Android's shell protocol, version 2: a kind, a length of 32 bits, that many bytes.
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)
HEADER = struct.Struct("<BI")
LARGEST_PACKET = 2**24  # adbd sends at most 2**20


def running_server() -> AdbClient:
    """The adb server that runs already. None is started: it would open a port, and it is the user's to do.

    Raises:
        DeviceGone: none answers.
        DeviceError: the environment names no port.
    """
    try:
        from adbutils import AdbClient

        client = AdbClient(socket_timeout=ANSWER_SECONDS)
    except ValueError as error:  # adbutils reads the port from the environment
        raise DeviceError(f"ANDROID_ADB_SERVER_PORT is no port ({error}).") from None
    try:
        # adbutils starts a server where none answers.
        socket.create_connection((client.host, client.port), timeout=ANSWER_SECONDS).close()
    except OSError:
        raise DeviceGone(
            f"no adb server answers at {client.host}:{client.port}; start yours with `adb start-server`."
        ) from None
    return client


class AdbTransport(ShellTransport):
    """A device that an adb server knows. `adb://` alone is the only one attached.

    Raises:
        DeviceError: the address is of another form.
    """

    _folder = "/data/local/tmp"

    def __init__(self, address: str) -> None:
        serial = address.removeprefix("adb://")
        if serial == address or (serial and not SERIAL.fullmatch(serial)):
            raise DeviceError(
                f"address {address!r} cannot be used; accepted: adb://SERIAL as `adb devices` prints it, or adb:// for the "
                "only device attached."
            )
        self.address = address
        self._serial = serial
        self._modern = False

    def _execute(self, script: str, capture: Capture, *, timeout: float, feed: Iterable[bytes] | None) -> None:
        service = f"shell,v2,raw:{script}"
        size = len(service.encode("utf-8", "surrogateescape"))
        if size > LONGEST_SERVICE:
            raise DeviceError(f"a command for {self.address} has {size} bytes; at most {LONGEST_SERVICE} are accepted.")
        with self._connection() as connection:
            with _faults(self.address, ANSWER_SECONDS):
                connection.send_command(service)
                connection.check_okay()
            packets = () if feed is None else _packets(feed)
            with feeding(packets, connection.conn.sendall, close=None):
                self._receive(connection, capture, timeout)

    def _receive(self, connection: AdbConnection, capture: Capture, timeout: float) -> None:
        """Take packets until the last."""
        deadline = time.monotonic() + timeout
        kind = None
        while kind != EXIT:
            with _faults(self.address, timeout):
                connection.conn.settimeout(max(deadline - time.monotonic(), 0.01))
                kind, size = HEADER.unpack(connection.read_exact(HEADER.size))
                if size > LARGEST_PACKET:
                    raise DeviceError(f"{self.address} announces a packet of {size} bytes, which is none of adb's.")
                data = connection.read_exact(size)
            if kind == STDOUT:
                capture.add_stdout(data)
            elif kind == STDERR:
                capture.add_stderr(data)

    @contextmanager
    def _connection(self) -> Iterator[AdbConnection]:
        from adbutils import AdbDevice

        client = running_server()
        with _faults(self.address, ANSWER_SECONDS):
            self._serial = self._serial or self._only_one(client)
            device = AdbDevice(client, serial=self._serial)
            if not self._modern:
                with device.open_transport("features", timeout=ANSWER_SECONDS) as asked:
                    features = asked.read_string_block()
                if "shell_v2" not in features.split(","):
                    raise DeviceError(f"{self.address} is too old: its adbd reports no exit codes; Android 7 does.")
                self._modern = True
            connection = device.open_transport(timeout=ANSWER_SECONDS)
        with connection:
            yield connection

    def _only_one(self, client: AdbClient) -> str:
        serials = [info.serial for info in client.list()]
        if not serials:
            raise DeviceGone(f"{self.address} accepts exactly one attached device; attached: none.")
        if len(serials) > 1:
            found = last_line(", ".join(f"adb://{serial}" for serial in serials).encode())
            raise DeviceError(f"{self.address} accepts exactly one attached device; attached: {found}.")
        return serials[0]


def _packets(feed: Iterable[bytes]) -> Iterator[bytes]:
    for chunk in feed:
        yield HEADER.pack(STDIN, len(chunk)) + chunk
    yield HEADER.pack(CLOSE_STDIN, 0)


@contextmanager
def _faults(address: str, seconds: float) -> Iterator[None]:
    """Say in terms of this package what adbutils and sockets report.

    Args:
        seconds: that were waited, should nothing have come.
    """
    from adbutils import AdbError
    from adbutils.errors import AdbTimeout

    try:
        yield
    except DeviceError:
        raise
    except (AdbTimeout, TimeoutError):
        raise DeviceGone(f"{address} has not answered for {seconds:g} s.") from None
    except (AdbError, OSError, EOFError, ValueError) as error:  # ValueError: a length that is no number
        reason = "the connection broke" if isinstance(error, EOFError) else str(error).partition("\n")[0]
        if "authoriz" in reason:  # "unauthorized", "still authorizing"
            raise DeviceError(
                f"{address} is not authorized; unlock its screen and accept this computer there."
            ) from None
        raise DeviceGone(f"{address} cannot be reached: {last_line(reason.encode())}.") from None
