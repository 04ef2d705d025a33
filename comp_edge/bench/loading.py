"""What loading a pruned folder costs, against transformers loading a dense model of the same size."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comp_edge.bench.speed import spread_plan
from comp_edge.checkpoint import save_pretrained
from comp_edge.families import family_of
from comp_edge.reference.shapes import random_model
from comp_edge.state import State
from comp_edge.structure import empty_model
from comp_edge.surgery import apply_plan

# Loads in a process of its own, touches every weight (both sides map the file), and says what that took.
CHILD = """
import json, sys, time
import torch, transformers
from comp_edge.checkpoint import load_pretrained
from comp_edge.memory import peak_bytes, reset_peak, resident_bytes
how, folder, kind = sys.argv[1:]
torch.set_num_threads(1)
getattr(transformers, kind)
reset_peak()
before, started, cpu = resident_bytes(), time.perf_counter(), time.process_time()
model = load_pretrained(folder) if how == "pruned" else getattr(transformers, kind).from_pretrained(folder, dtype="auto")
with torch.no_grad():
    total = sum(float(p.sum(dtype=torch.float32)) for p in model.parameters())
print(json.dumps({
    "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu,
    "bytes": peak_bytes() - before, "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
}))
"""


def measure(dense: Any, *, keep: float, rounds: int, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Seconds and peak memory of loading, pruned and dense in turns.

    The dense model has the same architecture and layers with equal widths, such that its weights have the pruned one's size.
    """
    family, kind = family_of(dense), type(dense).__name__
    state = State.of(dense, base="", request=family.default_request(dense, 32))
    twin = same_size(dense, plan_parameters := _pruned_parameters(dense, state, keep))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        twin.save_pretrained(root / "dense")
        plan = spread_plan(dense, keep=keep, state=state)
        apply_plan(dense, plan)
        save_pretrained(dense, plan, root / "pruned")
        found: dict[str, list[dict[str, float]]] = {"dense": [], "pruned": []}
        for round_ in range(-1, rounds):  # the first fills the page cache
            for how, results in found.items():
                result = _child(how, root / how, kind)
                if round_ >= 0:
                    results.append(result)
            if round_ >= 0:
                progress(round_ + 1, rounds)
    pairs = list(zip(found["pruned"], found["dense"], strict=True))
    middle = {
        how: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for how, runs in found.items()
    }
    return {
        "parameters": plan_parameters,
        **middle,
        "time_ratio": _ratio(pairs, "cpu_seconds"),
        "memory_ratio": _ratio(pairs, "bytes"),
        "rounds": rounds,
    }


def _ratio(pairs: list[tuple[dict[str, float], dict[str, float]]], name: str) -> float:
    """Pruned over dense, each per byte of its weights: feed-forwards alone cannot make the twin as small as may be."""
    return statistics.median((a[name] / a["weights"]) / (b[name] / b["weights"]) for a, b in pairs)


def _pruned_parameters(dense: Any, state: State, keep: float) -> int:
    model = empty_model(dense.config)
    apply_plan(model, spread_plan(dense, keep=keep, state=state))
    return sum(parameter.numel() for parameter in model.parameters())


def same_size(model: Any, parameters: int) -> Any:
    """A dense model of the same architecture and depth with about so many parameters: its feed-forwards are narrower."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]
    parts = {id(c): c for c in (config.vision_config, config.get_text_config())}
    low, high = 0.0, 1.0
    widths = {key: part.intermediate_size for key, part in parts.items()}
    for _ in range(20):
        share = (low + high) / 2
        for key, part in parts.items():
            part.intermediate_size = max(8, int(widths[key] * share) // 8 * 8)
        size = sum(p.numel() for p in empty_model(config).parameters())
        low, high = (share, high) if size < parameters else (low, share)
    return random_model(config, dtype=model.dtype)


def _child(how: str, folder: Path, kind: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, how, str(folder), kind], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"loading {how} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
