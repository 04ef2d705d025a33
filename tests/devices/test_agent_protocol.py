"""What an agent may print, and what is made of it: nothing that a device says is believed without a check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.agent.protocol import AgentError, Answer, Job, parse_answer
from devices.agent.remote import CommandAgent, RemoteFiles
from devices.errors import DeviceError, DeviceTimeout
from devices.transports import HostTransport

JOB = Job(Path("model.pte"), method="decode", threads=2)
GOOD: dict[str, Any] = {
    "schema": 1,
    "agent": "cpp",
    "runtime": "executorch 1.5.1",
    "method": "decode",
    "threads": 2,
    "load_ms": 12.5,
    "first_ms": 3.0,
    "total_ms": 6.2,
    "peak_rss_kb": 1000,
    "outputs": [{"shape": [1, 8], "sum": -1.5, "abs": 8.25}],
    "etdump_bytes": 0,
    "wall_ms": [2.0, 2.1, 1.9],
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


def parse(stdout: str) -> Answer:
    return parse_answer(stdout, job=JOB, where="somewhere")


def test_the_answer_is_on_the_last_line():
    answer = parse(f"loading\n{{}}\n{json.dumps(GOOD)}\n\n")
    assert answer.wall_ms == (2.0, 2.1, 1.9) and answer.outputs[0].shape == (1, 8)


@pytest.mark.parametrize("missing", [{"peak_rss_kb": None}, {"outputs": []}])
def test_what_a_device_need_not_know(missing):
    assert parse(json.dumps(GOOD | missing))


def test_an_output_may_be_no_number():
    """A model of random weights may well overflow; that is no reason not to time it."""
    outputs = [{"shape": [], "sum": float("nan"), "abs": float("inf")}]
    assert parse(json.dumps(GOOD | {"outputs": outputs})).outputs[0].abs == float("inf")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"method": "prefill"}, "'prefill' with 2 threads; asked were 'decode' and 2"),
        ({"threads": 1}, "'decode' with 1 threads; asked were 'decode' and 2"),
        ({"schema": 2}, "no answer"),
        ({"wall_ms": []}, "no answer"),
        ({"wall_ms": [2.0, -2.0]}, "no answer"),
        ({"wall_ms": [2.0, 1e300, 2.0]}, "no answer"),
        ({"wall_ms": [2.0, float("nan"), 2.0]}, "no answer"),
        ({"wall_ms": [2.0, float("inf"), 2.0]}, "no answer"),
        ({"wall_ms": [2.0, "2.0 s"]}, "no answer"),
        ({"beat_ms": [1.0]}, "3 wall times but 1 beats around them"),
        ({"total_ms": float("nan")}, "no answer"),
        ({"total_ms": -1}, "no answer"),
        ({"load_ms": None}, "no answer"),
        ({"threads": 10**30}, "no answer"),
        ({"peak_rss_kb": -5}, "no answer"),
        ({"outputs": [{"shape": [-1], "sum": 0, "abs": 0}]}, "no answer"),
        ({"agent": "x" * 100}, "no answer"),
        ({"surprise": 1}, "no answer"),
    ],
)
def test_what_is_no_answer_to_this_job(change, named):
    with pytest.raises(DeviceError, match="somewhere") as error:
        parse(json.dumps(GOOD | change))
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_clock_that_lies():
    """Single calls that add up to more than all of them took together."""
    samples = [2.0] * 1000
    answer = GOOD | {"wall_ms": samples}
    assert parse(json.dumps(answer | {"total_ms": 2003.0}))
    with pytest.raises(DeviceError, match="calls of 2000.0 ms in all were made in 1500.0 ms"):
        parse(json.dumps(answer | {"total_ms": 1500.0}))


def test_a_clock_that_stands_still():
    answer = GOOD | {"wall_ms": [0.001] * 1000}
    assert parse(json.dumps(answer | {"total_ms": 20.0}))
    with pytest.raises(DeviceError, match="calls of 1.0 ms in all took 4000.0 ms"):
        parse(json.dumps(answer | {"total_ms": 4000.0}))


def test_what_a_failure_says_cannot_move_the_terminal():
    with pytest.raises(AgentError) as error:
        parse(json.dumps({"schema": 1, "error": "\x1b[2Jgone\nreally"}))
    assert str(error.value).isprintable() and "gone" in str(error.value)


@pytest.mark.parametrize("stdout", ["", "\n \n"])
def test_an_agent_that_says_nothing(stdout):
    with pytest.raises(DeviceError, match="printed nothing"):
        parse(stdout)


def test_every_truncation_is_noticed():
    text = json.dumps(GOOD)
    for end in range(1, len(text)):
        with pytest.raises(DeviceError, match="no answer"):
            parse(text[:end])


def test_a_failure_is_passed_on():
    with pytest.raises(AgentError, match=r"model\.pte: there is no method 'x'; there are: y \(on somewhere\)"):
        parse('{"schema": 1, "error": "there is no method \'x\'; there are: y"}')


@pytest.mark.parametrize("failure", [{"error": "x" * 3000}, {"error": 5}, {"error": "x", "more": 1}, {"schema": 7}])
def test_a_failure_that_is_none(failure):
    with pytest.raises(DeviceError, match="no answer") as error:
        parse(json.dumps({"schema": 1, "error": "x"} | failure))
    assert not isinstance(error.value, AgentError)


@given(st.text() | JSON.map(json.dumps) | st.just("[" * 10**5))
def test_nonsense_is_an_error_of_ours(stdout):
    with pytest.raises(DeviceError):
        parse(stdout)


@given(st.sampled_from(sorted(GOOD)), JSON)
def test_a_field_that_holds_anything(name, value):
    """Either it is a whole and honest answer to the job, or an error of ours."""
    try:
        answer = parse(json.dumps(GOOD | {name: value}))
    except DeviceError:
        return
    assert (answer.method, answer.threads) == ("decode", 2)
    assert 0 <= sum(answer.wall_ms) <= answer.total_ms * 1.05 + 1


class ScriptAgent(CommandAgent):
    """An agent that is a line of shell."""

    script = ""

    def install(self) -> None:
        self._command = ("sh", "-c", self.script, "agent")


@pytest.fixture
def run_script(tmp_path):
    """Run a job whose agent is a script."""
    program = tmp_path / "model.pte"
    program.write_bytes(b"program")

    def run(script: str, *, timeout: float = 60) -> Answer:
        transport = HostTransport()
        with transport.workspace() as folder:
            agent = ScriptAgent(transport, folder)
            agent.script = script
            agent.install()
            return agent.run(Job(program, method="decode", threads=2), timeout=timeout)

    return run


def test_an_answer_goes_the_whole_way(run_script):
    assert run_script(f"echo noise; echo '{json.dumps(GOOD)}'") == parse(json.dumps(GOOD))


@pytest.mark.parametrize(
    ("script", "named"),
    [
        ("kill -SEGV $$", r"on host ended with 139 \(a fault in memory\) with 'model.pte'"),
        ("kill -ILL $$", r"ended with 132 \(an instruction that its processor does not have\)"),
        ("echo out of order >&2; exit 1", "ended with 1, saying 'out of order', with 'model.pte'"),
        ("exit 0", "printed nothing"),
        ("exit 3", "printed nothing"),
        ("head -c 100 /dev/urandom", "no answer"),
        ('echo \'{"schema": 1, "wall_ms": [1.0,\'', "no answer"),
        ("yes 1234567", "more on stdout"),
    ],
)
def test_agents_that_fail(script, named, run_script):
    with pytest.raises(DeviceError, match=named):
        run_script(script)


def test_an_agent_that_hangs(run_script):
    with pytest.raises(DeviceTimeout, match="longer than 1 s"):
        run_script("sleep 1000", timeout=1)


class Counting(HostTransport):
    """Counts what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []

    def offer(self, local: Path, remote: str) -> None:
        self.sent.append(local.name)
        super().offer(local, remote)


