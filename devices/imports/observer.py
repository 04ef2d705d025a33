"""`PyTorchObserver {…}` lines of ExecuTorch's runners for language models: one for each answer, with times of its stages.

Times are of a clock in milliseconds, without fractions. The first stage includes splitting the prompt into tokens.
"""

from __future__ import annotations

import json
import re

from pydantic import Field, model_validator

from devices.imports.model import Contents, ImportedTiming, Malformed, Number, Part, checked, of_samples, of_statistics
from devices.profiles import Count

FORMAT = "PyTorchObserver"

_START = re.compile(r"PyTorchObserver[ \t]*\{")


class _Run(Part):
    """Names are the runner's; units are 1/`scale` of a second."""

    prompt_tokens: Count
    generated_tokens: Count
    model_load_start_ms: Number
    model_load_end_ms: Number
    inference_start_ms: Number
    prompt_eval_end_ms: Number
    first_token_ms: Number
    inference_end_ms: Number
    scale: Number = Field(default=1000, alias="SCALING_FACTOR_UNITS_PER_SECOND", ge=1, le=1e12)

    @model_validator(mode="after")
    def _in_order(self) -> _Run:
        if not self.inference_start_ms <= self.prompt_eval_end_ms <= self.inference_end_ms:
            raise ValueError("inference_start_ms, prompt_eval_end_ms and inference_end_ms must follow one another")
        if not (self.model_load_start_ms <= self.model_load_end_ms and self.inference_start_ms <= self.first_token_ms):
            raise ValueError("a stage ends before it starts")
        return self

    def between(self, start: str, end: str) -> float:
        """Milliseconds."""
        return (getattr(self, end) - getattr(self, start)) * 1e3 / self.scale


def recognises(text: str) -> bool:
    """Whether a text is one."""
    return _START.search(text) is not None


def parse(text: str) -> Contents:
    """For each length of prompt: the prompt's own time, a token's afterwards, and the whole answer's.

    Raises:
        Malformed: a line is no JSON, lacks a field, or its clock goes back.
    """
    runs: dict[int, list[_Run]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        start = _START.search(line)
        if start:
            run = _run(line[start.end() - 1 :], place=f"line {number}")
            runs.setdefault(run.prompt_tokens, []).append(run)
    timings = [timing for tokens, group in runs.items() for timing in _timings(tokens, group)]
    return Contents(
        timings=timings,
        notes=("Times are whole milliseconds; the prompt's includes its tokenization.",),
    )


def _run(text: str, *, place: str) -> _Run:
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        raise Malformed(f"{place}: a JSON object must follow 'PyTorchObserver', not {text[:40]!r}") from None
    return checked(_Run, value, place=place)


def _timings(tokens: int, runs: list[_Run]) -> list[ImportedTiming]:
    place = f"runs with {tokens} prompt tokens"
    loads = [run.between("model_load_start_ms", "model_load_end_ms") for run in runs if run.model_load_end_ms]
    load = max(loads, default=None)
    first = [run.between("inference_start_ms", "first_token_ms") for run in runs]
    found = [
        of_samples(
            f"prefill of {tokens} tokens",
            (run.between("inference_start_ms", "prompt_eval_end_ms") for run in runs),
            place=place,
            load_ms=load,
            other={"first_token_ms": sum(first) / len(first)},
        )
    ]
    generated = sum(run.generated_tokens for run in runs)
    if generated:
        found.append(
            of_statistics(
                f"decode after {tokens} tokens",
                place=place,
                count=generated,
                mean=sum(run.between("prompt_eval_end_ms", "inference_end_ms") for run in runs) / generated,
                load_ms=load,
            )
        )
    found.append(
        of_samples(
            f"answer to {tokens} tokens",
            (run.between("inference_start_ms", "inference_end_ms") for run in runs),
            place=place,
            load_ms=load,
            other={"generated_tokens": generated / len(runs)},
        )
    )
    return found
