"""Devices by their addresses, and what they say of themselves."""

from __future__ import annotations

import subprocess
import sys

import pytest

import devices
from devices.errors import DeviceAbsent, DeviceGone
from devices.memory import peak_memory_mb, resident_memory_mb
from devices.transports import Completed


class Talker:
    """A transport whose commands answer with a fixed text."""

    def __init__(self, stdout: str, *, stderr: str = "", exit_code: int = 0) -> None:
        self.done = Completed(exit_code, stdout, stderr)

    def run(self, command, **options):
        return self.done

    def close(self) -> None:
        pass


def test_this_machine():
    with devices.connect("host") as device:
        info = device.info()
    assert info.address == "host" and info.cores >= 1 and info.cpu and info.machine and info.memory_mb > 100
    assert device.kind == "linux"
    assert "kind" in device.conditions()


def test_a_device_that_is_not_there_is_told_from_one_that_goes(monkeypatch):
    absent = Talker("")
    monkeypatch.setattr(absent, "run", lambda command, **options: (_ for _ in ()).throw(DeviceGone("ssh://x is off.")))
    with pytest.raises(DeviceAbsent, match="ssh://x is off"):
        devices.Device("ssh://x", transport=absent).info()


def test_cores_are_the_machines(monkeypatch):
    """Whatever threads this process may use, and after any update: a profile is taken up again on the same device."""
    with devices.connect("host") as device:
        before = device.info()
    monkeypatch.setenv("OMP_NUM_THREADS", str(before.cores + 1))
    with devices.connect("host") as device:
        assert list(before.unlike(device.info())) == []
    booted = before.model_copy(update={"system": "Linux 99", "memory_mb": before.memory_mb - 1})
    assert list(before.unlike(booted)) == []
    other = before.model_copy(update={"cpu": "another"})
    assert list(before.unlike(other)) == [("cpu", before.cpu, "another")]


def test_a_phone_and_a_board_are_told_by_what_they_have():
    phone = devices.Device(
        "adb://X",
        transport=Talker("machine\taarch64\nsystem\tLinux 5.10\ncores\t8\nandroid\tyes\nmodel\tAcme One\nsoc\tT1000\n"),
    )
    assert phone.kind == "android" and phone.info().name == "Acme One" and phone.info().cpu == "T1000"
    board = devices.Device("ssh://x", transport=Talker("machine\taarch64\nboard\tNVIDIA Jetson Orin\njetson\tyes\n"))
    assert board.kind == "jetson" and board.info().name == "NVIDIA Jetson Orin" and board.info().cores is None


@pytest.mark.parametrize("said", ["", "garbage", "\x00\xff" * 100, "cores\t4\n"])
def test_what_runs_no_commands_is_no_device(said):
    with pytest.raises(devices.DeviceError, match="ssh://x runs no commands"):
        devices.Device("ssh://x", transport=Talker(said, stderr="not a shell", exit_code=1)).info()


def test_long_and_odd_answers_are_cut():
    said = f"machine\t{'a' * 5000}\nmodel\t{'b' * 5000}\nandroid\tyes\ncores\tmany\nmemory\t-5\n"
    info = devices.Device("adb://X", transport=Talker(said)).info()
    assert len(info.machine) <= 64 and len(info.name) <= 256 and info.cores is None and info.memory_mb is None


@pytest.mark.parametrize("address", ["", "localhost", "http://x", "moon", "ssh://-oProxyCommand=x", "adb://a b"])
def test_other_addresses_are_refused(address):
    with pytest.raises(devices.DeviceError, match="accepted|SERIAL|host"):
        devices.connect(address)


def test_memory_of_this_process():
    assert 0 < resident_memory_mb() <= peak_memory_mb() + 1


def test_names_of_the_package_are_all_there():
    for name in devices.__all__:
        assert getattr(devices, name) is not None
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = devices.nothing


def test_reaching_a_device_brings_no_pruner_along():
    script = "import sys, devices.device; print([m for m in sys.modules if m.split('.')[0] in ('comp_edge', 'torch')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
