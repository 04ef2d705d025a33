"""Where a pruning stands: which units live, how many tokens each layer gets, and what could go next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from comp_edge.families import family_of
from comp_edge.families.base import Request, StreamView
from comp_edge.plan import LayerPlan, Plan, StreamPlan, plan_of
from comp_edge.units import KINDS, Kind, Site, dense_plan, sites, unit_count

WIDE_ENOUGH = 4  # a layer's width is rounded when it is at least this many multiples wide


@dataclass
class State:
    """Live units and token counts; mutable, cheap to copy.

    Attributes:
        alive: [units] bool per site, in the order in which the units lie in the model's weights.
        tokens: token schedule per stream (see `StreamPlan.schedule`).
        template: the plan that the model has now; what `alive` counts are the units that it keeps.
        follows: streams that compute on the tokens of another one.
    """

    alive: dict[Site, Tensor]
    tokens: dict[str, list[int]]
    template: Plan = field(repr=False)
    follows: dict[str, str] = field(default_factory=dict, repr=False)
    # What each mask keeps, with the mask and its version: pricing asks for all of them after each change of one.
    _listed: dict[Site, tuple[Tensor, int, tuple[int, ...]]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, model: Any, *, base: str, prompt_tokens: int | None = None, request: Request | None = None) -> State:
        """Everything alive that the model has: a dense one, or one that was pruned before.

        Args:
            prompt_tokens, request: see `dense_plan`; a pruned model's plan says it itself.
        """
        plan = plan_of(model) or dense_plan(model, prompt_tokens=prompt_tokens, request=request, base=base)
        streams = family_of(model).streams(model)
        alive = {site: torch.ones(unit_count(streams, site), dtype=torch.bool) for site in sites(streams)}
        follows = {name: stream.follows for name, stream in streams.items() if stream.follows}
        return cls(alive=alive, tokens={k: list(v) for k, v in plan.schedules.items()}, template=plan, follows=follows)

    def copy(self) -> State:
        """An independent copy."""
        return State(
            alive={site: mask.clone() for site, mask in self.alive.items()},
            tokens={name: list(tokens) for name, tokens in self.tokens.items()},
            template=self.template,
            follows=self.follows,
        )

    def plan(self) -> Plan:
        """As a plan, in dense indices (not validated: this runs thousands of times)."""
        streams = {}
        for name, stream in self.template.streams.items():
            count = len(stream.layers)
            layers = tuple(
                LayerPlan.model_construct(**{kind: self._kept(name, i, kind) for kind in KINDS}) for i in range(count)
            )
            tokens = self.tokens[self.follows.get(name, name)]
            streams[name] = StreamPlan.model_construct(
                layers=layers,
                tokens=tuple(tokens[:count]),
                delivered=tokens[count] if len(tokens) > count and name not in self.follows else None,
            )
        return self.template.model_copy(update={"streams": streams})

    def _kept(self, stream: str, layer: int, kind: Kind) -> tuple[int, ...]:
        mask = self.alive.get(site := Site(stream, layer, kind))
        if mask is None:
            return ()
        found = self._listed.get(site)
        if found is None or found[0] is not mask or found[1] != mask._version:
            dense = getattr(self.template.streams[stream].layers[layer], kind)
            kept = tuple(dense[i] for i in mask.nonzero()[:, 0].tolist())
            found = self._listed[site] = (mask, mask._version, kept)
        return found[2]

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint records."""
        plan = self.plan()
        return {name: stream.model_dump(mode="json") for name, stream in plan.streams.items()}

    def restore(self, value: Mapping[str, Any]) -> None:
        """Take over what `to_json` gave."""
        for name, stream in value.items():
            delivered = stream.get("delivered")
            self.tokens[name] = list(stream["tokens"]) + ([] if delivered is None else [delivered])
            for index, layer in enumerate(stream["layers"]):
                for kind in KINDS:
                    if (site := Site(name, index, kind)) in self.alive:
                        kept = set(layer[kind])
                        dense = getattr(self.template.streams[name].layers[index], kind)
                        self.alive[site] = torch.tensor([unit in kept for unit in dense], dtype=torch.bool)


@dataclass(frozen=True)
class Chunk:
    """Units that go together: a multiple of channels, a head, a head of every group, or all that is left.

    Attributes:
        score: their summed importance.
    """

    site: Site
    units: tuple[int, ...]
    score: float


def next_chunk(
    state: State, site: Site, scores: Tensor, *, stream: StreamView, round_to: int, floor: int = 1
) -> Chunk | None:
    """The least important chunk that can leave a sub-layer now; None when nothing may.

    Widths stay multiples of `round_to` where the dense layer is at least `WIDE_ENOUGH` such multiples wide. Under
    grouped-query attention a chunk is a whole group or one query head of every group, whichever matters less per head.

    Args:
        scores: [units] importance.
        floor: chunks that must stay (0 lets the whole sub-layer go).
    """
    alive = state.alive[site]
    layer = stream.layers[site.layer]
    living = alive.nonzero()[:, 0]
    if not len(living):
        return None
    if site.kind == "ffn":
        size = round_to if len(alive) >= WIDE_ENOUGH * round_to else max(1, len(alive) // 16)
        count = len(living) - (-(-len(living) // size) - 1) * size  # down to the next multiple below
        candidates = [living[scores[living].argsort()[:count]]]
    elif not layer.attn.separable:
        size, candidates = 1, [living]
    else:
        size = 1
        step = _head_step(layer.attn.heads * layer.attn.head_dim, layer.attn.head_dim, round_to)
        candidates = _head_chunks(living, scores, group=layer.attn.heads // layer.attn.kv_heads, step=step)
    # Candidates first: where one would leave too little, another may not.
    candidates = [units for units in candidates if len(living) - len(units) >= floor * size]
    if not candidates:
        return None
    best = min(candidates, key=lambda units: float(scores[units].mean()))
    return Chunk(site=site, units=tuple(sorted(best.tolist())), score=float(scores[best].sum()))


def _head_step(width: int, head_dim: int, round_to: int) -> int:
    """Heads that must go together so that the width stays a multiple of `round_to`."""
    return 1 if width < WIDE_ENOUGH * round_to else round_to // math.gcd(round_to, head_dim)


def _head_chunks(living: Tensor, scores: Tensor, *, group: int, step: int) -> list[Tensor]:
    """What may go at once: the weakest groups, or the weakest query heads of every group.

    As few of them as leave a multiple of `step` heads (everything, where nothing less does). Without groups a group is
    a head.
    """
    groups = [living[living // group == g] for g in (living // group).unique().tolist()]
    groups.sort(key=lambda members: float(scores[members].sum()))
    count, size = len(groups), len(groups[0])
    whole = next(k for k in range(1, count + 1) if (count - k) * size % step == 0)
    thin = next(k for k in range(1, size + 1) if (size - k) * count % step == 0)
    chunks = [torch.cat(groups[:whole])]
    if size > 1:
        chunks.append(torch.cat([members[scores[members].argsort()[:thin]] for members in groups]))
    return chunks
