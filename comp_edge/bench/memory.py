"""What the pruning pass needs in memory, against plain fine-tuning of the same model on batches of the same size."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# In a process of its own: imports are paid before the counting begins, the model's weights are not.
CHILD = """
import json, sys
from comp_edge.bench.memory import run
print(json.dumps(run(sys.argv[1], **json.loads(sys.argv[2]))))
"""
WAYS = ("plain", "prune")
VALIDATION = 250  # examples that score a stage: one batch, as more need time but no memory


def measure(
    model: str,
    *,
    task: str,
    batch: int,
    strategy: str = "probe",
    keep: float = 0.5,
    accumulate: int = 1,
    checkpointing: bool = False,
    steps: int = 4,
    rounds: int = 3,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Peak memory of both ways, each in a process of its own, in turns.

    Plain fine-tuning has the pass's optimizer and the task's own loss, no teacher and no validation. The pass is whole:
    a teacher, statistics, probes, validation, checkpoints, fine-tuning, saving.

    Args:
        model: a name that `load_dense` takes, with a processor.
        task: a task's name, as for the command line.
        batch: images of a training batch (pairs, for tasks of pairs).
        keep: fraction of the MACs that the pass keeps.
        accumulate, checkpointing: of both ways.
        steps: optimizer steps, of a stage and at the end; plain fine-tuning has as many as a stage and the end.

    Returns:
        `ratio` of the peaks (median of the rounds), and for each way its median `bytes` above what the imports hold and
        its `seconds`.
    """
    options = {
        "model": model,
        "task": task,
        "batch": batch,
        "strategy": strategy,
        "keep": keep,
        "accumulate": accumulate,
        "checkpointing": checkpointing,
        "steps": steps,
    }
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for round_ in range(rounds):
        for way, results in found.items():
            results.append(_child(way, options))
        progress(round_ + 1, rounds)
    middle = {way: {k: statistics.median(run[k] for run in runs) for k in runs[0]} for way, runs in found.items()}
    ratios = [prune["bytes"] / plain["bytes"] for plain, prune in zip(found["plain"], found["prune"], strict=True)]
    return {**options, **middle, "ratio": statistics.median(ratios), "rounds": rounds}


def run(
    way: str,
    *,
    model: str,
    task: str,
    batch: int,
    strategy: str,
    keep: float,
    accumulate: int,
    checkpointing: bool,
    steps: int,
) -> dict[str, float]:
    """One of the `WAYS` in this process (see `measure`): peak bytes above what it held before, and seconds."""
    import torch

    import comp_edge
    from comp_edge.checkpoint import load_dense, load_processor
    from comp_edge.memory import peak_bytes, reset_peak, resident_bytes
    from comp_edge.settings import PruneConfig
    from comp_edge.tasks import load_task

    torch.set_num_threads(1)
    processor = load_processor(model)  # before the counting: it imports the tokenizer's and the image library
    reset_peak()
    before, started = resident_bytes(), time.perf_counter()
    dense = load_dense(model)
    data: Any = load_task(task, processor, dense)
    for name in ("images_per_batch", "pairs_per_batch"):
        if hasattr(data, name):
            setattr(data, name, batch)
    config = PruneConfig(
        stages=2,
        stage_steps=steps,
        final_steps=steps,
        val_examples=VALIDATION,
        accumulate=accumulate,
        checkpointing=checkpointing,
    )
    peak = 0
    if way == "plain":
        _fine_tune(dense, data, config, steps=2 * steps)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = comp_edge.prune(
                dense,
                data,
                budget=comp_edge.Budget(macs=keep),
                strategy=strategy,
                config=config,
                processor=processor,
                out=Path(folder) / "out",
                evaluate=False,
            )
            peak = result.metrics["peak_memory_bytes"]  # of all stages: each lets the kernel's record begin anew
    return {"bytes": max(peak, peak_bytes()) - before, "seconds": time.perf_counter() - started}


def _fine_tune(model: Any, task: Any, config: Any, *, steps: int) -> None:
    from itertools import islice

    from comp_edge.microbatches import micro_batches
    from comp_edge.optim import Optimizer
    from comp_edge.recomputation import Recomputation

    if config.checkpointing:
        Recomputation(model)
    optimizer = Optimizer(model.named_parameters(), matrix_lr=config.matrix_lr, lr=config.lr, muon=config.muon)
    model.train()
    for batch in islice(task.train_batches(17), steps):
        parts = micro_batches(task, batch, config.accumulate)
        optimizer.step_in_parts((weight * task.loss(model, part) for weight, part in parts), factor=1.0)


def _child(way: str, options: dict[str, Any]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, way, json.dumps(options)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{way} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
