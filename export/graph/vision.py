"""Image towers, and the image encoder of a generative model: a tower with its connector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from comp_edge.errors import InputError
from comp_edge.families import family_of
from export.graph.connectors import Reads, Reorder, connector_of
from export.graph.fronts import Front, Size, front_of
from export.graph.layers import Layer, Rotary, Windows, rotate_half_matrix
from export.graph.norms import AffineNorm
from export.graph.options import GraphOptions
from export.graph.select import Select, TokenDrops, attention_scores


class Tower(nn.Module):
    """`pixel_values [1, 3, H, W]` -> tokens [1, n, width] and, where asked, their importance [1, all n]; else None.

    Args:
        model: whose layers are already shrunk.
        tokens: the plan's vision schedule, tokens (class token included) of each layer.
        reads: tokens that are read after the last layer; the others leave as soon as nothing attends to them.
        final_norm: apply the norm behind the layers, if the tower has one.
        scores: give what the last attention says of all its tokens, too.
        size: height and width of the images, in pixels; by default what the tower's config says.

    Raises:
        InputError: the tower has no form here, or the schedule does not fit.

    Attributes:
        front: what it was built from, for what comes behind it.
    """

    def __init__(
        self,
        model: Any,
        tokens: Sequence[int],
        options: GraphOptions,
        *,
        reads: Reads = "all",
        final_norm: bool = True,
        scores: bool = False,
        size: Size | None = None,
    ) -> None:
        super().__init__()
        stream = family_of(model).streams(model)["vision"]
        front = front_of(stream.root, size)
        self._embeddings(front, options)
        self.front = front
        dense = len(front.order) if front.table is None else front.table.shape[1]
        tokens = tuple(tokens)
        if len(tokens) != len(stream.layers) or tokens[:1] != (dense,):
            raise InputError(
                f"the plan's vision schedule {list(tokens)} does not fit: the tower has {len(stream.layers)} used layers and "
                f"starts with {dense} tokens."
            )
        self.layers = nn.ModuleList(Layer(view, options) for view in stream.layers)
        attending = [layer.attention is not None for layer in self.layers]
        self.windows = [front.windows if view.attn and view.attn.windowed else () for view in stream.layers]
        self.drops = TokenDrops(
            tokens, attending, stream="vision", protected=stream.protected, options=options, handed=scores
        )
        for layer in self.drops.sources:
            for part, windows in enumerate(self.windows[layer] or [Windows(1, tokens[layer])]):
                ones = torch.ones(windows.count, 1, windows.length)
                self.register_buffer(f"queries_{layer}_{part}", ones, persistent=False)
        self.rows = {"all": None, "class": slice(0, 1), "patches": slice(front.classes, None)}[reads]
        # Behind the last attention nothing reads the other rows, unless a drop still counts on all of them.
        last = max((i for i, has in enumerate(attending) if has), default=len(tokens) - 1)
        self.cut = len(tokens) - 1 if scores or tokens[-1] < tokens[last] else last
        self.final = AffineNorm(front.final, options) if final_norm and front.final is not None else nn.Identity()

    def _embeddings(self, front: Front, options: GraphOptions) -> None:
        with torch.device("meta"):
            width, channels, *side = front.patches.shape
            self.patches = nn.Conv2d(channels, width, side, side, bias=False)
        self.patches.weight = nn.Parameter(front.patches.detach().float(), requires_grad=False)
        self.pre_norm = nn.Identity() if front.norm is None else AffineNorm(front.norm, options)
        cls = positions = None
        if front.table is not None:
            cls, positions = front.table[:, : front.classes], _constant(front.table[:, front.classes :])
            # The class token is the same for every image up to the first attention: its embedding and norm are constants.
            with torch.no_grad():
                cls = _constant(cls if front.norm is None else front.norm(cls))
        self.register_buffer("cls", cls if front.classes else None, persistent=False)
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("order", front.order, persistent=False)
        self.rotates = front.angles is not None
        if front.angles is not None:
            for name, angles in zip(("cos", "sin"), front.angles, strict=True):
                self.register_buffer(name, _constant(angles[:, None]), persistent=False)
            self.register_buffer("rotate", rotate_half_matrix(self.cos.shape[-1]), persistent=False)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """[1, 3, H, W] -> [1, tokens, width], what the first layer gets."""
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        if self.positions is not None:
            x = x + self.positions
        if self.order is not None:
            x = torch.index_select(x, 1, self.order)
        x = self.pre_norm(x)
        return x if self.cls is None else torch.cat([self.cls, x], 1)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        x, scores = self.embed(pixel_values), None
        rotary = Rotary(self.cos, self.sin, self.rotate) if self.rotates else None
        for index, layer in enumerate(self.layers):
            if self.drops.drops_before(index):
                scores, (x,) = self.drops(index, scores, x)
            # What scores tokens needs every query.
            wanted = self.drops.wants_scores(index)
            rows = self.rows if index == self.cut and not wanted else None
            x, probabilities = layer(x, rotary=rotary, windows=self.windows[index], rows=rows)
            if wanted:
                parts = [
                    attention_scores(part, getattr(self, f"queries_{index}_{i}"))
                    for i, part in enumerate(probabilities)
                ]
                scores = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            if index == self.cut and wanted and self.rows is not None:
                x = x[:, self.rows]
        return self.final(x), scores


class VisionEncoder(nn.Module):
    """`pixel_values [1, 3, H, W]` -> `image_features [1, k, text width]`, tokens dropped inside the tower or behind the
    connector. Where image tokens keep their 2-D positions and some were dropped, also `kept [1, k]`: which of the dense
    image's tokens (counted row by row) they are.

    Args:
        model: a generative model whose layers are already shrunk.
        schedule: the plan's vision schedule (see `StreamPlan.schedule`).
        size: height and width of the images, in pixels; by default what the model's config says.

    Raises:
        InputError: the model takes features in a way that has no form here, or the schedule does not fit.
    """

    def __init__(self, model: Any, schedule: Sequence[int], options: GraphOptions, *, size: Size | None = None) -> None:
        super().__init__()
        family, connector = family_of(model), connector_of(model, options)
        stream = family.streams(model)["vision"]
        tokens = tuple(schedule)[: len(stream.layers)] if stream.hands_over else tuple(schedule)
        dense, delivered = family.image_tokens(model, schedule[0]), family.delivered(model, schedule)
        drops = stream.hands_over and delivered < dense
        self.tower = Tower(
            model, tokens, options, reads=connector.reads, final_norm=connector.final_norm, scores=drops, size=size
        )
        self.connector = connector.module
        front = self.tower.front
        ordered = front.places is None or bool((front.places.diff() == 1).all())
        self.reorder = nn.Identity() if ordered else Reorder(front.places.argsort())
        self.pool = self.select = None
        if drops:
            self.select = Select(tokens=dense, keep=delivered, protected=None, options=options)
            self.pool = _pooling(model, front, tokens[-1])
        self.says_kept = drops and family.absolute_positions
        if self.says_kept:
            self.register_buffer("places", torch.arange(dense).float()[None, :, None], persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x, scores = self.tower(pixel_values)
        x = self.reorder(self.connector(x))
        if self.select is None:
            return x
        scores = self.pool(scores)
        if not self.says_kept:
            return self.select(scores, x)[0]
        x, kept = self.select(scores, x, self.places)
        return x, kept.view(1, -1).to(torch.int64)


def _constant(tensor: Tensor) -> Tensor:
    """A copy in fp32; ExecuTorch refuses constants that lie in memory in another order than their dimensions."""
    return torch.empty(tensor.shape).copy_(tensor.detach())


def _pooling(model: Any, front: Front, tokens: int) -> nn.Linear:
    """How importance of the tower's tokens becomes importance of image tokens: `Family.pool_scores`, which is linear, as
    the matrix that it is."""
    arguments = {name: value.repeat(tokens, 1) for name, value in front.arguments.items()}
    with torch.no_grad():
        matrix = torch.stack(list(family_of(model).pool_scores(model, torch.eye(tokens), arguments)))
        if front.given is not None:
            matrix = matrix[front.given]
    with torch.device("meta"):
        pool = nn.Linear(*matrix.shape, bias=False)
    pool.weight = nn.Parameter(matrix.T.contiguous().float(), requires_grad=False)
    return pool
