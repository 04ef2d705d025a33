"""The text decoder that ExecuTorch's own multimodal runner calls: any number of embeddings at any position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from comp_edge.errors import InputError
from comp_edge.families import family_of
from export.graph.language import LanguageModel
from export.graph.options import GraphOptions


class TextDecoder(nn.Module):
    """`embeds [1, n, d]`, `position [1]` (int64: where the segment starts) -> `logits [1, vocabulary]` after its last row.

    n is dynamic, 1 <= n and position + n <= context. The runner prefills each segment of the prompt alone, so no token can be
    dropped here (the question is not known while the image is prefilled) and there is no padding.

    Args:
        context: positions that the cache holds.

    Raises:
        InputError: the model's positions are more than the runner can tell.
    """

    def __init__(self, model: Any, *, context: int, options: GraphOptions) -> None:
        super().__init__()
        if reason := stock_obstacle(model):
            raise InputError(f"{reason}; use profile 'scheduled'.")
        layers = len(family_of(model).streams(model)["language"].layers)
        # One cache of `context` entries per layer, whichever part of it is prompt.
        self.language = LanguageModel(model, (context,) * layers, new_tokens=0, options=options)
        self.context = context
        self.register_buffer("offsets", torch.arange(context), persistent=False)
        self.register_buffer("steps", torch.arange(context).float()[:, None], persistent=False)

    def forward(self, embeds: Tensor, position: Tensor) -> Tensor:
        lm, n = self.language, embeds.shape[1]
        first = position.to(embeds.dtype)
        rows = (self.steps[:n] + first)[None]  # [1, n, 1]: positions of this segment
        ahead = lm.positions - rows  # [1, n, context]
        penalty = torch.clamp(ahead, 0.0, 1.0) * lm.mask
        slots = lm.one - torch.clamp(ahead.abs(), 0.0, 1.0)  # [1, n, context], one-hot rows
        last = rows[:, -1:]
        stays = torch.clamp(first - lm.positions, 0.0, 1.0) + torch.clamp(lm.positions - last, 0.0, 1.0)
        rotary = lm.rope(torch.index_select(lm.rotary, 0, position + self.offsets[:n]))
        x = embeds
        for index, layer in enumerate(lm.layers):
            if index > lm.last_attending:
                x = x[:, -1:]
            if (attention := layer.attention) is not None:
                normal = attention.normalize(x)
                groups, width = attention.groups, attention.head_dim
                keys, values = lm.cache(index)
                new_keys = attention.keys(normal, rotary).reshape(1, groups * width, n)
                new_values = attention.values(normal).permute(0, 2, 1).reshape(1, groups * width, n)
                k = keys * stays + torch.bmm(new_keys, slots).view(groups, width, self.context)
                v = values * stays.view(1, -1, 1) + torch.bmm(new_values, slots).view(
                    groups, width, self.context
                ).permute(0, 2, 1)
                keys.copy_(k)
                values.copy_(v)
                if index == lm.last_attending:
                    x, normal, penalty = x[:, -1:], normal[:, -1:], penalty[:, -1:]
                    rotary = type(rotary)(rotary.cos[-1:], rotary.sin[-1:], rotary.rotate)
                x = x + attention.attend(attention.queries(normal, rotary), k, v, penalty)[0]
            else:
                x = layer.without_attention(x)
            x = layer.feed_forward(x)
        return lm.logits(x)


def stock_obstacle(model: Any) -> str | None:
    """Why ExecuTorch's runner cannot drive a model, as the beginning of a sentence; None where it can."""
    family = family_of(model)
    if not family.absolute_positions:
        return None
    return (
        f"model type {family.model_type!r} has no profile 'stock': ExecuTorch's runner gives each token one position, and its "
        "image tokens have two"
    )
