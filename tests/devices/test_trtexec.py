"""ONNX programs against torch, and trtexec: its formats from fixtures, and the whole way with a stand-in for it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import agent_programs
import pytest
import torch
from fake_programs import fake_programs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from devices.agent import Job, TrtexecAgent
from devices.agent.onnx_export import stateless, write_onnx
from devices.agent.trtexec import Input, read_inputs
from devices.agent.trtexec_output import check_agreement, parse_log, parse_times, parse_version, reason_of
from devices.errors import DeviceError
from devices.transports import Completed, HostTransport

FIXTURES = Path(__file__).parent / "fixtures" / "trtexec"
FAKE = Path(__file__).with_name("fake_trtexec.py")
TIMEOUT = 300
TOLERANCE = 1e-4


def fixture(name: str) -> str:
    return (FIXTURES / name).read_text(encoding="utf-8")


# ---- what trtexec writes ----


@pytest.mark.parametrize(
    ("name", "version", "load_ms", "median_ms", "count"),
    [("v8.2", (8, 2, 1), 1910.0, 5.31384, 40), ("v10.3", (10, 3, 0), 63.5, 2.4516, 60)],
)
def test_faithful_texts(name, version, load_ms, median_ms, count):
    text = fixture(f"{name}_log.txt")
    log = parse_log(text)
    times = parse_times(fixture(f"{name}_times.json"), warmup_ms=200)
    assert parse_version(text) == version
    assert log.load_ms == pytest.approx(load_ms) and log.queries == len(times) == count
    assert log.compute["median"] == median_ms == pytest.approx(median(times), rel=1e-5)
    assert log.compute["mean"] == pytest.approx(fmean(times), rel=1e-5)
    assert (log.compute["min"], log.compute["max"]) == (min(times), max(times))
    assert "percentile(99%)" in log.compute
    assert sum(times) <= log.total_ms <= sum(times) * 1.01
    check_agreement(times, log)


@pytest.mark.parametrize(
    ("banner", "version"),
    [("v8503", (8, 5, 3)), ("v8601", (8, 6, 1)), ("v100800] [b43", (10, 8, 0)), ("v101303] [b9", (10, 13, 3)),
     ("v110100", (11, 1, 0))],
)  # fmt: skip
def test_versions(banner, version):
    assert parse_version(f"&&&& RUNNING TensorRT.trtexec [TensorRT {banner}] # trtexec --help") == version


@pytest.mark.parametrize(
    "text", ["", "usage: trtexec", "&&&& RUNNING TensorRT.trtexec # /usr/src/tensorrt/bin/trtexec"]
)
def test_versions_that_are_too_old(text):
    with pytest.raises(DeviceError, match="8.2 or newer"):
        parse_version(text)


@pytest.mark.parametrize(
    "missing", ["Timing trace has", "GPU Compute Time: min", "Total Host Walltime: 0", "median = "]
)
def test_a_log_that_is_not_whole(missing):
    with pytest.raises(DeviceError, match="performance summary"):
        parse_log(fixture("v10.3_log.txt").replace(missing, "?"))


def test_what_only_looks_like_a_summary():
    """A name that the program gives is printed too; it is not in the place of a line of the summary."""
    text = fixture("v10.3_log.txt").replace(
        "Starting inference", "Using random values for input GPU Compute Time: min = 9 ms, max = 9 ms"
    )
    assert parse_log(text) == parse_log(fixture("v10.3_log.txt"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "{}",
        "[]",
        "[1]",
        '[{"startComputeMs" : 300}]',
        '[{"startComputeMs" : 300, "computeMs" : nan}]',
        '[{"startComputeMs" : 300, "computeMs" : NaN}]',
        '[{"startComputeMs" : 300, "computeMs" : -1}]',
        '[{"startComputeMs" : 300, "computeMs" : true}]',
        '[{"startComputeMs" : 300, "computeMs" : 1e400}]',
        '[{"startComputeMs" : 300, "computeMs" : "1"}]',
        '[{"startComputeMs" : 100, "computeMs" : 1}]',
        "[" * 100_000,
    ],
)
def test_files_of_times_that_are_none(text):
    with pytest.raises(DeviceError, match="file of times") as error:
        parse_times(text, warmup_ms=200)
    assert len(str(error.value)) < 400


def test_every_truncation_is_noticed():
    text = fixture("v10.3_times.json").strip()
    for end in range(0, len(text), 37):
        with pytest.raises(DeviceError, match="file of times"):
            parse_times(text[:end], warmup_ms=200)


@given(st.text() | st.binary().map(repr))
def test_nonsense_is_an_error_of_ours(text):
    for parse in (parse_log, parse_version, lambda text: parse_times(text, warmup_ms=0)):
        with pytest.raises(DeviceError):
            parse(text)
    assert len(reason_of(text)) <= 300


def test_two_accounts_that_differ():
    log, times = parse_log(fixture("v10.3_log.txt")), parse_times(fixture("v10.3_times.json"), warmup_ms=200)
    check_agreement(times[1:], log)  # at the end of the warm-up
    for other in (times[2:], [time * 1.05 for time in times], times * 2):
        with pytest.raises(DeviceError, match="tells of 60 inferences with a median of 2.4516 ms"):
            check_agreement(other, log)


def test_why_it_failed():
    assert reason_of(fixture("v10.3_failed_log.txt")).startswith(
        "[TRT] ModelImporter.cpp:948: While parsing node number 5"
    )
    assert reason_of("bash: something\n") == "bash: something"


# ---- ONNX programs ----


class Cache(nn.Module):
    """As a method with caches: writes into one buffer before it reads it, replaces another, leaves a third alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(2, 6, 4))
        self.register_buffer("steps", torch.zeros(3))
        self.register_buffer("table", torch.arange(24.0).reshape(6, 4))
        self.inner = nn.Module()
        self.inner.register_buffer("last", torch.zeros(2, 4))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """
        Shapes:
            x: [2, 4]; position: [1], int64.
        """
        here = (torch.arange(6) == position)[:, None]
        self.keys.copy_(torch.where(here, x[:, None], self.keys))
        self.inner.last.add_(x)
        self.steps = self.steps + 1
        return (self.keys + self.table).sum(1) * self.inner.last + self.steps.sum()


