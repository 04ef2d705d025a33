"""Where the time of a call goes: real traces of real programs, and what they are summed to."""

import json
from dataclasses import replace
from pathlib import Path

import agent_programs
import pytest

from devices.__main__ import main
from devices.agent.etdump import Part, attribute
from devices.measuring import PRESETS
from devices.tracing import Share, shares


def test_parts_of_one_name_are_one_row():
    parts = [
        Part("delegated", "gemm #1", 0, 1.0),
        Part("portable", "gemm", 1, 0.5),
        Part("delegated", "gemm #12", 2, 2.0),
    ]
    assert shares([*parts, Part("rest", "rest", -1, 0.5)]) == [
        Share("delegated", "gemm", 2, 3.0, 0.75),
        Share("portable", "gemm", 1, 0.5, 0.125),
        Share("rest", "rest", 1, 0.5, 0.125),
    ]
    assert shares([]) == [] and shares([Part("rest", "rest", -1, 0.0)])[0].share == 0.0


@pytest.mark.slow
def test_traces_of_a_program(tmp_path, capsys, monkeypatch):
    """Of each method one, kept as a file; the table names what was not delegated."""
    # How long calls take is of no interest here, and a busy machine would be waited for.
    monkeypatch.setitem(PRESETS, "quick", replace(PRESETS["quick"], rounds=1, min_seconds=0.01, patience=0.1))
    program = agent_programs.write_program(tmp_path, "mixed")
    arguments = ["run", str(program), "--trace", str(tmp_path / "traces")]
    assert main([*arguments, "--json"]) == 0
    traces = json.loads(capsys.readouterr().out)["traces"]
    assert list(traces) == [f"{program}:{method}" for method in ("again", "forward")]
    for trace in traces.values():
        assert [part["name"] for part in trace["parts"]] == [part.name for part in attribute(Path(trace["file"]))]
    assert [path.name for path in sorted((tmp_path / "traces").iterdir())] == [
        "01-mixed-again.etdp",
        "02-mixed-forward.etdp",
    ]
    assert main([*arguments, "--method", "forward"]) == 0
    printed = capsys.readouterr().out
    assert "embedding.out" in printed and "delegated" in printed and "rest" in printed


def test_a_file_where_traces_should_go(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["run", str(tmp_path / "model.pte"), "--trace", str(tmp_path / "file")]) == 2
    assert "is a file; give a folder" in capsys.readouterr().err


def test_an_agent_without_traces(tmp_path, capsys):
    """Said before anything is timed."""
    (tmp_path / "model.onnx").write_bytes(b"")
    assert main(["run", str(tmp_path / "model.onnx"), "--agent", "trtexec", "--trace", str(tmp_path / "traces")]) == 2
    assert "agent 'trtexec' writes no traces" in capsys.readouterr().err
    assert not (tmp_path / "traces").exists()
