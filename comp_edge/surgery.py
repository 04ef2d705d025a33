"""Making a model structurally smaller: slices of the dense weights, in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from comp_edge.families import family_of
from comp_edge.families.base import AttentionView, LayerView, MlpView, thirds
from comp_edge.plan import PLAN_ATTRIBUTE, Plan
from comp_edge.schedule import attach
from comp_edge.units import Site, check_plan, kept_kv_heads, live_units


def apply_plan(model: Any, plan: Plan) -> None:
    """Shrink a model to a plan and activate its token schedule, in place.

    The plan speaks of the dense model's units, also where the model was pruned before. The model stays an ordinary
    transformers model. Works on parameters on the meta device too, which is how a pruned folder is loaded without ever
    holding the dense weights; and weight by weight, so that never more than one is held twice.

    Raises:
        InputError: the plan does not fit the model.
    """
    check_plan(model, plan)
    family = family_of(model)
    streams = family.streams(model)
    for name, stream in streams.items():
        for index, (layer, kept) in enumerate(zip(stream.layers, plan.streams[name].layers, strict=True)):
            heads = _positions(live_units(model, streams, Site(name, index, "heads")), kept.heads)
            channels = _positions(live_units(model, streams, Site(name, index, "ffn")), kept.ffn)
            if layer.attn is not None and len(heads) < layer.attn.heads:
                if heads:
                    _shrink_attention(layer.attn, heads)
                    family.resize_attention(name, _resized(layer))
                else:
                    family.skip_attention(name, layer)
            if layer.mlp is not None and len(channels) < layer.mlp.channels:
                if channels:
                    _shrink_mlp(layer.mlp, channels)
                else:
                    family.skip_mlp(name, layer)
    setattr(model, PLAN_ATTRIBUTE, plan)
    attach(model, plan.schedules)


def _resized(layer: LayerView) -> LayerView:
    """The view with the new widths of a fused projection, which its slices do not follow."""
    view = layer.attn
    if view.fused is None:
        return layer
    q, k, v = thirds(view.fused)
    return dataclasses.replace(layer, attn=dataclasses.replace(view, q=q, k=k, v=v))


def _positions(live: Sequence[int], kept: Sequence[int]) -> list[int]:
    """Where the kept units lie among the live ones."""
    at = {unit: position for position, unit in enumerate(live)}
    return [at[unit] for unit in kept]


def _shrink_attention(view: AttentionView, kept: Sequence[int]) -> None:
    kv = kept_kv_heads(kept, heads=view.heads, kv_heads=view.kv_heads)
    queries, keys = _channels(kept, view.head_dim), _channels(kv, view.head_dim)
    if view.fused is None:
        keep_outputs(view.q, queries)
        keep_outputs(view.k, keys)
        keep_outputs(view.v, keys)
    else:
        rows = [
            part.start + row for part, wanted in ((view.q, queries), (view.k, keys), (view.v, keys)) for row in wanted
        ]
        keep_outputs(view.fused, rows)
    keep_inputs(view.out, queries)


def _shrink_mlp(view: MlpView, kept: Sequence[int]) -> None:
    for linear in view.up:
        keep_outputs(linear, list(kept))
    keep_inputs(view.down, list(kept))


def _channels(units: Sequence[int], size: int) -> list[int]:
    return [unit * size + i for unit in units for i in range(size)]


def keep_outputs(linear: nn.Linear, rows: list[int]) -> None:
    """Keep these output channels of a linear layer, in place."""
    index = torch.tensor(rows, device=linear.weight.device)
    linear.weight = _smaller(linear.weight, 0, index)
    if linear.bias is not None:
        linear.bias = _smaller(linear.bias, 0, index)
    linear.out_features = len(rows)


def keep_inputs(linear: nn.Linear, columns: list[int]) -> None:
    """Keep these input channels of a linear layer, in place."""
    index = torch.tensor(columns, device=linear.weight.device)
    linear.weight = _smaller(linear.weight, 1, index)
    linear.in_features = len(columns)


def _smaller(parameter: Tensor, dim: int, index: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(dim, index), requires_grad=parameter.requires_grad)
