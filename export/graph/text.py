"""Text towers on a whole padded text of static length: causal or not, with attention to an image between layers or without.

What a text tower leaves to its caller is where the text ends. CLIP's is read at its first end of text and knows nothing behind
it; BERT's is read at its first token and must not see padding; SigLIP's is read at its last position, padding or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from comp_edge.families.base import LayerView
from export.graph.fold import folded_linear
from export.graph.layers import Layer
from export.graph.norms import AffineNorm
from export.graph.options import GraphOptions
from export.graph.select import TokenDrops, attention_scores

# Which token is read after the layers: one of them, or all that are left.
Reading = Literal["first", "final", "end", "all"]


class TextEmbedding(nn.Module):
    """`input_ids [1, n]` -> [1, n, d]: words and positions, normalized where the model does that before its layers.

    Args:
        length: n, or the positions that the model may get one by one.
    """

    def __init__(
        self,
        words: nn.Embedding,
        positions: nn.Embedding,
        *,
        length: int,
        options: GraphOptions,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        # The model's own table (in fp32), whose memory it shares.
        self.words = nn.Embedding.from_pretrained(words.weight.detach().float())
        self.register_buffer("positions", positions.weight[:length].detach().float()[None].clone(), persistent=False)
        self.norm = nn.Identity() if norm is None else AffineNorm(norm, options)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.norm(self.words(input_ids) + self.positions)


class NoPadding(nn.Module):
    """Every position counts: nothing is marked."""

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        return ()


class Padding(nn.Module):
    """`input_ids [1, n]` -> ([1, n, 1],): 1 where a token is not padding."""

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad
        self.register_buffer("one", torch.ones(1), persistent=False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        padding = (input_ids == self.pad).to(self.one.dtype)
        return ((self.one - padding).view(1, -1, 1),)


class EndOfText(nn.Module):
    """`input_ids [1, n]` -> ([1, n, 1], [1, n, 1]): 1 up to the first end of text, and 1 at that end alone."""

    def __init__(self, eos: int, length: int) -> None:
        super().__init__()
        self.eos = eos
        self.register_buffer("one", torch.ones(1), persistent=False)
        self.register_buffer("earlier", torch.ones(length, length).tril(-1), persistent=False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        ends = (input_ids == self.eos).to(self.one.dtype)
        # A product counts the ends before each token: a running sum would leave the backends.
        counts = self.one - torch.clamp(nn.functional.linear(ends, self.earlier), 0.0, 1.0)
        return counts.view(1, -1, 1), (ends * counts).view(1, -1, 1)


class TextTower(nn.Module):
    """`input_ids [1, S]` (and `image [1, m, e]`) -> the token that is read, [1, 1, d]; or all that are left, [1, n, d], with
    which of them count, [1, n, 1].

    Args:
        layers: of the stream, already shrunk.
        tokens: the plan's schedule of the stream; S is its first entry.
        marks: which tokens count, and which is the end, see `EndOfText`.
        cross: the attention to an image in each layer.

    Raises:
        InputError: tokens are dropped before any layer has attention.
    """

    def __init__(
        self,
        embedding: TextEmbedding,
        layers: Sequence[LayerView],
        tokens: Sequence[int],
        options: GraphOptions,
        *,
        marks: nn.Module,
        reading: Reading,
        causal: bool = False,
        cross: Sequence[LayerView] = (),
    ) -> None:
        super().__init__()
        self.embedding, self.marks = embedding, marks
        self.layers = nn.ModuleList(Layer(view, options) for view in layers)
        self.cross = nn.ModuleList(Layer(view, options) for view in cross)
        self.reading, self.causal = reading, causal
        attending = [layer.attention is not None for layer in self.layers]
        # Behind the last attention nothing reads the other tokens, and the one that is read survives every drop.
        self.last = max((i for i, has in enumerate(attending) if has), default=-1)
        used = len(attending) if reading == "all" else self.last + 1
        self.drops = TokenDrops(
            tokens[:used],
            attending[:used],
            stream="language",
            # The end of a text is where the text has it: its score is raised when it is known.
            protected={"all": "first", "end": "none"}.get(reading, reading),
            options=options,
        )
        self.register_buffer("one", torch.ones(1), persistent=False)
        self.register_buffer("mask", torch.tensor([options.mask]), persistent=False)
        self.register_buffer("protect", torch.tensor([options.protect]), persistent=False)
        for n in sorted(set(tokens)):
            if causal:
                later = torch.full((1, n, n), options.mask).triu(1)
                self.register_buffer(f"causal_{n}", later, persistent=False)
            self.register_buffer(f"all_{n}", torch.ones(1, 1, n), persistent=False)

    def forward(self, input_ids: Tensor, image: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        x, marks, scores = self.embedding(input_ids), self.marks(input_ids), None
        if self.reading != "all" and self.last < 0:
            x = self._read(x, marks)
        for index, layer in enumerate(self.layers):
            if self.drops.drops_before(index):
                scores, (x, *marks) = self.drops(index, scores, x, *marks)
            reads = self.reading != "all" and index == self.last
            x, probabilities = self._attend(layer, x, marks, reads=reads)
            if self.drops.wants_scores(index):
                scores = self._scores(probabilities, marks)
            if self.cross:
                x = attend_to(self.cross[index], x, image)
            x = layer.feed_forward(x)
        return (x, marks[0]) if self.reading == "all" else x

    def _attend(self, layer: Layer, x: Tensor, marks: Sequence[Tensor], *, reads: bool) -> tuple[Tensor, Tensor | None]:
        """Self-attention, for the token that is read alone where nothing behind it needs the others."""
        attention = layer.attention
        if attention is None:
            return layer.without_attention(x), None
        penalty = self._penalty(x.shape[1], marks, all_rows=not reads)
        normal = attention.normalize(x)
        k, v = attention.keys(normal, None), attention.values(normal)
        if reads:
            x, normal = self._read(x, marks), self._read(normal, marks)
        added, probabilities = attention.attend(attention.queries(normal, None), k, v, penalty)
        return layer.after_attention(x + added), probabilities

    def _penalty(self, n: int, marks: Sequence[Tensor], *, all_rows: bool) -> Tensor | None:
        """[1, n or 1, n]. In a causal text padding comes last, where no token that counts sees it."""
        if self.causal and all_rows:
            return getattr(self, f"causal_{n}")
        return (self.one - marks[0].view(1, 1, n)) * self.mask if marks else None

    def _scores(self, probabilities: Tensor, marks: Sequence[Tensor]) -> Tensor:
        """[1, n]; padding below every token that counts, an end of text above."""
        n = probabilities.shape[-1]
        counts = marks[0].view(1, 1, n) if marks else getattr(self, f"all_{n}")
        scores = attention_scores(probabilities.reshape(-1, 1, n, n), counts)
        if not marks:
            return scores
        # Padding scores 0; one less puts it below any token whose probabilities underflow.
        scores = scores - (self.one - marks[0]).view(1, n)
        return scores if self.reading != "end" else scores + marks[1].view(1, n) * self.protect

    def _read(self, x: Tensor, marks: Sequence[Tensor]) -> Tensor:
        """[1, n, d] -> [1, 1, d]"""
        if self.reading == "end":
            return torch.bmm(marks[1].view(1, 1, -1), x)
        return x[:, :1] if self.reading == "first" else x[:, -1:]


def attend_to(layer: Layer, x: Tensor, source: Tensor) -> Tensor:
    """Attention of tokens [1, n, d] to others [1, m, e], with its residual and norm: [1, n, d]."""
    attention = layer.attention
    if attention is None:
        return layer.without_attention(x)
    k, v = attention.keys(source, None), attention.values(source)
    added, _ = attention.attend(attention.queries(attention.normalize(x), None), k, v, None)
    return layer.after_attention(x + added)


class TextEncoder(nn.Module):
    """`input_ids [1, S]` -> `text_embeds [1, projected]`.

    Args:
        pool: [1, 1, d] -> [1, 1, projected].
    """

    def __init__(self, tower: TextTower, pool: nn.Module) -> None:
        super().__init__()
        self.tower, self.pool = tower, pool

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.pool(self.tower(input_ids)).view(1, -1)


class Matcher(nn.Module):
    """`input_ids [1, S]`, `image_features [1, m, e]` -> `itm_scores [1, 2]`: that the text does not, and does, match."""

    def __init__(self, tower: TextTower, head: nn.Linear) -> None:
        super().__init__()
        self.tower, self.head = tower, folded_linear(head)

    def forward(self, input_ids: Tensor, image_features: Tensor) -> Tensor:
        return self.head(self.tower(input_ids, image_features)).view(1, -1)