def test_files_are_sent_once_and_again_when_they_have_changed(tmp_path):
    first, other = (tmp_path / name for name in ("first", "other"))
    first.write_bytes(b"content")
    other.write_bytes(b"another")
    transport = Counting()
    with transport.workspace() as folder:
        files = RemoteFiles(transport, folder)
        before = files.send(first)
        assert before == files.send(first) != files.send(other)
        assert transport.sent == ["first", "other"]
        first.write_bytes(b"new content")
        after = files.send(first)
        assert Path(after).read_bytes() == b"new content" and after != before and not Path(before).exists()
        assert transport.sent == ["first", "other", "first"]
    assert first.read_bytes() == b"new content" and other.read_bytes() == b"another", "what is here stays"


def test_what_is_removed_is_sent_again(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    transport = Counting()
    with transport.workspace() as folder:
        files = RemoteFiles(transport, folder)
        assert files.remove(path) is None
        remote = files.send(path)
        assert files.remove(path) == remote and not Path(remote).exists()
        assert files.remove(path) is None
        assert Path(files.send(path)).read_bytes() == b"content"
        path.unlink()  # it is forgotten also when it has gone here
        files.remove(path)
        assert not Path(remote).exists()
        with pytest.raises(DeviceError, match="file"):
            files.send(path)
