"""`comp-edge bench budget`: are budgets in milliseconds met, and is steering by milliseconds worth it?

* Training-free passes to several budgets, each result timed once more, apart from what corrected the pass.
* Passes with training to the same measured milliseconds, one steered by predicted milliseconds, the other by MACs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comp_edge.budget import Budget
from comp_edge.checkpoint import load_dense, load_processor
from comp_edge.cost import MacsCost
from comp_edge.errors import InputError
from comp_edge.files import read_json, write_bytes, write_json
from comp_edge.plan import Plan
from comp_edge.pruning import prune
from comp_edge.settings import PruneConfig
from comp_edge.tasks import load_task
from devices.errors import DeviceError
from devices.loop import DeviceCost
from devices.pictures import steered_png
from devices.profiling import profile

RESULTS_FILE, PICTURE_FILE, PROFILE_FILE, PARTS = "results.json", "steered.png", "profile.json", "parts"
ALLOWED = 1.03  # times the budget: what a measurement of the result may show
KEEPS = (0.8, 0.74, 0.68, 0.62, 0.56, 0.5, 0.44, 0.38, 0.32, 0.26)  # of the dense milliseconds
STEERED, SEEDS = (0.5, 0.35), (0, 1, 2)
QUICK_KEEPS, QUICK_STEERED, QUICK_SEEDS, QUICK_STEPS = (0.6, 0.4), (0.5,), (0,), 24
DRIVERS = ("latency", "macs")
Progress = Callable[[int, int, str], None]


class ByMacs:
    """Milliseconds as one would guess them from MACs alone; measured like any other budget.

    Args:
        cost: what the device takes; its dense milliseconds are where the guess begins.
        dense: the plan that keeps everything.
    """

    def __init__(self, cost: DeviceCost, model: Any, dense: Plan) -> None:
        self.name = f"macs, in {cost.name}"
        self._cost, self._macs = cost, MacsCost(model, decode_tokens=cost.model.decode_tokens)
        self._rate = cost.predict(dense) / self._macs.predict(dense)

    def predict(self, plan: Plan) -> float:
        """Milliseconds in proportion to MACs."""
        return self._rate * self._macs.predict(plan)

    def measure(self, plan: Plan) -> float | None:
        """Milliseconds that the device takes."""
        return self._cost.measure(plan)


def run(
    model: str,
    *,
    task: str,
    out: Path,
    device: str = "host",
    steps: int | None = None,
    decode_tokens: int = 0,
    quick: bool = False,
    jobs: int = 1,
    on_progress: Progress = lambda done, total, text: None,
) -> dict[str, Any]:
    """Run what is missing, write `results.json`; returns what it holds.

    Args:
        steps: optimizer steps of each pass that trains; by default as many as `comp-edge prune` takes.
        jobs: processes that lower the programs of the profile.

    Raises:
        InputError: the model, the task or the device cannot be used.
    """
    try:
        measured = profile(device, model, out=out / PROFILE_FILE, jobs=jobs, on_progress=on_progress)
        cost = DeviceCost(measured, decode_tokens=decode_tokens)
    except DeviceError as error:
        raise InputError(str(error)) from None
    bench = _Bench(model, task, cost, out, steps=steps or (QUICK_STEPS if quick else None))
    keeps, steered, seeds = (QUICK_KEEPS, QUICK_STEERED, QUICK_SEEDS) if quick else (KEEPS, STEERED, SEEDS)
    passes = [*bench.budgets(keeps), *bench.steered(steered, seeds)]
    for done, (name, call) in enumerate(passes):
        on_progress(done, len(passes), name)
        if not bench.file(name).is_file():
            write_json(bench.file(name), call())
    results = summarize([read_json(bench.file(name), what="part") for name, _ in passes])
    write_json(out / RESULTS_FILE, {"model": model, "task": task, "device": device, **results})
    write_bytes(out / PICTURE_FILE, steered_png([part for part in results["parts"] if part["kind"] == "steered"]))
    return results


def summarize(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over all parts: how many budgets are met, and paired differences of the two ways to steer at equal milliseconds.

    `steered` has the mean of the scores' differences and of `faster` (how much faster milliseconds steer at equal score), each
    with its standard error, and by driver how many passes with training met their budgets.
    """
    budgets = [part for part in parts if part["kind"] == "budget"]
    steered = [part for part in parts if part["kind"] == "steered"]
    pairs = []
    for latency in (part for part in steered if part["driven_by"] == "latency"):
        for macs in steered:
            same = all(macs[key] == latency[key] for key in ("seed", "budget_ms"))
            if macs["driven_by"] == "macs" and same:
                pairs.append(
                    {
                        "seed": latency["seed"],
                        "budget_ms": latency["budget_ms"],
                        "score": latency["score"] - macs["score"],
                    }
                )
    faster, scores = list(_faster(steered)), [pair["score"] for pair in pairs]
    return {
        "budgets": {
            "n": len(budgets),
            "met": _met(budgets),
            "worst": max((part["measured_ms"] / part["budget_ms"] for part in budgets), default=None),
        },
        "steered": {
            "pairs": pairs,
            "met": {driver: _met([part for part in steered if part["driven_by"] == driver]) for driver in DRIVERS},
            "score": statistics.mean(scores) if scores else None,
            "score_error": _error(scores),
            "faster": statistics.mean(faster) if faster else None,
            "faster_error": _error(faster),
            "faster_each": faster,
        },
        "parts": list(parts),
    }


