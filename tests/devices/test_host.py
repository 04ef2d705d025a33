"""This machine as a device, and the command line's bad input."""

import json

import pytest

import devices
from devices.__main__ import main
from devices.host import peak_memory_mb, resident_memory_mb


def test_host_info():
    info = devices.connect("host").info()
    assert info.name == "host" and info.cores >= 1 and info.cpu


def test_memory_of_this_process():
    assert 0 < resident_memory_mb() <= peak_memory_mb() + 1


@pytest.mark.parametrize("target", ["", "localhost", "adb://SERIAL"])
def test_other_addresses_are_refused(target):
    with pytest.raises(devices.DeviceError, match="accepted: host"):
        devices.connect(target)


def test_list_prints_json(capsys):
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"][0]["name"] == "host"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "missing.pte"], "missing.pte"),
        (["run", "missing.pte", "--device", "moon"], "moon"),
        (["run", "missing.pte", "--threads", "0"], "--threads 0"),
    ],
)
def test_bad_input_is_one_sentence(arguments, named, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert named in err and err.count("\n") == 1 and not out


def test_what_is_no_program(tmp_path, capfd):
    path = tmp_path / "model.pte"
    path.write_bytes(b"not a program" * 100)
    assert main(["run", str(path)]) == 2
    assert "model.pte" in capfd.readouterr().err
