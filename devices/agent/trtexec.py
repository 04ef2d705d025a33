"""A Jetson's GPU: ONNX programs, timed by TensorRT's own `trtexec`.

Never run on a board here. What it sends was written by following trtexec's published source, and its answers are tested on
texts of that format and with a stand-in that runs the programs on the processor.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from devices.agent.protocol import Answer, Job
from devices.agent.remote import ANSWER_LIMIT, RemoteFiles
from devices.agent.trtexec_output import check_agreement, parse_log, parse_times, parse_version, reason_of
from devices.errors import DeviceError
from devices.transports import Completed, Transport
from devices.transports.local import reading

PLACES = ("/usr/src/tensorrt/bin/trtexec", "trtexec")  # JetPack's, and what is in the PATH
BUILD_SECONDS = 1800.0  # that TensorRT may take to make an engine of a program
WARMUP_MS = 200  # trtexec's own default; it counts time, not calls
TIMES_LIMIT = 256 * 2**20  # bytes of the file of times
NAME = re.compile(r"[A-Za-z0-9_.]+")  # `--loadInputs` has no way to quote


@dataclass(frozen=True)
class Input:
    """An input of a program; `size` in bytes."""

    name: str
    size: int
    floats: bool


@dataclass(frozen=True)
class Engine:
    """What TensorRT made of a program, on the device.

    Attributes:
        first_ms: the first call, just after it was made: trtexec does not tell of the calls that it warms up with.
    """

    path: str
    first_ms: float


class TrtexecAgent:
    """Times `.onnx` programs on the GPU. An engine is made once of a program and kept in the workspace.

    Times are the GPU's of a call, without copies between host and GPU memory, and without a CUDA graph. Without `fp16`
    TensorRT may compute in TF32, as it does by default. `Answer.threads` is what the job says, and means nothing here;
    outputs and memory are not known.

    Args:
        workspace: a private folder on the device.
        fp16: TensorRT may compute in float16 (before TensorRT 11, which takes the precision from the program).
        program: trtexec on the device; by default where JetPack puts it, or in the PATH.
    """

    form = "onnx"

    def __init__(self, transport: Transport, workspace: str, *, fp16: bool = False, program: str | None = None) -> None:
        self._transport, self._workspace, self._fp16 = transport, workspace, fp16
        self._places = PLACES if program is None else (program,)
        self._files = RemoteFiles(transport, workspace)
        self._there: set[str] = set()  # inputs
        self._specs: dict[str, list[Input]] = {}  # by the program's place on the device
        self._engines: dict[Path, Engine] = {}
        self._program, self._version = "", (0, 0, 0)

    def install(self) -> None:
        """Find trtexec.

        Raises:
            DeviceError: there is none, or it is too old or too new for what is wanted.
        """
        for place in self._places:
            done = self._transport.run([place, "--help"])
            if done.exit_code == 0:
                self._program, self._version = place, parse_version(done.stdout)
                break
        else:
            raise DeviceError(
                f"{self._transport.address} has no trtexec at {' or '.join(self._places)}; JetPack's package tensorrt has it."
            )
        if self._fp16 and self._version[0] >= 11:
            raise DeviceError(
                f"TensorRT {self._version[0]} on {self._transport.address} takes the precision from the program; export it "
                "in float16 and leave fp16 out."
            )

    def run(self, job: Job, *, timeout: float) -> Answer:
        """Time a job; where its engine has yet to be made, that takes minutes more than the time-out.

        Raises:
            DeviceError: no ONNX program, TensorRT refuses it, or what trtexec says is not what it should be.
        """
        if job.program.suffix != ".onnx" or job.etdump:
            wanted = "a trace of ExecuTorch's" if job.etdump else repr(job.program.name)
            raise DeviceError(f"trtexec cannot give {wanted}; it times .onnx programs.")
        program = self._files.send(job.program)
        inputs = self._inputs(job, program)
        engine = self._engine(job, program, inputs)
        warmup = WARMUP_MS if job.warmup else 0
        words = [f"--loadEngine={engine.path}", *inputs, f"--warmUp={warmup}", f"--iterations={job.iterations}"]
        words.append(f"--duration={math.ceil(job.min_seconds)}")
        done, times = self._trtexec(job, words, warmup_ms=warmup, timeout=timeout)
        log = parse_log(done.stdout)
        check_agreement(times, log)
        try:
            return Answer(
                schema=1,
                agent="trtexec",
                runtime=f"TensorRT {'.'.join(map(str, self._version))}",
                method=job.method,
                threads=job.threads,
                load_ms=log.load_ms,
                first_ms=engine.first_ms,
                wall_ms=times,
                total_ms=log.total_ms,
            )
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise DeviceError(f"trtexec on {self._transport.address} cannot be believed: {reason}.") from None

    def forget(self, program: Path) -> None:
        """Remove a program from the device, and the engine that was made of it."""
        if (place := self._files.remove(program)) is not None:
            self._specs.pop(place, None)
        self._drop_engine(program)

    def _drop_engine(self, program: Path) -> None:
        engine = self._engines.pop(program.absolute(), None)
        if engine is not None:
            self._transport.run(["rm", "-f", engine.path])

    def _engine(self, job: Job, program: str, inputs: Sequence[str]) -> Engine:
        path, local = f"{program}.engine", job.program.absolute()
        if local not in self._engines or self._engines[local].path != path:
            self._drop_engine(local)  # of what the program was before
            words = [f"--onnx={program}", f"--saveEngine={path}", *inputs, *(["--fp16"] if self._fp16 else [])]
            words += ["--warmUp=0", "--iterations=1", "--duration=0"]
            _, times = self._trtexec(job, words, warmup_ms=0, timeout=BUILD_SECONDS)
            self._engines[local] = Engine(path, times[0])
        return self._engines[local]

    def _trtexec(
        self, job: Job, words: Sequence[str], *, warmup_ms: float, timeout: float
    ) -> tuple[Completed, tuple[float, ...]]:
        """Run it; what it printed, and the time of each inference."""
        times = f"{self._workspace}/times.json"
        command = [self._program, *words, "--noDataTransfers", "--useSpinWait", f"--exportTimes={times}"]
        if self._version[0] >= 11:
            command.append("--noCudaGraph")  # earlier versions use one only when they are told to
        if job.cpus:
            command = ["taskset", "-c", ",".join(map(str, job.cpus)), *command]
        done = self._transport.run(command, timeout=timeout, limit=ANSWER_LIMIT)
        if done.exit_code != 0:
            reason = reason_of(done.stdout + done.stderr)
            raise DeviceError(f"trtexec on {self._transport.address} failed with {job.program.name!r}: {reason}.")
        with TemporaryDirectory(prefix="comp-edge.") as folder:
            local = Path(folder, "times.json")
            self._transport.pull(times, local, limit=TIMES_LIMIT)
            self._transport.run(["rm", "-f", times])  # a run that writes none must not find this one's
            return done, parse_times(local.read_text(encoding="utf-8", errors="replace"), warmup_ms=warmup_ms)

    def _inputs(self, job: Job, program: str) -> tuple[str, ...]:
        """The words that say what to put in: trtexec wants a file an input. Without a job's inputs it makes up floats."""
        if program not in self._specs:
            self._specs[program] = read_inputs(job.program)
        specs = self._specs[program]
        total = sum(spec.size for spec in specs)
        raw = None
        if job.inputs is not None:
            with reading(job.inputs) as file:
                raw = file.read()
            if len(raw) != total:
                raise DeviceError(
                    f"inputs {str(job.inputs)!r} have {len(raw)} bytes; {job.program.name!r} takes {total}."
                )
        pairs, offset = [], 0
        for spec in specs:
            if raw is not None or not spec.floats:  # made-up integers could be no index of anything: zero is
                part = bytes(spec.size) if raw is None else raw[offset : offset + spec.size]
                pairs.append(f"{spec.name}:{self._send_input(part)}")
            offset += spec.size
        return (f"--loadInputs={','.join(pairs)}",) if pairs else ()

    def _send_input(self, data: bytes) -> str:
        """The path on the device of a file with this content, which is sent once."""
        remote = f"{self._workspace}/{hashlib.sha256(data).hexdigest()}"
        if remote not in self._there:
            with TemporaryDirectory(prefix="comp-edge.") as folder:
                local = Path(folder, "input")
                local.write_bytes(data)
                self._transport.push(local, remote)
            self._there.add(remote)
        return remote


