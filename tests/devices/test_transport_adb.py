"""Against a real adbd in namespaces of its own, and against servers that answer what no healthy one does.

This file is also the script that runs beside the adbd: `python test_transport_adb.py FOLDER`.
"""

from __future__ import annotations

import json
import os
import socket
import socketserver
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from real_adbd import Phone, phone, run_inside
from transport_contract import CHECKS, lasting, running, until

from devices import discovery
from devices.errors import DeviceError, DeviceGone
from devices.transports import adb, shell
from devices.transports.adb import AdbTransport

INSIDE_SECONDS = 600


def scene_the_only_device_needs_no_serial(device: Phone, local: Path) -> None:
    assert AdbTransport("adb://").run(["echo", "hello"]).stdout == "hello\n"


def scene_another_device_is_not_there(device: Phone, local: Path) -> None:
    with pytest.raises(DeviceGone, match="adb://SERIAL-1 cannot be reached: device 'SERIAL-1' not found"):
        AdbTransport("adb://SERIAL-1").run(["true"])


def scene_it_is_found(device: Phone, local: Path) -> None:
    found = {entry.address: entry for entry in discovery.attached(ssh_config=local / "none")}
    assert found[device.address].state == "ready" and set(found) == {"host", device.address}


def scene_workspaces_are_where_programs_may_run(device: Phone, local: Path) -> None:
    with AdbTransport(device.address).workspace() as folder:
        assert folder.startswith("/data/local/tmp/comp-edge.")


def scene_a_command_that_is_too_long(device: Phone, local: Path) -> None:
    with pytest.raises(DeviceError, match="at most 32768 are accepted"):
        AdbTransport(device.address).run(["echo", "x" * 40_000])


def scene_it_vanishes_while_a_command_runs(device: Phone, local: Path) -> None:
    marker = lasting()
    threading.Thread(target=lambda: (until(lambda: bool(running(marker))), device.vanish())).start()
    try:
        with pytest.raises(DeviceGone, match="cannot be reached"):
            AdbTransport(device.address).run(["sleep", marker], timeout=600)
        until(lambda: not running(marker))
        with pytest.raises(DeviceGone, match="cannot be reached"):
            AdbTransport(device.address).run(["true"])
        (entry,) = [entry for entry in discovery.attached(ssh_config=local / "none") if entry.address != "host"]
        assert (entry.state, entry.hint is None) == ("offline", False)
    finally:
        device.switch_on()


def scene_it_vanishes_and_hides_no_error(device: Phone, local: Path) -> None:
    try:
        with pytest.raises(KeyError, match="first"), AdbTransport(device.address).workspace() as folder:
            device.vanish()
            raise KeyError("first")
        os.rmdir(folder)
    finally:
        device.switch_on()


def scene_it_vanishes_while_it_gets_a_file(device: Phone, local: Path) -> None:
    (local / "file").write_bytes(os.urandom(300_000))
    (local / "there").mkdir()

    def chunks(file: Any) -> Iterator[bytes]:
        yield file.read(100_000)
        until(lambda: any(path.stat().st_size for path in (local / "there").iterdir()))
        device.vanish()
        yield file.read()

    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(DeviceGone):
            patch.setattr(shell, "read_chunks", chunks)
            AdbTransport(device.address).push(local / "file", str(local / "there/file"))
        until(lambda: not list((local / "there").iterdir()))
    finally:
        device.switch_on()


SCENES: dict[str, Callable[[Phone, Path], None]] = {
    name.removeprefix("scene_"): scene for name, scene in sorted(globals().items()) if name.startswith("scene_")
}


def play(folder: Path) -> None:
    """Every check and scene beside a real adbd; `result.json` has a traceback for each that failed."""
    result: dict[str, str | None] = {}

    def attempt(name: str, act: Callable[[Any, Path], None], subject: Any) -> None:
        local = folder / name
        local.mkdir()
        try:
            act(subject, local)
            result[name] = None
        except BaseException as error:
            skipped = isinstance(error, pytest.skip.Exception)
            result[name] = f"skipped: {error}" if skipped else traceback.format_exc()

    with phone(folder) as device:
        for name, check in CHECKS.items():
            attempt(name, check, AdbTransport(device.address))
        for name, scene in SCENES.items():
            attempt(name, scene, device)
    (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return run_inside(Path(__file__), tmp_path_factory.mktemp("phone"), timeout=INSIDE_SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CHECKS, *SCENES])
def test_real_adbd(name: str, played: dict[str, str | None]) -> None:
    outcome = played[name]
    if outcome is not None and outcome.startswith("skipped: "):
        pytest.skip(outcome)
    assert outcome is None, outcome


