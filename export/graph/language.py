"""The language model with a token schedule: `prefill` and `decode` over key-value caches of different lengths.

Positions count the padded prompt: slot j of the sequence `[left pads][prompt head][image tokens][prompt tail]` has position
j, and the t-th generated token S + t. RoPE's scores depend on differences of positions only, so the pads shift nothing and the
tables of the prompt are constants. Kept pads are the first entries of a layer's cache, so that the entry of position p is
`p - (S - n_l)` for everything that is not dropped: one vector over positions gives every layer's mask as a slice.

Where the image's tokens have positions in two dimensions (M-RoPE), `prefill` is told the prompt's (see `export.positions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.families.base import StreamView
from export.graph.fold import folded_linear
from export.graph.layers import Layer, Rotary, rotate_half_matrix
from export.graph.norms import Normalize, NormParts
from export.graph.options import GraphOptions
from export.graph.select import TokenDrops, attention_scores, tail
from export.positions import ImageGrid

# RoPE types whose angle is position times a constant frequency.
LINEAR_ROPE = ("default", "linear", "llama3", "yarn")


class LanguageModel(nn.Module):
    """Weights, tables and caches that `Prefill` and `Decode` share.

    Args:
        model: a generative model whose layers are already shrunk.
        tokens: the plan's language schedule; `tokens[0]` is the length S of the padded prompt.
        new_tokens: how many tokens can be generated after a prompt.
        grid: the image in the prompt, where its tokens have positions in two dimensions.

    Raises:
        InputError: the model or the schedule has no form here.

    Buffers:
        keys_l [groups, head_dim, n_l + new_tokens], values_l [groups, n_l + new_tokens, head_dim]: the cache of layer l,
        laid out as the matmuls read it; none for a layer without attention.
    """

    def __init__(
        self,
        model: Any,
        tokens: Sequence[int],
        *,
        new_tokens: int,
        options: GraphOptions,
        grid: ImageGrid | None = None,
    ) -> None:
        super().__init__()
        family = family_of(model)
        stream, config = family.streams(model)["language"], family.stream_config(model, "language")
        if len(tokens) != len(stream.layers):
            raise InputError(
                f"the plan's language schedule has {len(tokens)} entries for a model of {len(stream.layers)} layers."
            )
        if family.absolute_positions and grid is None:
            raise InputError(f"model type {family.model_type!r} needs to know the image's positions in the prompt.")
        self.options, self.grid = options, grid
        self.tokens = tuple(tokens)
        self.prompt, self.capacity = tokens[0], tokens[0] + new_tokens
        if self.capacity > config.max_position_embeddings:
            raise InputError(
                f"a prompt of {self.prompt} tokens and {new_tokens} new tokens need {self.capacity} positions; the model "
                f"has {config.max_position_embeddings}."
            )
        _check_attention(stream, self.capacity)
        self.layers = nn.ModuleList(Layer(view, options) for view in stream.layers)
        attending = [layer.attention is not None for layer in self.layers]
        # Only the last row is read after the last attention, and the last token survives every drop.
        self.last_attending = max((i for i, has in enumerate(attending) if has), default=-1)
        used = self.last_attending + 1
        self.drops = TokenDrops(
            tokens[:used], attending[:used], stream="language", protected=stream.protected, options=options
        )
        for i, layer in enumerate(self.layers):
            if (attention := layer.attention) is not None:
                length = tokens[i] + new_tokens
                self.register_buffer(f"keys_{i}", torch.zeros(attention.groups, attention.head_dim, length))
                self.register_buffer(f"values_{i}", torch.zeros(attention.groups, length, attention.head_dim))
        self.embedding = _embedding(model)
        parts = NormParts.of(stream.root.norm)
        self.normalize = Normalize(parts, options)
        self.head = folded_linear(model.get_output_embeddings(), input_scale=parts.weight, input_shift=parts.bias)
        self._rotary_tables(stream.root.rotary_emb)
        self._position_tables()

    def _rotary_tables(self, rotary: Any) -> None:
        """Rows of cosines and sines by position; one table, so that a drop or a decode step gathers once.

        With an image grid, also one where each of the three positions has the channels that it turns and zeros elsewhere.
        """
        if rotary.rope_type not in LINEAR_ROPE:
            raise InputError(f"rope type {rotary.rope_type!r} cannot be exported; supported: {', '.join(LINEAR_ROPE)}.")
        after = 0 if self.grid is None else self.grid.after
        positions = torch.arange(self.capacity + after)[None]
        table = _turns(rotary, positions if self.grid is None else positions.expand(3, 1, -1))
        self.head_dim = table.shape[-1] // 2
        self.register_buffer("rotary", table[after:].clone(), persistent=False)
        self.register_buffer("rotate", rotate_half_matrix(self.head_dim), persistent=False)
        if self.grid is None:
            return
        axes = []
        for axis in range(3):
            # A channel that turns when this position alone moves on belongs to it.
            one_step = torch.zeros(3, 1, 1, dtype=torch.long)
            one_step[axis] = 1
            turned = _turns(rotary, one_step)[0, self.head_dim :] != 0
            axes.append(table * turned.repeat(2))
        self.register_buffer("rotary_axes", torch.cat(axes), persistent=False)
        self.register_buffer("axis_rows", torch.arange(3)[:, None] * len(table), persistent=False)

    def _position_tables(self) -> None:
        positions = torch.arange(self.capacity).float()[None, None]
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("prompt_positions", positions[..., : self.prompt].clone(), persistent=False)
        self.register_buffer("prompt_rotary", self.rotary[: self.prompt].clone(), persistent=False)
        self.register_buffer("one", torch.ones(1), persistent=False)
        self.register_buffer("mask", torch.tensor([self.options.mask]), persistent=False)
        causal = torch.full((self.prompt, self.prompt), self.options.mask).triu(1)
        self.register_buffer("causal", causal[None], persistent=False)

    def corner(self, n: int) -> Tensor:
        """[1, n, n], the causal penalty among n tokens in order."""
        return self.causal if n == self.prompt else self.causal[:, :n, :n]

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer."""
        return getattr(self, f"keys_{layer}"), getattr(self, f"values_{layer}")

    def rope(self, table: Tensor) -> Rotary:
        """RoPE by rows [n, 2 * head_dim] of the table."""
        n = table.shape[0]
        cos, sin = table[:, : self.head_dim], table[:, self.head_dim :]
        return Rotary(cos.view(n, 1, self.head_dim), sin.view(n, 1, self.head_dim), self.rotate)

    def prompt_table(self, positions: Tensor | None) -> Tensor:
        """Rows [S, 2 * head_dim] for `rope`; `positions [3, S]` where the image has two dimensions."""
        if positions is None:
            return self.prompt_rotary
        rows = torch.index_select(self.rotary_axes, 0, (positions + self.axis_rows).view(-1))
        n = self.prompt
        return rows[:n] + rows[n : 2 * n] + rows[2 * n :]

    def logits(self, x: Tensor) -> Tensor:
        """[1, 1, d] -> [1, vocabulary]"""
        return self.head(self.normalize(x)).view(1, -1)


