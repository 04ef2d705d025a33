"""Proposals: what a stage may do, whatever the scores say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from comp_edge.calibrate import TokenStatistics
from comp_edge.cost import MacsCost
from comp_edge.families import family_of
from comp_edge.plan import Plan
from comp_edge.proposals import Limits, Proposal, Proposer
from comp_edge.state import State
from comp_edge.units import Site, check_plan
from tests import tiny

PROMPT = 8
STREAMS = ["vision", "language"]
MODES = ["vision_params", "language_params", "vision_tokens", "language_tokens"]


class Counting:
    """MACs under another name and scale: a proposer sees a cost, never what it is."""

    name = "pixel"

    def __init__(self, model: Any) -> None:
        self.macs = MacsCost(model)

    def predict(self, plan: Plan) -> float:
        return self.macs.predict(plan) * 1e-6 + 0.2


@pytest.fixture(scope="module")
def model():
    return tiny.make_model()


@pytest.fixture(scope="module", params=["macs", "milliseconds"])
def proposer(request, model) -> Proposer:
    return make_proposer(model, cost=MacsCost(model) if request.param == "macs" else Counting(model))


def make_proposer(model: Any, *, cost: Any = None, **limits: Any) -> Proposer:
    family = family_of(model)
    cost = cost or MacsCost(model)
    dense = cost.predict(State.of(model, prompt_tokens=PROMPT, base="").plan())
    options = {"share": 0.25, "min_tokens": 6, "round_to": 8} | limits
    return Proposer(family, model, family.streams(model), cost=cost, dense=dense, limits=Limits(**options))


def unit_scores(state: State, seed: int) -> dict[Site, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {site: torch.rand(len(alive), generator=generator) + 1e-3 for site, alive in state.alive.items()}


def statistics(state: State, seed: int) -> TokenStatistics:
    """Mean-one importance of what each layer computes on."""
    generator = torch.Generator().manual_seed(seed)
    found = TokenStatistics()
    for stream, counts in state.tokens.items():
        for layer, count in enumerate(counts):
            scores = torch.rand(5, count, generator=generator) ** 3
            scores = scores / scores.mean(1, keepdim=True)
            found.scores[(stream, layer)] = [scores.sort(1, descending=True).values]
    return found


def propose(
    proposer: Proposer, state: State, mode: str, *, goal: float, seed: int = 0, way: int = 0
) -> Proposal | None:
    """A proposal for a mode: parameters ranked per layer or per cost, tokens by threshold or from a layer."""
    stream, what = mode.rsplit("_", 1)
    if what == "params":
        scores = unit_scores(state, seed)
        return proposer.parameters(state, scores, streams=[stream], goal=goal, per_cost=bool(way % 2))
    if way % 3 == 0:
        return proposer.tokens_by_threshold(state, statistics(state, seed), streams=[stream], goal=goal)
    return proposer.tokens_from_layer(state, stream=stream, layer=way % 3, goal=goal)


def check(proposer: Proposer, model: Any, before: State, proposal: Proposal, mode: str) -> None:
    """What holds for every proposal."""
    after, stream = proposal.state, mode.rsplit("_", 1)[0]
    plan = Plan.parse(after.plan().to_json())  # valid: schedules do not rise
    check_plan(model, plan)  # fits the model: groups, ranking heads, image tokens
    assert proposal.mode == mode
    assert proposal.saving > 0
    assert proposal.saving == pytest.approx(proposer.price(before) - proposer.price(after), abs=1e-9)
    for site, alive in before.alive.items():
        assert not bool((after.alive[site] & ~alive).any()), "nothing comes back"
        if not (mode.endswith("params") and site.stream == stream):
            assert torch.equal(after.alive[site], alive)
    for name, counts in before.tokens.items():
        assert all(new <= old for new, old in zip(after.tokens[name], counts, strict=True))
        if mode.endswith("params") or (name == "vision" and stream == "language"):
            assert after.tokens[name] == counts
    if mode == "language_tokens":
        assert after.tokens["language"][0] == before.tokens["language"][0]
    # The language model gets what the vision stream delivers, and the whole prompt.
    assert after.tokens["language"][0] == after.tokens["vision"][-1] - 1 + PROMPT
    assert after.tokens["vision"][0] == 17


steps = st.lists(
    st.tuples(st.sampled_from(MODES), st.floats(0.005, 0.3), st.integers(0, 99), st.integers(0, 5)), max_size=12
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_a_walk_of_stages(proposer, model, steps):
    state = State.of(model, prompt_tokens=PROMPT, base="tiny")
    for mode, goal, seed, way in steps:
        before = state.plan()
        proposal = propose(proposer, state, mode, goal=goal, seed=seed, way=way)
        assert state.plan() == before, "a proposal leaves the state as it is"
        if proposal is not None:
            check(proposer, model, state, proposal, mode)
            state = proposal.state


def worn(proposer: Proposer, model: Any) -> State:
    """A state in the middle of a pruning."""
    state = State.of(model, prompt_tokens=PROMPT, base="tiny")
    for i, mode in enumerate(MODES * 2):
        proposal = propose(proposer, state, mode, goal=0.04, seed=i, way=i)
        state = proposal.state if proposal else state
    return state


@pytest.mark.parametrize("start", ["dense", "worn"])
@pytest.mark.parametrize("goal", [0.001, 0.03, 0.2, 9.0])
@pytest.mark.parametrize("per_cost", [True, False])
@pytest.mark.parametrize("stream", STREAMS)
def test_parameters_reach_the_goal_or_their_bound(proposer, model, start, goal, per_cost, stream):
    state = worn(proposer, model) if start == "worn" else State.of(model, prompt_tokens=PROMPT, base="")
    scores = unit_scores(state, 7)
    proposal = proposer.parameters(state, scores, streams=[stream], goal=goal, per_cost=per_cost)
    assert proposal is not None
    removed = {s: int(a.sum()) - int(proposal.state.alive[s].sum()) for s, a in state.alive.items()}
    for site, count in removed.items():
        had = int(state.alive[site].sum())
        # A chunk may always go (here 8 channels or at most two heads); more only up to the share.
        assert count <= max(0.25 * had, 8 if site.kind == "ffn" else 2)
    if proposal.saving < goal:
        again = proposer.parameters(state, scores, streams=[stream], goal=1e9, per_cost=per_cost)
        assert again.state.plan() == proposal.state.plan(), "it stopped before its bound"
        for site, alive in state.alive.items():
            if site.stream == stream and site.kind == "ffn" and alive.any():
                assert removed[site] > 0


def test_two_importances_have_to_agree(proposer, model):
    """What one of them holds to be worthless stays as long as the other one spares it."""
    state = State.of(model, prompt_tokens=PROMPT, base="")
    site, other = Site("language", 1, "ffn"), Site("language", 2, "ffn")
    fisher = {s: torch.ones(len(alive)) for s, alive in state.alive.items() if s in (site, other)}
    wanda = {s: torch.ones_like(scores) for s, scores in fisher.items()}
    fisher[site][:8], wanda[site][:8], fisher[site][8:16] = 1e-6, 1e6, 0.01

    def gone(**options: Any) -> set[int]:
        proposal = proposer.parameters(state, fisher, streams=["language"], goal=1e-6, per_cost=True, **options)
        return set((~proposal.state.alive[site]).nonzero()[:, 0].tolist())

    assert gone() == set(range(8)) and gone(beside=wanda) == set(range(8, 16))


@pytest.mark.parametrize("per_cost", [True, False])
def test_the_least_important_go_first(proposer, model, per_cost):
    """With one site far below all others, a small goal takes from that alone."""
    state = State.of(model, prompt_tokens=PROMPT, base="")
    scores = unit_scores(state, 3)
    site = Site("language", 1, "ffn")
    scores[site][:8] *= 1e-6
    proposal = proposer.parameters(state, scores, streams=["language"], goal=1e-6, per_cost=per_cost)
    gone = {s: (state.alive[s] & ~alive).nonzero()[:, 0].tolist() for s, alive in proposal.state.alive.items()}
    assert {s: units for s, units in gone.items() if units} == {site: list(range(8))}


@pytest.mark.parametrize("goal", [0.001, 0.02, 0.1, 9.0])
@pytest.mark.parametrize("start", ["dense", "worn"])
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("stream", STREAMS)
def test_tokens_from_a_layer(proposer, model, stream, layer, start, goal):
    state = worn(proposer, model) if start == "worn" else State.of(model, prompt_tokens=PROMPT, base="")
    current = state.tokens[stream]
    proposal = proposer.tokens_from_layer(state, stream=stream, layer=layer, goal=goal)
    bound = max(min(int(current[layer] * 0.75), current[layer] - 1), min(6, current[layer]))
    if proposal is None:
        assert bound >= current[layer]
        return
    counts = proposal.state.tokens[stream]
    assert counts[:layer] == current[:layer] and counts[layer] >= bound
    assert all(new == min(old, counts[layer]) for new, old in zip(counts[layer:], current[layer:], strict=True))
    if proposal.saving < goal:
        assert counts[layer] == bound
    elif counts[layer] + 1 < current[layer]:
        one_more = [*current[:layer], *(min(n, counts[layer] + 1) for n in current[layer:])]
        assert proposer.price(state) - proposer.price(proposer.with_tokens(state, stream, one_more)) < goal


@pytest.mark.parametrize("goal", [0.001, 0.02, 0.1, 9.0])
@pytest.mark.parametrize("start", ["dense", "worn"])
@pytest.mark.parametrize("stream", STREAMS)
def test_tokens_by_threshold(proposer, model, stream, start, goal):
    state = worn(proposer, model) if start == "worn" else State.of(model, prompt_tokens=PROMPT, base="")
    found = statistics(state, 5)
    proposal = proposer.tokens_by_threshold(state, found, streams=[stream], goal=goal)
    current = state.tokens[stream]
    bounds = [max(min(int(n * 0.75), n - 1), min(6, n)) for n in current]
    if proposal is None:
        assert bounds[1:] == current[1:]
        return
    counts = proposal.state.tokens[stream]
    assert counts[0] == current[0]
    assert all(count >= bound for count, bound in zip(counts[1:], bounds[1:], strict=True))
    if proposal.saving < goal:
        expected = []
        for count in [current[0], *bounds[1:]]:
            expected.append(min(count, expected[-1]) if expected else count)
        assert counts == expected


def test_a_layer_keeps_as_many_as_reach_the_threshold(model):
    """Layer 0 has 9 tokens of importance 1.8 and 8 of 0.1, layer 1 is flat: only layer 1's count may fall, to 13."""
    state = State.of(model, prompt_tokens=PROMPT, base="")
    found = TokenStatistics()
    found.scores[("vision", 0)] = [torch.tensor([[1.8] * 9 + [0.1] * 8])]
    found.scores[("vision", 1)] = [torch.ones(1, 17)]
    proposal = make_proposer(model, share=0.5).tokens_by_threshold(state, found, streams=["vision"], goal=0.01)
    assert proposal.state.tokens["vision"] == [17, 9, 9]


