"""The C++ and the Python agent on this machine, with real programs."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from threading import Barrier
from typing import Any

import agent_programs
import pytest
import torch
from fake_programs import fake_programs
from transport_contract import running, until

from devices.agent import AgentError, Answer, Job, NativeAgent, PythonAgent, build, native, python_agent
from devices.agent.etdump import attribute
from devices.agent.remote import CommandAgent
from devices.errors import DeviceError, DeviceTimeout
from devices.transports import Completed, HostTransport

TIMEOUT = 300
AGENTS = ("cpp", "python")


class InProcess(HostTransport):
    """This machine; but the Python agent runs in this process, where torch is imported already."""

    def run(self, command: Sequence[str], **options: Any) -> Completed:
        if len(command) < 2 or not command[1].endswith("/python_agent.py"):
            return super().run(command, **options)
        printed, cores = io.StringIO(), os.sched_getaffinity(0)
        try:
            with redirect_stdout(printed):
                code = python_agent.main(command[2:])
        finally:
            os.sched_setaffinity(0, cores)
        return Completed(code, printed.getvalue(), "")


@pytest.fixture(scope="module", params=AGENTS)
def agent(request: pytest.FixtureRequest) -> Iterator[CommandAgent]:
    with installed(request.param) as made:
        yield made


@contextmanager
def installed(name: str) -> Iterator[CommandAgent]:
    if name == "cpp" and shutil.which("g++") is None:
        pytest.skip("no g++ here (Debian: apt-get install g++)")
    transport = InProcess()
    with transport.workspace() as folder:
        made = (
            NativeAgent(transport, folder) if name == "cpp" else PythonAgent(transport, folder, python=sys.executable)
        )
        made.install()
        yield made


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    for name in ("mixed", "shared", "narrow"):
        agent_programs.write_program(folder, name)
    (folder / "mixed.bin").write_bytes(agent_programs.raw(agent_programs.mixed_inputs()))
    return folder


def sums(answer: Answer) -> list[tuple[tuple[int, ...], float, float]]:
    return [(output.shape, output.sum, output.abs) for output in answer.outputs]


def check_sums(answer: Answer, wanted: tuple[torch.Tensor, ...]) -> None:
    assert len(answer.outputs) == len(wanted)
    for output, tensor in zip(answer.outputs, wanted, strict=True):
        exact = tensor.double()
        assert output.shape == tuple(tensor.shape)
        assert output.abs == pytest.approx(exact.abs().sum().item(), rel=1e-5)
        assert output.sum == pytest.approx(exact.sum().item(), rel=1e-5, abs=1e-5 * output.abs)


def made_up(count: int) -> torch.Tensor:
    """What agents put into floats: stated here again, number by number."""
    state, values = 12345, []
    for _ in range(count):
        state = (state * 1664525 + 1013904223) % 2**32
        values.append((state >> 8) / 2**23 - 1)
    return torch.tensor(values)


@pytest.mark.slow
def test_an_answer(agent, programs):
    job = Job(programs / "mixed.pte", inputs=programs / "mixed.bin", warmup=3, iterations=20)
    answer = agent.run(job, timeout=TIMEOUT)
    assert answer.runtime == "executorch 1.5.1" and answer.method == "forward" and answer.threads == 1
    assert len(answer.wall_ms) == len(answer.beat_ms) - 1 == 20
    assert all(0 < beat < 100 for beat in answer.beat_ms)
    assert 0 < sum(answer.wall_ms) <= answer.total_ms
    assert answer.load_ms > 0 and answer.first_ms > 0 and answer.peak_rss_kb > 1000 and answer.etdump_bytes == 0
    check_sums(answer, agent_programs.mixed()(*agent_programs.mixed_inputs()))


@pytest.mark.slow
def test_both_agents_compute_the_same(programs):
    for job in (
        Job(programs / "mixed.pte", method="again", inputs=programs / "mixed.bin"),
        Job(programs / "mixed.pte"),
        Job(programs / "narrow.pte"),
        Job(programs / "shared.pte", method="write"),
    ):
        found = []
        for name in AGENTS:
            with installed(name) as one:
                answer = one.run(job, timeout=TIMEOUT)
                assert answer.agent == name
                found.append(sums(answer))
        for (shape, total, size), (other_shape, other_total, other_size) in zip(*found, strict=True):
            assert shape == other_shape and size > 0
            assert size == pytest.approx(other_size, rel=1e-9) and total == pytest.approx(other_total, abs=1e-9 * size)


@pytest.mark.slow
def test_inputs_that_are_made_up(agent, programs):
    x = made_up(agent_programs.TOKENS * agent_programs.WIDTH).reshape(1, agent_programs.TOKENS, agent_programs.WIDTH)
    ids = torch.zeros(1, agent_programs.TOKENS, dtype=torch.int64)
    check_sums(agent.run(Job(programs / "mixed.pte"), timeout=TIMEOUT), agent_programs.mixed()(x, ids))


@pytest.mark.slow
def test_inputs_of_other_dtypes(agent, programs, tmp_path):
    values = made_up(12)
    half, double = values[:6].half(), values[6:].double()
    zeros = torch.zeros(6, dtype=torch.int16), torch.zeros(6, dtype=torch.bool)
    check_sums(agent.run(Job(programs / "narrow.pte"), timeout=TIMEOUT), agent_programs.Narrow()(half, double, *zeros))
    given = (torch.arange(6).half(), torch.arange(6).double() / 7, torch.arange(6).short() - 9, torch.arange(6) > 2)
    (tmp_path / "given.bin").write_bytes(agent_programs.raw(given))
    job = Job(programs / "narrow.pte", inputs=tmp_path / "given.bin")
    check_sums(agent.run(job, timeout=TIMEOUT), agent_programs.Narrow()(*given))


@pytest.mark.slow
def test_methods_that_share_a_buffer(agent, programs):
    """`read` counts its calls in the memory that `write` writes to; the outputs are those of the first."""
    (written,) = agent.run(Job(programs / "shared.pte", method="write"), timeout=TIMEOUT).outputs
    assert written.sum == pytest.approx(made_up(agent_programs.WIDTH).sum().item(), rel=1e-5)
    for warmup, iterations in ((0, 1), (5, 9)):
        job = Job(programs / "shared.pte", method="read", warmup=warmup, iterations=iterations)
        check_sums(agent.run(job, timeout=TIMEOUT), (made_up(agent_programs.WIDTH)[None],))


@pytest.mark.slow
def test_without_a_warm_up_the_first_call_counts(agent, programs):
    answer = agent.run(Job(programs / "mixed.pte", warmup=0, iterations=4), timeout=TIMEOUT)
    assert answer.first_ms == answer.wall_ms[0] and len(answer.wall_ms) == 4


@pytest.mark.slow
def test_calls_go_on_for_a_while(agent, programs):
    answer = agent.run(Job(programs / "mixed.pte", iterations=1, min_seconds=0.2), timeout=TIMEOUT)
    assert 200 <= sum(answer.wall_ms) <= answer.total_ms and len(answer.wall_ms) > 10
    answer = agent.run(Job(programs / "mixed.pte", iterations=1), timeout=TIMEOUT)
    assert len(answer.wall_ms) == 1


@pytest.mark.slow
def test_threads_and_cores(agent, programs):
    answer = agent.run(Job(programs / "mixed.pte", threads=2, cpus=(0,)), timeout=TIMEOUT)
    assert answer.threads == 2
    with pytest.raises(AgentError, match="bound to cores '0,1000'"):
        agent.run(Job(programs / "mixed.pte", cpus=(0, 1000)), timeout=TIMEOUT)


@pytest.mark.slow
def test_a_trace(agent, programs, tmp_path):
    answer = agent.run(Job(programs / "mixed.pte", iterations=5, etdump=True), timeout=TIMEOUT)
    trace = tmp_path / "trace.etdp"
    agent.pull_etdump(trace)
    assert trace.stat().st_size == answer.etdump_bytes > 0
    parts = attribute(trace)
    assert [part.kind for part in parts].count("delegated") >= 2 and parts[-1].kind == "rest"
    assert {"embedding.out", "mul.out"} <= {part.name for part in parts if part.kind == "portable"}
    assert all(part.ms >= 0 for part in parts) and sum(part.ms for part in parts) > 0
    for damaged in (trace.read_bytes()[:-1], bytes(100), b""):
        trace.write_bytes(damaged)
        with pytest.raises(DeviceError, match="no whole ETDump"):
            attribute(trace)
    with pytest.raises(DeviceError, match="missing"):
        attribute(tmp_path / "missing")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"program": Path("missing.pte")}, "missing.pte"),
        ({"inputs": Path("missing.bin")}, "missing.bin"),
        ({"method": "decode"}, "no method 'decode'; there are: again, forward"),
        ({"method": 'a"b\\c\nd\x01é'}, "there are: again, forward"),
        ({"method": "--threads=7"}, "there are: again, forward"),
        ({"inputs": Path("mixed.pte")}, r"have \d+ bytes; method 'forward' takes 1088"),
        ({"program": Path("mixed.bin")}, "mixed.bin: program .* (cannot be loaded|is no ExecuTorch program)"),
        ({"program": Path("cut.pte")}, "cut.pte: program .* cannot be loaded"),
        ({"program": Path("damaged.pte")}, "damaged.pte: program .* cannot be loaded"),
        ({"iterations": 0}, "iterations.*'0' is no"),
        ({"iterations": 10**7}, "iterations.*'10000000' is no"),
        ({"threads": 0}, "threads.*'0' is no"),
        ({"min_seconds": float("nan")}, "min-seconds.*'nan' is no"),
        ({"cpus": (-1,)}, "cpus.*'-1' is no"),
    ],
)
def test_what_cannot_be_timed(agent, programs, change, named):
    whole = (programs / "mixed.pte").read_bytes()
    (programs / "cut.pte").write_bytes(whole[: len(whole) // 3])
    (programs / "damaged.pte").write_bytes(whole[:64] + bytes(255 - byte for byte in whole[64:]))
    fields = {"program": programs / "mixed.pte"} | {
        name: programs / value if isinstance(value, Path) else value for name, value in change.items()
    }
    with pytest.raises(DeviceError, match=named) as error:
        agent.run(Job(**fields), timeout=TIMEOUT)
    assert len(str(error.value)) < 300


@pytest.mark.slow
def test_a_job_that_takes_too_long_leaves_nothing(programs):
    with installed("cpp") as agent, pytest.raises(DeviceTimeout):
        agent.run(Job(programs / "mixed.pte", min_seconds=5000.25), timeout=1)
    until(lambda: not running("--min-seconds=5000.25"))


@pytest.mark.slow
def test_the_python_agent_in_a_process_of_its_own(programs):
    transport = HostTransport()
    with transport.workspace() as folder:
        agent = PythonAgent(transport, folder)
        agent.install()
        answer = agent.run(Job(programs / "mixed.pte", inputs=programs / "mixed.bin"), timeout=TIMEOUT)
        check_sums(answer, agent_programs.mixed()(*agent_programs.mixed_inputs()))
        with pytest.raises(AgentError, match="there are: again, forward"):
            agent.run(Job(programs / "mixed.pte", method="decode"), timeout=TIMEOUT)


@pytest.mark.slow
def test_a_program_is_forgotten(agent, programs, tmp_path):
    program = tmp_path / "mixed.pte"
    shutil.copyfile(programs / "mixed.pte", program)
    agent.run(Job(program), timeout=TIMEOUT)
    agent.forget(program)
    agent.forget(program)
    assert agent.run(Job(program), timeout=TIMEOUT)


class Answering(HostTransport):
    """This machine, but for what one command answers."""

    def __init__(self, command: str, answer: Completed) -> None:
        super().__init__()
        self._command, self._answer = command, answer

    def run(self, command: Any, **options: Any) -> Completed:
        return self._answer if command[0] == self._command else super().run(command, **options)


@pytest.mark.parametrize("machine", ["riscv64", "armv7l", "", "x" * 1000])
def test_a_processor_that_no_agent_exists_for(machine, tmp_path):
    transport = Answering("uname", Completed(0, f"{machine}\n", ""))
    with pytest.raises(DeviceError, match=f"host has a processor .* '{machine[:40]}'; it exists for x86_64, aarch64"):
        NativeAgent(transport, str(tmp_path)).install()
    with pytest.raises(DeviceError, match="accepted: x86_64, aarch64"):
        build.build(machine)


@pytest.mark.slow
def test_an_agent_for_another_processor(tmp_path, monkeypatch):
    """As where `uname` says one thing, and what runs programs another."""
    foreign = tmp_path / "built"
    shutil.copytree(build.build(), foreign)
    for path in (foreign / build.EXECUTABLE, *foreign.glob(f"{build.SYSTEM}/ld-*")):
        content = bytearray(path.read_bytes())
        content[18:20] = struct.pack("<H", 22)  # e_machine: S/390
        path.write_bytes(content)
    monkeypatch.setattr(native, "build", lambda machine, *, cache: foreign)
    transport = HostTransport()
    with transport.workspace() as folder, pytest.raises(DeviceError, match="does not run on host.*Exec format error"):
        NativeAgent(transport, folder).install()


@pytest.mark.slow
def test_a_device_with_other_libraries(programs, monkeypatch, tmp_path):
    """What starts the agent is not there, as on Android: it runs with the libraries that were brought along."""
    folder = tmp_path / "built"
    shutil.copytree(build.build(), folder)
    content = (folder / build.EXECUTABLE).read_bytes()
    start = content.index(b"/lib")  # the loader's path, which is also the longest string of its section
    end = content.index(b"\0", start)
    (folder / build.EXECUTABLE).write_bytes(content[:start] + b"/no".ljust(end - start, b"!") + content[end:])
    monkeypatch.setattr(native, "build", lambda machine, *, cache: folder)
    transport = HostTransport()
    with transport.workspace() as place:
        agent = NativeAgent(transport, place)
        agent.install()
        answer = agent.run(Job(programs / "mixed.pte", inputs=programs / "mixed.bin"), timeout=TIMEOUT)
    check_sums(answer, agent_programs.mixed()(*agent_programs.mixed_inputs()))


@pytest.mark.parametrize("script", ["exit 127", 'echo \'{"schema": 1, "error": "nothing here"}\'; exit 3', "echo [1]"])
def test_a_board_without_a_fitting_python(script, tmp_path, monkeypatch):
    fake_programs(tmp_path / "bin", monkeypatch)("python9", script)
    with pytest.raises(DeviceError, match="'python9' on host .*a Python with executorch and torch is needed there"):
        PythonAgent(HostTransport(), str(tmp_path), python="python9").install()


# ---- building ----


@pytest.mark.slow
def test_a_build_is_kept(monkeypatch):
    folder = build.build()
    assert {path.name for path in folder.iterdir()} >= {"agent", "system", "libexecutorch.so"}
    called = []
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **kw: called.append(command) or real(command, **kw))
    assert build.build() == folder
    assert [command for command in called if "-o" in command] == []


@pytest.mark.slow
def test_a_build_says_what_it_needs():
    needed = build.requirements(build.build())
    assert {"GLIBC", "GLIBCXX"} <= needed.keys()
    assert (2, 17) <= tuple(map(int, needed["GLIBC"].split("."))) < (3,)


@pytest.mark.slow
def test_the_source_compiles_without_warnings(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-Werror"))
    assert build.build(cache=tmp_path).parent == tmp_path


def test_two_at_once_make_one_folder(tmp_path):
    meet = Barrier(2, timeout=60)

    def make(folder: Path) -> None:
        (folder / "file").write_text("content")
        meet.wait()  # neither has moved its folder in place

    with ThreadPoolExecutor() as pool:
        made = [job.result() for job in [pool.submit(build._once, tmp_path / "target", make) for _ in range(2)]]
    assert made == [tmp_path / "target"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target" / "file").read_text() == "content"


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise DeviceError("no")

    with pytest.raises(DeviceError, match="no"):
        build._once(tmp_path / "target", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DeviceError, match="cannot be written"):
        build._once(tmp_path / "file" / "target", lambda folder: None)


def test_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for machine, compiler in (("x86_64", "x86-64"), ("aarch64", "aarch64")):
        with pytest.raises(
            DeviceError, match=rf"needs the compiler .*g\+\+'.*package g\+\+(-{compiler}-linux-gnu)? has it"
        ):
            build.build(machine, cache=tmp_path)


def test_a_compiler_that_fails(tmp_path, monkeypatch):
    put = fake_programs(tmp_path / "bin", monkeypatch)
    put("g++", 'case "$1" in --version) echo 1.0;; *) echo "agent.cpp:7: error: no such thing" >&2; exit 1;; esac')
    monkeypatch.setattr(build, "_is_native", lambda machine: True)
    with pytest.raises(DeviceError, match=r"'g\+\+' failed with 1: agent.cpp:7: error: no such thing"):
        build.build(cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_network(tmp_path, monkeypatch):
    put = fake_programs(tmp_path / "bin", monkeypatch)
    for machine in build.MACHINES:
        put(f"{machine}-linux-gnu-g++", "echo 1.0")
    monkeypatch.setattr(build, "_is_native", lambda machine: False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DeviceError, match="wheel of executorch 1.5.1 for aarch64 cannot be downloaded") as error:
        build.build("aarch64", cache=tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_the_script_stands_alone():
    """It goes to a board that has nothing of ours."""
    script = Path(build.__file__).with_name("python_agent.py")
    code = f"import sys, runpy; sys.modules['devices'] = None; runpy.run_path({str(script)!r})"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
