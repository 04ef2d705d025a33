"""The whole pass: it meets the budget, tells what it did, resumes to the same plan, and refuses what cannot be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import comp_edge
from comp_edge.errors import InputError
from comp_edge.session import STATE_FILE
from comp_edge.settings import PruneConfig
from comp_edge.strategy import BASELINES, STRATEGIES

QUICK = PruneConfig(
    stages=4, stage_steps=2, final_steps=3, val_examples=30, calibration_batches=1, round_to=8, lr=1e-3, matrix_lr=1e-3
)


def prune(model: Any, task: Any, **options: Any) -> comp_edge.PruneResult:
    options = {"budget": comp_edge.Budget(macs=0.4), "config": QUICK, "base": "tiny", **options}
    return comp_edge.prune(model, task, **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_budget_is_met_and_the_folder_tells_how(
    tiny_model: Any, tiny_task: Any, tmp_path: Path, strategy: str
) -> None:
    dense = comp_edge.macs(tiny_model, prompt_tokens=tiny_task.prompt_length - 16)["total"]
    macs = 0.7 if strategy == "tokens" else 0.4  # fewer tokens than that would leave nothing to read
    result = prune(
        tiny_model, tiny_task, strategy=strategy, budget=comp_edge.Budget(macs=macs), out=tmp_path / "out", seed=3
    )
    assert result.plan.cost.dense == dense
    assert macs - 0.15 < result.plan.cost.pruned / dense <= macs
    assert comp_edge.macs(result.model)["total"] == result.plan.cost.pruned == result.metrics["pruned"]["macs"]
    loaded = comp_edge.load_pretrained(tmp_path / "out")
    assert loaded.comp_edge_plan == result.plan and result.plan.strategy == strategy and result.plan.seed == 3
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["pruned"]["test_score"] == tiny_task.score(loaded, tiny_task.test_batches())
    trace = [json.loads(line) for line in (tmp_path / "out" / "trace.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in trace] == list(range(1, len(trace) + 1))
    fractions = [1.0] + [line["cost_fraction"] for line in trace]
    assert all(b < a for a, b in zip(fractions, fractions[1:], strict=False))
    for line in trace:
        modes = ("params", "tokens") if strategy in BASELINES else comp_edge.families.family_of(loaded).modes(loaded)
        assert line["mode"] in modes
        assert line["why"] in ("first try", "explored", "cheapest", "in turn", "scouted") and line[
            "macs"
        ] == pytest.approx(line["cost"])
    assert not (tmp_path / "out.work").exists()
    if strategy == "probe":  # each stage is filled, so there are not many more stages than were asked for
        assert len(trace) <= 2 * QUICK.stages and all(line["also"] is not None for line in trace)
    if strategy in ("params", "tokens"):
        assert {line["mode"] for line in trace} == {strategy}
        assert (len(set(result.plan.streams["vision"].tokens)) == 1) == (strategy == "params")
    if strategy == "joint":
        assert [line["mode"] for line in trace[:2]] == ["params", "tokens"]
    if strategy == "comp":
        assert [line["why"] for line in trace[:4]] == ["first try"] * 4


def test_widths_are_multiples_where_layers_are_wide_enough(tiny_model: Any, tiny_task: Any) -> None:
    plan = prune(tiny_model, tiny_task, strategy="probe").plan
    for stream in plan.streams.values():
        assert all(len(layer.ffn) % QUICK.round_to == 0 for layer in stream.layers)


def test_stock_deployment_drops_nothing_in_the_language_model(tiny_model: Any, tiny_task: Any) -> None:
    plan = prune(tiny_model, tiny_task, strategy="probe", deploy="stock").plan
    assert len(set(plan.streams["language"].tokens)) == 1


def test_modes_can_be_restricted(make_model: Any, tiny_task: Any) -> None:
    config = PruneConfig(**{**QUICK.__dict__, "modes": ("vision_params", "language_params")})
    plan = prune(make_model(), tiny_task, config=config).plan
    assert all(len(set(stream.tokens)) == 1 for stream in plan.streams.values())


def test_same_seed_same_plan_and_weights(make_model: Any, tiny_task: Any) -> None:
    first, second = (prune(make_model(), tiny_task, strategy="comp", seed=5) for _ in range(2))
    assert first.plan == second.plan
    weights = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


@pytest.mark.parametrize("total", [0, 30])
def test_steps_in_all_are_bounded(make_model: Any, tiny_task: Any, total: int) -> None:
    """However many stages there are: fine-tuning gets what they leave."""
    config = PruneConfig(**{**QUICK.__dict__, "stage_steps": 1 if total else 0, "total_steps": total})
    dense, counted = make_model(), []
    result = prune(dense, tiny_task, config=config, evaluate=False, on_progress=lambda p: counted.append(p.done))
    assert result.metrics["steps"] == total == max(counted)
    assert (result.trace[0]["loss"] is None) == (total == 0)


class _Stop(Exception):
    """Stands for a kill: raised from the progress callback."""


@pytest.mark.parametrize("strategy", ["comp", "probe"])
@pytest.mark.parametrize("after", [3, 9])
def test_resumed_equals_uninterrupted(
    make_model: Any, tiny_task: Any, tmp_path: Path, strategy: str, after: int
) -> None:
    whole = prune(make_model(), tiny_task, strategy=strategy, out=tmp_path / "whole")

    def stop(progress: Any) -> None:
        if progress.step >= after:
            raise _Stop

    with pytest.raises(_Stop):
        prune(make_model(), tiny_task, strategy=strategy, out=tmp_path / "cut", on_progress=stop)
    assert not (tmp_path / "cut").exists()
    resumed = prune(make_model(), tiny_task, strategy=strategy, out=tmp_path / "cut", resume=True)
    assert resumed.plan == whole.plan
    weights = zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    measured = ("seconds", "peak_memory_bytes")
    kept, expected = (
        [{k: v for k, v in line.items() if k not in measured} for line in run.trace] for run in (resumed, whole)
    )
    assert kept == expected


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
import comp_edge
from tests import tiny
from tests.comp_edge.test_pruning import QUICK
comp_edge.prune(
    tiny.make_model(), tiny.TinyVQA(tiny.make_processor()), budget=comp_edge.Budget(macs=0.4), config=QUICK, base="tiny",
    strategy="probe", out=sys.argv[1], resume="resume" in sys.argv, evaluate=False,
)
"""


