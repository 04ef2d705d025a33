"""The vision encoder with its projector: image in, features for the language model out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from comp_edge.errors import InputError
from comp_edge.families import family_of
from export.graph.fold import activation_form, folded_linear
from export.graph.layers import Layer
from export.graph.norms import AffineNorm
from export.graph.options import GraphOptions
from export.graph.select import TokenDrops, attention_scores, tail


class VisionEncoder(nn.Module):
    """`pixel_values [1, 3, H, W]` -> `image_features [1, k, text width]`, tokens dropped between layers.

    Args:
        model: a LLaVA whose layers are already shrunk.
        tokens: the plan's vision schedule, tokens (CLS included) of each used layer.

    Raises:
        InputError: the model takes features in a way that has no form here, or the schedule does not fit.
    """

    def __init__(self, model: Any, tokens: tuple[int, ...], options: GraphOptions) -> None:
        super().__init__()
        config = model.config
        if not isinstance(config.vision_feature_layer, int) or config.vision_feature_select_strategy != "default":
            raise InputError(
                f"vision_feature_layer {config.vision_feature_layer!r} with vision_feature_select_strategy "
                f"{config.vision_feature_select_strategy!r} cannot be exported; supported: one layer, 'default'."
            )
        stream, tower = family_of(model).streams(model)["vision"], model.model.vision_tower
        self._embeddings(tower)
        self.pre_norm = AffineNorm(tower.pre_layrnorm, options)
        self.layers = nn.ModuleList(Layer(view, options) for view in stream.layers)
        dense = self.positions.shape[1] + 1
        if len(tokens) != len(self.layers) or tokens[:1] != (dense,):
            raise InputError(
                f"the plan's vision schedule {list(tokens)} does not fit: the tower has {len(self.layers)} used layers and "
                f"starts with {dense} tokens."
            )
        attending = [layer.attention is not None for layer in self.layers]
        self.drops = TokenDrops(tokens, attending, stream="vision", protected="first", options=options)
        self.register_buffer("queries", torch.ones(1, 1, dense), persistent=False)
        projector = model.model.multi_modal_projector
        form = activation_form(projector.act)
        self.project_in = folded_linear(projector.linear_1, output_scale=form.inner)
        self.activation = form.function
        self.project_out = folded_linear(projector.linear_2)
        if form.inner != 1.0:
            self.project_out.weight.mul_(1.0 / form.inner)

    def _embeddings(self, tower: Any) -> None:
        source = tower.embeddings
        conv = source.patch_embedding
        self.patches = nn.Conv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, bias=conv.bias is not None
        ).requires_grad_(False)
        self.patches.load_state_dict(conv.state_dict())
        positions = source.position_embedding.weight.detach()
        self.register_buffer("positions", positions[None, 1:].clone(), persistent=False)
        # The CLS token is the same for every image up to the first attention: its embedding and norm are constants.
        with torch.no_grad():
            cls = tower.pre_layrnorm(source.class_embedding + positions[0])
        self.register_buffer("cls", cls.detach().clone()[None, None], persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patches(pixel_values).flatten(2).transpose(1, 2) + self.positions
        x = torch.cat([self.cls, self.pre_norm(x)], 1)
        scores = None
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            if self.drops.drops_before(index):
                scores, (x,) = self.drops(index, scores, x)
            if layer.attention is not None:
                normal = layer.attention.normalize(x)
                k, v = layer.attention.keys(normal, None), layer.attention.values(normal)
                if index == last:
                    # Nothing reads the CLS token any more.
                    x, normal = x[:, 1:], normal[:, 1:]
                added, probabilities = layer.attention.attend(layer.attention.queries(normal, None), k, v, None)
                if self.drops.wants_scores(index):
                    scores = attention_scores(probabilities, tail(self.queries, probabilities.shape[2]))
                x = x + added
            else:
                x = layer.without_attention(x if index < last else x[:, 1:])
            x = layer.feed_forward(x)
        return self.project_out(self.activation(self.project_in(x)))
