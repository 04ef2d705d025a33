"""Devices that compute in tiles: their steps are found, steps are not seen in noise, and the pruner takes what is free."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import pytest

from comp_edge.families import family_of
from comp_edge.proposals import Limits, Proposer
from comp_edge.state import State
from comp_edge.structure import empty_model
from devices.latency import LatencyModel, accuracy
from devices.latency.features import FEATURES
from devices.latency.fitting import Rows
from devices.latency.stairs import STEPS, find
from tests.devices.latency_machine import TEXT, Machine, clip_config, make_profile, random_plan


@cache
def fitted(tile: int, noise: float = 0.01, seed: int = 0) -> LatencyModel:
    machine = partial(Machine, tile=tile, noise=noise, seed=seed)
    return LatencyModel.fit(make_profile(clip_config(), machine, seed=seed))


@pytest.mark.parametrize("tile", [32, 64])
def test_steps_are_found(tile):
    latency, model = fitted(tile), empty_model(clip_config())
    assert latency.steps.step == tile
    assert latency.steps.to_json()["step"] == tile
    assert latency.steps.errors[tile] < 0.7 * latency.steps.errors[1]
    machine, rng = Machine(model, tile=tile), np.random.default_rng(5)
    plans = [random_plan(model, rng, keep=keep) for keep in np.linspace(0.3, 0.9, 20)]
    found = accuracy([machine.request(plan) for plan in plans], [latency.predict(plan) for plan in plans])
    assert found["mape"] < 0.03 and found["spearman"] > 0.98


@pytest.mark.parametrize(("noise", "seed"), [(0.01, 0), (0.02, 1), (0.03, 2)])
def test_there_are_no_steps_in_noise(noise, seed):
    assert fitted(1, noise, seed).steps.step == 1


def rows_of(ms: np.ndarray, tokens: np.ndarray, step: int) -> dict[str, Rows]:
    """Measurements of a method whose only feature is its number of tokens."""
    features = np.zeros((len(ms), len(FEATURES)))
    features[:, 0], features[:, 1] = 1.0, -(-tokens // step) * step
    count = len(ms)
    return {"m": Rows(np.arange(count), features, ms, np.full(count, 0.01), np.zeros(count, bool))}


def test_one_point_does_not_make_a_staircase():
    """Rounding up explains it exactly, but a single point between two steps may as well be an outlier."""
    tokens = np.array([16, 32, 48, 64, 80, 96, 112, 113])
    smooth = 1 + 0.1 * tokens
    smooth[-1] = 1 + 0.1 * 128
    found = find(lambda step: rows_of(smooth, tokens, step))
    assert found.errors[16] < 0.7 * found.errors[1] and found.step == 1
    up = -(-tokens // 48) * 48
    assert find(lambda step: rows_of(1 + 0.1 * up, tokens, step)).step == 48
    assert set(found.errors) == {1, *STEPS}
    assert find(lambda step: {}).step == 1


def test_the_pruner_takes_the_tokens_up_to_the_edge():
    """Whatever is asked for, counts that fall stop where one more token would cost a tile."""
    latency, model = fitted(32), empty_model(clip_config())
    family, state = family_of(model), State.of(model, base="", prompt_tokens=TEXT["clip"])
    streams, dense = family.streams(model), latency.predict(state.plan())
    proposer = Proposer(family, model, streams, cost=latency, dense=dense, limits=Limits(share=0.4))
    seen = set()
    for layer in (5, 3, 4, 1, 2, 5, 3, 1):
        for goal in (0.02, 0.3):
            proposal = proposer.tokens_from_layer(state, stream="vision", layer=layer, goal=goal)
            if proposal is not None:
                state = proposal.state
                seen |= set(state.tokens["vision"][1:])
    assert len(seen) > 2
    assert all(count == 197 or count % 32 == 0 for count in seen)
