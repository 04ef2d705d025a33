"""`python -m devices`: exit codes, signals, and what is timed under which clocks."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import devices.commands
import devices.conditions
import devices.device
import devices.metering
import devices.sitting
import devices.tracing
from comp_edge.cli import common
from devices.__main__ import main
from devices.agent.protocol import Job
from devices.errors import DeviceAbsent, DeviceError, DeviceGone, DeviceTimeout
from tests.devices.simulated import ANCHOR, SimulatedAgent, SimulatedDevice


@pytest.mark.parametrize(
    ("error", "code"),
    [(DeviceGone, 1), (DeviceTimeout, 1), (DeviceAbsent, 2), (DeviceError, 2), (KeyboardInterrupt, 130)],
)
def test_exit_codes(error, code, monkeypatch, capsys):
    """1 where a device fails in the middle, 2 where it was never there or what was given is wrong."""

    def run(arguments):
        raise error("unplugged.")

    monkeypatch.setattr(devices.commands.ListCommand, "run", run)
    assert main(["list"]) == code
    assert "Traceback" not in capsys.readouterr().err


@pytest.fixture
def default_signals():
    before = {one: signal.signal(one, signal.SIG_DFL) for one in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_kill_ends_every_command_as_ctrl_c_does(number, default_signals):
    """Also `comp-edge prune --device`: what was changed on a device is put back."""
    put_back = []

    def command():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            put_back.append(True)

    assert common.run(command, name="test") == common.INTERRUPTED and put_back
    assert signal.getsignal(number) is signal.SIG_DFL


def test_what_is_ignored_stays_so(default_signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by `nohup`
    assert common.run(lambda: os.kill(os.getpid(), signal.SIGHUP), name="test") == 0
    codes = []
    thread = threading.Thread(target=lambda: codes.append(common.run(lambda: 7, name="test")))
    thread.start()
    thread.join()
    assert codes == [7], "another thread may set no handlers"


@pytest.fixture
def formula(monkeypatch):
    """A device for `run` whose clocks note when they were fixed; `done` is what happened."""
    device, done = SimulatedDevice(SimulatedAgent(lambda job, number: 4.0)), []
    device._agent.form = "onnx"

    @contextmanager
    def connect(address):
        yield device

    @contextmanager
    def fixed_clocks(transport, kind):
        done.append("fix")
        yield
        done.append("put back")

    def joules_a_call(device, jobs, *, agent):
        done.append("energy")
        return dict.fromkeys(jobs, 0.5)

    monkeypatch.setattr(devices.device, "connect", connect)
    monkeypatch.setattr(devices.conditions, "fixed_clocks", fixed_clocks)
    monkeypatch.setattr(devices.metering, "check_meter", lambda device: None)
    monkeypatch.setattr(devices.metering, "joules_a_call", joules_a_call)
    monkeypatch.setattr(devices.sitting, "write_anchor", lambda folder, **options: Job(Path(ANCHOR)))
    return done


def test_energy_is_taken_at_the_clocks_that_times_were(formula, tmp_path, capsys):
    (tmp_path / "prefill.onnx").touch()
    arguments = ["run", str(tmp_path / "prefill.onnx"), "--agent", "trtexec", "--set-clocks", "--energy"]
    assert main(arguments) == 0
    assert formula == ["fix", "energy", "put back"]
    assert "prefill" in capsys.readouterr().out, "an ONNX program has one method, named as the file is"


def test_names_are_no_markup(formula, tmp_path, capsys):
    """A serial or a file may be called anything."""
    names = ["a[int8].onnx", "b[red].onnx"]
    for name in names:
        (tmp_path / name).touch()
    assert main(["run", *(str(tmp_path / name) for name in names), "--agent", "trtexec"]) == 0
    printed = "".join(part.strip("│┃ \n") for part in capsys.readouterr().out)
    assert "[int8]" in printed and "[red]" in printed
    devices.commands._warn(["[/x] is no tag"])
    assert "[/x] is no tag" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "agent", "content", "said"),
    [
        ("model.pte", "trtexec", b"", "takes .onnx files"),
        ("model.onnx", "native", b"", "takes .pte files"),
        ("model.pte", "native", b"\x08\x00\x00\x00FL12 what looks like it", "is no ExecuTorch program"),
        ("model.pte", "native", b"", "is no ExecuTorch program"),
        ("model.pte", "mine", b"", "unknown agent 'mine'; accepted: native, python, trtexec"),
    ],
)
def test_programs_that_are_none_for_an_agent(tmp_path, capsys, name, agent, content, said):
    (tmp_path / name).write_bytes(content)
    assert main(["run", str(tmp_path / name), "--agent", agent]) == 2
    assert said in capsys.readouterr().err
