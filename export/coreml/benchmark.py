"""Time every function of the Core ML bundle that this file lies in, on a Mac, or on an iPhone or iPad connected to it.

Needs macOS 15 or later, and coremltools 9 (with numpy, which it brings); for a device also Xcode, iOS 18 and a development
team. NOT run on a Mac or a device so far: it was written on Linux and tested there against coremltools 9.0 with the parts
replaced that only macOS has.

What is measured: Core ML's own call alone, in milliseconds, after calls that do not count. Inputs are the first request of
golden.safetensors, and random values of the range in manifest.json where that has none: every shape is fixed, so the
values hardly matter. A function with states keeps one state for all its calls, as an application does. On this Mac the
calls follow each other; on a device coremltools sends files before and after each, so that calls are a second or more apart
and find cooler, slower clocks than in an application that does not wait.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # --help and the first checks need neither
    import numpy as np

BUNDLE = Path(__file__).resolve().parent
COMPUTE_UNITS = ("all", "cpu_and_ne", "cpu_and_gpu", "cpu_only")
WARM_UP = 3  # calls that do not count; coremltools makes one on a device
EXAMPLE = """example:
  python benchmark.py -o mac.json
  python benchmark.py -o mac-ane.json --compute-units cpu_and_ne --iterations 200
  python benchmark.py -o phone.json --device "My iPhone" --team ABCDE12345

`python -m devices import mac.json` of comp-edge reads what this writes.
"""


class Problem(Exception):
    """Why nothing was measured, in one sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0 written, 2 not written, which a sentence on stderr explains, 130 interrupted."""
    options = _parser().parse_args(argv)
    try:
        _check_surroundings(options)
        result = asyncio.run(_benchmark(options))
        _write(options.output, result)
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"written to {options.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time every function of this Core ML bundle on this Mac, or on a device that is connected to it.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", dest="output", type=Path, required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument(
        "--iterations", type=_count, default=50, metavar="N", help="calls of each function that count (default: 50)"
    )
    parser.add_argument(
        "--compute-units", choices=COMPUTE_UNITS, default="all", help="what Core ML may use (default: all)"
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="name or identifier, as `xcrun devicectl list devices` shows it"
    )
    parser.add_argument(
        "--team", type=_team, metavar="ID", help="development team that signs coremltools' app for the device"
    )
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of calls from 1 to 100000")
    return int(text)


def _team(text: str) -> str:
    # coremltools puts it into a shell command as it is.
    if not re.fullmatch("[A-Z0-9]{10}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no team; Apple's identifiers have ten capitals and digits")
    return text


def _check_surroundings(options: argparse.Namespace) -> None:
    """Refuse what could only fail after minutes of measuring."""
    if platform.system() != "Darwin":
        raise Problem(f"Core ML is a part of macOS, and this is {platform.system()}; copy the bundle to a Mac.")
    if (options.device is None) != (options.team is None):
        raise Problem("--device and --team belong together; give both for a device, or neither for this Mac.")
    if not options.output.parent.is_dir():
        raise Problem(f"the folder {str(options.output.parent)!r} does not exist.")
    if options.output.is_dir():
        raise Problem(f"{str(options.output)!r} is a folder; give the file to write.")
    try:
        import coremltools  # noqa: F401
    except ImportError:
        raise Problem('coremltools is missing; install it (pip install "coremltools==9.*").') from None


# ---- the bundle


def _read_bundle() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest, and of each tensor of the golden file the first request's row [1, ...]."""
    try:
        manifest = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))
        return manifest, _golden_rows(BUNDLE / "golden.safetensors")
    except (OSError, ValueError, KeyError) as error:
        raise Problem(f"{str(BUNDLE)!r} is not a whole bundle ({error}); leave this file in its bundle.") from None


def _golden_rows(path: Path) -> dict[str, np.ndarray]:
    import numpy as np

    types, rows = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8"), "I32": np.dtype("<i4")}, {}
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            shape, dtype = (1, *entry["shape"][1:]), types[entry["dtype"]]
            file.seek(8 + size + entry["data_offsets"][0])
            rows[name] = np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)
    return rows


