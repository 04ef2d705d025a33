"""A real adbd of Debian as a stand-in phone, in namespaces of its own: loopback only, its own /data and its own processes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = {"adbd": "adbd", "adb": "adb", "unshare": "util-linux", "ip": "iproute2", "mount": "mount"}
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PORT = 15555
SERVER_PORT = 15037
START_SECONDS = 60


def run_inside(script: Path, folder: Path, *, timeout: float) -> Any:
    """Run a Python script where a phone can be started; skips the test where that cannot be.

    Args:
        folder: the script's only argument; it writes `result.json` there.

    Returns:
        What the script wrote.
    """
    for program, package in PROGRAMS.items():
        if shutil.which(program, path=PATH) is None:
            pytest.skip(f"no {program} here (Debian: apt-get install {package}; adbd and adb from backports)")
    spaces = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*spaces, "true"], capture_output=True, env=os.environ | {"PATH": PATH}).returncode != 0:
        pytest.skip("namespaces cannot be made here (they need root)")
    environment = os.environ | {
        "PATH": PATH,
        "HOME": str(folder),
        "ANDROID_ADB_SERVER_PORT": str(SERVER_PORT),
        "ADBD_PORT": str(PORT),
    }
    with place_for_data():
        ended = subprocess.run(
            [*spaces, sys.executable, script, folder],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=timeout,
        )  # fmt: skip
    assert ended.returncode == 0, ended.stdout
    return json.loads((folder / "result.json").read_text())


@contextmanager
def place_for_data() -> Iterator[None]:
    """A folder /data to mount something on; adbd knows no other place. One user at a time, and gone afterwards."""
    data = Path("/data")
    with open(Path(tempfile.gettempdir(), "comp-edge-adbd.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = not data.exists()
        data.mkdir(exist_ok=True)
        try:
            yield
        finally:
            if made and not any(data.iterdir()):
                data.rmdir()


@dataclass
class Phone:
    """A phone that is switched on and known to the adb server; only inside."""

    folder: Path
    daemon: subprocess.Popen = field(init=False)

    address = f"adb://127.0.0.1:{PORT}"

    def switch_on(self) -> None:
        with open(self.folder / "adbd.log", "ab") as log:
            self.daemon = subprocess.Popen(["adbd"], stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + START_SECONDS
        while "device" not in adb("-s", f"127.0.0.1:{PORT}", "get-state"):
            assert time.monotonic() < end and self.daemon.poll() is None, (self.folder / "adbd.log").read_text()
            adb("connect", f"127.0.0.1:{PORT}")
            time.sleep(0.1)

    def vanish(self) -> None:
        """As if its battery were taken out."""
        self.daemon.kill()
        self.daemon.wait()


def adb(*words: str) -> str:
    """What the adb client of Debian prints."""
    ended = subprocess.run(["adb", *words], capture_output=True, text=True, timeout=START_SECONDS)
    return ended.stdout + ended.stderr if ended.returncode == 0 else ""


@contextmanager
def phone(folder: Path) -> Iterator[Phone]:
    """Switch a phone on; only inside."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/data"], check=True)
    Path("/data/local/tmp").mkdir(parents=True)
    adb("start-server")
    made = Phone(folder)
    made.switch_on()
    yield made
