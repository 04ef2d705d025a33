"""How fast is a bundle, and how much memory does it take?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devices.timing import Timing, interleave
from export.bundle import Bundle
from export.encoder_runner import EncoderRunner
from export.executorch.runner import Runner

FIRST_TOKEN, NEXT_TOKEN, REQUEST = "first_token", "next_token", "request"
# What is timed, in words.
UNITS = {
    FIRST_TOKEN: "image and prompt to first token",
    NEXT_TOKEN: "each further token",
    REQUEST: "image and text",
}


@dataclass(frozen=True)
class Latency:
    """Milliseconds by what is timed: a request first, to its first token or to what encoders make of it, then its parts."""

    parts: dict[str, Timing]

    @property
    def request(self) -> Timing:
        """What two bundles are compared by."""
        return next(iter(self.parts.values()))

    def to_json(self) -> dict[str, Any]:
        return {name: timing.to_json() for name, timing in self.parts.items()}


def measure_latency(
    runners: Mapping[str, Runner | EncoderRunner], *, rounds: int, progress: Callable[[], None] = lambda: None
) -> dict[str, Latency]:
    """Time the first golden request of every bundle, in turns, so that their ratio is meaningful.

    Preparing the image and tokenizing the prompt are not included.
    """
    subjects = {(name, part): call for name, runner in runners.items() for part, call in _subjects(runner).items()}
    timings = interleave(
        {f"{name} {part}": call for (name, part), call in subjects.items()}, rounds=rounds, progress=progress
    )
    return {
        name: Latency({part: timings[f"{name} {part}"] for owner, part in subjects if owner == name})
        for name in runners
    }


def _subjects(runner: Runner | EncoderRunner) -> dict[str, Callable[[], Any]]:
    if isinstance(runner, EncoderRunner):
        return _encoder_subjects(runner)
    return {FIRST_TOKEN: _first_token(runner), NEXT_TOKEN: _next_token(runner)}


def _first_token(runner: Runner) -> Callable[[], int]:
    golden = runner.bundle.golden()
    pixels, ids = golden.pixel_values[:1], runner.prompt_ids(golden.questions[0])
    return lambda: int(runner.prefill(pixels, ids).argmax())


def _next_token(runner: Runner) -> Callable[[], int]:
    token = runner.bundle.golden().tokens[0][0]

    def step() -> int:
        runner.rewind()
        return int(runner.step(token).argmax())

    return step


def _encoder_subjects(runner: EncoderRunner) -> dict[str, Callable[[], Any]]:
    """The whole request (to the first token where there is an answer), and each method alone."""
    golden = runner.bundle.text_golden()
    pixels, ids = golden.tensors["pixel_values"][:1], golden.tensors["input_ids"][:1]
    whole = FIRST_TOKEN if runner.answer is not None else REQUEST
    subjects: dict[str, Callable[[], Any]] = {whole: lambda: runner.respond(pixels, ids, max_new_tokens=1)}
    values = runner.respond(pixels, ids, max_new_tokens=1).tensors
    for method in runner.once:
        subjects[method.name] = lambda method=method: runner.call(method, dict(values))
    if runner.answer is not None:
        token, position = golden.tokens[0][0], runner.start(ids)
        subjects[NEXT_TOKEN] = lambda: runner.decode(values, token, position)
    return subjects


@dataclass(frozen=True)
class Memory:
    """MB in a process of its own. `program` is what loading the bundle and answering once added to the runtime."""

    peak: float
    program: float

    def to_json(self) -> dict[str, float]:
        return {"peak_mb": self.peak, "program_mb": self.program}


def measure_memory(bundle: Bundle, *, threads: int) -> Memory | None:
    """Peak memory of answering one golden request in a fresh process; None where the system does not say."""
    command = [sys.executable, "-m", "runtime_tests.memory", str(bundle.folder.resolve()), str(threads)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    if done.returncode != 0:
        return None
    value = json.loads(done.stdout.strip().splitlines()[-1])
    return None if value is None else Memory(peak=value["peak"], program=value["program"])
