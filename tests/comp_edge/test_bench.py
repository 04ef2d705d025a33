"""The benchmark commands measure what they say; how fast this machine is, is not tested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from comp_edge.bench.loading import same_size
from comp_edge.bench.speed import spread_plan
from comp_edge.cli.main import main
from comp_edge.cost import MacsCost
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.state import State
from comp_edge.units import check_plan
from tests import tiny
from tests.families import case_named


@pytest.mark.parametrize("name", ["clip", "smolvlm", "qwen2.5-vl", "blip-vqa"])
def test_a_spread_plan_takes_from_every_mode(name: str) -> None:
    case = case_named(name)
    model = case.model()
    state = State.of(model, base="", request=family_of(model).request(model, case.inputs([0], prompt_lengths=14)))
    plan, cost = spread_plan(model, keep=0.6, state=state), MacsCost(model)
    check_plan(model, plan)
    assert cost.predict(plan) <= 0.6 * cost.predict(state.plan())
    assert plan == spread_plan(model, keep=0.6, state=state)  # the same every time
    for mode in family_of(model).modes(model):
        stream, what = mode.rsplit("_", 1)
        before, after = state.template.streams[stream], plan.streams[stream]
        assert before.layers != after.layers if what == "params" else before.schedule != after.schedule
    with pytest.raises(
        InputError, match="keeping 0.001 of the MACs was asked for; the lowest that can be reached is 0"
    ):
        spread_plan(model, keep=0.001, state=state)


def test_the_twin_has_the_pruned_models_size(make_model: Any) -> None:
    model = make_model(ffn=256)
    whole = sum(p.numel() for p in model.parameters())
    twin = same_size(model, int(0.7 * whole))
    assert sum(p.numel() for p in twin.parameters()) == pytest.approx(0.7 * whole, rel=0.04)
    assert len(twin.model.language_model.layers) == len(model.model.language_model.layers)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "tiny"
    tiny.make_model(ffn=256).save_pretrained(folder)
    tiny.make_processor().save_pretrained(folder)
    return folder


def test_bench_speed(dense: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "speed", str(dense), "--keep", "0.6", "--rounds", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["results"][0]
    assert result["macs"]["pruned"] <= 0.6 * result["macs"]["dense"]
    assert result["ideal"] == pytest.approx(result["macs"]["dense"] / result["macs"]["pruned"])
    assert result["efficiency"] == pytest.approx(result["speedup"] / result["ideal"])
    assert result["spread"][0] <= result["speedup"] <= result["spread"][1]
    assert main(["bench", "speed", str(dense), "--keep", "0.6", "--rounds", "1"]) == 0
    assert "of ideal" in capsys.readouterr().out


@pytest.mark.slow
def test_bench_load(dense: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "load", str(dense), "--keep", "0.6", "--rounds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["results"][0]
    assert result["pruned"]["weights"] == pytest.approx(result["dense"]["weights"], rel=0.05)
    assert result["time_ratio"] > 0 and result["memory_ratio"] > 0


def test_what_cannot_be_measured(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "speed", "no-such-model"]) == 2
    assert "unknown model 'no-such-model'" in capsys.readouterr().err
