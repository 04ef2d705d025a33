"""The memory of a pass against that of plain fine-tuning, as the benchmark measures it."""

from __future__ import annotations

import pytest

from comp_edge.bench.memory import measure

MOST = 1.6  # times the peak of plain fine-tuning with the same batch


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["comp", "probe"])
def test_a_pass_needs_little_more_than_fine_tuning(strategy: str) -> None:
    """With a batch whose activations outweigh the rest; language tokens are dropped on the way, and nothing is shared then."""
    told: list[tuple[int, int]] = []
    found = measure(
        "llava-digits", task="digit_vqa", batch=24, strategy=strategy, keep=0.7, steps=1, rounds=1,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(1, 1)] and found["strategy"] == strategy
    assert 2e8 < found["plain"]["bytes"] < 2e9 and found["plain"]["seconds"] > 0
    assert found["ratio"] == found["prune"]["bytes"] / found["plain"]["bytes"] <= MOST


@pytest.mark.slow
def test_less_memory_is_possible() -> None:
    """Micro-batches and checkpointing take from both ways what activations need."""
    options = {"task": "digit_vqa", "batch": 24, "strategy": "comp", "keep": 0.9, "steps": 1, "rounds": 1}
    whole = measure("llava-digits", **options)
    less = measure("llava-digits", accumulate=4, checkpointing=True, **options)
    for way in ("plain", "prune"):
        assert less[way]["bytes"] < whole[way]["bytes"]
    assert less["plain"]["bytes"] < 0.8 * whole["plain"]["bytes"]
