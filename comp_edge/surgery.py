"""Making a model structurally smaller: slices of the dense weights, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from comp_edge.families import family_of
from comp_edge.families.base import AttentionView, MlpView
from comp_edge.plan import Plan
from comp_edge.schedule import attach
from comp_edge.units import check_plan, kept_kv_heads

PLAN_ATTRIBUTE = "comp_edge_plan"


def apply_plan(model: Any, plan: Plan) -> None:
    """Shrink a dense model to a plan and activate its token schedule, in place.

    The model stays an ordinary transformers model. Works on parameters on the meta device too, which is how a pruned
    folder is loaded without ever holding the dense weights.

    Raises:
        InputError: the plan does not fit the model.
    """
    check_plan(model, plan)
    family = family_of(model)
    for name, stream in family.streams(model).items():
        for layer, kept in zip(stream.layers, plan.streams[name].layers, strict=True):
            if layer.attn is not None and len(kept.heads) < layer.attn.heads:
                if kept.heads:
                    _shrink_attention(layer.attn, kept.heads)
                    family.resize_attention(layer)
                else:
                    family.skip_attention(layer)
            if layer.mlp is not None and len(kept.ffn) < layer.mlp.channels:
                if kept.ffn:
                    _shrink_mlp(layer.mlp, kept.ffn)
                else:
                    family.skip_mlp(layer)
    attach(model, {name: stream.tokens for name, stream in plan.streams.items()})
    setattr(model, PLAN_ATTRIBUTE, plan)


def _shrink_attention(view: AttentionView, kept: Sequence[int]) -> None:
    kv = kept_kv_heads(kept, heads=view.heads, kv_heads=view.kv_heads)
    queries = _channels(kept, view.head_dim)
    keys = _channels(kv, view.head_dim)
    keep_outputs(view.q, queries)
    keep_outputs(view.k, keys)
    keep_outputs(view.v, keys)
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
    linear.weight = nn.Parameter(linear.weight.detach()[index].clone(), requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[index].clone(), requires_grad=linear.bias.requires_grad)
    linear.out_features = len(rows)


def keep_inputs(linear: nn.Linear, columns: list[int]) -> None:
    """Keep these input channels of a linear layer, in place."""
    index = torch.tensor(columns, device=linear.weight.device)
    linear.weight = nn.Parameter(linear.weight.detach()[:, index].clone(), requires_grad=linear.weight.requires_grad)
    linear.in_features = len(columns)