def _check_attention(stream: StreamView, capacity: int) -> None:
    for index, view in enumerate(stream.layers):
        window = None if view.attn is None else getattr(view.attn.module, "sliding_window", None)
        if window is not None and window < capacity:
            raise InputError(
                f"language layer {index} attends to {window} tokens only; sliding windows shorter than prompt and answer "
                f"({capacity}) cannot be exported."
            )


@torch.no_grad()
def _turns(rotary: Any, positions: Tensor) -> Tensor:
    """[n, 2 * head_dim], cosines and sines of positions [(3,) 1, n]."""
    return torch.cat([part[0].float() for part in rotary(torch.zeros(1), positions)], -1)


def _embedding(model: Any) -> nn.Embedding:
    """The model's own table (in fp32), whose memory it shares."""
    return nn.Embedding.from_pretrained(model.get_input_embeddings().weight.detach().float())


class TokenEmbedding(nn.Module):
    """`token_ids [1, n]` (int64) -> `embeddings [1, n, d]`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embedding = _embedding(model)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.embedding(token_ids)


class Prefill(nn.Module):
    """`inputs_embeds [1, S, d]`, `start [1]` (int64: left pads) -> `logits [1, vocabulary]` of the next token.

    Fills the caches; what was in them before is gone. Where the image has two dimensions, the third input is `positions
    [3, S]`, see `export.positions`.
    """

    def __init__(self, language: LanguageModel) -> None:
        super().__init__()
        self.language = language

    def forward(self, inputs_embeds: Tensor, start: Tensor, positions: Tensor | None = None) -> Tensor:
        lm = self.language
        # Comparing integers would leave XNNPACK: 1 where a position is a pad, by clamping a difference of floats.
        pads = torch.clamp(start.to(inputs_embeds.dtype) - lm.prompt_positions, 0.0, 1.0)
        valid, padding = lm.one - pads, pads * lm.mask
        x, table, scores, penalty = inputs_embeds, lm.prompt_table(positions), None, None
        for index, layer in enumerate(lm.layers):
            if lm.drops.drops_before(index):
                scores, (x, table) = lm.drops(index, scores, x, table)
                penalty = None
            if index > lm.last_attending:
                x = x[:, -1:]
            if layer.attention is not None:
                n = x.shape[1]
                if penalty is None:
                    # Kept pads come first, and order is kept: the masks of n tokens are corners of those of S.
                    penalty = lm.corner(n) + tail(padding, n)
                rotary = lm.rope(table)
                normal = layer.attention.normalize(x)
                k, v = layer.attention.keys(normal, rotary), layer.attention.values(normal)
                keys, values = lm.cache(index)
                keys.copy_(nn.functional.pad(k, (0, keys.shape[2] - n)))
                values.copy_(nn.functional.pad(v, (0, 0, 0, values.shape[1] - n)))
                if index == lm.last_attending:
                    x, normal, rotary = x[:, -1:], normal[:, -1:], lm.rope(table[-1:])
                    penalty = tail(padding, n)
                added, probabilities = layer.attention.attend(layer.attention.queries(normal, rotary), k, v, penalty)
                if lm.drops.wants_scores(index):
                    count, heads = tail(valid, n), layer.attention.heads
                    # Pads score 0; one less puts them below any token whose probabilities underflow.
                    scores = attention_scores(probabilities.reshape(heads, 1, n, n), count) - (lm.one - count).view(
                        1, n
                    )
                x = x + added
            else:
                x = layer.without_attention(x)
            x = layer.feed_forward(x)
        return lm.logits(x)


class Decode(nn.Module):
    """`token [1, 1]`, `position [1]`, `start [1]` (int64) -> `logits [1, vocabulary]` of the next token.

    `position` is S + t for the t-th generated token. The caches are written by blending: `cache * (1 - slot) + slot * new`.
    That stays inside one delegate (0.24 ms a step of a 4x128 decoder with 84 entries; ExecuTorch's custom cache and
    attention operators 0.22, but an application must link their library) and is the form that Core ML states take.
    The price grows with the cache: at 1024 entries 0.94 ms against 0.21.
    """

    def __init__(self, language: LanguageModel) -> None:
        super().__init__()
        self.language = language

    def forward(self, token: Tensor, position: Tensor, start: Tensor) -> Tensor:
        lm = self.language
        x = lm.embedding(token)
        rotary = lm.rope(torch.index_select(lm.rotary, 0, position))
        ahead = lm.positions - position.to(x.dtype)
        slot = lm.one - torch.clamp(ahead.abs(), 0.0, 1.0)
        unused = torch.clamp(ahead, 0.0, 1.0) + torch.clamp(start.to(x.dtype) - lm.positions, 0.0, 1.0)
        penalty, stays = unused * lm.mask, lm.one - slot
        for index, layer in enumerate(lm.layers):
            if layer.attention is not None:
                normal = layer.attention.normalize(x)
                keys, values = lm.cache(index)
                length = keys.shape[2]
                here, others = tail(slot, length), tail(stays, length)
                k = keys * others + layer.attention.keys(normal, rotary) * here
                v = values * others.view(1, -1, 1) + layer.attention.values(normal) * here.view(1, -1, 1)
                keys.copy_(k)
                values.copy_(v)
                x = x + layer.attention.attend(layer.attention.queries(normal, rotary), k, v, tail(penalty, length))[0]
            else:
                x = layer.without_attention(x)
            x = layer.feed_forward(x)
        return lm.logits(x)
