"""Units: what can be removed from a layer as a whole, and how heads group under grouped-query attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.families.base import StreamView
from comp_edge.plan import LayerPlan, Plan, StreamPlan

Kind = Literal["heads", "ffn"]


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


def reference_prompt(model: Any, inputs: Mapping[str, Tensor]) -> int:
    """Text tokens of a request as a task gives it (`example_inputs`), which must fit the model.

    Raises:
        InputError: its image has another size than the model's, or its prompt shows another number of image tokens.
    """
    family = family_of(model)
    side, given = family.image_size(model), tuple(inputs["pixel_values"].shape[-2:])
    if given != (side, side):
        raise InputError(f"the task gives images of {given[0]}x{given[1]} pixels, the model takes {side}x{side}.")
    wanted = family.image_tokens(model, family.dense_vision_tokens(model))
    images = int((inputs["input_ids"][0] == model.config.image_token_id).sum())
    if images != wanted:
        raise InputError(f"the task's prompt holds {images} image tokens, the model makes {wanted} of an image.")
    return inputs["input_ids"].shape[1] - images


def dense_plan(model: Any, *, prompt_tokens: int, base: str) -> Plan:
    """The plan that keeps everything, for a reference prompt of this many text tokens."""
    family = family_of(model)
    streams = family.streams(model)
    tokens = family.dense_tokens(model, prompt_tokens)
    return Plan(
        model_type=family.model_type,
        base=base,
        streams={
            name: StreamPlan(
                layers=tuple(
                    LayerPlan(
                        heads=tuple(range(unit_count(streams, Site(name, index, "heads")))),
                        ffn=tuple(range(unit_count(streams, Site(name, index, "ffn")))),
                    )
                    for index in range(len(stream.layers))
                ),
                tokens=tokens[name],
            )
            for name, stream in streams.items()
        },
    )


def check_plan(model: Any, plan: Plan) -> None:
    """Whether a plan fits a dense model.

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
            for kind in ("heads", "ffn"):
                units, kept = unit_count(streams, Site(name, index, kind)), getattr(layer, kind)
                if kept and kept[-1] >= units:
                    raise InputError(
                        f"{kind} index {kept[-1]} in layer {index} of stream {name!r} is out of range: the model has "
                        f"{units} there."
                    )
            attn = stream.layers[index].attn
            if attn is not None:
                try:
                    kept_kv_heads(layer.heads, heads=attn.heads, kv_heads=attn.kv_heads)
                except ValueError as error:
                    raise InputError(f"layer {index} of stream {name!r}: {error}.") from None
        without = [i for i, layer in enumerate(planned.layers) if not layer.heads]
        first_drop = next((i for i, n in enumerate(planned.tokens) if n < planned.tokens[0]), None)
        if first_drop is not None and all(i in without for i in range(first_drop)):
            raise InputError(
                f"stream {name!r} drops tokens before layer {first_drop}, but no layer before it keeps an attention head "
                "to rank them."
            )
    vision = plan.streams["vision"].tokens
    dense = family.dense_vision_tokens(model)
    if vision[0] != dense:
        raise InputError(f"the first vision layer must compute on all {dense} tokens, the plan says {vision[0]}.")
    first, image = plan.streams["language"].tokens[0], family.image_tokens(model, vision[-1])
    if first <= image:
        raise InputError(
            f"the first language layer must compute on the {image} image tokens and at least one prompt token, the plan "
            f"says {first}."
        )


def mask_of(kept: Iterable[int], units: int) -> Tensor:
    """[units] float mask: 1 for kept units, 0 for the others."""
    mask = torch.zeros(units)
    mask[list(kept)] = 1.0
    return mask
