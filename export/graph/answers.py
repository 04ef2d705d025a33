"""A text decoder that attends to an image or a question: `prefill` and `decode` for BLIP's answers and captions.

What the decoder attends to is projected once, by `prefill`, and handed to `decode` as inputs: as buffers they would be copied
in every step, because only buffers that a method writes are shared between methods. Its own keys and values are buffers.
Positions count from the beginning of the text, so padding is on the right, where each generated token takes the next slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from comp_edge.errors import InputError
from comp_edge.families.base import LayerView
from export.graph.fold import activation_form, folded_linear
from export.graph.layers import Layer
from export.graph.norms import Normalize, NormParts
from export.graph.options import GraphOptions
from export.graph.text import Padding, TextEmbedding, TextTower


class AnswerDecoder(nn.Module):
    """Weights, tables and caches that `CaptionPrefill` and `AnswerDecode` share.

    Args:
        decoder: transformers' `BlipTextLMHeadModel`.
        layers, cross: views on its self-attention and feed-forward, and on its attention to something else.
        prompt: slots of the (padded) text that generated tokens follow.
        new_tokens: how many tokens can be generated behind it.

    Raises:
        InputError: text and answer need more positions than the model has.

    Buffers:
        keys_l [heads, head_dim, prompt + new_tokens], values_l [heads, prompt + new_tokens, head_dim].
    """

    def __init__(
        self,
        decoder: Any,
        layers: Sequence[LayerView],
        cross: Sequence[LayerView],
        *,
        prompt: int,
        new_tokens: int,
        options: GraphOptions,
    ) -> None:
        super().__init__()
        embeddings, predictions = decoder.bert.embeddings, decoder.cls.predictions
        self.prompt, self.capacity = prompt, prompt + new_tokens
        most = embeddings.position_embeddings.num_embeddings
        if self.capacity > most:
            raise InputError(
                f"a text of {prompt} tokens and {new_tokens} new tokens need {self.capacity} positions; the model has {most}."
            )
        self.embedding = TextEmbedding(
            embeddings.word_embeddings,
            embeddings.position_embeddings,
            length=self.capacity,
            options=options,
            norm=embeddings.LayerNorm,
        )
        self.layers = nn.ModuleList(Layer(view, options) for view in layers)
        self.cross = nn.ModuleList(Layer(view, options) for view in cross)
        self.last = max((i for i, layer in enumerate(self.layers) if layer.attention is not None), default=-1)
        for i, layer in enumerate(self.layers):
            if (attention := layer.attention) is not None:
                self.register_buffer(f"keys_{i}", torch.zeros(attention.groups, attention.head_dim, self.capacity))
                self.register_buffer(f"values_{i}", torch.zeros(attention.groups, self.capacity, attention.head_dim))
        form, parts = (
            activation_form(predictions.transform.transform_act_fn),
            NormParts.of(predictions.transform.LayerNorm),
        )
        self.transform = folded_linear(predictions.transform.dense, output_scale=form.inner)
        self.activation = form.function
        # The norm behind the activation takes any scale off again, but for its epsilon.
        self.register_buffer("outer", torch.tensor([form.outer or 1.0]), persistent=False)
        self.scales = form.outer is not None
        self.normalize = Normalize(parts, options)
        self.head = folded_linear(predictions.decoder, input_scale=parts.weight, input_shift=parts.bias)
        self.register_buffer("one", torch.ones(1), persistent=False)
        self.register_buffer("mask", torch.tensor([options.mask]), persistent=False)
        self.register_buffer("slots", torch.arange(self.capacity).float()[None, None], persistent=False)
        self.register_buffer("causal", torch.full((1, prompt, prompt), options.mask).triu(1), persistent=False)
        self.register_buffer("start_positions", self.embedding.positions[:, :prompt].clone(), persistent=False)

    @property
    def attending(self) -> list[int]:
        """Layers that attend to something else, for which `prefill` gives keys and values."""
        return [index for index, layer in enumerate(self.cross) if layer.attention is not None]

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer."""
        return getattr(self, f"keys_{layer}"), getattr(self, f"values_{layer}")

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """[1, n] at [1, n, d] -> [1, n, d]"""
        return self.embedding.norm(self.embedding.words(ids) + positions)

    def logits(self, x: Tensor) -> Tensor:
        """[1, 1, d] -> [1, vocabulary]"""
        x = self.activation(self.transform(x))
        return self.head(self.normalize(x * self.outer if self.scales else x)).view(1, -1)

    def begin(self, ids: Tensor, source: Tensor, read: Tensor) -> tuple[Tensor, ...]:
        """Fill the caches with a text [1, prompt] that attends to `source [1, m, e]`.

        Args:
            read: [1, 1, prompt], 1 at the last token of the text.

        Returns:
            [1, vocabulary] of the next token; for each layer that attends to `source` its keys [heads, head_dim, m] and
            values [heads, m, head_dim].
        """
        x, handed = self.embed(ids, self.start_positions), []
        if self.last < 0:
            x = torch.bmm(read, x)
        for index, layer in enumerate(self.layers):
            x = self._fill(index, layer, x, read if index == self.last else None)
            cross = self.cross[index]
            if cross.attention is None:
                x = cross.without_attention(x)
            else:
                k, v = cross.attention.keys(source, None), cross.attention.values(source)
                handed += [k, v]
                x = _attend(cross, x, k, v, None)
            x = layer.feed_forward(x)
        return self.logits(x), *handed

    def _fill(self, index: int, layer: Layer, x: Tensor, read: Tensor | None) -> Tensor:
        attention = layer.attention
        if attention is None:
            return layer.without_attention(x)
        k, v = attention.keys(x, None), attention.values(x)
        keys, values = self.cache(index)
        keys.copy_(nn.functional.pad(k, (0, self.capacity - self.prompt)))
        values.copy_(nn.functional.pad(v, (0, 0, 0, self.capacity - self.prompt)))
        if read is None:
            return _attend(layer, x, k, v, self.causal)
        # Padding is behind the last token of the text: what that row of the causal mask hides.
        hidden = torch.bmm(read, self.causal)
        return _attend(layer, torch.bmm(read, x), k, v, hidden)

    def step(self, token: Tensor, position: Tensor, handed: Sequence[Tensor], *, penalty: Tensor | None) -> Tensor:
        """[1, vocabulary] behind `token [1, 1]`, whose slot and position is `position [1]`.

        Args:
            handed: keys and values of each layer that attends to something else, see `begin`.
            penalty: [1, 1, m], subtracted from the logits of that attention.
        """
        x = self.embed(token, torch.index_select(self.embedding.positions, 1, position))
        ahead = self.slots - position.to(x.dtype)
        here = self.one - torch.clamp(ahead.abs(), 0.0, 1.0)
        others, later, left = self.one - here, torch.clamp(ahead, 0.0, 1.0) * self.mask, list(handed)
        for index, layer in enumerate(self.layers):
            if (attention := layer.attention) is None:
                x = layer.without_attention(x)
            else:
                keys, values = self.cache(index)
                k = keys * others + attention.keys(x, None) * here
                v = values * others.view(1, -1, 1) + attention.values(x) * here.view(1, -1, 1)
                keys.copy_(k)
                values.copy_(v)
                x = _attend(layer, x, k, v, later)
            cross = self.cross[index]
            if cross.attention is None:
                x = cross.without_attention(x)
            else:
                x = _attend(cross, x, left.pop(0), left.pop(0), penalty)
            x = layer.feed_forward(x)
        return self.logits(x)