def read_inputs(program: Path) -> list[Input]:
    """The inputs of an ONNX program, in its order.

    Raises:
        DeviceError: no such program, one with dynamic shapes, or the package `onnx` is not there.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise DeviceError(f"{program.name!r} cannot be read without the package onnx; pip install onnx.") from None
    try:
        graph = onnx.load(str(program), load_external_data=False).graph
        constants = {tensor.name for tensor in graph.initializer}
        specs = []
        for value in graph.input:
            if value.name in constants:
                continue
            kind = value.type.tensor_type
            if not NAME.fullmatch(value.name) or not all(axis.HasField("dim_value") for axis in kind.shape.dim):
                raise DeviceError(
                    f"input {value.name[:80]!r} of {program.name!r} cannot be given to trtexec; accepted: a name of letters, "
                    "digits, _ and ., and a static shape."
                )
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
            size = math.prod(axis.dim_value for axis in kind.shape.dim) * dtype.itemsize
            specs.append(Input(value.name, size, dtype.kind not in "biu"))
    except FileNotFoundError:
        raise DeviceError(f"program {str(program)!r} does not exist; give an .onnx file.") from None
    except (OSError, DecodeError, KeyError, TypeError) as error:
        raise DeviceError(f"program {str(program)!r} is no ONNX program ({type(error).__name__}).") from None
    return specs
