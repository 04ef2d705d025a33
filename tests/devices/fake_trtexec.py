"""A stand-in for `trtexec`: runs ONNX programs on the processor, takes its options and writes what it writes (10.3)."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

BANNER = "TensorRT.trtexec [TensorRT v100300] # trtexec"


def log(text: str) -> None:
    print(f"[11/02/2024-16:40:07] [I] {text}")


def summary(times: Sequence[float]) -> str:
    ordered = sorted(times)
    found = {"min": ordered[0], "max": ordered[-1], "mean": fmean(times), "median": median(times)}
    return ", ".join(f"{name} = {value:g} ms" for name, value in (found | {"percentile(90%)": ordered[-1]}).items())


def read(session: Any, given: dict[str, str]) -> dict[str, Any]:
    """Inputs as trtexec takes them: from files of exactly the right size, or random."""
    import numpy as np

    dtypes = {"tensor(float)": "float32", "tensor(int32)": "int32", "tensor(bool)": "bool"}
    values = {}
    for one in session.get_inputs():
        dtype = np.dtype(dtypes[one.type])
        if one.name in given:
            raw = Path(given.pop(one.name)).read_bytes()
            size = int(np.prod(one.shape)) * dtype.itemsize
            if len(raw) != size:
                raise ValueError(f"Unexpected file size for input file: binding size is {size} bytes, file {len(raw)}")
            values[one.name] = np.frombuffer(raw, dtype).reshape(one.shape)
        elif dtype.kind == "f":
            values[one.name] = np.random.rand(*one.shape).astype(dtype)
        else:
            values[one.name] = np.random.randint(-100, 100, one.shape).astype(dtype)  # no index of anything
    if given:
        raise ValueError(f"Cannot find input tensor with name {next(iter(given))!r} in the engine bindings!")
    return values


def main(words: Sequence[str]) -> None:
    options = {name: value for name, _, value in (word.removeprefix("--").partition("=") for word in words)}
    if "help" in options:
        return
    unknown = options.keys() - {
        "onnx", "saveEngine", "loadEngine", "loadInputs", "fp16", "warmUp", "iterations", "duration", "noDataTransfers",
        "useSpinWait", "exportTimes",
    }  # fmt: skip
    if unknown:
        raise ValueError(f"Unknown option: --{unknown.pop()}")
    import onnxruntime

    if "onnx" in options:
        Path(options["saveEngine"]).write_bytes(Path(options["onnx"]).read_bytes())
        log("Engine built in 1.5 sec.")
    else:
        log("Engine loaded in 0.0114 sec.")
    session = onnxruntime.InferenceSession(options.get("onnx") or options["loadEngine"])
    log("Engine deserialized in 0.0521 sec.")
    given = dict(pair.split(":") for pair in options["loadInputs"].split(",")) if "loadInputs" in options else {}
    values = read(session, given)
    warmup, begin, rows = float(options["warmUp"]), time.perf_counter(), []
    while len(rows) < int(options["iterations"]) or rows[-1][1] < warmup + 1e3 * int(options["duration"]):
        start = (time.perf_counter() - begin) * 1e3
        session.run(None, values)
        if start >= warmup:
            rows.append((start, (time.perf_counter() - begin) * 1e3))
    times = [end - start for start, end in rows]
    with open(options["exportTimes"], "w") as file:
        entries = (
            f'{{ "startComputeMs" : {start:g}, "endComputeMs" : {end:g}, "computeMs" : {end - start:g} }}\n'
            for start, end in rows
        )
        file.write("[\n  " + ", ".join(entries) + "]\n")
    log(f"Timing trace has {len(rows)} queries over {(rows[-1][1] - rows[0][0]) / 1e3:g} s")
    log("=== Performance summary ===")
    log(f"GPU Compute Time: {summary(times)}")
    log(f"Total Host Walltime: {(rows[-1][1] - rows[0][0]) / 1e3:g} s")


if __name__ == "__main__":
    print(f"&&&& RUNNING {BANNER}")
    try:
        main(sys.argv[1:])
    except Exception as error:
        print(f"[11/02/2024-16:40:07] [E] {error}", file=sys.stderr)
        print(f"&&&& FAILED {BANNER}")
        sys.exit(1)
    print(f"&&&& PASSED {BANNER}")
