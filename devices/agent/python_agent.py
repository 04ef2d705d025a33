"""The agent of a board with Python: times one method of an ExecuTorch program, and prints one JSON object on its last line.

It does what `agent.cpp` does, with the same options, answers and made-up inputs; what an answer holds is said in
`protocol.py`. This file goes to the board alone: it needs `executorch` and `torch` there, and nothing of comp-edge.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

FAILED = 3  # exit code
MOST_SAMPLES = 1_000_000
LONGEST_ERROR = 1_900  # characters

# Torch's names of the scalar types of ExecuTorch's schema.
DTYPES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
    15: "bfloat16",
    27: "uint16",
    28: "uint32",
    29: "uint64",
}


class Fault(Exception):
    """What is wrong, for a user: one sentence without the final stop."""


class Parser(argparse.ArgumentParser):
    """A parser that does not write on stderr and exit, but says what is wrong where answers go."""

    def error(self, message: str) -> NoReturn:
        raise Fault(message)


def number(kind: Callable[[str], Any], least: int, most: int) -> Callable[[str], Any]:
    """A function that reads a number within bounds."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {least} to {most}")
        return value

    return read


def cores(text: str) -> list[int]:
    """Core numbers from a list with commas."""
    return [number(int, 0, 1023)(part) for part in text.split(",")] if text else []


def parser() -> Parser:
    """The command line, the same as that of `agent.cpp`."""
    parse = Parser(prog="python_agent.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parse.add_argument("--version", action="store_true")
    parse.add_argument("--model", default="")
    parse.add_argument("--method", default="forward")
    parse.add_argument("--inputs", default="")
    parse.add_argument("--threads", type=number(int, 1, 4096), default=1)
    parse.add_argument("--cpus", type=cores, default=[])
    parse.add_argument("--warmup", type=number(int, 0, MOST_SAMPLES), default=2)
    parse.add_argument("--iterations", type=number(int, 1, MOST_SAMPLES), default=10)
    parse.add_argument("--min-seconds", type=number(float, 0, 86400), default=0.0)
    parse.add_argument("--etdump", default="")
    return parse


def bind(cpus: Sequence[int]) -> None:
    """Threads take over what their maker is bound to: this goes before anything that starts one."""
    if not cpus:
        return
    try:
        os.sched_setaffinity(0, cpus)
    except OSError:
        pass  # seen below; the kernel also leaves out, silently, what it does not have
    if os.sched_getaffinity(0) != set(cpus):
        listed = ",".join(map(str, cpus))
        raise Fault(
            f"this process cannot be bound to cores {listed!r}; the machine has {os.cpu_count()}, numbered from 0, and may "
            "not give us all"
        )


def set_threads(threads: int) -> None:
    """Before a method is loaded: what XNNPACK has prepared for one pool is of no use to another."""
    from executorch.extension.pybindings import portable_lib

    if portable_lib._threadpool_get_thread_count() != threads:
        portable_lib._unsafe_reset_threadpool(threads)
    found = portable_lib._threadpool_get_thread_count()
    if found != threads:
        raise Fault(f"the thread pool has {found} threads instead of {threads}")


def made_up(count: int, state: int) -> tuple[Tensor, int]:
    """Numbers of a linear congruential generator in [-1, 1), and its next state; products wrap as they do in C."""
    import torch

    powers = torch.full((count,), 1664525, dtype=torch.int64).cumprod(0)
    sums = torch.cat([torch.ones(1, dtype=torch.int64), powers[:-1]]).cumsum(0)
    states = (powers * state + sums * 1013904223) & 0xFFFFFFFF
    return (states >> 8).float() / 8388608 - 1, int(states[-1])


def make_inputs(meta: Any, method: str, path: str) -> list[Tensor]:
    """Tensors of the right shapes and dtypes, from a file with their raw bytes or made up."""
    import torch

    infos = []
    for index in range(meta.num_inputs()):
        where = f"input {index} of {method!r}"
        try:
            info = meta.input_tensor_meta(index)
        except (RuntimeError, IndexError):
            raise Fault(f"{where} is no tensor; methods that take tensors alone can be timed") from None
        if info.dtype() not in DTYPES:
            accepted = "integers, bool, float16, bfloat16, float32, float64"
            raise Fault(f"{where} has dtype {info.dtype()}; accepted: {accepted}")
        infos.append((tuple(info.sizes()), getattr(torch, DTYPES[info.dtype()]), info.nbytes()))
    total = sum(size for _, _, size in infos)
    raw = None
    if path:
        try:
            raw = bytearray(Path(path).read_bytes())
        except OSError as error:
            raise Fault(f"inputs {path!r} cannot be read: {error.strerror}") from None
        if len(raw) != total:
            raise Fault(f"inputs {path!r} have {len(raw)} bytes; method {method!r} takes {total}")
    tensors, offset, state = [], 0, 12345
    for shape, dtype, size in infos:
        if raw is not None and size:
            tensor = torch.frombuffer(raw, dtype=dtype, offset=offset, count=size // dtype.itemsize)
            tensor, offset = tensor.reshape(shape).clone(), offset + size
        elif dtype.is_floating_point and size:
            values, state = made_up(size // dtype.itemsize, state)
            tensor = values.to(dtype).reshape(shape)
        else:
            tensor = torch.zeros(shape, dtype=dtype)
        tensors.append(tensor)
    return tensors


def checksums(outputs: Iterable[Any]) -> list[dict[str, Any]]:
    """Shape, sum and sum of magnitudes of what are tensors."""
    import torch

    found = []
    for value in outputs:
        if isinstance(value, torch.Tensor):
            exact = value.double()
            found.append({"shape": list(value.shape), "sum": exact.sum().item(), "abs": exact.abs().sum().item()})
    return found


def load(args: argparse.Namespace) -> tuple[Any, Any, float]:
    """The program (which must live as long as the method), the method, and the milliseconds that loading took."""
    from executorch.runtime import Runtime

    try:
        with open(args.model, "rb") as file:
            head = file.read(8)
    except OSError as error:
        raise Fault(f"program {args.model!r} cannot be read: {error.strerror}") from None
    if head[4:6] != b"ET":  # the runtime's Python module aborts where it cannot decode these bytes
        raise Fault(f"program {args.model!r} is no ExecuTorch program")
    start = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    try:
        program = Runtime.get().load_program(Path(args.model), enable_etdump=bool(args.etdump))
    except RuntimeError as error:
        raise Fault(f"program {args.model!r} cannot be loaded: {first_line(error)}") from None
    if args.method not in program.method_names:
        listed = ", ".join(sorted(program.method_names))
        raise Fault(f"there is no method {args.method!r}; there are: {listed}")
    try:
        method = program.load_method(args.method)
    except RuntimeError as error:
        raise Fault(f"method {args.method!r} cannot be loaded: {first_line(error)}") from None
    return program, method, (time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW) - start) / 1e6


def beat() -> float:
    """Milliseconds of a piece of work that is always the same, as that of `agent.cpp` is."""
    start, value = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW), 0.0
    for _ in range(3000):
        value = value * 0.5 + 1.0
    return (time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW) - start) / 1e6


