"""Ways that are walked for trial: which share of tokens is looked at, and that nothing of a walk stays."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comp_edge.budget import Budget
from comp_edge.scouting import CLEARLY, HOPEFUL, JUMPS, RESTING, best, bold, bracket, rests
from comp_edge.selectors import ProbeSelector, mixed
from comp_edge.session import Session
from tests.comp_edge.test_pruning import QUICK


@pytest.mark.parametrize(
    ("optimum", "looked_at", "taken"),
    [(0.3, 0.25, 0.25), (0.45, 0.75, 0.5), (0.7, 0.75, 0.75), (1.0, 0.75, 0.75)],
)
def test_the_third_way_lies_on_the_better_side(optimum: float, looked_at: float, taken: float) -> None:
    losses = bracket(lambda share: (share - optimum) ** 2)
    assert list(losses) == [0.0, 0.5, looked_at] and best(losses) == taken


@given(st.floats(0.001, 9), st.floats(0.001, 9), st.floats(0.001, 9))
def test_a_third_way_is_walked_where_it_can_be_clearly_better(none: float, half: float, third: float) -> None:
    losses = bracket({0.0: none, 0.5: half, 0.25: third, 0.75: third}.__getitem__)
    assert (len(losses) == 3) == (half <= HOPEFUL * none) and (0.75 in losses) == (half <= CLEARLY * none)


def test_more_tokens_have_to_end_clearly_better() -> None:
    """What parameters lose comes back in the steps that a walk lacks: blip-digits, dense seed 1."""
    assert best({0.0: 0.149, 0.5: 0.139, 0.25: 0.14}) == best({0.0: 0.726, 0.5: 0.302, 0.75: 0.598}) == 0.0
    assert best({0.0: 1.0, 0.25: 0.4, 0.5: 0.2}) == 0.5, "each against the best of those with fewer"
    assert best({0.0: 0.149, 0.5: 0.03, 0.75: 0.02}) == 0.5


def test_two_ways_that_lead_nowhere() -> None:
    losses = bracket(lambda share: 1.0 if share == 0.25 else math.inf)
    assert losses == {0.0: math.inf, 0.5: math.inf, 0.25: 1.0} and best(losses) == 0.25


def test_a_way_that_leads_nowhere_is_not_taken() -> None:
    assert best({0.0: math.inf, 0.5: 3.0, 0.75: math.nan}) == 0.5
    with pytest.raises(FloatingPointError, match="every way to the budget that was tried"):
        best({0.0: math.inf, 0.5: math.nan})


@given(st.floats(0.01, 0.9), st.integers(1, 40))
def test_jumps_come_as_far_as_the_stages(share: float, stages: int) -> None:
    reached = (1 - bold(share, stages=stages)) ** JUMPS
    assert reached == pytest.approx((1 - share) ** max(stages, JUMPS), rel=1e-6)


@given(st.integers(0, 200))
def test_steps_between_jumps(steps: int) -> None:
    taken = list(itertools.islice(rests(steps), 3 * JUMPS))
    assert sum(taken) == round(RESTING * steps) and all(n >= 0 for n in taken)
    assert not any(taken[JUMPS:])


@pytest.fixture
def session(tiny_model: Any, tiny_task: Any) -> Session:
    return Session(
        tiny_model, tiny_task, budget=Budget(macs=0.5), strategy="probe", out=None, seed=1, config=QUICK, base="tiny",
        deploy="any", on_progress=lambda progress: told.append(progress),
    )  # fmt: skip


told: list[Any] = []


def test_nothing_of_a_walk_stays(session: Session) -> None:
    """Weights, optimizer, masks and token counts are as before, and training was really tried."""
    told.clear()
    before = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    trained, inner = [], session.trainer.step

    def step(*args: Any, **options: Any) -> float:
        trained.append(options["where"])
        return inner(*args, **options)

    session.trainer.step = step
    session.start(evaluate=False)
    session.model.eval()
    chosen, why = session.selector.select(session.setting, session.state, goal=0.1, stage=0)
    ways = len(why["walks"])
    assert len(trained) == ways * session.setting.trial_steps > 0 and all("for trial" in where for where in trained)
    assert {progress.phase for progress in told} == {"scout"} and all(progress.step == 0 for progress in told)
    assert [progress.done for progress in told] == list(range(1, len(trained) + 1))
    for name, tensor in session.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not session.trainer.optimizer.state_tensors()
    assert all(bool((mask == 1).all()) for mask in session.masks.masks.values())
    assert session.schedule.tokens == {name: tuple(counts) for name, counts in session.state.tokens.items()}
    assert [walk["tokens"] for walk in why["walks"]][:2] == [0.0, 0.5] and chosen.saving >= 0.05
    assert why["token_share"] == best(session.selector.losses) and session.selector.ways == ways

    session.selector.select(session.setting, session.state, goal=0.1, stage=1)
    assert len(trained) == ways * session.setting.trial_steps  # the way is found once


def test_what_was_found_survives_a_checkpoint() -> None:
    selector, other = ProbeSelector(losses={0.0: 0.5, 0.5: math.inf, 0.25: 0.125}), ProbeSelector()
    other.restore(json.loads(json.dumps(selector.to_json())))
    assert other == selector and best(other.losses) == 0.25


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_stage_takes_the_proportion(session: Session, share: float) -> None:
    session.start(evaluate=False)
    session.model.eval()
    taken = mixed(session.setting, session.state, share, 0.2)
    savings = {"tokens": 0.0, "params": 0.0}
    for proposal in taken:
        savings[proposal.mode.rsplit("_", 1)[-1]] += proposal.saving
    assert sum(savings.values()) >= 0.19
    assert savings["tokens"] == pytest.approx(share * 0.2, abs=0.05)


def test_what_one_kind_cannot_save_the_other_does(session: Session) -> None:
    session.start(evaluate=False)
    session.model.eval()
    taken = mixed(session.setting, session.state, 1.0, 0.9)  # a stage may not take so many tokens
    assert {proposal.mode for proposal in taken} == {"tokens", "params"}
