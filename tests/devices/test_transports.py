"""Addresses, this machine as a device, scripts on whatever shell there is, and what is found attached."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transport_contract import CHECKS, lasting, running, small_disk, until

from devices import discovery
from devices.errors import DeviceError, DeviceGone, DeviceTimeout
from devices.transports import AdbTransport, HostTransport, SshTransport, open_transport
from devices.transports.local import Capture, supervise
from devices.transports.shell import WORKSPACE, ShellTransport
from devices.transports.ssh import Destination, parse_address

# A killed process cannot end what it runs on the same machine; a device can.
OF_HOST = {name: check for name, check in CHECKS.items() if name != "nothing_is_left_when_who_asked_is_killed"}


class LocalShell(ShellTransport):
    """A shell of this machine that is asked as a device's is."""

    _folder = "${TMPDIR:-/tmp}"

    def __init__(self, *words: str) -> None:
        self.address = " ".join(words)
        self.words = words

    def _execute(self, script: str, capture: Capture, *, timeout: float, feed: Iterable[bytes] | None) -> None:
        supervise(
            [*self.words, script], capture, timeout=timeout, environment=os.environ, feed=feed or (), hold=feed is None
        )


@pytest.mark.parametrize("check", OF_HOST.values(), ids=OF_HOST)
def test_host(check: Callable[[HostTransport, Path], None], tmp_path: Path) -> None:
    check(HostTransport(), tmp_path)


@pytest.mark.parametrize("shell", ["bash", "busybox sh", "dash", "mksh"])
def test_scripts_run_on_any_shell(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell.split()[0]) is None:
        pytest.skip(f"no {shell} here")
    for name in (
        "words_arrive_as_they_were_sent",
        "exit_codes_and_streams_come_back",
        "nothing_is_left_of_a_command_that_took_too_long",
        "nothing_is_left_when_who_asked_is_killed",
        "files_come_back_as_they_were",
    ):
        folder = tmp_path / name
        folder.mkdir()
        CHECKS[name](LocalShell(*shell.split(), "-c"), folder)


def test_a_server_without_sessions_survives_the_end_of_a_command() -> None:
    """A command is ended with its process group, which must not be the server's."""
    done: list[str] = []

    class Server(LocalShell):
        def _execute(self, script: str, capture: Capture, *, timeout: float, feed: Iterable[bytes] | None) -> None:
            super()._execute(script, capture, timeout=timeout, feed=feed)
            done.append(capture.stdout.getvalue().decode())

    marker = lasting()
    server = Server("sh", "-c", 'sh -c "$1"; echo the server goes on', "server")
    assert server.run(["echo", "hello"]).exit_code == 0
    with pytest.raises(DeviceTimeout):
        server.run(["sleep", marker], timeout=1)
    assert done == ["hello\nthe server goes on\n", "the server goes on\n"]
    until(lambda: not running(marker))


@pytest.mark.parametrize(
    "folder", ["", "/", "comp-edge.AbCdEf", "/tmp/comp-edge.AbCdEf/..", "/tmp/../comp-edge.abcdef", "/tmp/a b/comp-edge.abcdef",
               "/tmp/comp-edge.abcdef\n/", "/tmp/comp-edge.$(id)"],
)  # fmt: skip
def test_a_folder_that_a_device_only_claims_is_not_removed(folder: str) -> None:
    removed = []

    class Liar(LocalShell):
        def _call(self, words: list[str], capture: Capture, **_: object) -> int:
            if words[0] == "rm":
                removed.append(words)
            capture.add_stdout(f"{folder}\n".encode())
            return 0

    with pytest.raises(DeviceError, match="no folder can be made"), Liar().workspace():
        pass
    assert not removed
    assert WORKSPACE.fullmatch("/data/local/tmp/comp-edge.Ab12Cd") and WORKSPACE.fullmatch("/tmp//comp-edge.Ab12Cd")


def test_a_file_that_grew_while_it_was_copied_is_not_kept(tmp_path: Path) -> None:
    class Growing(LocalShell):
        def _call(self, words: list[str], capture: Capture, **rest: object) -> int:
            if words[0] == "cat":
                capture.add_stdout(b"other bytes")
                return 0
            return super()._call(words, capture, **rest)

    (tmp_path / "file").write_bytes(b"eleven byte")
    with pytest.raises(DeviceError, match="did not arrive as it is there"):
        Growing("sh", "-c").pull(str(tmp_path / "file"), tmp_path / "copy", limit=100)
    assert os.listdir(tmp_path) == ["file"]


def test_what_ends_without_its_last_words_has_gone() -> None:
    for words in (["echo", "broken pipe"], ["sh", "-c", "echo no such user >&2; exit 255"], ["false"]):
        with pytest.raises(DeviceGone, match="cannot be reached"):
            LocalShell(*words).run(["true"])


def test_a_workspace_that_has_gone_already() -> None:
    with HostTransport().workspace() as folder:
        shutil.rmtree(folder)


def test_a_full_disk_on_this_side(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(1_000_000))
    with small_disk(tmp_path / "disk") as disk:
        for transport in (HostTransport(), LocalShell("sh", "-c")):
            with pytest.raises(DeviceError, match="No space left"):
                transport.pull(str(tmp_path / "file"), disk / "copy", limit=1_000_000)
            assert not os.listdir(disk)


