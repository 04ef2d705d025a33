"""Attention and feed-forward in the form that lowers best, built from a family's views. Batch 1 throughout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comp_edge.errors import InputError
from comp_edge.families.base import AttentionView, LayerView, MlpView
from export.graph.fold import activation_form, folded_linear
from export.graph.norms import AffineNorm, Normalize, NormParts
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


@dataclass(frozen=True)
class Windows:
    """So many windows of the same number of tokens, one behind the other; a token attends within its own only."""

    count: int
    length: int


class Attention(nn.Module):
    """Self-attention of one layer, its norm's affine part, its scale and its LayerScale folded into the projections.

    Heads are the batch of `bmm`; with grouped queries a batch entry is a key-value group and its query heads are stacked as
    rows, so nothing is expanded. Three projections and their permutations measured as fast as one fused projection
    with slices, and as fast with few heads. Softmax is written out: the stock attention operator leaves XNNPACK.

    Args:
        norm: what stands before the projections; None in post-norm layers.
        scale: LayerScale, [d].
    """

    def __init__(
        self, view: AttentionView, norm: nn.Module | None, options: GraphOptions, *, scale: Tensor | None = None
    ) -> None:
        super().__init__()
        if view.heads % view.kv_heads:
            raise InputError(
                f"attention has {view.heads} query heads for {view.kv_heads} key-value heads; each group must have the "
                "same number of query heads."
            )
        fold = {}
        self.normalize: nn.Module = nn.Identity()
        if norm is not None:
            parts = NormParts.of(norm)
            fold = {"input_scale": parts.weight, "input_shift": parts.bias}
            self.normalize = Normalize(parts, options)
        query_norm, key_norm = view.norms
        # A norm takes the scale off again, so that it must wait until after it.
        self.query_norm = None if query_norm is None else AffineNorm(query_norm, options, scale=view.scale)
        self.key_norm = None if key_norm is None else AffineNorm(key_norm, options)
        self.q = folded_linear(view.q, output_scale=view.scale if query_norm is None else 1.0, **fold)
        self.k = folded_linear(view.k, **fold)
        self.v = folded_linear(view.v, **fold)
        self.out = folded_linear(view.out, output_scale=1.0 if scale is None else scale)
        self.groups, self.head_dim = view.kv_heads, view.head_dim
        self.heads = view.heads

    def _project(self, x: Tensor, linear: nn.Linear, norm: AffineNorm | None, heads: int) -> Tensor:
        """[1, n, d] -> [n, heads, head_dim]; the norm is over one head or over all of them."""
        projected = linear(x)
        if norm is not None and norm.width != self.head_dim:
            projected = norm(projected)
        projected = projected.view(x.shape[1], heads, self.head_dim)
        return norm(projected) if norm is not None and norm.width == self.head_dim else projected

    def queries(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        """[1, n, d] (normalized) -> [groups, heads/groups * n, head_dim], a group's heads stacked."""
        n, per_group = x.shape[1], self.heads // self.groups
        q = self._project(x, self.q, self.query_norm, self.heads)
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
        k = self._project(x, self.k, self.key_norm, self.groups)
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

    def attend_windows(
        self, q: Tensor, k: Tensor, v: Tensor, windows: Sequence[Windows]
    ) -> tuple[Tensor, list[Tensor]]:
        """The same within windows, for as many key-value heads as query heads: windows join heads as the batch.

        Returns:
            what the sub-layer adds, [1, n, d]; for each of `windows` the probabilities, [heads, count, length, length].
        """
        outputs, probabilities, begin = [], [], 0
        for part in windows:
            end = begin + part.count * part.length
            batch = (self.heads * part.count, part.length, self.head_dim)
            queries = _stretch(q, 1, begin, end).reshape(batch)
            values = _stretch(v, 1, begin, end).reshape(batch)
            keys = _stretch(k, 2, begin, end).view(self.heads, self.head_dim, part.count, part.length)
            keys = keys.permute(0, 2, 1, 3).reshape(batch[0], self.head_dim, part.length)
            found = torch.softmax(torch.bmm(queries, keys), -1)
            outputs.append(torch.bmm(found, values).view(self.heads, end - begin, self.head_dim))
            probabilities.append(found.view(self.heads, part.count, part.length, part.length))
            begin = end
        mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return self.out(mixed.permute(1, 0, 2).reshape(1, begin, self.heads * self.head_dim)), probabilities


