"""What counting needs to know of a model: the shape of a request, dense widths, and what is never pruned."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Request:
    """What a request is made of, as far as a plan's token schedules depend on it.

    Attributes:
        vision_tokens: tokens of one image in the dense vision stream, class token included.
        text_tokens: tokens of the language stream that are not image tokens.
        images: images of the request, or tiles of them.
    """

    vision_tokens: int
    text_tokens: int
    images: int = 1


@dataclass(frozen=True)
class Count:
    """MACs of a part that is never pruned: `constant` once a request, the rest per what their names say.

    Attributes:
        per_patch, per_vision_token: of the tokens that the first and the last vision layer compute on.
    """

    constant: int = 0
    per_image: int = 0
    per_patch: int = 0
    per_vision_token: int = 0
    per_image_token: int = 0
    per_language_token: int = 0


@dataclass(frozen=True)
class StreamShape:
    """Dense widths of a stream's layers, for counting.

    Attributes:
        width, source: what queries, and what keys and values are computed from; `source` is `width` for self-attention.
        projections: matrices of a feed-forward: 2, or 3 when gated; 0 without one.
        keys_from: the stream whose last layer's tokens are attended to; None for self-attention.
        windows: per layer, the tokens that each token attends to at most; 0 for all of them.
        layer_norms, outer_norms: norms in a layer, and before and after the layers.
    """

    width: int
    head_dim: int
    heads: int
    kv_heads: int
    ffn: int
    projections: int
    source: int = 0
    keys_from: str | None = None
    windows: tuple[int, ...] = ()
    layer_norms: int = 2
    outer_norms: int = 1

    def __post_init__(self) -> None:
        if not self.source:
            object.__setattr__(self, "source", self.width)

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads


def linear_macs(*layers: nn.Module) -> int:
    """MACs per token of linear layers: their weights."""
    return sum(layer.weight.numel() for layer in layers)


def patch_macs(conv: nn.Module, patches: int) -> int:
    """MACs of a patch embedding."""
    return conv.weight.numel() * patches