def measure(method: Any, inputs: Sequence[Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """Times in milliseconds and checksums of the first call's outputs."""
    # Not `Method.execute`: it copies the outputs, which the C++ agent does not.
    execute, clock = method._method, time.clock_gettime_ns
    result: dict[str, Any] = {"outputs": [], "wall_ms": []}

    def call() -> float:
        start = clock(time.CLOCK_MONOTONIC_RAW)
        try:
            outputs = execute(inputs, clone_outputs=False)
        except RuntimeError as error:
            raise Fault(f"method {args.method!r} failed: {first_line(error)}") from None
        ms = (clock(time.CLOCK_MONOTONIC_RAW) - start) / 1e6
        if "first_ms" not in result:
            # Later calls may find other values in the program's own buffers, and their outputs differ.
            result.update(first_ms=ms, outputs=checksums(outputs))
        return ms

    for _ in range(args.warmup):
        call()
    spent = 0.0
    result["beat_ms"] = [beat()]
    # A second clock around all calls: single readings that lie do not add up to it.
    start = clock(time.CLOCK_MONOTONIC)
    while len(result["wall_ms"]) < args.iterations or (
        spent < args.min_seconds * 1e3 and len(result["wall_ms"]) < MOST_SAMPLES
    ):
        ms = call()
        result["wall_ms"].append(ms)
        result["beat_ms"].append(beat())
        spent += ms
    result["total_ms"] = (clock(time.CLOCK_MONOTONIC) - start) / 1e6
    return result


def peak_memory() -> int | None:
    """Most memory that this process has had resident, in kB, Python and torch included; None where the kernel is silent."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def first_line(error: Exception) -> str:
    """Of an exception's text."""
    return (str(error).splitlines() or ["it does not say why"])[0]


def runtime() -> str:
    """Name and version of what runs the program."""
    try:
        return f"executorch {importlib.metadata.version('executorch')}"
    except importlib.metadata.PackageNotFoundError:
        raise Fault(f"{sys.executable} has no package executorch; install it with its torch") from None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The answer."""
    head = {"schema": 1, "agent": "python", "runtime": runtime()}
    try:
        import executorch.runtime  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise Fault(f"{sys.executable} cannot import ExecuTorch's runtime: {first_line(error)}") from None
    if args.version:
        return head
    if not args.model:
        raise Fault("--model is missing; give a .pte file")
    set_threads(args.threads)
    program, method, load_ms = load(args)
    inputs = make_inputs(program.metadata(args.method), args.method, args.inputs)
    result = measure(method, inputs, args)
    result |= {"method": args.method, "threads": args.threads, "load_ms": load_ms, "peak_rss_kb": peak_memory()}
    if args.etdump:
        program.write_etdump_result_to_file(args.etdump, "")
        result["etdump_bytes"] = os.path.getsize(args.etdump)
    return head | result


def main(argv: Sequence[str] | None = None) -> int:
    """Print the answer or what is wrong; the exit code."""
    try:
        args = parser().parse_args(argv)
        bind(args.cpus)
        print(json.dumps(run(args)))
        return 0
    except Fault as error:
        print(json.dumps({"schema": 1, "error": str(error)[:LONGEST_ERROR]}))
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