def _stretch(x: Tensor, dim: int, begin: int, end: int) -> Tensor:
    """`x[begin:end]` along `dim`; a slice of everything would lower to a copy outside XNNPACK."""
    return x if (begin, end) == (0, x.shape[dim]) else x.narrow(dim, begin, end - begin)


class Mlp(nn.Module):
    """Feed-forward of one layer, plain or gated; [1, n, d] -> what it adds to the residual stream, [1, n, d].

    Args:
        norm: what stands before it; None in post-norm layers.
        scale: LayerScale, [d].
    """

    def __init__(
        self, view: MlpView, norm: nn.Module | None, options: GraphOptions, *, scale: Tensor | None = None
    ) -> None:
        super().__init__()
        form, fold = activation_form(view.act), {}
        self.normalize: nn.Module = nn.Identity()
        if norm is not None:
            parts = NormParts.of(norm)
            fold = {"input_scale": parts.weight, "input_shift": parts.bias}
            self.normalize = Normalize(parts, options)
        self.activation = form.function
        self.gate = folded_linear(view.up[0], output_scale=form.inner, **fold)
        self.up = folded_linear(view.up[1], **fold) if len(view.up) == 2 else None
        self.down = folded_linear(view.down, input_scale=form.outer, output_scale=1.0 if scale is None else scale)

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
        before = [None, None] if view.post_norm else [view.norm_attn, view.norm_mlp]
        after = [view.norm_attn, view.norm_mlp] if view.post_norm else [None, None]
        self.attention = self.mlp = None
        if view.attn is not None:
            self.attention = Attention(view.attn, before[0], options, scale=view.attn_scale)
        if view.mlp is not None:
            self.mlp = Mlp(view.mlp, before[1], options, scale=view.mlp_scale)
        self.after_attention, self.after_mlp = (
            nn.Identity() if norm is None else AffineNorm(norm, options) for norm in after
        )
        rests = (view.attn_rest, view.attn_scale), (view.mlp_rest, view.mlp_scale)
        for name, (rest, scale) in zip(("attention_rest", "mlp_rest"), rests, strict=True):
            if rest is not None:
                rest = (rest if scale is None else rest * scale).detach().float().clone()
            self.register_buffer(name, rest, persistent=False)

    def forward(
        self,
        x: Tensor,
        *,
        rotary: Rotary | None = None,
        penalty: Tensor | None = None,
        windows: Sequence[Windows] = (),
        rows: slice | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The whole layer on tokens that are all there, [1, n, d].

        Args:
            penalty: [1, n or 1, n], see `Attention.attend`.
            windows: attend within them.
            rows: the tokens that are read after this layer, where not all are.

        Returns:
            [1, rows, d]; for each of `windows` the attention's probabilities [heads, count, length, length], without
            windows [heads, 1, rows, n], without attention none.
        """
        probabilities = []
        if self.attention is None:
            x = self.without_attention(x if rows is None else x[:, rows])
        else:
            attention = self.attention
            normal = attention.normalize(x)
            k, v = attention.keys(normal, rotary), attention.values(normal)
            if rows is not None:
                x, normal = x[:, rows], normal[:, rows]
                if rotary is not None:
                    rotary = Rotary(rotary.cos[rows], rotary.sin[rows], rotary.rotate)
            q = attention.queries(normal, rotary)
            if windows:
                added, probabilities = attention.attend_windows(q, k, v, windows)
            else:
                added, found = attention.attend(q, k, v, penalty)
                probabilities = [found.reshape(attention.heads, 1, *found.shape[2:])]
            x = self.after_attention(x + added)
        return self.feed_forward(x), probabilities

    def without_attention(self, x: Tensor) -> Tensor:
        """The first half where attention was dropped: [1, n, d] -> [1, n, d]."""
        return self.after_attention(x if self.attention_rest is None else x + self.attention_rest)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half: [1, n, d] -> [1, n, d]."""
        if self.mlp is not None:
            x = x + self.mlp(x)
        elif self.mlp_rest is not None:
            x = x + self.mlp_rest
        return self.after_mlp(x)