def _met(parts: Sequence[dict[str, Any]]) -> int:
    return sum(part["measured_ms"] <= part["budget_ms"] * ALLOWED for part in parts)


def _error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None of a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def _faster(steered: Sequence[dict[str, Any]]) -> Iterator[float]:
    """How much faster than each model that MACs steered one of the same score is that milliseconds steered.

    Between two budgets of a seed milliseconds are interpolated over the score; beyond them nothing is known.
    """
    for seed in sorted({part["seed"] for part in steered}):
        line = sorted(
            (part["score"], part["measured_ms"])
            for part in steered
            if part["seed"] == seed and part["driven_by"] == "latency"
        )
        for part in steered:
            if part["seed"] == seed and part["driven_by"] == "macs" and len(line) > 1:
                scores, times = zip(*line, strict=True)
                if scores[0] <= part["score"] <= scores[-1]:
                    yield part["measured_ms"] / float(np.interp(part["score"], scores, times)) - 1


class _Bench:
    """The passes of one model to budgets on one device."""

    def __init__(self, model: str, task: str, cost: DeviceCost, out: Path, *, steps: int | None) -> None:
        self.model, self.task, self.cost, self.out = model, task, cost, out
        self.config = PruneConfig() if steps is None else PruneConfig().sharing(steps)

    def file(self, name: str) -> Path:
        """Where a part is kept."""
        return self.out / PARTS / f"{name}.json"

    def budgets(self, keeps: Sequence[float]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """Training-free passes, one to each share of the dense milliseconds."""
        for keep in keeps:
            yield f"budget-{keep:.2f}", lambda keep=keep: self._budget(keep)

    def steered(
        self, keeps: Sequence[float], seeds: Sequence[int]
    ) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """Passes with training, by each way to steer."""
        for keep in keeps:
            for seed in seeds:
                for driver in DRIVERS:
                    yield f"{driver}-{keep:.2f}-{seed}", lambda k=keep, s=seed, d=driver: self._steered(k, s, d)

    def _budget(self, keep: float) -> dict[str, Any]:
        result, target = self._prune(keep, "latency", strategy="joint", seed=0, config=PruneConfig().sharing(0))
        return {"kind": "budget", "keep": keep, "budget_ms": target, **self._again(result)}

    def _steered(self, keep: float, seed: int, driver: str) -> dict[str, Any]:
        result, target = self._prune(keep, driver, strategy="probe", seed=seed, config=self.config, evaluate=True)
        return {
            "kind": "steered",
            "driven_by": driver,
            "keep": keep,
            "seed": seed,
            "budget_ms": target,
            "score": result.metrics["pruned"]["test_score"],
            "dense_score": result.metrics["dense"]["test_score"],
            "macs_kept": result.metrics["macs_kept"],
            "steps": result.metrics["steps"],
            **self._again(result),
        }

    def _again(self, result: Any) -> dict[str, Any]:
        """The plan timed once more, apart from what corrected the pass.

        Raises:
            InputError: the device is not attached any more.
        """
        rounds, measured = result.metrics["measured"], self.cost.measure(result.plan)
        if measured is None:
            raise InputError(f"{self.cost.notes[-1]} Attach it and give the same command again.")
        return {"rounds": rounds, "measured_ms": measured, "plan": result.plan.to_json()}

    def _prune(self, keep: float, driver: str, *, evaluate: bool = False, **options: Any) -> tuple[Any, float]:
        model, processor = load_dense(self.model), load_processor(self.model)
        dense = self.cost.model.profile.points[0].parsed_plan()
        task = load_task(self.task, processor, model)
        target = keep * self._dense_ms(model, task)
        cost = self.cost if driver == "latency" else ByMacs(self.cost, model, dense)
        budget = Budget(latency_ms=target, cost=cost)
        return prune(model, task, budget=budget, base=self.model, evaluate=evaluate, **options), target

    def _dense_ms(self, model: Any, task: Any) -> float:
        """Predicted milliseconds of the dense model on the task's own request."""
        from comp_edge.families import family_of
        from comp_edge.state import State

        request = family_of(model).request(model, task.example_inputs())
        return self.cost.predict(State.of(model, base=self.model, request=request).plan())
