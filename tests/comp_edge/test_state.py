"""The state of a pruning, and which chunk of a sub-layer may go next."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comp_edge.plan import Plan
from comp_edge.state import WIDE_ENOUGH, State, next_chunk
from comp_edge.units import Site, check_plan, dense_plan, kept_kv_heads

HEADS, FFN = Site("language", 0, "heads"), Site("language", 0, "ffn")


def a_layer(*, heads: int = 4, kv_heads: int = 4, head_dim: int = 8, channels: int = 64) -> Any:
    """As much of a stream with one layer as chunks depend on."""
    attn = SimpleNamespace(heads=heads, kv_heads=kv_heads, head_dim=head_dim, separable=True)
    return SimpleNamespace(layers=[SimpleNamespace(attn=attn, mlp=SimpleNamespace(channels=channels))])


def drain(site: Site, units: int, scores: torch.Tensor, **options: Any) -> list[list[int]]:
    """The kept units after each chunk, until nothing may go any more."""
    state = State(alive={site: torch.ones(units, dtype=torch.bool)}, tokens={}, template=None)
    kept = [list(range(units))]
    while (chunk := next_chunk(state, site, scores, **options)) is not None:
        assert chunk.site == site and len(chunk.units) > 0 and sorted(set(chunk.units)) == list(chunk.units)
        assert bool(state.alive[site][list(chunk.units)].all()), "what is gone cannot go again"
        assert chunk.score == pytest.approx(float(scores[list(chunk.units)].sum()), rel=1e-5)
        state.alive[site][list(chunk.units)] = False
        kept.append(state.alive[site].nonzero()[:, 0].tolist())
    return kept


def some_scores(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) + 0.01


@settings(max_examples=80)
@given(
    channels=st.integers(1, 300), round_to=st.sampled_from([1, 8, 32]), floor=st.integers(0, 2), seed=st.integers(0, 99)
)
def test_channels(channels, round_to, floor, seed):
    scores = some_scores(channels, seed)
    steps = drain(FFN, channels, scores, stream=a_layer(channels=channels), round_to=round_to, floor=floor)
    ranked = scores.argsort().tolist()
    for kept in steps:
        assert set(kept) == set(ranked[channels - len(kept) :])  # always the most important ones
    if channels >= WIDE_ENOUGH * round_to:
        assert all(len(kept) % round_to == 0 for kept in steps[1:])
        assert min(len(kept) for kept in steps) >= min(floor * round_to, channels)
    if not floor:
        assert steps[-1] == []


heads_of = st.tuples(
    st.integers(1, 6), st.integers(1, 4), st.sampled_from([8, 16, 24, 32]), st.sampled_from([1, 8, 16, 32, 64])
)


@settings(max_examples=150)
@given(shape=heads_of, floor=st.integers(0, 1), seed=st.integers(0, 99))
def test_heads_leave_valid_groups(shape, floor, seed):
    kv_heads, group, head_dim, round_to = shape
    heads = kv_heads * group
    stream = a_layer(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    steps = drain(HEADS, heads, some_scores(heads, seed), stream=stream, round_to=round_to, floor=floor)
    for kept in steps:
        kept_kv_heads(kept, heads=heads, kv_heads=kv_heads)  # raises for uneven groups
        assert len(kept) >= floor
    if not floor:
        assert steps[-1] == []


@settings(max_examples=150)
@given(shape=heads_of, seed=st.integers(0, 99))
def test_head_widths_are_multiples_where_the_layer_is_wide_enough(shape, seed):
    kv_heads, group, head_dim, round_to = shape
    heads = kv_heads * group
    width = heads * head_dim
    stream = a_layer(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    steps = drain(HEADS, heads, some_scores(heads, seed), stream=stream, round_to=round_to, floor=0)
    if width >= WIDE_ENOUGH * round_to and width % round_to == 0:
        assert all(len(kept) * head_dim % round_to == 0 for kept in steps), [len(kept) for kept in steps]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "round_to"),
    [
        (9, 3, 64, 128),  # SmolLM-135M: neither a group nor a head of each is a multiple of two heads
        (9, 3, 16, 32),
        (20, 10, 16, 64),
        (14, 2, 64, 128),  # Qwen2-0.5B
        (16, 8, 128, 128),
    ],
)
def test_heads_of_real_models(heads, kv_heads, head_dim, round_to):
    stream = a_layer(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    for seed in range(5):
        for kept in drain(HEADS, heads, some_scores(heads, seed), stream=stream, round_to=round_to, floor=0):
            kept_kv_heads(kept, heads=heads, kv_heads=kv_heads)


def test_the_weakest_head_goes_first():
    scores = torch.tensor([3.0, 1.0, 4.0, 2.0])
    steps = drain(HEADS, 4, scores, stream=a_layer(), round_to=32, floor=1)
    assert steps == [[0, 1, 2, 3], [0, 2, 3], [0, 2], [2]]


def test_a_group_or_a_head_of_each_whichever_matters_less_per_head():
    stream = a_layer(heads=4, kv_heads=2)
    # The second group matters nothing at all; then single heads are left.
    assert drain(HEADS, 4, torch.tensor([5.0, 4.0, 0.1, 0.1]), stream=stream, round_to=32)[1] == [0, 1]
    # One head of each group matters nothing.
    assert drain(HEADS, 4, torch.tensor([5.0, 0.1, 0.1, 4.0]), stream=stream, round_to=32)[1] == [0, 3]


def test_what_may_go_does_not_hang_on_a_tie():
    """A last group of two equal heads can still give up one of them when one must stay."""
    steps = drain(HEADS, 2, torch.ones(2), stream=a_layer(heads=2, kv_heads=1), round_to=32, floor=1)
    assert [len(kept) for kept in steps] == [2, 1]


# ---- the state itself


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


def test_the_dense_state_is_the_dense_plan(model):
    state = State.of(model, prompt_tokens=8, base="tiny")
    assert state.plan() == dense_plan(model, prompt_tokens=8, base="tiny")
    check_plan(model, state.plan())


def pruned(model: Any) -> State:
    state = State.of(model, prompt_tokens=8, base="tiny")
    state.alive[Site("language", 1, "heads")][:2] = False
    state.alive[Site("language", 2, "ffn")][:] = False
    state.alive[Site("vision", 0, "ffn")][::2] = False
    state.tokens["language"][2] = 9
    return state


def test_state_to_plan(model):
    plan = pruned(model).plan()
    assert plan.streams["language"].layers[1].heads == (2, 3)
    assert plan.streams["language"].layers[2].ffn == ()
    assert plan.streams["vision"].layers[0].ffn == tuple(range(1, 64, 2))
    assert plan.streams["language"].tokens == (24, 24, 9)
    assert Plan.parse(plan.to_json()) == plan  # what was built without validation is valid
    check_plan(model, plan)


def test_copies_are_independent(model):
    state = pruned(model)
    before = state.plan()
    copy = state.copy()
    copy.tokens["vision"][2] = 3
    copy.alive[Site("vision", 1, "heads")][:] = False
    assert state.plan() == before != copy.plan()


def test_state_survives_json(model):
    state = pruned(model)
    other = State.of(model, prompt_tokens=8, base="tiny")
    other.restore(json.loads(json.dumps(state.to_json())))
    assert other.plan() == state.plan()
    assert all(torch.equal(other.alive[site], mask) for site, mask in state.alive.items())
