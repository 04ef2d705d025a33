"""Importance of parameters and of tokens (CIM): pure functions on tensors.

Sources: structured Wanda; CIP and CIT of CoMP (DESIGN section 5). Shapes: b batch, h heads, n tokens (queries or keys),
c input channels of a projection, d its output channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Norm = Literal["sum", "mean", "minmax", "rank"]


def token_importance(attention: Tensor, *, head_mask: Tensor | None = None, queries: Tensor | None = None) -> Tensor:
    """S^t before Norm: how much the queries look at each token, by the head that looks most.

    `S_i = sum_n max_h A_h,n,i`. With a head mask this is CIT: `A * M` after the softmax, so that a fading head fades
    instead of turning uniform.

    Args:
        attention: [b, h, n, n] softmax probabilities.
        head_mask: [h], 1 for a live head, 0 for a removed one.
        queries: [b, n] bool, the rows that count (padding does not).

    Returns:
        [b, n]
    """
    if head_mask is not None:
        attention = attention * head_mask.to(attention.dtype)[:, None, None]
    strongest = attention.amax(1)
    if queries is not None:
        strongest = strongest * queries.to(attention.dtype)[:, :, None]
    return strongest.sum(1)


def normalize(scores: Tensor, norm: Norm, *, valid: Tensor | None = None) -> Tensor:
    """Norm of S^t over the tokens of each example, [b, n] -> [b, n]; invalid tokens get 0.

    `sum`: sums to one. `mean`: mean one. `minmax`: 0 to 1. `rank`: 0 (least) to 1 (most).
    """
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    live = scores.masked_fill(~valid, 0.0)
    count = valid.sum(1, keepdim=True).clamp(min=1)
    if norm in ("sum", "mean"):
        total = live.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        return live / total if norm == "sum" else live / total * count
    if norm == "minmax":
        low = scores.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
        high = scores.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
        return ((scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny)).masked_fill(~valid, 0.0)
    if norm == "rank":
        order = scores.masked_fill(~valid, -torch.inf).argsort(1).argsort(1)
        rank = order - (~valid).sum(1, keepdim=True)
        return (rank / (count - 1).clamp(min=1)).masked_fill(~valid, 0.0).to(scores.dtype)
    raise ValueError(f"unknown norm {norm!r}: expected sum, mean, minmax or rank")


def token_weights(scores: Tensor, *, valid: Tensor | None = None, cls: bool) -> Tensor:
    """CIP's omega [b, n]: `S_n / sum S` for ordinary tokens; 1 for the CLS token at position 0 where there is one."""
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    if not cls:
        return normalize(scores, "sum", valid=valid)
    rest = normalize(scores[:, 1:], "sum", valid=valid[:, 1:])
    return torch.cat([torch.ones_like(rest[:, :1]), rest], 1)


def input_energy(inputs: Tensor, weights: Tensor | None = None) -> Tensor:
    """What a batch adds to ||X_:,i||^2, token-weighted for CIP: `sum_n w_n X_n,i^2`.

    Summing this over batches is all the state that Wanda needs: no activation is kept.

    Args:
        inputs: [b, n, c], the input of a projection.
        weights: [b, n]; None weighs each token 1.

    Returns:
        [c]
    """
    squares = inputs.detach().float().pow(2)
    if weights is not None:
        squares = squares * weights.float()[..., None]
    return squares.sum((0, 1))


def wanda(weight: Tensor, energy: Tensor) -> Tensor:
    """Structured Wanda, S^p_i = (1/d) sum_j |W_ij| * ||X_:,i||_2, for every input channel of a projection.

    Args:
        weight: [d, c] as in `nn.Linear`.
        energy: [c], summed `input_energy`.

    Returns:
        [c]
    """
    return weight.detach().abs().mean(0, dtype=torch.float32) * energy.clamp(min=0).sqrt()


def per_unit(channels: Tensor, unit_size: int) -> Tensor:
    """Mean importance of units of `unit_size` neighbouring channels (a head's `head_dim`): [c] -> [c / unit_size]."""
    return channels.view(-1, unit_size).mean(1)


def relative_to_mean(scores: Tensor, alive: Tensor) -> Tensor:
    """Scores over the mean of the live units, so that layers of different scale can share one ranking."""
    mean = scores[alive].mean() if alive.any() else scores.new_ones(())
    return scores / mean.clamp(min=torch.finfo(torch.float32).tiny)


def blend(squared: Tensor, scores: Tensor, alive: Tensor) -> Tensor:
    """A geometric mean of two importances of a layer's units: of a squared one, and of one relative to the layer's mean.

    Fisher importance per unit of cost compares units of all layers, but knows only what a removal costs at once; Wanda
    spares layers whose other units are gone already. Neither is better alone (`docs/method.md`).

    Args:
        squared: [units] such as Fisher importance per unit of cost.
        scores: [units] such as structured Wanda.
        alive: [units] bool, whose mean is taken.
    """
    return squared.clamp(min=0).sqrt() * relative_to_mean(scores, alive)
