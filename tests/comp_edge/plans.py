"""Plans for the models of the tests, with everything a plan can say, and masks that do the same to a dense model."""

from __future__ import annotations

from typing import Any

from comp_edge.families import family_of
from comp_edge.families.base import Request
from comp_edge.masks import UnitMasks
from comp_edge.plan import LayerPlan, Plan, StreamPlan, stream_plan
from comp_edge.schedule import attach
from comp_edge.units import dense_plan, mask_of, sites, unit_count


def layer(heads: Any, ffn: Any) -> LayerPlan:
    """A layer that keeps these heads and channels."""
    return LayerPlan(heads=tuple(heads), ffn=tuple(ffn))


def tiny_plan(
    *, prompt: int, vision_tokens: tuple[int, ...] = (17, 12, 9), language_drops: tuple[int, ...] = (12, 7)
) -> Plan:
    """Heads and channels gone, one feed-forward and (in the language stream) one attention pruned away, tokens dropped.

    For three vision layers (4 heads, 64 channels, 16 patches) and three language layers (4 heads in 2 groups).
    """
    delivered = vision_tokens[-1] - 1
    return Plan(
        model_type="llava",
        base="tiny",
        streams={
            "vision": StreamPlan(
                layers=(layer(range(4), range(64)), layer((0, 2, 3), range(0, 64, 2)), layer((1,), ())),
                tokens=vision_tokens,
            ),
            "language": StreamPlan(
                layers=(layer((0, 2), range(32)), layer((), range(0, 64, 3)), layer((2, 3), range(5, 64))),
                tokens=(delivered + prompt, *language_drops),
            ),
        },
    )


def family_plan(model: Any, request: Request, *, tokens: bool = True, units: bool = True) -> Plan:
    """A plan for any family with three layers or more a stream, with everything that a plan can say.

    Layer 0 loses one head of every group and some channels, layer 1 its attention, layer 2 a group (or head) and its
    feed-forward; tokens fall at every drop point.
    """
    family = family_of(model)
    streams, plan = family.streams(model), dense_plan(model, base="tiny", request=request)
    for name, stream in streams.items():
        layers = list(plan.streams[name].layers)
        shape = family.shape(model, name)
        if units:
            layers[0] = layer(without_one_of_each_group(shape), layers[0].ffn[::2])
            layers[1] = layer((), layers[1].ffn[3:])
            layers[2] = layer(range(shape.group, shape.heads) if shape.kv_heads > 1 else layers[2].heads, ())
        schedule = list(plan.streams[name].schedule)
        if tokens and not stream.follows:
            for point in stream.drop_points:
                lower = max(2, schedule[point] * 3 // 4)
                schedule[point:] = [min(n, lower) for n in schedule[point:]]
        plan = plan.model_copy(update={"streams": {**plan.streams, name: stream_plan(layers, schedule)}})
    return settled(model, plan, request)


def settled(model: Any, plan: Plan, request: Request) -> Plan:
    """The plan with the language stream's first count, and what follows a stream, in line with the vision stream's."""
    family = family_of(model)
    streams = family.streams(model)
    if family.fusion(model) is not None:
        first = request.text_tokens + request.images * family.delivered(model, plan.streams["vision"].schedule)
        rest = plan.streams["language"].tokens[1:]
        plan = plan.with_tokens("language", (first, *(min(n, first) for n in rest)))
    for name, stream in streams.items():
        if stream.follows:
            plan = plan.with_tokens(name, plan.streams[stream.follows].tokens)
    return plan


def without_one_of_each_group(shape: Any) -> tuple[int, ...]:
    """Query heads without the first of every key-value group; without the first head where a head is a group."""
    if shape.group == 1:
        return tuple(range(1, shape.heads))
    return tuple(head for head in range(shape.heads) if head % shape.group)


def mask_units(model: Any, plan: Plan) -> UnitMasks:
    """Mask a dense model's units, and drop its tokens, as the plan says."""
    streams = family_of(model).streams(model)
    masks = UnitMasks(streams)
    schedule = attach(model, plan.schedules)
    for site in sites(streams):
        kept = getattr(plan.streams[site.stream].layers[site.layer], site.kind)
        masks.masks[site] = mask_of(kept, unit_count(streams, site))
        if site.kind == "heads":
            schedule.head_masks[(site.stream, site.layer)] = masks.masks[site]
    return masks
