"""The memory of a pass against that of plain fine-tuning, as the benchmark measures it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest

from comp_edge.bench.memory import measure

MOST = 1.6  # times the peak of plain fine-tuning with the same batch


@lru_cache
def measured(strategy: str) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """With a batch whose activations outweigh the rest; language tokens are dropped on the way, and nothing is shared then."""
    told: list[tuple[int, int]] = []
    found = measure(**options(strategy), progress=lambda done, total: told.append((done, total)))
    return found, told


def options(strategy: str) -> dict[str, Any]:
    return {
        "model": "llava-digits",
        "task": "digit_vqa",
        "batch": 24,
        "strategy": strategy,
        "keep": 0.7,
        "steps": 1,
        "rounds": 1,
    }


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["comp", "probe"])
def test_a_pass_needs_little_more_than_fine_tuning(strategy: str) -> None:
    found, told = measured(strategy)
    assert told == [(1, 1)] and found["strategy"] == strategy
    assert 2e8 < found["plain"]["bytes"] < 2e9 and found["plain"]["seconds"] > 0
    assert found["ratio"] == found["prune"]["bytes"] / found["plain"]["bytes"] <= MOST


@pytest.mark.slow
def test_less_memory_is_possible() -> None:
    """Micro-batches and checkpointing take from both ways what activations need."""
    whole, _ = measured("comp")
    less = measure(**options("comp"), accumulate=4, checkpointing=True)
    for way in ("plain", "prune"):
        assert less[way]["bytes"] < whole[way]["bytes"]
    assert less["plain"]["bytes"] < 0.8 * whole["plain"]["bytes"]
