"""Attention and feed-forward in the form that lowers best, built from a family's views. Batch 1 throughout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comp_edge.errors import InputError
from comp_edge.families.base import AttentionView, LayerView, MlpView, SkippedAttention, SkippedMlp
from export.graph.fold import activation_form, folded_linear
from export.graph.norms import Normalize, NormParts
from export.graph.options import GraphOptions


@dataclass(frozen=True)
class Rotary:
    """RoPE of the tokens at hand: `x * cos + rotate_half(x) * sin`.

    Attributes:
        cos, sin: [n, 1, head_dim].
        rotate: [head_dim, head_dim], `rotate_half` as a matrix: one small matmul instead of slices, a negation (not in
            XNNPACK) and a concatenation.
    """

    cos: Tensor
    sin: Tensor
    rotate: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """[n, heads, head_dim] -> [n, heads, head_dim]"""
        return x * self.cos + F.linear(x, self.rotate) * self.sin


def rotate_half_matrix(head_dim: int) -> Tensor:
    """[head_dim, head_dim] M with `F.linear(x, M) == rotate_half(x)` = (-x2, x1)."""
    half = head_dim // 2
    matrix = torch.zeros(head_dim, head_dim)
    index = torch.arange(half)
    matrix[index, index + half] = -1.0
    matrix[index + half, index] = 1.0
    return matrix


class Attention(nn.Module):
    """Self-attention of one layer, its norm's affine part and its scale folded into the projections.

    Heads are the batch of `bmm`; with grouped queries a batch entry is a key-value group and its query heads are stacked as
    rows, so nothing is expanded. Three projections and their permutations measured as fast as one fused projection
    with slices, and as fast with few heads. Softmax is written out: the stock attention operator leaves XNNPACK.
    """

    def __init__(self, view: AttentionView, norm: nn.Module, options: GraphOptions) -> None:
        super().__init__()
        if view.heads % view.kv_heads:
            raise InputError(
                f"attention has {view.heads} query heads for {view.kv_heads} key-value heads; each group must have the "
                "same number of query heads."
            )
        parts = NormParts.of(norm)
        fold = {"input_scale": parts.weight, "input_shift": parts.bias}
        self.normalize = Normalize(parts, options)
        self.q = folded_linear(view.q, output_scale=view.scale, **fold)
        self.k = folded_linear(view.k, **fold)
        self.v = folded_linear(view.v, **fold)
        self.out = folded_linear(view.out)
        self.groups, self.head_dim = view.kv_heads, view.head_dim
        self.heads = view.heads

    def queries(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        """[1, n, d] (normalized) -> [groups, heads/groups * n, head_dim], a group's heads stacked."""
        n, per_group = x.shape[1], self.heads // self.groups
        q = self.q(x).view(n, self.heads, self.head_dim)
        if rotary is not None:
            q = rotary(q)
        if per_group == 1:
            return q.permute(1, 0, 2)
        return (
            q.view(n, self.groups, per_group, self.head_dim)
            .permute(1, 2, 0, 3)
            .reshape(self.groups, per_group * n, self.head_dim)
        )

    def keys(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        """[1, n, d] -> [groups, head_dim, n]: transposed, as the product with the queries wants it."""
        k = self.k(x).view(x.shape[1], self.groups, self.head_dim)
        return (k if rotary is None else rotary(k)).permute(1, 2, 0)

    def values(self, x: Tensor) -> Tensor:
        """[1, n, d] -> [groups, n, head_dim]"""
        return self.v(x).view(x.shape[1], self.groups, self.head_dim).permute(1, 0, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, penalty: Tensor | None) -> tuple[Tensor, Tensor]:
        """Softmax attention.

        Args:
            q: [groups, heads/groups * n, head_dim]; k: [groups, head_dim, m]; v: [groups, m, head_dim].
            penalty: [1, n or 1, m], subtracted from the logits; None where every query sees every key.

        Returns:
            what the sub-layer adds to the residual stream, [1, n, d]; the probabilities, [groups, heads/groups, n, m].
        """
        per_group, m = self.heads // self.groups, k.shape[2]
        n = q.shape[1] // per_group
        # Rank 4 here: with a dynamic n, exporting a view that merges heads and groups asks for guards it cannot prove.
        logits = torch.bmm(q, k).view(self.groups, per_group, n, m)
        probabilities = torch.softmax(logits if penalty is None else logits - penalty, -1)
        mixed = torch.bmm(probabilities.view(self.groups, per_group * n, m), v)
        if per_group == 1:
            mixed = mixed.permute(1, 0, 2)
        else:
            mixed = mixed.view(self.groups, per_group, n, self.head_dim).permute(2, 0, 1, 3)
        return self.out(mixed.reshape(1, n, self.heads * self.head_dim)), probabilities


class Mlp(nn.Module):
    """Feed-forward of one layer, plain or gated; [1, n, d] -> what it adds to the residual stream, [1, n, d]."""

    def __init__(self, view: MlpView, norm: nn.Module, options: GraphOptions) -> None:
        super().__init__()
        parts = NormParts.of(norm)
        form = activation_form(view.act)
        fold = {"input_scale": parts.weight, "input_shift": parts.bias}
        self.normalize = Normalize(parts, options)
        self.activation = form.function
        self.gate = folded_linear(view.up[0], output_scale=form.inner, **fold)
        self.up = folded_linear(view.up[1], **fold) if len(view.up) == 2 else None
        self.down = folded_linear(view.down)
        if form.inner != 1.0:
            self.down.weight.mul_(1.0 / form.inner)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        hidden = self.activation(self.gate(x))
        if self.up is not None:
            hidden = hidden * self.up(x)
        return self.down(hidden)


class Layer(nn.Module):
    """One residual layer; `attention` or `mlp` is None where the plan dropped the sub-layer.

    A dropped sub-layer may have left the bias of its output projection behind, which is then added to every token.
    """

    def __init__(self, view: LayerView, options: GraphOptions) -> None:
        super().__init__()
        self.attention = None if view.attn is None else Attention(view.attn, view.norm_attn, options)
        self.mlp = None if view.mlp is None else Mlp(view.mlp, view.norm_mlp, options)
        left = {type(child): child.bias for child in view.module.children() if isinstance(child, SkippedAttention)}
        for name, kind in (("attention_bias", SkippedAttention), ("mlp_bias", SkippedMlp)):
            bias = left.get(kind)
            self.register_buffer(name, None if bias is None else bias.detach().clone(), persistent=False)

    def without_attention(self, x: Tensor) -> Tensor:
        """The first half where attention was dropped: [1, n, d] -> [1, n, d]."""
        return x if self.attention_bias is None else x + self.attention_bias

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half: [1, n, d] -> [1, n, d]."""
        if self.mlp is not None:
            return x + self.mlp(x)
        return x if self.mlp_bias is None else x + self.mlp_bias
