"""Which tokens stay when a layer hands over to the next: pure functions on scores and masks."""

from __future__ import annotations

import torch
from torch import Tensor

PROTECTED = 1e6  # added to a protected token's score; importances are sums of probabilities, far below


def keep_tokens(scores: Tensor, *, keep: int) -> Tensor:
    """Indices [b, keep] of the best-scored tokens, in their original order.

    Args:
        scores: [b, n]; protected tokens carry `PROTECTED` on top, padding 0.
    """
    return scores.argsort(dim=1, descending=True, stable=True)[:, :keep].sort(1).values


def keep_within(scores: Tensor, targets: Tensor) -> Tensor:
    """[b, n] bool: the `targets` [b] best-scored tokens of each example.

    Where examples of a batch have prompts of different lengths, each keeps what it would keep alone.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)  # ties as in `keep_tokens`
    ranks = torch.empty_like(order).scatter_(
        1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    )
    return ranks < targets[:, None]


def take(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gather `index` [b, k] along `dim` of a tensor whose dimension 0 is the batch (size 1 broadcasts)."""
    if tensor.shape[0] != index.shape[0]:
        tensor = tensor.expand(index.shape[0], *tensor.shape[1:])
    shape = [1] * tensor.ndim
    shape[0], shape[dim] = index.shape
    size = list(tensor.shape)
    size[dim] = index.shape[1]
    return tensor.gather(dim, index.view(shape).expand(size))


def layer_width(width: int, *, before: int, after: int, answers: int) -> int:
    """How many tokens a layer computes on, of `width` that the first layer got.

    The plan says `before` for the first layer and `after` for this one. Tokens of an answer are never dropped; a prompt
    longer than the plan's loses as many tokens as the plan's, a shorter one counts as padded to it.

    Args:
        width: tokens of the batch, padding and answers included.
        answers: how many of them (at the end) belong to answers.
    """
    prompt = width - answers
    kept = prompt - (before - after) if prompt >= before else min(prompt, after)
    return max(kept, 1) + answers


def targets(valid_prompt: Tensor, *, before: int, after: int) -> Tensor:
    """The same for the real prompt tokens of each example: [b] counts -> [b] counts."""
    longer = valid_prompt - (before - after)
    return torch.where(valid_prompt >= before, longer, valid_prompt.clamp(max=after)).clamp(min=1)