def _inputs(method: dict[str, Any], golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values for the inputs of a method, by name."""
    import numpy as np

    random, made = np.random.default_rng(0), {}
    for port in method["inputs"]:
        shape, value = tuple(port["shape"]), golden.get(port["name"])
        if value is None or value.shape != shape:
            low, high = port["range"] or (0, 1)
            whole = port["dtype"].startswith("int")
            value = random.integers(int(low), int(high) + 1, shape) if whole else random.uniform(low, high, shape)
        made[port["name"]] = np.ascontiguousarray(value, dtype=port["dtype"])
    return made


# ---- measuring


async def _benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """What the file will say: `functions` has the layout of coremltools' `MLModelBenchmarker.Measurement`."""
    import coremltools as ct

    manifest, golden = _read_bundle()
    device = None if options.device is None else await _prepare(options.device, options.team)
    functions = {}
    for method in manifest["methods"]:
        function = method["function"] or method["name"]
        arguments = {
            "model": str(BUNDLE / method["file"]),
            "compute_units": ct.ComputeUnit[options.compute_units.upper()],
            # The only function of a package needs no name, and Core ML takes none.
            "function_name": None if function == "main" else function,
        }
        inputs = _inputs(method, golden)
        try:
            if device is None:
                load, predict = _time_here(arguments, inputs, options.iterations, stateful=bool(method["states"]))
            else:
                load, predict = await _time_there(arguments, inputs, options.iterations, device)
        except Exception as error:  # whatever Core ML and coremltools raise
            raise Problem(f"{method['name']} cannot be timed: {_reason(error)}.") from error
        functions[method["name"]] = {"load": asdict(load), "predict": asdict(predict)}
        median, least = predict.statistics.median, predict.statistics.minimum
        print(f"{method['name']}: median {median:.3f} ms, least {least:.3f} ms, loaded in {load.samples[0]:.0f} ms")
    return {
        "device": _this_mac() if device is None else {"name": device.name, "os_version": device.os_version},
        "functions": functions,
        "compute_units": options.compute_units,
        "coremltools": ct.__version__,
        "bundle": {
            "model_type": manifest["model_type"],
            "precision": manifest["precision"],
            "manifest_sha256": hashlib.sha256((BUNDLE / "manifest.json").read_bytes()).hexdigest(),
        },
    }


def _time_here(arguments: dict[str, Any], inputs: dict[str, np.ndarray], iterations: int, *, stateful: bool) -> Any:
    """Measurements of loading (once) and of the calls, on this Mac.

    coremltools 9.0's `MLModelBenchmarker.benchmark_predict` cannot be used here: it raises an AttributeError for any
    function of a multifunction package (`MLModel._is_stateful`), and would make a new state for each call.
    """
    from coremltools.models import MLModel
    from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # how coremltools says that Core ML refused the package
        model = MLModel(**arguments)
    try:
        load = model.load_duration_in_nano_seconds
    except AttributeError:  # no package was handed to Core ML
        advice = "use macOS 15 or later, and a Python that coremltools has a wheel for"
        raise RuntimeError(f"coremltools could not reach Core ML; {advice}") from None
    state = model.make_state() if stateful else None
    times = []
    for _ in range(WARM_UP + iterations):
        model.predict(inputs, state)
        times.append(model.last_predict_duration_in_nano_seconds / 1e6)
    measurement = MLModelBenchmarker.Measurement.from_samples
    return measurement([load / 1e6]), measurement(times[WARM_UP:])


async def _time_there(arguments: dict[str, Any], inputs: dict[str, np.ndarray], iterations: int, device: Any) -> Any:
    """The same on a device: there coremltools' app makes one state when it loads the model."""
    from coremltools.models import MLModel
    from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker

    benchmarker = MLModelBenchmarker(MLModel(**arguments, skip_model_load=True), device=device)
    load = await benchmarker.benchmark_load()
    return load, await benchmarker.benchmark_predict(inputs=inputs, iterations=iterations, warmup=True)


async def _prepare(wanted: str, team: str) -> Any:
    """The device with coremltools' app running on it, which Xcode builds first (minutes)."""
    from coremltools.models.ml_program.experimental.remote_device import AppSigningCredentials, Device

    try:
        devices = Device.get_devices()
        found = [one for one in devices if wanted in (one.name, one.identifier, one.udid)]
        if len(found) == 1:
            return await found[0].prepare_for_model_debugging(credentials=AppSigningCredentials(development_team=team))
    except Exception as error:  # devicectl's and xcodebuild's failures have classes that coremltools keeps to itself
        raise Problem(f"device {wanted!r} cannot be used: {_reason(error)}.") from error
    known = ", ".join(f"{one.name!r} ({one.identifier})" for one in devices) or "none"
    raise Problem(f"{len(found)} devices are called {wanted!r}; known: {known}.")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _this_mac() -> dict[str, str]:
    command = ["/usr/sbin/sysctl", "-n", "hw.model", "machdep.cpu.brand_string"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    name = ", ".join(found.stdout.split("\n")).strip(", ") or platform.machine()
    return {"name": name, "os_version": f"macOS {platform.mac_ver()[0]}"}


def _write(path: Path, result: dict[str, Any]) -> None:
    """Write the file, whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise Problem(f"{str(path)!r} cannot be written: {error.strerror}.") from None


if __name__ == "__main__":
    sys.exit(main())
