"""Budgets that can be measured: predictions are checked, and the aim is corrected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import comp_edge
from comp_edge.correction import CLOSE, ROUNDS, Correction
from comp_edge.cost import MacsCost
from comp_edge.errors import InputError
from tests.comp_edge.test_pruning import QUICK


class Milliseconds:
    """A cost in proportion to MACs, which the device answers with a truth of its own."""

    name = "latency_ms:formula"

    def __init__(self, model: Any, truth: Any) -> None:
        self.macs, self.truth, self.asked = MacsCost(model), truth, 0

    def predict(self, plan: comp_edge.Plan) -> float:
        return self.macs.predict(plan) / 1e4

    def measure(self, plan: comp_edge.Plan) -> float | None:
        self.asked += 1
        return self.truth(self.predict(plan))

    def describe(self, dense: comp_edge.Plan, plan: comp_edge.Plan) -> dict[str, Any]:
        return {"predicted_ms": {"dense": self.predict(dense), "pruned": self.predict(plan)}}


def prune(model: Any, task: Any, truth: Any, *, keep: float = 0.6, **options: Any) -> tuple[Any, Milliseconds, float]:
    cost = Milliseconds(model, truth)
    dense = comp_edge.macs(model, prompt_tokens=task.prompt_length - 16)["total"] / 1e4
    budget = comp_edge.Budget(latency_ms=keep * dense, cost=cost)
    given = {"config": QUICK, "base": "tiny", "strategy": "params", "evaluate": False, **options}
    return comp_edge.prune(model, task, budget=budget, **given), cost, keep * dense


def test_a_true_prediction_is_left_alone(tiny_model: Any, tiny_task: Any) -> None:
    result, cost, target = prune(tiny_model, tiny_task, lambda ms: ms)
    assert cost.asked == 1 and len(result.metrics["measured"]) == 1
    assert result.metrics["measured"][0]["measured"] <= target
    assert result.metrics["device"]["predicted_ms"]["pruned"] == result.plan.cost.pruned


def test_a_device_that_is_slower_than_predicted_gets_a_smaller_model(tiny_model: Any, tiny_task: Any) -> None:
    result, cost, target = prune(tiny_model, tiny_task, lambda ms: 1.25 * ms)
    measured = [entry["measured"] for entry in result.metrics["measured"]]
    assert len(measured) == cost.asked >= 2
    assert measured[0] > target * CLOSE and measured[-1] <= target * CLOSE
    assert cost.predict(result.plan) <= target / 1.25 * 1.001
    stages = [entry["stage"] for entry in result.metrics["measured"]]
    assert stages == sorted(set(stages)) and stages[-1] == len(result.trace)
    assert result.metrics["steps"] == len(result.trace) * QUICK.stage_steps + QUICK.final_steps


def test_a_device_that_goes_on_being_slower_is_asked_no_more_than_agreed(tiny_model: Any, tiny_task: Any) -> None:
    # Half of the time is nothing that pruning could take away.
    result, cost, target = prune(tiny_model, tiny_task, lambda ms: 10.0 + 0.9 * ms, keep=0.9)
    assert cost.asked <= ROUNDS + 1 and len(result.metrics["measured"]) == cost.asked


def test_without_the_device_predictions_are_all_there_is(tiny_model: Any, tiny_task: Any) -> None:
    result, cost, target = prune(tiny_model, tiny_task, lambda ms: None)
    assert result.metrics["measured"] == [] and cost.predict(result.plan) <= target


def test_a_run_that_is_killed_after_measuring_does_not_measure_again(
    tiny_model: Any, tiny_task: Any, tmp_path: Path
) -> None:
    import copy

    out, whole = tmp_path / "killed", tmp_path / "whole"
    again = copy.deepcopy(tiny_model)

    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if "measured" in progress.message:
            raise Stop

    with pytest.raises(Stop):
        prune(copy.deepcopy(tiny_model), tiny_task, lambda ms: 1.25 * ms, out=out, on_progress=stop)
    resumed, cost, _ = prune(again, tiny_task, lambda ms: 1.25 * ms, out=out, resume=True)
    direct, other, _ = prune(tiny_model, tiny_task, lambda ms: 1.25 * ms, out=whole)
    assert cost.asked == other.asked - 1
    assert resumed.plan == direct.plan and resumed.metrics["measured"] == direct.metrics["measured"]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert json.loads((out / "metrics.json").read_text())["measured"] == direct.metrics["measured"]


def test_a_budget_that_the_dense_model_meets_is_refused(tiny_model: Any, tiny_task: Any) -> None:
    with pytest.raises(InputError, match="asks for nothing"):
        prune(tiny_model, tiny_task, lambda ms: ms, keep=1.5)


def test_the_aim_follows_what_was_measured() -> None:
    correction = Correction(10.0)
    assert correction.aim == 10.0
    assert correction.book({"stage": 3, "predicted": 9.9, "measured": 12.0})
    assert correction.aim == pytest.approx(10.0 * 9.9 / 12.0)
    assert not correction.book({"stage": 4, "predicted": 8.2, "measured": 10.05}), "as close as can be told"
    faster = Correction(10.0)
    assert not faster.book({"stage": 3, "predicted": 9.9, "measured": 5.0})
    assert faster.aim == 10.0, "what is fast enough stays as it is"
