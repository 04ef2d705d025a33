"""MPS as published, by hand and by frequency; what strategies use."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comp_edge.settings import PruneConfig
from comp_edge.strategy import MPS, STRATEGIES, MPSConfig, history_weight, strategy_modes, turn

MODES = ["vision_params", "language_params", "vision_tokens", "language_tokens"]
NEVER, ALWAYS = MPSConfig(explore=0.0), MPSConfig(explore=1.0)


def tried(config: MPSConfig = NEVER) -> MPS:
    """Every mode ran once, in stages 0 to 3; the third lost least per unit of cost."""
    costs = dict(zip(MODES, [0.4, 0.3, 0.1, 0.2], strict=True))
    return MPS(config, costs=costs, last={mode: stage for stage, mode in enumerate(MODES)})


def test_the_published_constants():
    assert MPSConfig() == MPSConfig(explore=0.2, temperature=5.0, history=0.4, horizon=5)


def test_history_weight_by_hand():
    got = [history_weight(idle, MPSConfig()) for idle in range(1, 9)]
    np.testing.assert_allclose(got, [0.4, 0.32, 0.24, 0.16, 0.08, 0.0, 0.0, 0.0], atol=1e-12)


def test_cost_arithmetic_by_hand():
    """R_m <- lambda R_m + (1 - lambda) r, with r = (score after - before) / (cost after - before)."""
    mps = MPS()
    # Stage 0: 2 points lost for 5 % of the cost: r = 0.4. There is no history yet.
    assert math.isclose(mps.update("a", stage=0, score_change=-0.02, cost_change=-0.05), 0.4)
    # Stage 1, one stage later: lambda = 0.4; r = 0.1: R = 0.4 * 0.4 + 0.6 * 0.1.
    assert math.isclose(mps.update("a", stage=1, score_change=-0.005, cost_change=-0.05), 0.22)
    # Stage 4, three stages later: lambda = 0.24; r = 1.0: R = 0.24 * 0.22 + 0.76 * 1.0.
    assert math.isclose(mps.update("a", stage=4, score_change=-0.04, cost_change=-0.04), 0.8128)
    # Stage 10, six stages later: nothing of the history is left.
    assert math.isclose(mps.update("a", stage=10, score_change=-0.03, cost_change=-0.06), 0.5)
    assert mps.costs == {"a": mps.costs["a"]} and mps.last == {"a": 10}
    # A score that rises makes a mode cheaper than one that costs nothing.
    assert mps.update("b", stage=11, score_change=0.01, cost_change=-0.05) < 0
    # A stage that saved nothing does not divide by zero.
    assert math.isfinite(mps.update("c", stage=12, score_change=-0.01, cost_change=0.0))


def test_modes_do_not_share_history():
    mps = MPS()
    mps.update("a", stage=0, score_change=-0.5, cost_change=-0.1)
    assert math.isclose(mps.update("b", stage=1, score_change=-0.02, cost_change=-0.1), 0.2)
    assert math.isclose(mps.costs["a"], 5.0)


def test_every_mode_is_tried_once_at_the_start():
    mps, rng = MPS(ALWAYS), np.random.default_rng(0)
    for stage, expected in enumerate(MODES):
        mode, why = mps.choose(MODES, stage=stage, rng=rng)
        assert (mode, why) == (expected, "first try")
        mps.update(mode, stage=stage, score_change=-0.01, cost_change=-0.05)
    assert mps.choose(MODES, stage=4, rng=rng)[1] == "explored"


def test_the_cheapest_mode_runs():
    rng = np.random.default_rng(0)
    assert tried().choose(MODES, stage=4, rng=rng) == ("vision_tokens", "cheapest")
    left = [mode for mode in MODES if mode != "vision_tokens"]  # that one cannot advance any more
    assert tried().choose(left, stage=4, rng=rng) == ("language_tokens", "cheapest")


def test_how_often_it_explores_and_what():
    mps, rng, n = tried(MPSConfig()), np.random.default_rng(0), 6000
    drawn = [mps.choose(MODES, stage=10, rng=rng) for _ in range(n)]
    explored = [mode for mode, why in drawn if why == "explored"]
    assert abs(len(explored) / n - 0.2) < 4 * math.sqrt(0.2 * 0.8 / n)
    assert {mode for mode, why in drawn if why == "cheapest"} == {"vision_tokens"}
    # Softmax(I_m / tau), idle for 10, 9, 8 and 7 stages.
    weights = np.exp(np.array([10, 9, 8, 7]) / 5.0)
    for mode, expected in zip(MODES, weights / weights.sum(), strict=True):
        deviation = math.sqrt(expected * (1 - expected) / len(explored))
        assert abs(explored.count(mode) / len(explored) - expected) < 4 * deviation


def test_long_idle_modes_do_not_overflow():
    mps = tried(ALWAYS)
    assert mps.choose(MODES, stage=1_000_000, rng=np.random.default_rng(0))[0] in MODES


def test_a_seed_decides():
    def run(seed: int) -> list[tuple[str, str]]:
        mps, chosen = MPS(MPSConfig(explore=0.5)), []
        for stage in range(30):
            choice = mps.choose(MODES, stage=stage, rng=np.random.default_rng([seed, stage]))
            mps.update(choice[0], stage=stage, score_change=-0.01 * (stage % 3), cost_change=-0.02)
            chosen.append(choice)
        return chosen

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_state_survives_json():
    mps = tried(MPSConfig())
    mps.update("vision_tokens", stage=7, score_change=-0.013, cost_change=-0.03)
    other = MPS()
    other.restore(json.loads(json.dumps(mps.to_json())))
    assert (other.costs, other.last) == (mps.costs, mps.last)
    other.update("vision_tokens", stage=8, score_change=-0.1, cost_change=-0.1)
    assert mps.last["vision_tokens"] == 7  # restored, not shared


def test_without_cost_awareness_the_modes_take_turns():
    """Whatever they cost, and with a mode that cannot go on left out."""
    mps, chosen = MPS(MPSConfig(cost_aware=False, explore=1.0)), []
    for stage in range(9):
        modes = [mode for mode in MODES if stage < 6 or mode != "vision_params"]
        mode, why = mps.choose(modes, stage=stage, rng=np.random.default_rng(stage))
        assert why == ("first try" if stage < 4 else "in turn")
        mps.update(mode, stage=stage, score_change=-0.1 * MODES.index(mode), cost_change=-0.1)
        chosen.append(mode)
    assert chosen == [*MODES, *MODES[:2], *MODES[2:], MODES[1]]


@given(st.lists(st.text(max_size=2), min_size=1, max_size=4, unique=True), st.integers(0, 50))
def test_turns(kinds, stage):
    order = turn(kinds, stage)
    assert sorted(order) == sorted(kinds) and order[0] == kinds[stage % len(kinds)]
    assert turn(kinds, stage + len(kinds)) == order


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("params", MODES[:2]), ("tokens", MODES[2:]), ("joint", MODES), ("comp", MODES), ("probe", MODES)],
)
def test_modes_of_a_strategy(strategy, expected):
    assert strategy_modes(strategy, MODES) == expected


def test_what_a_strategy_decides_where_nothing_was_given():
    for strategy in STRATEGIES:
        config = PruneConfig().of(strategy)
        assert config.cip == (strategy == "comp") and config.cit == (strategy in ("comp", "probe"))
        assert config.importance == ("blend" if strategy == "probe" else "wanda")
        given_ = PruneConfig(cip=True, cit=False, importance="taylor").of(strategy)
        assert (given_.cip, given_.cit, given_.importance) == (True, False, "taylor")
    assert PruneConfig(stage_steps=0, final_steps=0).of("probe").importance == "wanda"  # no gradients there


@given(st.integers(0, 2000), st.integers(1, 40))
def test_a_sixth_of_the_steps_is_taken_in_stages(steps: int, stages: int) -> None:
    config = PruneConfig(stages=stages).sharing(steps)
    taken = sum(map(config.steps_in, range(stages)))
    assert taken + config.steps_after(stages) == steps == config.planned_steps
    assert steps - 6 * stages < 6 * taken <= max(steps, 6 * stages)
    assert (config.stage_steps == 0) == (steps < stages)  # every stage trains where there are enough steps for that


def test_the_default_is_what_sharing_gives() -> None:
    assert PruneConfig().sharing(300).stage_steps == PruneConfig().stage_steps
    assert PruneConfig().planned_steps == 300
