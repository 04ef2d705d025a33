"""Choosing and gathering the tokens that the next layer computes on; batch 1, static counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from comp_edge.errors import InputError
from comp_edge.families.base import Protected
from export.graph.options import GraphOptions


def attention_scores(probabilities: Tensor, queries: Tensor) -> Tensor:
    """Importance of each token: `sum over queries of max over heads of A`.

    Slices and `maximum` stay inside XNNPACK where a maximum over a dimension does not, and the sum over queries is a
    matmul with the vector of rows that count.

    Args:
        probabilities: [heads, windows, n, m] softmax probabilities; one window where every query sees every key.
        queries: [windows, 1, n], 1 for each row that counts.

    Returns:
        [1, windows * m]
    """
    strongest = probabilities[0:1]
    for head in range(1, probabilities.shape[0]):
        strongest = torch.maximum(strongest, probabilities[head : head + 1])
    return torch.bmm(queries, strongest.view(probabilities.shape[1:])).view(1, -1)


def tail(vector: Tensor, count: int) -> Tensor:
    """The last `count` entries of the last dimension. A slice of everything would lower to a copy outside XNNPACK."""
    return vector if vector.shape[-1] == count else vector[..., vector.shape[-1] - count :]


class Select(nn.Module):
    """Keep the `keep` best of `tokens` tokens, in their original order.

    Buffers:
        protection: [1, tokens], what protected tokens get on top.

    Args:
        protected: the token that always survives; None for none.
    """

    def __init__(self, *, tokens: int, keep: int, protected: int | None, options: GraphOptions) -> None:
        super().__init__()
        self.keep = keep
        self.form = options.selection
        protection = torch.zeros(1, tokens)
        if protected is not None:
            protection[0, protected] = options.protect
        self.register_buffer("protection", protection, persistent=False)
        if self.form == "rank":
            lower = torch.ones(tokens, tokens).tril(-1)
            # Of equal scores the earlier token wins; `before` counts kept tokens up to and including a token.
            self.register_buffer("earlier", lower, persistent=False)
            self.register_buffer("before", torch.ones(tokens, tokens).tril(), persistent=False)
            self.register_buffer("slots", torch.arange(1, keep + 1).float()[:, None], persistent=False)

    def forward(self, scores: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """Gather dimension -2 of each of `rows` ([..., tokens, c], ... being 1 or absent).

        Args:
            scores: [1, tokens]; padding must be below every real token.

        Returns:
            The same tensors with `keep` tokens.
        """
        scores = scores + self.protection
        if self.form == "topk":
            best = torch.topk(scores, self.keep, dim=-1, sorted=False).indices
            # Ascending order without a sort: the `keep` smallest of `keep` indices. (`view`, because `[0]` is a copying
            # operator of its own.)
            ordered = torch.topk(best, self.keep, dim=-1, largest=False, sorted=True).values.view(self.keep)
            return tuple(torch.index_select(tensor, tensor.ndim - 2, ordered) for tensor in rows)
        one_hot = self._one_hot(scores)
        return tuple(torch.matmul(one_hot, tensor) for tensor in rows)

    def _one_hot(self, scores: Tensor) -> Tensor:
        """[keep, tokens], 1 where a token goes to a slot."""
        column, row = scores.transpose(0, 1), scores
        better = (row > column).to(scores.dtype) + (row == column).to(scores.dtype) * self.earlier
        rank = better.sum(-1, keepdim=True)
        kept = (rank < self.keep).to(scores.dtype)
        slot = torch.matmul(self.before, kept) * kept
        return (self.slots == slot.transpose(0, 1)).to(scores.dtype)


class TokenDrops(nn.Module):
    """The drops of one stream: entering layer i, `tokens[i - 1]` become `tokens[i]`.

    A drop ranks by what the last attention before it gave. Where the layers between two drops have lost their attention,
    the scores of the survivors are carried along.

    Args:
        attending: per layer, whether it has attention.
        protected: the token that always survives (see `comp_edge.families.base.Protected`).
        handed: the scores after the last layer are wanted, too: what is behind it drops by them.

    Raises:
        InputError: tokens are dropped before any layer has attention.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        attending: Sequence[bool],
        *,
        stream: str,
        protected: Protected,
        options: GraphOptions,
        handed: bool = False,
    ) -> None:
        super().__init__()
        drops = [layer for layer in range(1, len(tokens)) if tokens[layer] < tokens[layer - 1]]
        drops += [len(tokens)] if handed else []
        self.sources: set[int] = set()
        self.carried: set[int] = set()
        self.selects = nn.ModuleDict()
        for layer in drops:
            before = [i for i in range(layer) if attending[i]]
            if not before:
                raise InputError(
                    f"the plan drops tokens of stream {stream!r} before layer {layer}, but no layer before it has "
                    "attention that could rank them."
                )
            self.sources.add(before[-1])
            self.carried.update(earlier for earlier in drops if before[-1] < earlier < layer)
            if layer < len(tokens):
                place = {"first": 0, "none": None}.get(protected, tokens[layer - 1] - 1)
                self.selects[str(layer)] = Select(
                    tokens=tokens[layer - 1], keep=tokens[layer], protected=place, options=options
                )

    def wants_scores(self, layer: int) -> bool:
        """Whether a drop will rank by this layer's attention."""
        return layer in self.sources

    def drops_before(self, layer: int) -> bool:
        """Whether fewer tokens enter this layer than left the one before."""
        return str(layer) in self.selects

    def forward(self, layer: int, scores: Tensor, *rows: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Drop what does not enter `layer`.

        Returns:
            the scores that a later drop still needs, [1, kept] or None; `rows` (see `Select`) of the kept tokens.
        """
        select = self.selects[str(layer)]
        if layer not in self.carried:
            return None, select(scores, *rows)
        column, *kept = select(scores, scores.transpose(0, 1), *rows)
        return column.transpose(0, 1), tuple(kept)


@contextmanager
def watch_cuts(*modules: nn.Module) -> Iterator[list[float]]:
    """Collect how clear every drop was while the modules run eagerly.

    Yields:
        a list that gets, for each drop, the distance between the worst kept and the best dropped score. Where both are
        padding the choice does not matter, and the distance is infinite. Below rounding error two correct programs may
        keep different tokens.
    """
    gaps: list[float] = []

    def record(select: nn.Module, args: tuple[Tensor, ...]) -> None:
        ordered = (args[0] + select.protection)[0].sort(descending=True).values
        kept, dropped = ordered[select.keep - 1].item(), ordered[select.keep].item()
        gaps.append(float("inf") if kept < 0 else kept - dropped)

    handles = [
        part.register_forward_pre_hook(record)
        for module in modules
        for part in module.modules()
        if isinstance(part, Select)
    ]
    try:
        yield gaps
    finally:
        for handle in handles:
            handle.remove()
