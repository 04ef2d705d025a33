"""Which tokens stay: properties that every caller, eager or exported, relies on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comp_edge.selection import PROTECTED, keep_tokens, keep_within, layer_width, take, targets


@st.composite
def scored(draw: st.DrawFn, *, ties: bool = False) -> torch.Tensor:
    """[b, n] scores; without ties unless asked for."""
    b, n = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    rows = st.lists(st.integers(0, 4 if ties else 10_000), min_size=n, max_size=n, unique=not ties)
    return torch.tensor([draw(rows) for _ in range(b)], dtype=torch.float32)


@given(scores=scored(), data=st.data())
def test_keep_tokens(scores, data):
    keep = data.draw(st.integers(1, scores.shape[1]))
    got = keep_tokens(scores, keep=keep)
    assert got.shape == (len(scores), keep)
    for row, kept in zip(scores.tolist(), got.tolist(), strict=True):
        best = sorted(range(len(row)), key=lambda i: -row[i])[:keep]
        assert kept == sorted(best)  # in original order


@given(scores=scored(), data=st.data())
def test_protected_tokens_stay(scores, data):
    n = scores.shape[1]
    special = data.draw(st.integers(0, n - 1))
    scores[:, special] = 0.0
    scores[:, special] += PROTECTED
    for keep in range(1, n + 1):
        assert bool((keep_tokens(scores, keep=keep) == special).any(1).all())


@given(scores=scored(ties=True), data=st.data())
def test_keep_within(scores, data):
    n = scores.shape[1]
    goals = torch.tensor(data.draw(st.lists(st.integers(0, n), min_size=len(scores), max_size=len(scores))))
    got = keep_within(scores, goals)
    assert got.sum(1).tolist() == goals.tolist()
    for row, kept in zip(scores, got, strict=True):
        if kept.any() and not kept.all():
            assert float(row[kept].min()) >= float(row[~kept].max())


@given(scores=scored(), data=st.data())
def test_what_an_example_keeps_is_among_what_the_batch_keeps(scores, data):
    keep = data.draw(st.integers(1, scores.shape[1]))
    alone = keep_within(scores, torch.full((len(scores),), data.draw(st.integers(0, keep))))
    together = torch.zeros_like(alone).scatter(1, keep_tokens(scores, keep=keep), True)
    assert not bool((alone & ~together).any())


def test_ties_are_broken_alike():
    """A mask of equal scores must not name tokens that the gather leaves out: the layer would lose them twice."""
    for n in range(2, 80):
        scores = torch.ones(1, n)
        keep = max(n // 2, 1)
        alone = keep_within(scores, torch.tensor([keep]))
        together = torch.zeros_like(alone).scatter(1, keep_tokens(scores, keep=keep), True)
        assert torch.equal(alone, together), f"{n} tokens, {keep} kept"


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_take(dim):
    tensor = torch.randn(2, 4, 4, 4)
    index = torch.tensor([[0, 2], [1, 3]])
    expected = torch.stack([tensor[b].index_select(dim - 1, index[b]) for b in range(2)])
    assert torch.equal(take(tensor, index, dim), expected)
    shared = take(tensor[:1], index, dim)  # a batch of one serves all, as rotary embeddings do
    assert torch.equal(shared, torch.stack([tensor[0].index_select(dim - 1, index[b]) for b in range(2)]))


schedule = st.integers(1, 80).flatmap(lambda before: st.tuples(st.just(before), st.integers(1, before)))


@given(schedule=schedule, width=st.integers(1, 120), answers=st.integers(0, 5))
def test_layer_width(schedule, width, answers):
    before, after = schedule
    width += answers
    got = layer_width(width, before=before, after=after, answers=answers)
    assert answers + 1 <= got <= width
    prompt = width - answers
    assert layer_width(prompt, before=before, after=after, answers=0) == got - answers  # answers are never dropped
    if prompt == before:
        assert got - answers == after  # the plan's own prompt gets the plan's counts
    if prompt > before:
        assert prompt - (got - answers) == before - after
    if before == after:
        assert got == width


@given(schedule=schedule, width=st.integers(1, 120), further=st.integers(0, 80))
def test_later_layers_never_compute_on_more(schedule, width, further):
    before, after = schedule
    later = max(1, after - further)
    wide = layer_width(width, before=before, after=after, answers=0)
    assert layer_width(width, before=before, after=later, answers=0) <= wide


@given(schedule=schedule, counts=st.lists(st.integers(1, 120), min_size=1, max_size=5), padding=st.integers(0, 20))
def test_each_example_keeps_what_it_would_keep_alone(schedule, counts, padding):
    before, after = schedule
    width = max(counts) + padding
    batch = layer_width(width, before=before, after=after, answers=0)
    goals = targets(torch.tensor(counts), before=before, after=after)
    for count, goal in zip(counts, goals.tolist(), strict=True):
        assert goal == layer_width(count, before=before, after=after, answers=0)
        assert 1 <= goal <= min(count, batch)