def test_dropping_image_tokens_shortens_the_language_stream(model):
    proposer, state = make_proposer(model), State.of(model, prompt_tokens=PROMPT, base="")
    assert proposer.with_tokens(state, "vision", [17, 15, 12]).tokens == {
        "vision": [17, 15, 12],
        "language": [19, 19, 19],
    }
    lower = proposer.with_tokens(state, "language", [24, 20, 10])
    assert lower.tokens == {"vision": [17, 17, 17], "language": [24, 20, 10]}
    # The language model drops from what it gets, and never computes on more than that.
    assert proposer.with_tokens(lower, "vision", [17, 15, 12]).tokens["language"] == [19, 19, 10]
    assert proposer.with_tokens(state, "vision", [17, 9, 12]).tokens["vision"] == [17, 9, 9]


def exhausted(proposer: Proposer, model: Any, modes: list[str]) -> State:
    """Stages until no mode can save anything any more."""
    state, moved = State.of(model, prompt_tokens=PROMPT, base=""), True
    while moved:
        moved = False
        for mode in modes:
            for way in range(3):
                proposal = propose(proposer, state, mode, goal=1.0, way=way)
                if proposal is not None:
                    state, moved = proposal.state, True
    return state


@pytest.mark.parametrize("modes", [MODES, MODES[:1], MODES[1:2], MODES[2:]], ids="+".join)
@pytest.mark.parametrize(
    ("shape", "slack"),
    [
        ({}, 0.0),
        ({"width": 64, "heads": 8, "kv_heads": 8}, 0.0),
        # The last two heads of the first layer may be of one group or of two, as the scores want it.
        ({"width": 64, "heads": 8, "kv_heads": 4}, 0.01),
    ],
    ids=["single heads", "heads in pairs", "heads in pairs, grouped"],
)
def test_the_lowest_cost_is_what_can_be_reached(make_model, modes, shape, slack):
    """A budget below it is refused, and every budget above it can be met: both rest on this number."""
    model = make_model(**shape)
    proposer = make_proposer(model, round_to=16)
    state = exhausted(proposer, model, modes)
    lowest = proposer.lowest(State.of(model, prompt_tokens=PROMPT, base=""), modes)
    assert lowest - 1e-9 <= proposer.price(state) <= lowest + slack + 1e-9
    check_plan(model, state.plan())


