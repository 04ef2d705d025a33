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


class FakeAgent(CommandAgent):
    """Loads for half a second, and calls for another."""

    def install(self):
        self._command = ("sh", "-c", f"sleep 1; echo '{json.dumps(ANSWER)}'", "sh")


@pytest.fixture
def board(tmp_path, monkeypatch):
    """A host that looks like a Jetson; the power of its module rises once calls begin."""
    script = tmp_path / "bin" / "tegrastats"
    script.parent.mkdir()
    script.write_text(
        f'#!{sys.executable}\nimport sys, time\nlog, start = open(sys.argv[4], "a"), time.monotonic()\n'
        "while True:\n"
        f"    power = {LOADING} if time.monotonic() - start < 0.45 else {CALLING}\n"
        '    print(f"RAM 10/20MB VDD_IN {power}mW/{power}mW", file=log, flush=True)\n'
        "    time.sleep(0.1)\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setitem(devices.agent.AGENTS, "native", FakeAgent)
    (tmp_path / "model.pte").write_bytes(b"")
    return tmp_path


def test_joules_are_those_of_the_calls_alone(board):
    with connect("host") as device:
        assert device.kind == "jetson"
        found = joules_a_call(device, {"a": Job(board / "model.pte"), "b": Job(board / "model.pte")})
    # Eight watts for a tenth of a second each; a busy machine may start the meter late.
    assert found == {"a": pytest.approx(0.8, rel=0.3), "b": pytest.approx(0.8, rel=0.3)}


def test_a_meter_that_tells_nothing(board):
    (board / "bin" / "tegrastats").write_text('#!/bin/sh\ntouch "$4"\n')
    with connect("host") as device, pytest.raises(DeviceError, match="0 samples of power"):
        joules_a_call(device, {"a": Job(board / "model.pte")})


def test_only_a_jetson_has_a_meter(tmp_path):
    with connect("host") as device, pytest.raises(DeviceError, match="host is no Jetson"):
        joules_a_call(device, {"a": Job(tmp_path / "model.pte")})
