"""Energy a call, with a tegrastats that is a script and an agent that only takes its time."""

import json
import os
import stat
import sys

import pytest

import devices.agent
from devices.agent.protocol import Job
from devices.agent.remote import CommandAgent
from devices.device import connect
from devices.errors import DeviceError
from devices.metering import joules_a_call

LOADING = 2000  # milliwatts before the calls
CALLING = 8000  # and while they go on
ANSWER = {
    "schema": 1, "agent": "fake", "runtime": "none", "method": "forward", "threads": 1, "load_ms": 1.0, "first_ms": 1.0,
    "wall_ms": [100.0] * 5, "total_ms": 500.0,
}  # fmt: skip


# Loads until the meter was read three times, and calls until it was read eight times more: however late the meter begins.
AGENT = """
cd "$1"; rm -f calling; : > readings
until [ "$(grep -c . readings)" -ge 3 ]; do sleep 0.05; done
touch calling
until [ "$(grep -c CALLING readings)" -ge 8 ]; do sleep 0.05; done
""".replace("CALLING", str(CALLING))


@pytest.fixture
def board(tmp_path, monkeypatch):
    """A host that looks like a Jetson; the power of its module rises once calls begin."""
    script = tmp_path / "bin" / "tegrastats"
    script.parent.mkdir()
    script.write_text(
        f'#!{sys.executable}\nimport os, sys, time\nlog = open(sys.argv[4], "a")\n'
        "while True:\n"
        f"    power = {CALLING} if os.path.exists({str(tmp_path / 'calling')!r}) else {LOADING}\n"
        '    print(f"RAM 10/20MB VDD_IN {power}mW/{power}mW", file=log, flush=True)\n'
        f"    print(power, file=open({str(tmp_path / 'readings')!r}, 'a'))\n"
        "    time.sleep(0.1)\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")

    class FakeAgent(CommandAgent):
        def install(self):
            self._command = ("sh", "-c", f"{AGENT}echo '{json.dumps(ANSWER)}'", "sh", str(tmp_path))

    monkeypatch.setitem(devices.agent.AGENTS, "native", FakeAgent)
    (tmp_path / "model.pte").write_bytes(b"")
    return tmp_path


def test_joules_are_those_of_the_calls_alone(board):
    with connect("host") as device:
        assert device.kind == "jetson"
        found = joules_a_call(device, {"a": Job(board / "model.pte"), "b": Job(board / "model.pte")})
    assert found == {"a": pytest.approx(0.8), "b": pytest.approx(0.8)}, "eight watts for a tenth of a second"


def test_a_meter_that_tells_nothing(board):
    (board / "bin" / "tegrastats").write_text(
        f'#!/bin/sh\ntouch "$4"; while sleep 0.05; do echo {CALLING} >> {board}/readings; done\n'
    )
    with connect("host") as device, pytest.raises(DeviceError, match="0 samples of power"):
        joules_a_call(device, {"a": Job(board / "model.pte")})


def test_only_a_jetson_has_a_meter(tmp_path):
    with connect("host") as device, pytest.raises(DeviceError, match="host is no Jetson"):
        joules_a_call(device, {"a": Job(tmp_path / "model.pte")})
