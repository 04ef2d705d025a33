"""Static schedule against per-image thresholds: both trained alike from the same dense model, at equal mean costs.

The schedule is the one that the `tokens` strategy finds for the reduction. Its weights are not used: they were trained under
that schedule. Both sides begin with the dense model, take the same number of optimizer steps on the same batches with the
same objective, and are scored on the test split once, at the end.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from comp_edge.bench.method.dense import test_batches
from comp_edge.bench.method.pool import Failure, Job
from comp_edge.bench.parts import PARTS, finished_part, run_parts, write_part
from comp_edge.bench.thresholds import (
    STREAM,
    Thresholds,
    calibration_pixels,
    check_per_image,
    mean_macs,
    train_scheduled,
)
from comp_edge.budget import Budget
from comp_edge.checkpoint import load_dense, load_processor
from comp_edge.cost import MacsCost
from comp_edge.digests import weights_digest
from comp_edge.families import family_of
from comp_edge.options import flat
from comp_edge.recovery import Distillation
from comp_edge.schedule import attach
from comp_edge.session import FINE_TUNING, Session
from comp_edge.settings import PruneConfig
from comp_edge.state import State
from comp_edge.tasks import load_task

SCHEDULE, STATIC, DYNAMIC = "schedule", "static", "dynamic"
ARMS = (STATIC, DYNAMIC)


@dataclass(frozen=True)
class Comparison:
    """One reduction with one seed.

    Attributes:
        dense: what to load as the dense model; `model` is what it is called.
        steps: optimizer steps of each side.
        images: training images that thresholds are set on.
        test_examples: the score is that of the first so many test examples; None for all.
    """

    out: Path
    model: str
    dense: str
    task: str
    reduction: float
    seed: int
    steps: int
    config: PruneConfig = field(default_factory=PruneConfig)
    images: int = 512
    test_examples: int | None = None

    @functools.cached_property
    def weights(self) -> str | None:
        """A digest of the dense model's weights."""
        return weights_digest(self.dense)

    @property
    def options(self) -> dict[str, Any]:
        """What the numbers depend on, besides reduction and seed."""
        named = {"model": self.model, "task": self.task, "images": self.images, "test_examples": self.test_examples}
        named["dense_weights"] = self.weights
        return {**flat(self.config), **named, "steps": self.steps}

    def part(self, name: str) -> Path:
        """The file of the schedule or of a side."""
        return self.out / PARTS / f"{name}-reduction-{self.reduction}-seed-{self.seed}.json"

    def finished(self, name: str) -> dict[str, Any] | None:
        """What it holds (see `finished_part`)."""
        return finished_part(self.part(name), self.options)

    def write(self, name: str, record: dict[str, Any]) -> dict[str, Any]:
        """Write it."""
        labels = {"model": self.model, "arm": name, "reduction": self.reduction, "seed": self.seed}
        write_part(self.part(name), labels | record, self.options)
        return record

    @property
    def cost(self) -> int:
        """What is to be done, in optimizer steps."""
        search = self.config.stages * self.config.stage_steps
        return sum(self.steps for arm in ARMS if not self.finished(arm)) + search * (not self.finished(SCHEDULE))


def run(
    comparisons: Sequence[Comparison],
    *,
    workers: int,
    on_progress: Callable[[int, int, str], None],
) -> list[Failure]:
    """Run what is not finished, each comparison in a worker process.

    Returns:
        the comparisons that went wrong.

    Raises:
        InputError: the folder holds parts with other options, or another run is at work in it.
    """

    def list_jobs() -> Iterator[Job]:
        for comparison in comparisons:
            if cost := comparison.cost:
                name = f"reduction {comparison.reduction} seed {comparison.seed}"
                yield Job(name, functools.partial(run_comparison, comparison), cost, name)

    return run_parts(comparisons[0].out, list_jobs, workers=workers, on_progress=on_progress)


