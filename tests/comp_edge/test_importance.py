"""CIM's formulas against loops that follow the notation of DESIGN section 5."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comp_edge.importance import (
    blend,
    input_energy,
    normalize,
    per_unit,
    relative_to_mean,
    token_importance,
    token_weights,
    wanda,
)

B, H, N, C, D = 2, 3, 5, 12, 4
NORMS = ["sum", "mean", "minmax", "rank"]


@pytest.fixture
def attention():
    return torch.randn(B, H, N, N).softmax(-1)


def test_token_importance(attention):
    got = token_importance(attention)
    for b in range(B):
        for i in range(N):
            expected = sum(max(float(attention[b, h, n, i]) for h in range(H)) for n in range(N))
            assert math.isclose(float(got[b, i]), expected, rel_tol=1e-6)


def test_token_importance_with_fading_heads_and_padding(attention):
    """CIT: A * M after the softmax; rows of padding do not count."""
    mask = torch.tensor([1.0, 0.3, 0.0])
    queries = torch.tensor([[True] * N, [False, False, True, True, True]])
    got = token_importance(attention, head_mask=mask, queries=queries)
    for b in range(B):
        for i in range(N):
            rows = [n for n in range(N) if queries[b, n]]
            expected = sum(max(float(attention[b, h, n, i] * mask[h]) for h in range(H)) for n in rows)
            assert math.isclose(float(got[b, i]), expected, rel_tol=1e-6)


def test_a_removed_head_does_not_count(attention):
    removed = token_importance(attention, head_mask=torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(removed, token_importance(attention[:, [0, 2]]))


scores = st.lists(st.lists(st.floats(0, 100, width=32), min_size=N, max_size=N), min_size=1, max_size=3).map(
    torch.tensor
)


@settings(max_examples=60)
@given(scores=scores, data=st.data())
@pytest.mark.parametrize("norm", NORMS)
def test_normalize(norm, scores, data):
    valid = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=N, max_size=N), min_size=len(scores), max_size=len(scores)))
    )
    got = normalize(scores, norm, valid=valid)
    assert got.shape == scores.shape and got.dtype == scores.dtype and bool(got.isfinite().all())
    assert bool((got[~valid] == 0).all()) and bool((got >= 0).all())
    for row, before, live in zip(got, scores, valid, strict=True):
        kept, given_ = row[live], before[live]
        if not len(kept) or given_.sum() < 1e-30:
            continue
        if norm == "sum":
            assert math.isclose(float(kept.sum()), 1.0, rel_tol=1e-4)
        elif norm == "mean":
            assert math.isclose(float(kept.mean()), 1.0, rel_tol=1e-4)
        elif norm == "rank":
            # 0 for the least to 1 for the most important, evenly spaced; a lone token is 0.
            steps = torch.arange(len(kept)) / max(len(kept) - 1, 1)
            torch.testing.assert_close(kept.sort().values, steps)
        elif given_.max() > given_.min() + 1e-30:
            assert float(kept.min()) == 0 and math.isclose(float(kept.max()), 1.0, rel_tol=1e-4)
        # No Norm changes a ranking inside a layer: the exporters rely on that.
        assert bool((kept[given_.argsort()].diff() >= -1e-6 * float(kept.max())).all())


def test_normalize_by_hand():
    scores = torch.tensor([[4.0, 1.0, 3.0, 9.0]])
    valid = torch.tensor([[True, True, True, False]])
    expected = {
        "sum": [0.5, 0.125, 0.375, 0.0],
        "mean": [1.5, 0.375, 1.125, 0.0],
        "minmax": [1.0, 0.0, 2 / 3, 0.0],
        "rank": [1.0, 0.0, 0.5, 0.0],
    }
    for norm in NORMS:
        torch.testing.assert_close(normalize(scores, norm, valid=valid), torch.tensor([expected[norm]]))
    with pytest.raises(ValueError, match="'softmax'.*sum, mean, minmax or rank"):
        normalize(scores, "softmax")


@pytest.mark.parametrize("cls", [True, False])
def test_token_weights(cls):
    scores = torch.rand(B, N)
    valid = torch.tensor([[True] * N, [True, True, False, True, False]])
    got = token_weights(scores, valid=valid, cls=cls)
    for b in range(B):
        first = 1 if cls else 0
        total = sum(float(scores[b, n]) for n in range(first, N) if valid[b, n])
        for n in range(N):
            if cls and n == 0:
                expected = 1.0
            else:
                expected = float(scores[b, n]) / total if valid[b, n] else 0.0
            assert math.isclose(float(got[b, n]), expected, rel_tol=1e-5, abs_tol=1e-9)


def test_token_weights_without_padding():
    scores = torch.rand(B, N)
    torch.testing.assert_close(token_weights(scores, cls=False), scores / scores.sum(1, keepdim=True))


@pytest.mark.parametrize("weighted", [True, False])
def test_wanda(weighted):
    """S^p_i = (1/d) sum_j |W_ij| (sum_n w_n X_n,i^2)^(1/2), over two batches as over one."""
    inputs, weights = torch.randn(2 * B, N, C), torch.rand(2 * B, N)
    linear = torch.randn(D, C)
    energy = sum(input_energy(inputs[i : i + B], weights[i : i + B] if weighted else None) for i in (0, B))
    got = wanda(linear, energy)
    for i in range(C):
        norm = math.sqrt(
            sum(
                (float(weights[b, n]) if weighted else 1.0) * float(inputs[b, n, i]) ** 2
                for b in range(2 * B)
                for n in range(N)
            )
        )
        expected = sum(abs(float(linear[j, i])) for j in range(D)) / D * norm
        assert math.isclose(float(got[i]), expected, rel_tol=1e-5)


def test_half_precision_does_not_overflow():
    energy = input_energy(torch.full((1, N, C), 300.0, dtype=torch.float16))
    assert energy.dtype == torch.float32
    torch.testing.assert_close(energy, torch.full((C,), N * 90_000.0))


def test_per_unit():
    channels = torch.arange(12.0)
    torch.testing.assert_close(per_unit(channels, 4), torch.tensor([1.5, 5.5, 9.5]))
    torch.testing.assert_close(per_unit(channels, 1), channels)


def test_a_blend_is_low_where_both_are():
    """And does not care in which unit either is measured, as long as it is one for all layers, or one a layer."""
    squared, scores = torch.tensor([1.0, 1.0, 9.0, 9.0]), torch.tensor([2.0, 4.0, 2.0, 4.0])
    alive = torch.tensor([True] * 4)
    found = blend(squared, scores, alive)
    torch.testing.assert_close(found, torch.tensor([2 / 3, 4 / 3, 2.0, 4.0]))
    torch.testing.assert_close(blend(squared * 4, scores * 7, alive), 2 * found)
    assert bool(blend(-squared, scores, alive).isfinite().all()), "what a drop saves nothing of has a cost of about 0"


def test_relative_to_mean():
    scores = torch.tensor([1.0, 3.0, 100.0])
    torch.testing.assert_close(
        relative_to_mean(scores, torch.tensor([True, True, False])), torch.tensor([0.5, 1.5, 50.0])
    )
    # Layers of different scale come out the same.
    alive = torch.ones(3, dtype=torch.bool)
    torch.testing.assert_close(relative_to_mean(scores * 1e-20, alive), relative_to_mean(scores, alive))
    assert bool(relative_to_mean(torch.zeros(3), alive).isfinite().all())
    assert bool(relative_to_mean(scores, ~alive).isfinite().all())
