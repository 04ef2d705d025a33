"""A real OpenSSH server on loopback, with keys that are thrown away: a board to reach."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

START_SECONDS = 30

SERVER = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
PidFile none
AuthorizedKeysFile {folder}/client.pub
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
SetEnv HOME={folder}
{extra}
"""
CLIENT = """
IdentityFile {folder}/client
IdentitiesOnly yes
IdentityAgent none
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile none
StrictHostKeyChecking yes
"""


@dataclass
class Board:
    """A server that runs.

    Attributes:
        address: ssh://127.0.0.1:PORT.
        options: words for the ssh client, in place of the user's own configuration.
    """

    folder: Path
    port: int
    server: psutil.Popen

    @property
    def address(self) -> str:
        return f"ssh://127.0.0.1:{self.port}"

    @property
    def options(self) -> tuple[str, ...]:
        return ("-F", str(self.folder / "client_config"))

    def vanish(self) -> None:
        """As if it were switched off: the server and its connections are gone, without a word."""
        for process in self.servers():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def servers(self) -> list[psutil.Process]:
        """The processes of sshd, not those that it runs for others."""
        found = []
        for process in (self.server, *self.server.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                if process.name() == "sshd":
                    found.append(process)
        return found


@contextmanager
def board(folder: Path, *, extra: str = "") -> Iterator[Board]:
    """Start a server in an empty folder; skips the test where there is none.

    Args:
        extra: further lines of its configuration.
    """
    program = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None or shutil.which("ssh-keygen") is None:
        pytest.skip("no sshd here (Debian: apt-get install openssh-server)")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd insists on it
    for name in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (folder / "client_config").write_text(CLIENT.format(folder=folder))
    (folder / "sshd_config").write_text(SERVER.format(folder=folder, port=port, extra=extra))
    with open(folder / "log", "wb") as log:
        server = psutil.Popen([program, "-D", "-e", "-f", folder / "sshd_config"], stderr=log, stdin=subprocess.DEVNULL)
    try:
        _wait_for(port, server, folder / "log")
        yield Board(folder, port, server)
    finally:
        for process in (*server.children(recursive=True), server) if server.is_running() else ():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        server.wait(START_SECONDS)


def _wait_for(port: int, server: psutil.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"sshd did not start: {log.read_text()}") from None
            time.sleep(0.05)