def _attend(layer: Layer, x: Tensor, k: Tensor, v: Tensor, penalty: Tensor | None) -> Tensor:
    """Attention to keys and values that are there, with its residual and norm."""
    attention = layer.attention
    return layer.after_attention(x + attention.attend(attention.queries(x, None), k, v, penalty)[0])


class CaptionPrefill(nn.Module):
    """`input_ids [1, S]` (what the caption begins with, padded on the right), `image_features [1, m, e]` -> `logits [1,
    vocabulary]` of the next token, and the keys and values of the image, see `AnswerDecoder.begin`."""

    def __init__(self, decoder: AnswerDecoder, pad: int) -> None:
        super().__init__()
        self.decoder, self.padding = decoder, Padding(pad)
        # What counts less what counts behind it: the last token.
        behind = torch.eye(decoder.prompt) - torch.ones(decoder.prompt - 1).diag(1)
        self.register_buffer("last", behind, persistent=False)

    def forward(self, input_ids: Tensor, image_features: Tensor) -> tuple[Tensor, ...]:
        (counts,) = self.padding(input_ids)
        read = nn.functional.linear(counts.view(1, 1, -1), self.last)
        return self.decoder.begin(input_ids, image_features, read)


class AnswerPrefill(nn.Module):
    """`input_ids [1, S]` (a question, padded on the right), `image_features [1, m, e]` -> `padding [1, 1, n]` of the question's
    tokens that are left, and their keys [heads, head_dim, n] and values [heads, n, head_dim] in each layer of the decoder that
    attends to them. The answer begins with a `decode` of what every answer begins with.

    Args:
        question: the tower that reads the question, with everything that is left of it as its output.
    """

    def __init__(self, question: TextTower, decoder: AnswerDecoder) -> None:
        super().__init__()
        self.question = question
        self.attending = nn.ModuleList(decoder.cross[index].attention for index in decoder.attending)
        self.register_buffer("one", torch.ones(1), persistent=False)

    def forward(self, input_ids: Tensor, image_features: Tensor) -> tuple[Tensor, ...]:
        states, counts = self.question(input_ids, image_features)
        handed = [part for one in self.attending for part in (one.keys(states, None), one.values(states))]
        return (self.one - counts).view(1, 1, -1), *handed


class AnswerDecode(nn.Module):
    """`token [1, 1]`, `position [1]`, and what the prefill handed on -> `logits [1, vocabulary]`.

    Args:
        pads: `padding` is among what the prefill gave.
    """

    def __init__(self, decoder: AnswerDecoder, *, pads: bool) -> None:
        super().__init__()
        self.decoder, self.pads = decoder, pads

    def forward(self, token: Tensor, position: Tensor, *handed: Tensor) -> Tensor:
        penalty = None
        if self.pads:
            padding, *handed = handed
            penalty = padding * self.decoder.mask
        return self.decoder.step(token, position, handed, penalty=penalty)
