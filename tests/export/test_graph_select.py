"""Choosing tokens: order, protection, padding, ties; the two forms keep the same tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comp_edge.errors import InputError
from export.graph import EXECUTORCH, GraphOptions
from export.graph.select import Select, TokenDrops, attention_scores, tail, watch_cuts

RANK = GraphOptions(selection="rank")


def select(keep, tokens, protected, options):
    return Select(tokens=tokens, keep=keep, protected=protected, options=options)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_forms_agree_and_keep_order(data):
    tokens = data.draw(st.integers(2, 24))
    keep = data.draw(st.integers(1, tokens - 1))
    protected = data.draw(st.sampled_from([0, tokens - 1]))
    scores = torch.tensor([data.draw(st.permutations(range(tokens)))]).float() / tokens
    rows = torch.arange(tokens).float()[None, :, None].expand(1, tokens, 3)
    (by_topk,) = select(keep, tokens, protected, EXECUTORCH)(scores, rows)
    (by_rank,) = select(keep, tokens, protected, RANK)(scores, rows)
    assert torch.equal(by_topk, by_rank)
    kept = by_topk[0, :, 0].int().tolist()
    assert kept == sorted(set(kept)) and len(kept) == keep and protected in kept
    others = [scores[0, i] for i in range(tokens) if i not in kept]
    assert min(scores[0, i] for i in kept if i != protected or keep == 1) >= (max(others) if keep > 1 else -1)


def test_rank_breaks_ties_by_position():
    (kept,) = select(2, 4, 3, RANK)(torch.zeros(1, 4), torch.arange(4).float()[None, :, None])
    assert kept[0, :, 0].tolist() == [0, 3]


def test_scores_are_sums_of_maxima_over_heads():
    # Six heads, two windows of five tokens each.
    probabilities = torch.rand(6, 2, 5, 5).softmax(-1)
    queries = torch.tensor([[0.0, 1, 1, 0, 1], [1, 1, 1, 1, 0]])
    expected = (probabilities.amax(0) * queries[..., None]).sum(1).flatten()
    assert torch.allclose(attention_scores(probabilities, queries[:, None])[0], expected, atol=1e-6)


def test_a_drop_without_attention_before_it_is_an_error():
    with pytest.raises(InputError, match="before layer 1"):
        TokenDrops((8, 4), (False, True), stream="vision", protected="first", options=EXECUTORCH)


def test_scores_are_carried_only_where_attention_is_gone():
    drops = TokenDrops((8, 6, 4, 2), (True, False, True, True), stream="vision", protected="first", options=EXECUTORCH)
    assert drops.sources == {0, 2} and drops.carried == {1}
    scores = torch.tensor([[0.0, 5, 1, 4, 2, 3, 0.5, 0.1]])
    left, (rows,) = drops(1, scores, torch.arange(8).float()[None, :, None])
    assert rows[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert left.tolist() == [[0, 5, 1, 4, 2, 3]]
    assert drops(3, torch.rand(1, 4), torch.rand(1, 4, 2))[0] is None


def test_cut_gaps():
    chosen = select(2, 4, 0, EXECUTORCH)
    rows = torch.zeros(1, 4, 1)
    with watch_cuts(chosen) as gaps:
        chosen(torch.tensor([[0.1, 0.75, 0.5, -1.0]]), rows)
        # The worst kept is padding: which one stays does not matter.
        chosen(torch.tensor([[0.1, -1.0, -1.0, -1.0]]), rows)
    chosen(torch.tensor([[0.1, 0.75, 0.5, -1.0]]), rows)
    assert gaps == [0.25, float("inf")]


def test_tail():
    vector = torch.arange(6)[None]
    assert tail(vector, 6) is vector
    assert tail(vector, 2).tolist() == [[4, 5]]
