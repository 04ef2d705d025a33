"""What a stage could do next: for each mode, the state after taking about a given share of the cost away."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from comp_edge.calibrate import TokenStatistics
from comp_edge.cost import Cost
from comp_edge.families.base import Family, StreamView
from comp_edge.importance import blend, relative_to_mean
from comp_edge.state import Chunk, State, next_chunk
from comp_edge.units import Site

FREE = 1e-9  # of the dense cost: rounding


@dataclass(frozen=True)
class Proposal:
    """One way to go on.

    Attributes:
        mode: the mode it advances; "params" or "tokens" where it advances those of several streams at once.
        saving: cost saved, as a fraction of the dense cost.
    """

    mode: str
    state: State
    saving: float


@dataclass(frozen=True)
class Limits:
    """Bounds of a single stage and of the result.

    Attributes:
        share: at most this fraction of a sub-layer's units or of a layer's tokens goes in one stage.
        min_tokens: what a layer always computes on, per stream.
        round_to: widths stay multiples of this where the layer is wide enough.
    """

    share: float = 0.25
    min_tokens: int = 6
    round_to: int = 32


class Proposer:
    """Builds proposals for a model; `cost` is asked, never known.

    Args:
        dense: cost of the dense model, to which savings are relative.
    """

    def __init__(
        self, family: Family, model: Any, streams: Mapping[str, StreamView], *, cost: Cost, dense: float, limits: Limits
    ) -> None:
        self.family, self.model, self.streams = family, model, streams
        self.cost, self.dense, self.limits = cost, dense, limits

    def within(self, limits: Limits) -> Proposer:
        """The same within other limits."""
        return Proposer(self.family, self.model, self.streams, cost=self.cost, dense=self.dense, limits=limits)

    def price(self, state: State) -> float:
        """Cost of a state, as a fraction of the dense cost."""
        return self.cost.predict(state.plan()) / self.dense

    # ---- parameters

    def parameters(
        self,
        state: State,
        scores: Mapping[Site, Tensor],
        *,
        streams: Sequence[str],
        goal: float,
        per_cost: bool,
        beside: Mapping[Site, Tensor] | None = None,
    ) -> Proposal | None:
        """Remove the least important chunks of one or several streams until `goal` of the dense cost is saved.

        Args:
            scores: [units] importance per site.
            streams: what shares one ranking.
            per_cost: rank by importance per cost saved (scores comparable across layers), else by importance relative to
                the layer's mean.
            beside: a second importance, in the unit of the first's square root, of which only the layer's mean says how much it
                is; a unit goes first where both are low.
        """
        new, before = state.copy(), self.price(state)
        sites = [s for s in scores if s.stream in streams and state.alive[s].any()]
        ranking = {s: scores[s] if per_cost else relative_to_mean(scores[s], state.alive[s]) for s in sites}
        unit_costs = {s: self._unit_cost(state, s) if per_cost else 1.0 for s in sites}
        if beside is not None:
            ranking = {s: blend(scores[s] / max(unit_costs[s], 1e-12), beside[s], state.alive[s]) for s in sites}
            unit_costs = dict.fromkeys(sites, 1.0)

        def candidate(site: Site) -> tuple[float, Chunk] | None:
            chunk = self._next(new, site, ranking[site])
            if chunk is None or not self._within(chunk, new, state):
                return None
            return chunk.score / len(chunk.units) / max(unit_costs[site], 1e-12), chunk

        candidates = {site: candidate(site) for site in sites}
        saved = 0.0
        while saved < goal and (open_ := [c for c in candidates.values() if c is not None]):
            _, chunk = min(open_, key=lambda c: c[0])
            new.alive[chunk.site][list(chunk.units)] = False
            candidates[chunk.site] = candidate(chunk.site)
            saved = before - self.price(new)
        if saved <= 0:
            return None
        return Proposal(_mode(streams, "params"), new, saved)

    def _next(self, state: State, site: Site, scores: Tensor) -> Chunk | None:
        # The first layer's attention ranks tokens for all that follow: one chunk of it stays.
        floor = 1 if site.kind == "heads" and site.layer == 0 else 0
        return next_chunk(
            state, site, scores, stream=self.streams[site.stream], round_to=self.limits.round_to, floor=floor
        )

    def _within(self, chunk: Chunk, new: State, old: State) -> bool:
        """Whether a stage may take this chunk too: one is always allowed, more only up to the limit's share."""
        had = int(old.alive[chunk.site].sum())
        gone = had - int(new.alive[chunk.site].sum())
        return gone == 0 or gone + len(chunk.units) <= self.limits.share * had

    def _unit_cost(self, state: State, site: Site) -> float:
        """Cost of one unit of a site, with everything else as it is."""
        one = state.copy()
        first = int(one.alive[site].nonzero()[0, 0])
        group = _group_of(self.streams, site)
        members = range(first // group * group, first // group * group + group)
        live = [u for u in members if bool(one.alive[site][u])]
        one.alive[site][live] = False
        return (self.price(state) - self.price(one)) / len(live)

    # ---- tokens

    def tokens_by_threshold(
        self, state: State, statistics: TokenStatistics, *, streams: Sequence[str], goal: float
    ) -> Proposal | None:
        """Lower the token counts of whole streams by one global threshold on importance, until `goal` is saved.

        A layer's count is the mean number of tokens that reach the threshold. What one layer loses is bounded, because a
        global threshold cascades: the few tokens that a layer keeps make everything after look unimportant.
        """
        before = self.price(state)
        low, high, best = 0.0, 4.0, None
        for _ in range(24):
            middle = (low + high) / 2
            counts = {stream: self._reaching(state, statistics, stream, middle) for stream in streams}
            saved = before - self.price(self._lowered(state, counts))
            if saved >= goal:
                best, high = counts, middle
            else:
                low = middle
                if best is None:
                    most = counts
        new = self._with_free_tokens(state, best or most)
        saved = before - self.price(new)
        return Proposal(_mode(streams, "tokens"), new, saved) if saved > 0 else None

    def _reaching(self, state: State, statistics: TokenStatistics, stream: str, threshold: float) -> list[int]:
        """Token counts of a stream's drop points by a threshold, within a stage's bounds."""
        view, counts = self.streams[stream], list(state.tokens[stream])
        for point in view.drop_points:
            key = (stream, point if point == len(view.layers) else point - 1)
            reached = round(statistics.above(*key, threshold)) if key in statistics.scores else 0
            counts[point] = min(counts[point], max(reached, self._least(state, stream, point)))
        return counts

    def tokens_from_layer(self, state: State, *, stream: str, layer: int, goal: float) -> Proposal | None:
        """Lower the token counts from one drop point on, until `goal` is saved or its bound is reached."""
        before, current = self.price(state), state.tokens[stream]
        least = self._least(state, stream, layer)
        low, high = least, current[layer] - 1
        if high < low:
            return None
        while low < high:  # most tokens that still save the goal
            middle = (low + high + 1) // 2
            if before - self.price(self._cut(state, stream, layer, middle)) >= goal:
                low = middle
            else:
                high = middle - 1
        counts = self._cut(state, stream, layer, low).tokens[stream]
        new = self._with_free_tokens(state, {stream: counts})
        saved = before - self.price(new)
        return Proposal(f"{stream}_tokens", new, saved) if saved > 0 else None

    def _lowered(self, state: State, counts: Mapping[str, Sequence[int]]) -> State:
        """A state whose streams have at most these token counts."""
        for stream, most in counts.items():
            state = self.with_tokens(
                state, stream, [min(pair) for pair in zip(state.tokens[stream], most, strict=True)]
            )
        return state

    def _with_free_tokens(self, state: State, counts: Mapping[str, Sequence[int]]) -> State:
        """The same with as many tokens as cost no more, at most those that `state` has.

        Devices that compute in tiles have a staircase of costs, where tokens up to the edge of a step are free. Equal counts
        in a row rise together, because each drop may cost something, and then alone.
        """
        price = self.price(self._lowered(state, counts)) + FREE
        # Never rising, or a layer that rises alone would take the next one with it.
        counts = {stream: list(accumulate(most, min)) for stream, most in counts.items()}
        for stream in counts:
            for point in self.streams[stream].drop_points:
                now = self._lowered(state, counts).tokens[stream]
                end = next((i for i in range(point, len(now)) if now[i] < now[point]), len(now))
                for layers in (range(point, end), range(point, point + 1)):
                    counts = self._raised(state, counts, stream, layers, price)
        return self._lowered(state, counts)

    def _raised(
        self, state: State, counts: Mapping[str, Sequence[int]], stream: str, layers: range, price: float
    ) -> Mapping[str, Sequence[int]]:
        """Counts with as many tokens in some layers of a stream as cost no more than `price`."""
        now = self._lowered(state, counts).tokens[stream]
        count, highest = now[layers[0]], min(state.tokens[stream][layers[0]], now[layers[0] - 1])

        def with_count(count: int) -> dict[str, Sequence[int]]:
            return {**counts, stream: [count if i in layers else n for i, n in enumerate(counts[stream])]}

        def costs_more(count: int) -> bool:
            return self.price(self._lowered(state, with_count(count))) > price

        if count == highest or costs_more(count + 1):
            return counts
        free = bisect_left(range(count + 1, highest + 1), True, key=costs_more)
        return with_count(count + free)

    def _cut(self, state: State, stream: str, layer: int, count: int) -> State:
        counts = list(state.tokens[stream])
        return self.with_tokens(state, stream, counts[:layer] + [min(n, count) for n in counts[layer:]])

    def _least(self, state: State, stream: str, layer: int) -> int:
        current = state.tokens[stream][layer]
        bound = int(current * (1 - self.limits.share))
        return max(min(bound, current - 1), min(self.limits.min_tokens, current))

    def with_tokens(self, state: State, stream: str, counts: Sequence[int]) -> State:
        """A state with other token counts; never rising, and the language model gets what the vision stream delivers."""
        new = state.copy()
        falling: list[int] = []
        for count in counts:
            falling.append(min(count, falling[-1]) if falling else count)
        new.tokens[stream] = falling
        if stream == "vision" and self.family.fusion(self.model) is not None:
            images = state.template.images
            gone = images * (
                self.family.delivered(self.model, state.tokens[stream]) - self.family.delivered(self.model, falling)
            )
            first = state.tokens["language"][0] - gone
            new.tokens["language"] = [first] + [min(n, first) for n in state.tokens["language"][1:]]
        return new

    def lowest(self, state: State, modes: Sequence[str]) -> float:
        """The lowest cost that these modes can reach, as a fraction of the dense cost."""
        new = state.copy()
        for mode in modes:
            stream, what = mode.rsplit("_", 1)
            if what == "params":
                for site in [s for s in new.alive if s.stream == stream]:
                    # What stays is decided by the same rules as in a stage, whatever the scores.
                    equal = torch.ones(len(new.alive[site]))
                    while (chunk := self._next(new, site, equal)) is not None:
                        new.alive[site][list(chunk.units)] = False
            else:
                points = self.streams[stream].drop_points
                if points:
                    new = self._cut(new, stream, points[0], self.limits.min_tokens)
        return self.price(new)


def _mode(streams: Sequence[str], what: str) -> str:
    """A mode, or what stages of several streams together are called: "params", "tokens"."""
    return f"{streams[0]}_{what}" if len(streams) == 1 else what


def _group_of(streams: Mapping[str, StreamView], site: Site) -> int:
    if site.kind == "ffn":
        return 1
    attn = streams[site.stream].layers[site.layer].attn
    return attn.heads // attn.kv_heads