def run_onnx(path: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install onnxruntime")
    session = onnxruntime.InferenceSession(str(path))
    names = [one.name for one in session.get_inputs()]
    assert all(isinstance(size, int) for one in session.get_inputs() for size in one.shape)
    values = {f"input_{index}": tensor.numpy() for index, tensor in enumerate(inputs)}
    return [torch.from_numpy(output) for output in session.run(None, {name: values[name] for name in names})]


def check_onnx(path: Path, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        wanted = module(*inputs)
    found = run_onnx(path, inputs)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")
    return write_onnx("forward", agent_programs.mixed(), agent_programs.mixed_inputs(), tmp_path_factory.mktemp("onnx"))


def test_a_method_as_onnx(mixed):
    x, ids = agent_programs.mixed_inputs()
    check_onnx(mixed.path, *stateless(agent_programs.mixed(), (x, ids)))
    assert mixed.inputs.read_bytes() == agent_programs.raw((x, ids.int()))
    assert read_inputs(mixed.path) == [Input("input_0", x.nbytes, True), Input("input_1", ids.nbytes // 2, False)]


def test_state_goes_in_and_out(tmp_path):
    module, inputs = Cache(), (torch.randn(2, 4), torch.tensor([3]))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    method, example = stateless(module, inputs)
    assert sorted(method.state) == ["inner.last", "keys", "steps"]
    program = write_onnx("decode", module, inputs, tmp_path)
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name
    check_onnx(program.path, method, example)
    # Two steps, the state of the first handed to the second, are two calls of the module.
    state = [torch.randn_like(tensor) for tensor in example[2:]]
    for name, tensor in zip(method.state, state, strict=True):
        module.get_buffer(name).copy_(tensor)
    for position in (1, 4):
        x = torch.randn(2, 4)
        output, *state = run_onnx(program.path, (x, torch.tensor([position], dtype=torch.int32), *state))
        torch.testing.assert_close(output, module(x, torch.tensor([position])), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow
def test_deployed_methods_as_onnx(tmp_path):
    """What is lowered for ExecuTorch, of a shallow model with a token drop."""
    from comp_edge.reference.shapes import random_model
    from comp_edge.surgery import apply_plan
    from devices.depth import with_layers
    from devices.points import choose_points
    from devices.programs import Subject, deployed_methods

    subject = Subject.of("random:smolvlm-256m")
    point = [point for point in choose_points(subject) if point.kind == "block"][-1]
    model = random_model(with_layers(subject.config, point.layers), seed=0).requires_grad_(False)
    apply_plan(model, point.plan)
    methods = deployed_methods(model, point.plan, subject)
    assert {"vision_encoder", "decode"} <= methods.keys()
    for name in ("vision_encoder", "decode"):
        method = methods[name]
        inputs = tuple(torch.randn_like(x) if x.is_floating_point() else x for x in method.inputs)
        program = write_onnx(name, method.module, inputs, tmp_path)
        check_onnx(program.path, *stateless(method.module, inputs))


def test_what_has_no_onnx_form(tmp_path):
    class Strange(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x)

    with pytest.raises(DeviceError, match="method 'forward' has no ONNX form: .*eigvals"):
        write_onnx("forward", Strange(), (torch.randn(3, 3),), tmp_path)


def test_programs_that_are_none(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")
    with pytest.raises(DeviceError, match="missing.onnx"):
        read_inputs(tmp_path / "missing.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(DeviceError, match=r"bad\.onnx' is no ONNX program"):
        read_inputs(tmp_path / "bad.onnx")
    make = onnx.helper.make_tensor_value_info
    for name, shape in (("x", ["batch", 3]), ("x,y", [1, 3]), ("x:/etc/passwd", [1, 3])):
        value = make(name, onnx.TensorProto.FLOAT, shape)
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [value], [])), tmp_path / "odd.onnx")
        with pytest.raises(DeviceError, match="a static shape"):
            read_inputs(tmp_path / "odd.onnx")


# ---- the agent ----


@pytest.fixture
def trtexec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrtexecAgent]:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install onnxruntime")
    put = fake_programs(tmp_path / "bin", monkeypatch)
    put("trtexec", f'exec {shlex.quote(sys.executable)} {shlex.quote(str(FAKE))} "$@"')
    transport = HostTransport()
    with transport.workspace() as folder:
        agent = TrtexecAgent(transport, folder)
        agent.install()
        yield agent


@pytest.mark.slow
def test_the_whole_way(trtexec, mixed, monkeypatch):
    job = Job(mixed.path, inputs=mixed.inputs, iterations=5, cpus=(0,))
    answer = trtexec.run(job, timeout=TIMEOUT)
    assert (answer.agent, answer.runtime, answer.method) == ("trtexec", "TensorRT 10.3.0", "forward")
    assert len(answer.wall_ms) >= 5 and 0 < sum(answer.wall_ms) <= answer.total_ms * 1.05 + 1
    assert answer.load_ms == pytest.approx(63.5) and answer.first_ms > 0
    # The engine is kept, until it is forgotten.
    called: list[Sequence[str]] = []
    real = HostTransport.run

    def run(self: HostTransport, command: Sequence[str], **options: Any) -> Completed:
        if "rm" not in command:
            called.append(command)
        return real(self, command, **options)

    monkeypatch.setattr(HostTransport, "run", run)
    trtexec.run(Job(mixed.path, iterations=2, warmup=0, min_seconds=0.1), timeout=TIMEOUT)
    assert len(called) == 1 and "--duration=1" in called[0] and "--warmUp=0" in called[0]
    assert any(word.startswith("--loadEngine=") for word in called[0])
    trtexec.forget(mixed.path)
    trtexec.forget(mixed.path)
    called.clear()
    trtexec.run(job, timeout=TIMEOUT)
    assert [any(word.startswith("--onnx=") for word in words) for words in called] == [True, False]


@pytest.mark.slow
def test_a_program_that_tensorrt_refuses(trtexec, tmp_path, mixed):
    wrong = tmp_path / "wrong.onnx"
    content = mixed.path.read_bytes()
    wrong.write_bytes(content.replace(b"MatMul", b"FatMul"))
    with pytest.raises(DeviceError, match=r"trtexec on host failed with 'wrong\.onnx': .*FatMul") as error:
        trtexec.run(Job(wrong), timeout=TIMEOUT)
    assert "\n" not in str(error.value)


def test_jobs_that_are_not_for_it(tmp_path, mixed):
    agent = TrtexecAgent(HostTransport(), str(tmp_path))
    (tmp_path / "short.bin").write_bytes(b"123")
    for job, named in (
        (Job(Path("model.pte")), "cannot give 'model.pte'"),
        (Job(mixed.path, etdump=True), "a trace of ExecuTorch's"),
        (Job(mixed.path, inputs=tmp_path / "short.bin"), "have 3 bytes; 'forward.onnx' takes"),
        (Job(mixed.path, inputs=tmp_path / "missing.bin"), "missing.bin"),
        (Job(tmp_path / "missing.onnx"), "missing.onnx"),
    ):
        with pytest.raises(DeviceError, match=named):
            agent.run(job, timeout=TIMEOUT)


class Replaying(HostTransport):
    """A board whose trtexec says what it is told to."""

    def __init__(self, log: str, times: str, *, exit_code: int = 0) -> None:
        super().__init__()
        self._done, self._times = Completed(exit_code, log, ""), times

    def run(self, command: Sequence[str], **options: Any) -> Completed:
        for word in command:
            if word.startswith("--exportTimes="):
                Path(word.partition("=")[2]).write_text(self._times)
        return self._done if "trtexec" in command[0] else super().run(command, **options)


def replay(log: str, times: str, program: Path, **options: Any) -> Any:
    transport = Replaying(log, times)
    with transport.workspace() as folder:
        agent = TrtexecAgent(transport, folder, **options)
        agent.install()
        return agent.run(Job(program), timeout=TIMEOUT)


@pytest.mark.parametrize("name", ["v8.2", "v10.3"])
def test_an_answer_from_faithful_texts(name, mixed):
    text = fixture(f"{name}_times.json")
    answer = replay(fixture(f"{name}_log.txt"), text, mixed.path)
    counted = [row["computeMs"] for row in json.loads(text) if row["startComputeMs"] >= 200]
    assert list(answer.wall_ms) == counted and answer.first_ms == json.loads(text)[0]["computeMs"]
    assert answer.total_ms == pytest.approx(sum(counted), rel=0.01)


def test_a_board_that_lies(mixed):
    log, times = fixture("v10.3_log.txt"), fixture("v10.3_times.json")
    hasty = log.replace("Total Host Walltime: 0.147965 s", "Total Host Walltime: 0.0147965 s")
    for text, file, named in (
        (hasty, times, "cannot be believed: calls of 147.6 ms in all were made in 14.8 ms"),
        (log.replace("2.4516 ms", "1.4516 ms"), times, "tells of 60 inferences"),
        (log, times[: len(times) // 2], "file of times cannot be read"),
        (log[: len(log) // 2], times, "no performance summary"),
    ):
        with pytest.raises(DeviceError, match=named):
            replay(text, file, mixed.path)


def test_a_board_without_trtexec(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="host has no trtexec at /usr/src/tensorrt/bin/trtexec or trtexec"):
        TrtexecAgent(HostTransport(), str(tmp_path)).install()


def test_half_precision_by_version(mixed):
    log, times = fixture("v10.3_log.txt"), fixture("v10.3_times.json")
    assert replay(log, times, mixed.path, fp16=True)
    with pytest.raises(DeviceError, match="TensorRT 11 on host takes the precision from the program"):
        replay(log.replace("v100300", "v110100"), times, mixed.path, fp16=True)