def test_the_scheme_chooses_the_transport() -> None:
    assert type(open_transport("host")) is HostTransport
    assert type(open_transport("adb://SERIAL-1")) is AdbTransport
    if shutil.which("ssh"):
        assert type(open_transport("ssh://pi@board:2222")) is SshTransport


@pytest.mark.parametrize(
    "address", ["", "hosts", "host://x", "usb://1", "ssh", "ssh:board", "board", "ssh://", "adb", "ADB://x"]
)
def test_other_addresses_are_refused_in_a_sentence(address: str) -> None:
    with pytest.raises(DeviceError) as error:
        open_transport(address)
    assert repr(address) in str(error.value) and "accepted" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("address", "destination"),
    [
        ("ssh://board", Destination(None, "board", None)),
        ("ssh://pi@board.local:2222", Destination("pi", "board.local", 2222)),
        ("ssh://my_board", Destination(None, "my_board", None)),
        ("ssh://a.b-c@10.0.0.7:65535", Destination("a.b-c", "10.0.0.7", 65535)),
        ("ssh://[::1]", Destination(None, "::1", None)),
        ("ssh://pi@[fe80::1%eth0]:22", Destination("pi", "fe80::1%eth0", 22)),
    ],
)
def test_ssh_addresses(address: str, destination: Destination) -> None:
    assert parse_address(address) == destination


@pytest.mark.parametrize(
    "rest",
    ["-oProxyCommand=id", "pi@-oProxyCommand=id", "-l@board", "board:0", "board:65536", "board:x", "board:", "board/", "a b",
     "board;id", "$(id)", "@board", "a@b@c", "[::1", "::1", "[1.2.3.4]", "[zz::1]", "[::1%-x y]", "board\n",
     "bücher", "%h", "*"],
)  # fmt: skip
def test_other_ssh_addresses_are_refused(rest: str) -> None:
    with pytest.raises(DeviceError, match="cannot be used; accepted: ssh://"):
        parse_address(f"ssh://{rest}")


@given(st.text())
def test_what_gets_through_to_ssh_is_harmless(rest: str) -> None:
    try:
        user, host, port = parse_address(f"ssh://{rest}")
    except DeviceError:
        return
    for word in (user or "a", host):
        assert word.isascii() and not word.startswith("-") and not set(word) & set(" \t\n'\"$`\\;&|<>()*?/@")
    assert port is None or 1 <= port <= 65535


@pytest.mark.parametrize("serial", ["-s", "a b", "a;id", "$(id)", "a\n", "ü", "x" * 129, "/dev/x", "a/b"])
def test_other_serials_are_refused(serial: str) -> None:
    with pytest.raises(DeviceError, match="cannot be used; accepted: adb://SERIAL"):
        AdbTransport(f"adb://{serial}")


def test_a_workspace_on_host_is_private() -> None:
    with HostTransport().workspace() as folder:
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700


CONFIG = """
# Host commented
Host pi jetson *.lab "quoted" !no
    HostName 10.0.0.7
HOST=equals
host   pi   nano?  # Host pi2
  Host indented\tafter-a-tab
Hostname other
Match host matched
Host -oProxyCommand=id $(id) "open
"""


def test_hosts_of_the_ssh_configuration() -> None:
    assert discovery.literal_hosts(CONFIG) == ["pi", "jetson", "quoted", "equals", "indented", "after-a-tab"]


@given(st.text())
def test_any_configuration_is_read(text: str) -> None:
    for host in discovery.literal_hosts(f"Host {text}\nHost pi"):
        assert parse_address(f"ssh://{host}")


@pytest.mark.parametrize(
    ("state", "shown", "hint"),
    [
        ("device", "ready", None),
        ("unauthorized", "unauthorized", "unlock"),
        ("offline", "offline", "plug"),
        ("no", "no permission", "udev"),
        ("recovery", "recovery", "restart"),
    ],
)
def test_states_of_android_devices(state: str, shown: str, hint: str | None) -> None:
    found = discovery.describe_android("R58M1", state, "Pixel_7_Pro")
    assert (found.address, found.what, found.state) == ("adb://R58M1", "Pixel 7 Pro", shown)
    assert found.hint is None if hint is None else hint in found.hint


def test_a_device_cannot_draw_on_the_terminal() -> None:
    found = discovery.describe_android("\x1b[31mred", "\x07" * 9, "\x1b]0;title\x07" + "x" * 1000)
    assert found.state == "unusable" and all(
        text.isprintable() and len(text) < 80 for text in (found.address, found.what)
    )


def test_nothing_is_started_to_see_what_is_attached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    """An `adb` is in PATH, and adbutils would start a server with it."""
    adb = tmp_path / "adb"
    adb.write_text(f"#!/bin/sh\ntouch '{tmp_path}/started'\n")
    adb.chmod(0o755)
    (tmp_path / "config").write_text("Host board\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(free_port))
    found = discovery.attached(ssh_config=tmp_path / "config")
    assert [(device.address, device.state) for device in found] == [
        ("host", "ready"),
        ("adb://", "not asked"),
        ("ssh://board", "configured, not tried"),
    ]
    assert "adb start-server" in found[1].hint
    with pytest.raises(DeviceError, match="no adb server answers"):
        AdbTransport("adb://SERIAL").run(["true"])
    assert not (tmp_path / "started").exists()
    subprocess.run(["adb"], check=True)  # that it would have been noticed
    assert (tmp_path / "started").exists()
    monkeypatch.setenv("PATH", "/nowhere")
    assert [device.address for device in discovery.attached(ssh_config=tmp_path / "none")] == ["host"]


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
