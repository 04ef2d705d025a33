"""Boards that are reached by ssh, through the user's own OpenSSH client."""

from __future__ import annotations

import ipaddress
import itertools
import os
import re
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from devices.errors import DeviceError, DeviceGone
from devices.transports.local import Capture, supervise
from devices.transports.shell import ShellTransport, last_line

CONNECT_SECONDS = 10  # for each address of a host
CONNECTION_SECONDS = 60  # for all of it, jump hosts and slow logins included
IDLE_SECONDS = 120  # after which a shared connection ends by itself, should this process be killed

# The user's configuration, agent and known hosts decide how a device is reached and whether it is trusted. These only say
# that nobody can be asked, that a dead connection is noticed, and that nothing else of the user's goes there or is opened.
OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": str(CONNECT_SECONDS),
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "LogLevel": "ERROR",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "RemoteCommand": "none",
    "RequestTTY": "no",
}
ADDRESS = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]*)@)?"
    r"(?:(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]*)|\[(?P<ipv6>[0-9A-Fa-f:.]+)(?P<zone>%[A-Za-z0-9_.-]+)?\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
# Whatever shell the user has there (fish and csh too) hears only this. The script follows on stdin, byte by byte, for what
# stands behind it there is not the script's to read ahead.
BOOTSTRAP = "exec sh -c 'eval \"$(dd bs=1 count={size} 2>/dev/null)\"'"


class Destination(NamedTuple):
    """Where an address leads; None: what the user's configuration says."""

    user: str | None
    host: str
    port: int | None


def parse_address(address: str) -> Destination:
    """The parts of `ssh://[user@]host[:port]`; an IPv6 address stands in brackets.

    Raises:
        DeviceError: it is something else.
    """
    found = ADDRESS.fullmatch(address)
    if found:
        host, port = found["host"], found["port"] and int(found["port"])
        if host is None and _is_ipv6(found["ipv6"]):
            host = found["ipv6"] + (found["zone"] or "")
        if host is not None and (port is None or 1 <= port <= 65535):
            return Destination(found["user"], host, port)
    raise DeviceError(
        f"address {address!r} cannot be used; accepted: ssh://[user@]host[:port], of letters, digits and ._- (not first), "
        "an IPv6 address in brackets."
    )


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


class SshTransport(ShellTransport):
    """A device behind `ssh`. One connection is made at the first use and shared until `close`.

    Args:
        address: ssh://[user@]host[:port].
        options: further words for the ssh client, such as ("-F", "config").

    Raises:
        DeviceError: no address, or no ssh client here.
    """

    def __init__(self, address: str, *, options: Sequence[str] = ()) -> None:
        user, host, port = parse_address(address)
        self.address = address
        self._client = shutil.which("ssh")
        if self._client is None:
            raise DeviceError(f"{address} needs the OpenSSH client; there is no `ssh` in PATH.")
        self._options = [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]
        self._options += [*options, *(("-l", user) if user else ()), *(("-p", str(port)) if port else ())]
        self._host = host
        self._socket: Path | None = None
        self._release: weakref.finalize | None = None

    def close(self) -> None:
        if self._release is not None:
            self._release()
        self._socket = self._release = None

    def _execute(self, script: str, capture: Capture, *, timeout: float, feed: Iterable[bytes] | None) -> None:
        self._connect()
        content = script.encode("utf-8", "surrogateescape")
        command = self._ssh("-o", "ControlMaster=no", words=[BOOTSTRAP.format(size=len(content))])
        # Its exit code tells nothing: 255 is as well the command's own. The script's last words do.
        supervise(
            command,
            capture,
            timeout=timeout,
            environment=_environment(),
            feed=itertools.chain([content], feed or ()),
            hold=feed is None,
        )

    def _ssh(self, *flags: str, words: Sequence[str] = ()) -> list[str]:
        path = ["-o", f"ControlPath={self._socket}"]
        return [self._client, *flags, *path, *self._options, "--", self._host, *words]

    def _connect(self) -> None:
        """Make the connection that commands share: a login takes time, and the device's processor."""
        if self._socket is not None and self._socket.exists():
            return
        self.close()
        # A socket's path may have about 100 characters: not under TMPDIR, which may be long.
        folder = tempfile.mkdtemp(prefix="comp-edge-", dir="/tmp")
        self._socket = Path(folder, "s")
        self._release = weakref.finalize(self, _hang_up, self._ssh("-O", "exit"), folder)
        command = self._ssh("-f", "-N", "-o", "ControlMaster=yes", "-o", f"ControlPersist={IDLE_SECONDS}")
        with tempfile.TemporaryFile() as messages:  # no pipe: what goes on in the background would keep it open
            try:
                made = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=messages,
                    env=_environment(),
                    start_new_session=True,
                    timeout=CONNECTION_SECONDS,
                )
            except subprocess.TimeoutExpired:
                self.close()
                raise DeviceGone(f"{self.address} did not let us in within {CONNECTION_SECONDS} s.") from None
            messages.seek(0)
            if made.returncode != 0:
                reason = last_line(messages.read()) or f"ssh ended with {made.returncode}"
                self.close()
                raise DeviceGone(f"{self.address} cannot be reached: {reason}.")


def _environment() -> dict[str, str]:
    return os.environ | {"SSH_ASKPASS_REQUIRE": "never"}


def _hang_up(command: Sequence[str], folder: str) -> None:
    if os.path.exists(os.path.join(folder, "s")):
        try:
            subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=CONNECT_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            pass  # it ends by itself, having nothing to do
    shutil.rmtree(folder, ignore_errors=True)
