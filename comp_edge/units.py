"""Units: what can be removed from a layer as a whole, and how heads group under grouped-query attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.families.base import Family, Request, StreamView
from comp_edge.plan import LayerPlan, Plan, StreamPlan, plan_of, stream_plan

Kind = Literal["heads", "ffn"]
KINDS: tuple[Kind, ...] = ("heads", "ffn")


class Site(NamedTuple):
    """Where units live: one kind of sub-layer in one layer of one stream."""

    stream: str
    layer: int
    kind: Kind


def sites(streams: Mapping[str, StreamView]) -> list[Site]:
    """All sub-layers that still have units."""
    found = []
    for name, stream in streams.items():
        for index, layer in enumerate(stream.layers):
            if layer.attn is not None:
                found.append(Site(name, index, "heads"))
            if layer.mlp is not None:
                found.append(Site(name, index, "ffn"))
    return found


def unit_count(streams: Mapping[str, StreamView], site: Site) -> int:
    """Units (query heads or channels) of a sub-layer, as they are now; 0 where it was pruned away."""
    layer = streams[site.stream].layers[site.layer]
    if site.kind == "heads":
        return layer.attn.heads if layer.attn else 0
    return layer.mlp.channels if layer.mlp else 0


def kept_kv_heads(kept: Iterable[int], *, heads: int, kv_heads: int) -> list[int]:
    """Key-value heads that the kept query heads need.

    Raises:
        ValueError: groups keep different numbers of query heads: grouped-query attention needs the same in each.
    """
    size = heads // kv_heads
    counts = [0] * kv_heads
    for head in kept:
        counts[head // size] += 1
    used = {count for count in counts if count}
    if len(used) > 1:
        raise ValueError(
            f"kept heads {list(kept)} leave {sorted(used)} query heads in the {kv_heads} key-value groups; every group "
            "that stays must keep the same number"
        )
    return [group for group, count in enumerate(counts) if count]


def dense_plan(model: Any, *, base: str, prompt_tokens: int | None = None, request: Request | None = None) -> Plan:
    """The plan that keeps everything.

    Args:
        prompt_tokens: text tokens of the reference prompt, with one image of the model's usual size; or
        request: the whole reference request.
    """
    family = family_of(model)
    if request is None:
        request = family.default_request(model, prompt_tokens or 0)
    streams, tokens = family.streams(model), family.dense_tokens(model, request)
    return Plan(
        model_type=family.model_type,
        base=base,
        images=request.images,
        streams={
            name: stream_plan(
                [
                    LayerPlan(**{kind: tuple(range(unit_count(streams, Site(name, index, kind)))) for kind in KINDS})
                    for index in range(len(stream.layers))
                ],
                tokens[name],
            )
            for name, stream in streams.items()
        },
    )


def live_units(model: Any, streams: Mapping[str, StreamView], site: Site) -> tuple[int, ...]:
    """Dense indices of the units that a sub-layer has now, in the order in which they lie in its weights.

    Args:
        streams: the model's views.
    """
    plan = plan_of(model)
    if plan is not None:
        return getattr(plan.streams[site.stream].layers[site.layer], site.kind)
    return tuple(range(unit_count(streams, site)))


def check_plan(model: Any, plan: Plan) -> None:
    """Whether a plan fits a model: a dense one, or one that was pruned to a larger plan.

    Raises:
        InputError: another architecture, other layers, an index out of range, uneven groups or an impossible schedule; says
            where.
    """
    family = family_of(model)
    if plan.model_type != family.model_type:
        raise InputError(f"the plan is for model type {plan.model_type!r}, the model is {family.model_type!r}.")
    streams = family.streams(model)
    if set(plan.streams) != set(streams):
        raise InputError(f"the plan has streams {sorted(plan.streams)}, the model has {sorted(streams)}.")
    for name, stream in streams.items():
        planned = plan.streams[name]
        if len(planned.layers) != len(stream.layers):
            raise InputError(
                f"the plan has {len(planned.layers)} layers in stream {name!r}, the model has {len(stream.layers)}."
            )
        for index, layer in enumerate(planned.layers):
            _check_units(family, model, streams, Site(name, index, "heads"), layer.heads)
            _check_units(family, model, streams, Site(name, index, "ffn"), layer.ffn)
        _check_schedule(stream, planned)
        if stream.follows and planned.tokens != plan.streams[stream.follows].tokens[: len(planned.tokens)]:
            raise InputError(f"stream {name!r} must compute on the tokens of stream {stream.follows!r}.")
    _check_first_counts(family, model, plan)


def _check_units(family: Family, model: Any, streams: Mapping[str, StreamView], site: Site, kept: tuple) -> None:
    where = f"in layer {site.layer} of stream {site.stream!r}"
    live = live_units(model, streams, site)
    if plan_of(model) is None:
        if kept and kept[-1] >= len(live):
            raise InputError(f"{site.kind} index {kept[-1]} {where} is out of range: the model has {len(live)} there.")
    elif gone := sorted(set(kept) - set(live)):
        raise InputError(f"{site.kind} index {gone[0]} {where} was pruned away already; it has {len(live)} there.")
    attn = streams[site.stream].layers[site.layer].attn
    if site.kind == "heads" and attn is not None:
        if not attn.separable and kept and len(kept) < len(live):
            raise InputError(
                f"{len(kept)} of {len(live)} heads {where} cannot be kept: a norm spans all of them; keep all or none."
            )
        shape = family.shape(model, site.stream)
        try:
            kept_kv_heads(kept, heads=shape.heads, kv_heads=shape.kv_heads)
        except ValueError as error:
            raise InputError(f"layer {site.layer} of stream {site.stream!r}: {error}.") from None


def _check_schedule(stream: StreamView, planned: StreamPlan) -> None:
    schedule, layers = planned.schedule, len(stream.layers)
    if (planned.delivered is not None) != stream.hands_over:
        raise InputError(
            f"stream {stream.name!r} "
            + (
                "drops tokens behind the connector: its plan must say how many are 'delivered'."
                if stream.hands_over
                else f"hands on what its last layer computes on; its plan says {planned.delivered} are 'delivered'."
            )
        )
    if stream.follows:
        return
    falls = [i for i in range(1, layers) if schedule[i] < schedule[i - 1]]
    where = ", ".join(map(str, stream.drops)) or "none"
    for layer in falls:
        if layer not in stream.drops:
            raise InputError(f"stream {stream.name!r} cannot drop tokens before layer {layer}; it can before: {where}.")
    attending = [i for i, layer in enumerate(planned.layers) if layer.heads]
    if falls and (not attending or attending[0] >= falls[0]):
        raise InputError(
            f"stream {stream.name!r} drops tokens before layer {falls[0]}, but no layer before it keeps an attention head "
            "to rank them."
        )


def _check_first_counts(family: Family, model: Any, plan: Plan) -> None:
    vision = plan.streams["vision"]
    dense = family.default_request(model, 0).vision_tokens
    if vision.tokens[0] != dense and not family.variable_images:
        raise InputError(
            f"the first vision layer must compute on all {dense} tokens, the plan says {vision.tokens[0]}."
        )
    if vision.delivered is not None:
        most = family.image_tokens(model, vision.tokens[-1])
        if vision.delivered > most:
            raise InputError(f"the connector makes {most} tokens of an image, the plan says {vision.delivered} stay.")
        if vision.delivered < most and not any(layer.heads for layer in vision.layers):
            raise InputError("the plan drops image tokens, but no vision layer keeps an attention head to rank them.")
    if family.fusion(model) is None:
        return
    image = plan.images * family.delivered(model, vision.schedule)
    first = plan.streams["language"].tokens[0]
    if first <= image:
        raise InputError(
            f"the first language layer must compute on the {image} image tokens and at least one prompt token, the plan "
            f"says {first}."
        )


def text_tokens(model: Any, plan: Plan) -> int:
    """Tokens of the plan's reference prompt that are not image tokens."""
    family, first = family_of(model), plan.streams["language"].tokens[0]
    if family.fusion(model) is None:
        return first
    return first - plan.images * family.delivered(model, plan.streams["vision"].schedule)


def request_of(model: Any, plan: Plan) -> Request:
    """The reference request that a plan's token schedules are for."""
    return Request(plan.streams["vision"].tokens[0], text_tokens(model, plan), plan.images)


def mask_of(kept: Iterable[int], units: int) -> Tensor:
    """[units] float mask: 1 for kept units, 0 for the others."""
    mask = torch.zeros(units)
    mask[list(kept)] = 1.0
    return mask