@pytest.mark.slow
def test_kill_9_and_resume(tmp_path: Path) -> None:
    """A process killed in the middle of pruning leaves no output; the resumed one ends with the same plan."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}

    def start(out: str, *more: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / out), *more], cwd=root, env=environment)

    assert start("whole").wait(timeout=300) == 0
    process = start("killed")
    checkpoint = tmp_path / "killed.work" / STATE_FILE
    deadline, first = time.time() + 300, None
    while time.time() < deadline and process.poll() is None:
        # Wait until a stage after the first checkpoint is booked, then kill without a warning.
        stamp = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        first = first or stamp
        if stamp is not None and stamp != first:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists() and checkpoint.exists()
    assert start("killed", "resume").wait(timeout=300) == 0
    assert (tmp_path / "killed" / "plan.json").read_bytes() == (tmp_path / "whole" / "plan.json").read_bytes()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]


def test_resuming_another_run_is_refused(make_model: Any, tiny_task: Any, tmp_path: Path) -> None:
    def stop(progress: Any) -> None:
        raise _Stop

    with pytest.raises(InputError, match="there is nothing to resume"):
        prune(make_model(), tiny_task, out=tmp_path / "x", resume=True)
    with pytest.raises(_Stop):
        prune(make_model(), tiny_task, out=tmp_path / "x", on_progress=stop)
    with pytest.raises(InputError, match="interrupted run had seed 0, this one has 1"):
        prune(make_model(), tiny_task, out=tmp_path / "x", seed=1, resume=True)
    state = tmp_path / "x.work" / STATE_FILE
    state.write_bytes(state.read_bytes()[:50])
    with pytest.raises(InputError, match="is damaged"):
        prune(make_model(), tiny_task, out=tmp_path / "x", resume=True)


def test_a_loss_that_is_not_finite_stops_with_the_last_stage_intact(
    make_model: Any, tiny_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prune(make_model(), tiny_task, out=tmp_path / "whole")
    logits, calls = type(tiny_task).logits, []

    def poisoned(self: Any, model: Any, batch: Any) -> Any:
        calls.append(1)
        result = logits(self, model, batch)
        return result * float("nan") if len(calls) > 12 and model.training else result

    monkeypatch.setattr(type(tiny_task), "logits", poisoned)
    with pytest.raises(FloatingPointError, match="not finite"):
        prune(make_model(), tiny_task, out=tmp_path / "cut")
    monkeypatch.undo()
    assert prune(make_model(), tiny_task, out=tmp_path / "cut", resume=True).plan == whole.plan


def test_what_cannot_be_pruned_says_so(make_model: Any, tiny_task: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown strategy 'best'; give one of params, tokens, joint, comp, probe"):
        prune(make_model(), tiny_task, strategy="best")
    with pytest.raises(InputError, match="unknown deployment 'phone'"):
        prune(make_model(), tiny_task, deploy="phone")
    with pytest.raises(InputError, match=r"asks for 0.0100 of the dense cost; the lowest .* can reach is 0\.\d+"):
        prune(make_model(), tiny_task, budget=comp_edge.Budget(macs=0.01))
    with pytest.raises(InputError, match="mode 'cross_params' is not one of the model's"):
        prune(make_model(), tiny_task, config=PruneConfig(modes=("cross_params",)))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; give a folder"):
        prune(make_model(), tiny_task, out=tmp_path / "file")


def test_a_pruned_folder_can_be_pruned_again(make_model: Any, tiny_task: Any, tmp_path: Path) -> None:
    """The second budget is a share of the model that is given; its plan speaks of the dense model's units."""
    first = prune(make_model(), tiny_task, budget=comp_edge.Budget(macs=0.7), out=tmp_path / "first", evaluate=False)
    model = comp_edge.load_pretrained(tmp_path / "first")
    second = prune(model, tiny_task, budget=comp_edge.Budget(macs=0.8), out=tmp_path / "second", base="ignored")
    assert second.plan.base == "tiny" and second.plan.cost.dense == first.plan.cost.pruned
    assert comp_edge.macs(second.model)["total"] <= 0.8 * comp_edge.macs(first.model)["total"]
    for name, stream in second.plan.streams.items():
        for kept, before in zip(stream.layers, first.plan.streams[name].layers, strict=True):
            assert set(kept.heads) <= set(before.heads) and set(kept.ffn) <= set(before.ffn)
    loaded = comp_edge.load_pretrained(tmp_path / "second")
    inputs = tiny_task.example_inputs()
    assert torch.allclose(loaded(**inputs).logits, second.model(**inputs).logits, atol=1e-6)


def test_a_cost_that_the_pruner_does_not_know(make_model: Any, tiny_task: Any) -> None:
    """The pruner asks `predict` only: a device whose time is all in the vision tokens makes it drop vision tokens."""

    class Device:
        name = "a device"

        def predict(self, plan: comp_edge.Plan) -> float:
            return 1.0 + sum(plan.streams["vision"].tokens)

    budget = comp_edge.Budget(speedup=1.3, cost=Device())
    result = prune(make_model(), tiny_task, budget=budget, strategy="probe", evaluate=False)
    assert {line["mode"] for line in result.trace} == {"vision_tokens"}
    assert result.plan.cost.name == "a device" and result.plan.cost.dense / result.plan.cost.pruned >= 1.3
    assert result.trace[-1]["predicted_ms"] == pytest.approx(result.plan.cost.pruned)