def run_comparison(comparison: Comparison, tell: Callable[[int, str], None]) -> None:
    """Find the schedule, train and score both sides; what is finished is left as it is.

    Args:
        tell: gets the optimizer steps that are done, and what is going on.

    Raises:
        InputError: a model whose images cannot keep different numbers of tokens, or a reduction that dropping tokens cannot
            reach.
    """
    done = 0
    found = comparison.finished(SCHEDULE)
    if found is None:
        found = comparison.write(SCHEDULE, find_schedule(comparison, lambda step: tell(step, "find the schedule")))
        done = comparison.config.stages * comparison.config.stage_steps
    for arm in ARMS:
        if comparison.finished(arm) is None:

            def told(step: int, before: int = done, name: str = arm) -> None:
                tell(before + step, f"train {name}")

            comparison.write(arm, run_arm(comparison, arm, found["tokens"], told))
            done += comparison.steps


def _load(comparison: Comparison) -> tuple[Any, Any]:
    model = load_dense(comparison.dense)
    return model, load_task(comparison.task, load_processor(comparison.dense), model)


def find_schedule(comparison: Comparison, tell: Callable[[int], None]) -> dict[str, Any]:
    """The token schedule of each stream that the `tokens` strategy comes to, and what the dense model scores."""
    model, task = _load(comparison)
    check_per_image(model)
    dense_score = task.score(model, test_batches(task, comparison.test_examples))
    most = comparison.config.stages * comparison.config.stage_steps
    session = Session(
        model,
        task,
        budget=Budget(macs=round(1 - comparison.reduction, 12)),
        strategy="tokens",
        out=None,
        seed=comparison.seed,
        config=comparison.config,
        base=comparison.model,
        deploy="any",
        on_progress=lambda progress: tell(min(progress.step, most)),
    )
    session.start(evaluate=False)
    session.advance()
    return {"tokens": session.state.tokens, "stages": session.stage, "dense_score": dense_score}


def run_arm(
    comparison: Comparison, arm: str, tokens: dict[str, list[int]], tell: Callable[[int], None]
) -> dict[str, Any]:
    """Train one side from the dense model, and score it.

    Args:
        tokens: the static schedule of each stream.

    Returns:
        `score`; `macs`, the mean over the images of the test split, beside those of the static schedule and of the dense model;
        `counts` and `deviations`, mean and standard deviation of the tokens of each vision layer; and what it took.
    """
    model, task = _load(comparison)
    config, seed = comparison.config, comparison.seed
    request = family_of(model).request(model, task.example_inputs())
    state, cost = State.of(model, request=request, base=comparison.model), MacsCost(model)
    dense_macs = cost.predict(state.plan())
    state.tokens = {name: list(counts) for name, counts in tokens.items()}
    plan = state.plan()
    distillation = Distillation(model, task, weight=config.distill, hidden=config.distill_hidden)
    schedule = attach(model, state.tokens)
    thresholds, seconds = None, {"training": 0.0, "calibration": 0.0}
    recalibrate = None
    if arm == DYNAMIC:
        thresholds = Thresholds(model, norm=config.token_norm)
        pixels = calibration_pixels(task.train_batches(seed * 7919 + 1), comparison.images)

        def recalibrate() -> None:
            started = time.perf_counter()
            thresholds.calibrate(pixels)
            seconds["calibration"] += time.perf_counter() - started

    started = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        samples = train_scheduled(
            model,
            task,
            distillation,
            steps=comparison.steps,
            seed=seed * 100_003 + 17 + FINE_TUNING,
            config=config,
            recalibrate=recalibrate,
            tell=tell,
        )
    seconds["training"] = time.perf_counter() - started - seconds["calibration"]
    static = torch.tensor([schedule.tokens[STREAM]])
    counts = [static]
    if thresholds is None:
        score = task.score(model, test_batches(task, comparison.test_examples))
    else:
        with thresholds.noting() as counts:
            score = task.score(model, test_batches(task, comparison.test_examples))
    every = torch.cat(counts).double()
    return {
        "score": score,
        "macs": mean_macs(cost, plan, counts),
        "static_macs": cost.predict(plan),
        "dense_macs": dense_macs,
        "counts": every.mean(0).tolist(),
        "deviations": every.std(0, correction=0).tolist(),
        "thresholds": None if thresholds is None else {str(k): v for k, v in thresholds.values.items()},
        "steps": comparison.steps,
        "samples": samples,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }
