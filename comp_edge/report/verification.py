"""What the demo found out about the exported programs, judged against the limits that they must keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from comp_edge.errors import InputError
from comp_edge.report import words

PROFILES = ("stock", "scheduled")
EXECUTORCH_LIMIT = 1e-4  # fp32 program against eager
COREML_LIMITS = {"fp32": 1e-4, "fp16": 1e-3}  # fp16 weights evaluated in fp32, against eager with the same weights


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        passed: None for what is reported without a limit.
    """

    program: str
    what: str
    value: str
    limit: str
    passed: bool | None


@dataclass(frozen=True)
class Latency:
    """Milliseconds from image and prompt to the first token, in one interleaved run."""

    dense: float
    pruned: float


def checks(verification: Mapping[str, Any]) -> list[Check]:
    """The lines of the verification table.

    Args:
        verification: the object that `comp-edge demo --json` prints; parts that are missing were not verified.

    Raises:
        InputError: a part is not what it should be; names it.
    """
    found: list[Check] = []
    executorch = _object(verification, "executorch")
    for profile in PROFILES:
        program, where = f"ExecuTorch, {profile}", f"executorch.{profile}"
        values = _object({where: executorch.get(profile)}, where)
        found += _error(program, "largest error of the logits", values, "max_abs_error", EXECUTORCH_LIMIT, where)
        equal = _get(values, "tokens_equal", bool, "true or false", where)
        if equal is not None:
            matched, asked = (_get(values, k, int, "an integer", where) for k in ("matched", "questions"))
            count = f", {matched} of {asked}" if matched is not None and asked is not None else ""
            found.append(Check(program, "generated tokens equal", ("yes" if equal else "no") + count, "all", equal))
        found += _plain(program, "latency", values, "latency_ms", lambda v: f"{v:.2f} ms", where)
    values = _object(verification, "coreml")
    for precision, limit in COREML_LIMITS.items():
        what = f"largest error, {precision}"
        found += _error("Core ML", what, values, f"{precision}_max_abs_error", limit, "coreml")
    found += _plain("Core ML", "same image tokens kept", values, "kept_set_agreement", words.percent, "coreml")
    return found


def latency(verification: Mapping[str, Any]) -> Latency | None:
    """Latency of the dense and the pruned model, where both were measured.

    Raises:
        InputError: a latency that is not a positive number.
    """
    both = [_number(_object(verification, side), "latency_ms", side) for side in ("dense", "pruned")]
    if None in both:
        return None
    if min(both) <= 0:
        raise InputError(f"verification: latency_ms must be above 0, got {min(both)}.")
    return Latency(*both)


def _error(program: str, what: str, values: Mapping[str, Any], key: str, limit: float, where: str) -> list[Check]:
    value = _number(values, key, where)
    if value is None:
        return []
    return [Check(program, what, words.small(value), f"\u2264 {words.small(limit)}", value <= limit)]


def _plain(
    program: str, what: str, values: Mapping[str, Any], key: str, write: Callable[[float], str], where: str
) -> list[Check]:
    value = _number(values, key, where)
    return [] if value is None else [Check(program, what, write(value), "", None)]


def _object(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"verification: {key} must be an object, got {value!r:.80}.")
    return value


def _number(values: Mapping[str, Any], key: str, where: str) -> float | None:
    if isinstance(values.get(key), bool):
        raise InputError(f"verification: {where}.{key} must be a number, got {values[key]!r}.")
    return _get(values, key, (int, float), "a number", where)


def _get(values: Mapping[str, Any], key: str, kind: Any, wanted: str, where: str) -> Any:
    value = values.get(key)
    if value is not None and not isinstance(value, kind):
        raise InputError(f"verification: {where}.{key} must be {wanted}, got {value!r:.80}.")
    return value