@contextmanager
def server_that_says(answers: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An adb server on loopback that answers what the longest matching beginning of a request says, and hangs up."""

    class Client(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError, ValueError):
                while size := self.request.recv(4, socket.MSG_WAITALL):
                    request = self.request.recv(int(size, 16), socket.MSG_WAITALL).decode()
                    starts = [start for start in answers if request.startswith(start)]
                    self.request.sendall(answers[max(starts, key=len)])
                    if request.startswith("shell"):
                        self.request.shutdown(socket.SHUT_WR)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Client) as server:
        server.daemon_threads = True
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(server.server_address[1]))
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def said(text: str, *, ok: bool = True) -> bytes:
    """An answer of an adb server."""
    return (b"OKAY" if ok else b"FAIL") + f"{len(text):04x}{text}".encode()


HEALTHY = {
    "host:version": said("0029"),
    "host-serial:": said("cmd,shell_v2,stat_v2"),
    "host:tport:": b"OKAY" + bytes(8),
    "shell": b"OKAY",
}


@pytest.mark.parametrize(
    ("answers", "kind", "reason"),
    [
        (
            {"host-serial:": said("device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set", ok=False)},
            DeviceError,
            "accept this computer",
        ),
        ({"host-serial:": said("device still authorizing", ok=False)}, DeviceError, "accept this computer"),
        ({"host:tport:": said("device offline", ok=False)}, DeviceGone, "device offline"),
        ({"host-serial:": said("cmd,stat_v2")}, DeviceError, "too old"),
        ({"shell": said("closed", ok=False)}, DeviceGone, "closed"),
        ({"shell": b"OKAY\x01\xff\xff\xff\xff"}, DeviceError, "packet of 4294967295 bytes"),
        ({"shell": b"OKAY" + adb.HEADER.pack(3, 1) + b"\x00"}, DeviceGone, "the connection broke"),
        ({"shell": b"OKAY" + adb.HEADER.pack(2, 5) + b"\xff\x00"}, DeviceGone, "the connection broke"),
        ({"host-serial:": b"OKAYzzzz"}, DeviceGone, "cannot be reached: invalid literal"),
        ({"host-serial:": b"HTTP/1.1 400 Bad Request\r\n"}, DeviceGone, "Unknown data"),
    ],
)
def test_what_a_server_may_say(
    answers: dict[str, bytes], kind: type[DeviceError], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "GRACE", 0.5)
    with server_that_says(HEALTHY | answers, monkeypatch):
        with pytest.raises(DeviceError, match=reason) as error:
            AdbTransport("adb://SERIAL").run(["true"], timeout=1)
    assert type(error.value) is kind and "adb://SERIAL" in str(error.value) and "\n" not in str(error.value)


def test_a_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adb, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(listener.getsockname()[1]))
        with pytest.raises(DeviceGone, match="adb://SERIAL has not answered for 0.5 s"):
            AdbTransport("adb://SERIAL").run(["true"])


def test_the_only_device_must_be_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = (
        "A1 device product:x model:Pixel_7 device:y\nB2 unauthorized usb:1-1\nC3 no permissions (user in plugdev?)\n"
    )
    with server_that_says(HEALTHY | {"host:devices": said(listed)}, monkeypatch):
        with pytest.raises(DeviceError, match="exactly one attached device; attached: adb://A1, adb://B2, adb://C3"):
            AdbTransport("adb://").run(["true"])
        found = discovery.attached(ssh_config=Path("none"))[1:]
    assert [(entry.address, entry.what, entry.state) for entry in found] == [
        ("adb://A1", "Pixel 7", "ready"),
        ("adb://B2", "Android device", "unauthorized"),
        ("adb://C3", "Android device", "no permission"),
    ]
    with server_that_says(HEALTHY | {"host:devices": said("")}, monkeypatch):
        with pytest.raises(DeviceGone, match="attached: none"):
            AdbTransport("adb://").run(["true"])
        assert discovery.attached(ssh_config=Path("none"))[1:] == []


def test_a_server_that_lists_nonsense(monkeypatch: pytest.MonkeyPatch) -> None:
    for nonsense in (b"OKAYzzzz", b"FAIL0003why", b"\xff" * 20):
        with server_that_says({"host:devices": nonsense}, monkeypatch):
            (entry,) = discovery.attached(ssh_config=Path("none"))[1:]
        assert (entry.address, entry.state) == ("adb://", "the adb server gives no list")


def test_a_port_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", "here")
    with pytest.raises(DeviceError, match="ANDROID_ADB_SERVER_PORT"):
        AdbTransport("adb://SERIAL").run(["true"])


if __name__ == "__main__":
    play(Path(sys.argv[1]))
