"""Image towers whose tokens become one embedding: CLIP's class token, SigLIP's attention pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from comp_edge.families.base import MlpView
from export.graph.fold import folded_linear
from export.graph.layers import Mlp
from export.graph.norms import Normalize, NormParts
from export.graph.options import GraphOptions
from export.graph.vision import Tower


class ImageEncoder(nn.Module):
    """`pixel_values [1, 3, H, W]` -> `image_embeds [1, projected]`.

    Args:
        tower: without the norm behind its layers, which the pooling holds.
        pool: [1, n, d] -> [1, 1, projected].
    """

    def __init__(self, tower: Tower, pool: nn.Module) -> None:
        super().__init__()
        self.tower, self.pool = tower, pool

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.pool(self.tower(pixel_values)[0]).view(1, -1)


class ImageTokens(nn.Module):
    """`pixel_values [1, 3, H, W]` -> `image_features [1, k, d]`: all tokens of the last layer that are left."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.tower(pixel_values)[0]


class Projection(nn.Module):
    """A norm and a projection, [1, n, d] -> [1, n, projected]."""

    def __init__(self, norm: nn.Module, projection: nn.Linear, options: GraphOptions) -> None:
        super().__init__()
        parts = NormParts.of(norm)
        self.normalize = Normalize(parts, options)
        self.project = folded_linear(projection, input_scale=parts.weight, input_shift=parts.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.normalize(x))


class AttentionPool(nn.Module):
    """A norm and SigLIP's pooling: a learnt probe attends to all tokens, then a feed-forward; [1, n, d] -> [1, 1, d].

    The probe is a constant, so its query is one with the keys' projection: a token needs one product a head instead of a
    projection. Values are projected after the tokens were mixed, once a head instead of once a token.
    """

    def __init__(self, head: Any, norm: nn.Module, options: GraphOptions) -> None:
        super().__init__()
        attention, parts = head.attention, NormParts.of(norm)
        heads, width = attention.num_heads, attention.embed_dim
        size = width // heads
        weight = attention.in_proj_weight.detach().double().view(3, heads, size, width)
        bias = attention.in_proj_bias.detach().double().view(3, heads, size)
        scale, shift = parts.weight.detach().double(), parts.bias.detach().double()
        query = (weight[0] @ head.probe.detach().double().flatten() + bias[0]) * size**-0.5
        # What does not depend on the token (the keys' bias, the norm's) is the same for all and falls out of the softmax.
        scoring = torch.einsum("hc,hcd->hd", query, weight[1]) * scale
        self.normalize = Normalize(parts, options)
        self.register_buffer("scoring", scoring.float(), persistent=False)
        self.register_buffer("values", (weight[2] * scale).transpose(1, 2).float().contiguous(), persistent=False)
        # Probabilities sum to one, so a shift of every token shifts their mixture as much.
        self.register_buffer("value_bias", (bias[2] + weight[2] @ shift).float()[:, None], persistent=False)
        self.out = folded_linear(attention.out_proj)
        view = MlpView(module=head.mlp, up=(head.mlp.fc1,), down=head.mlp.fc2, act=head.mlp.activation_fn)
        self.mlp = Mlp(view, head.layernorm, options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        probabilities = torch.softmax(nn.functional.linear(x, self.scoring).permute(0, 2, 1), -1)
        mixed = torch.bmm(probabilities, x).permute(1, 0, 2)
        pooled = self.out((torch.bmm(mixed, self.values) + self.value_bias).reshape(1, 1, -1))
        return pooled + self.mlp(pooled)