def test_the_first_layer_keeps_a_head_to_rank_tokens(model):
    state = exhausted(make_proposer(model), model, MODES)
    for stream in STREAMS:
        assert int(state.alive[Site(stream, 0, "heads")].sum()) >= 1
        assert min(state.tokens[stream]) >= 6


def test_a_share_of_everything(model):
    """One stage may take all it wants when the share allows it."""
    state = State.of(model, prompt_tokens=PROMPT, base="")
    proposer = make_proposer(model, share=1.0)
    scores = {site: values for site, values in unit_scores(state, 0).items() if site.kind == "ffn"}
    proposal = proposer.parameters(state, scores, streams=["vision"], goal=1.0, per_cost=False)
    assert not any(
        bool(alive.any()) for s, alive in proposal.state.alive.items() if s == Site("vision", s.layer, "ffn")
    )


class Tiled:
    """A device that computes in tiles: every layer pays for the next multiple of `tile` tokens, and each drop costs `drop`."""

    name = "tiles"

    def __init__(self, model: Any, *, tile: int = 4, drop: float = 0.0) -> None:
        self.macs, self.tile, self.drop = MacsCost(model), tile, drop

    def predict(self, plan: Plan) -> float:
        drops = 0
        for name, stream in plan.streams.items():
            drops += len(set(stream.tokens)) - 1
            plan = plan.with_tokens(name, [-(-n // self.tile) * self.tile for n in stream.tokens])
        return self.macs.predict(plan) + self.drop * drops


def check_edges(proposer: Proposer, before: State, after: State) -> None:
    """One more token anywhere costs more, unless the layer had no more before, or does not get more."""
    for stream in STREAMS:
        counts = after.tokens[stream]
        for layer in (1, 2):
            if counts[layer] < min(before.tokens[stream][layer], counts[layer - 1]):
                more = {name: list(n) for name, n in after.tokens.items()}
                more["language"][0] = before.tokens["language"][0]  # follows from the image tokens
                more[stream][layer] += 1
                raised = proposer._lowered(before, more)
                assert proposer.price(raised) > proposer.price(after) + 1e-9, (stream, layer, after.tokens)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps, drop=st.sampled_from([0.0, 2e3]))
@example(steps=[("vision_tokens", 0.25, 13, 0)], drop=0.0)  # thresholds that rise from one layer to the next
def test_on_a_staircase_counts_lie_on_edges(model, steps, drop):
    proposer = make_proposer(model, cost=Tiled(model, drop=drop), share=0.6, min_tokens=2)
    state = State.of(model, prompt_tokens=PROMPT, base="tiny")
    for mode, goal, seed, way in steps:
        proposal = propose(proposer, state, mode, goal=goal, seed=seed, way=way)
        if proposal is not None:
            assert proposal.saving == pytest.approx(proposer.price(state) - proposer.price(proposal.state), abs=1e-9)
            if mode.endswith("tokens"):
                check_edges(proposer, state, proposal.state)
            state = proposal.state


@pytest.mark.parametrize("drop", [0.0, 1e3])
def test_a_bound_between_two_edges_gives_the_tokens_above_it_free(model, drop):
    """At most 60 % may go, which leaves 9 of 24 tokens; 12 cost as much."""
    state = State.of(model, prompt_tokens=PROMPT, base="")
    free = make_proposer(model, cost=Tiled(model, drop=drop), share=0.6, min_tokens=2)
    proposal = free.tokens_from_layer(state, stream="language", layer=2, goal=9.0)
    assert proposal.state.tokens["language"] == [24, 24, 12]
    plain = make_proposer(model, share=0.6, min_tokens=2).tokens_from_layer(state, stream="language", layer=2, goal=9.0)
    assert plain.state.tokens["language"] == [24, 24, 9]


@pytest.mark.parametrize("drop", [0.0, 2e3])
def test_layers_rise_together_where_a_drop_between_them_would_cost(model, drop):
    """Both layers could do with 9 tokens: a drop from 12 to 9 is no gain, whether it costs something or not."""
    state = State.of(model, prompt_tokens=PROMPT, base="")
    found = TokenStatistics()
    for layer in (0, 1):
        found.scores[("language", layer)] = [torch.tensor([[2.0] * 9 + [0.1] * 15])]
    proposer = make_proposer(model, cost=Tiled(model, drop=drop), share=0.7, min_tokens=2)
    proposal = proposer.tokens_by_threshold(state, found, streams=["language"], goal=0.05)
    assert proposal.state.tokens["language"] == [24, 12, 12]


def test_what_image_tokens_gain_the_language_model_gains(model):
    """Streams that are pruned at once: vision's free tokens come back as prompt, and no prompt token goes for them."""
    state = State.of(model, prompt_tokens=PROMPT, base="")
    proposer = make_proposer(model, cost=Tiled(model, tile=8), share=0.6, min_tokens=2)
    for streams in (STREAMS, STREAMS[::-1]):
        proposal = proposer.tokens_by_threshold(state, statistics(state, 3), streams=streams, goal=0.2)
        tokens = proposal.state.tokens
        assert tokens["language"][0] == tokens["vision"][-1] - 1 + PROMPT
        check_edges(proposer, state, proposal.state)
