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
from export.executorch.runner import Runner


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a request: image and prompt to the first token, and each token after it."""

    first_token: Timing
    next_token: Timing

    def to_json(self) -> dict[str, Any]:
        return {"first_token": self.first_token.to_json(), "next_token": self.next_token.to_json()}


def measure_latency(
    runners: Mapping[str, Runner], *, rounds: int, progress: Callable[[], None] = lambda: None
) -> dict[str, Latency]:
    """Time the first golden request of every bundle, in turns, so that their ratio is meaningful.

    Preparing the image and tokenizing the prompt are not included.
    """
    subjects: dict[str, Callable[[], Any]] = {}
    for name, runner in runners.items():
        subjects[f"{name} first"] = _first_token(runner)
        subjects[f"{name} next"] = _next_token(runner)
    timings = interleave(subjects, rounds=rounds, progress=progress)
    return {name: Latency(first_token=timings[f"{name} first"], next_token=timings[f"{name} next"]) for name in runners}


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
