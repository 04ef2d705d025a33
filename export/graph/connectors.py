"""How each family brings an image tower's tokens to its language model.

A new one is a function here and a line in `CONNECTORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from comp_edge.errors import InputError
from export.graph.fold import activation_form, folded_linear
from export.graph.norms import Normalize, NormParts
from export.graph.options import GraphOptions

# Which tokens are read after a tower's last layer: all, the class token, or what comes behind it.
Reads = Literal["all", "class", "patches"]


@dataclass(frozen=True)
class Connector:
    """What stands between tower and language model.

    Attributes:
        module: [1, n, width] -> [1, image tokens, text width].
        reads: see `Reads`.
        final_norm: whether the norm behind the tower's layers is applied.
    """

    module: nn.Module
    reads: Reads
    final_norm: bool


def connector_of(model: Any, options: GraphOptions) -> Connector:
    """The connector of a generative model.

    Raises:
        InputError: the family, or the way the model takes the tower's tokens, has no form here.
    """
    kind = model.config.model_type
    if kind not in CONNECTORS:
        raise InputError(
            f"the connector of model type {kind!r} cannot be exported; supported: {', '.join(CONNECTORS)}."
        )
    return CONNECTORS[kind](model, options)


class PixelShuffle(nn.Module):
    """Squares of `factor` x `factor` tokens become one with as many times the channels: [1, n, d] -> [1, n/f², f²·d]."""

    def __init__(self, grid: tuple[int, int], factor: int) -> None:
        super().__init__()
        self.grid, self.factor = grid, factor

    def forward(self, x: Tensor) -> Tensor:
        (height, width), factor, d = self.grid, self.factor, x.shape[2]
        squares = x.reshape(height // factor, factor, width // factor, factor * d).permute(0, 2, 1, 3)
        return squares.reshape(1, height * width // factor**2, factor**2 * d)


class Projector(nn.Module):
    """Two linear layers with an activation between, [1, n, d] -> [1, n·d / in features, text width].

    Args:
        norm: of each row that comes in, before rows are joined.
    """

    def __init__(
        self,
        first: nn.Linear,
        act: nn.Module,
        second: nn.Linear,
        options: GraphOptions,
        *,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        form, fold = activation_form(act), {}
        self.normalize: nn.Module = nn.Identity()
        if norm is not None:
            parts = NormParts.of(norm)
            repeats = first.in_features // parts.weight.shape[0]
            fold = {
                "input_scale": parts.weight.repeat(repeats),
                "input_shift": None if parts.bias is None else parts.bias.repeat(repeats),
            }
            self.normalize = Normalize(parts, options)
        self.project_in = folded_linear(first, output_scale=form.inner, **fold)
        self.activation = form.function
        self.project_out = folded_linear(second, input_scale=form.outer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x).reshape(1, -1, self.project_in.in_features)
        return self.project_out(self.activation(self.project_in(x)))


class Reorder(nn.Module):
    """Put rows [1, n, d] into another order."""

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.index_select(x, 1, self.order)


def _feature_layer(model: Any) -> tuple[Reads, int]:
    """What LLaVA's configuration says of the tokens that are read, and of which layer.

    Raises:
        InputError: tokens of several layers are joined.
    """
    layer, strategy = model.config.vision_feature_layer, model.config.vision_feature_select_strategy
    if not isinstance(layer, int):
        raise InputError(f"vision_feature_layer {layer!r} cannot be exported; supported: one layer.")
    return ("patches" if strategy == "default" else "all"), layer


def _llava(model: Any, options: GraphOptions) -> Connector:
    projector, (reads, _) = model.model.multi_modal_projector, _feature_layer(model)
    module = Projector(projector.linear_1, projector.act, projector.linear_2, options)
    return Connector(module, reads=reads, final_norm=False)


def _internvl(model: Any, options: GraphOptions) -> Connector:
    projector, (reads, layer) = model.model.multi_modal_projector, _feature_layer(model)
    if reads != "patches":
        raise InputError(
            f"vision_feature_select_strategy {model.config.vision_feature_select_strategy!r} cannot be exported; "
            "supported: 'default'."
        )
    grid = model.model.vision_tower.embeddings.patch_embeddings.patch_shape
    module = nn.Sequential(
        PixelShuffle(tuple(grid), round(1 / model.config.downsample_ratio)),
        Projector(projector.linear_1, projector.act, projector.linear_2, options, norm=projector.layer_norm),
    )
    return Connector(module, reads=reads, final_norm=layer == -1)


def _idefics3(model: Any, options: GraphOptions) -> Connector:
    side = model.model.vision_model.embeddings.num_patches_per_side
    projection = folded_linear(model.model.connector.modality_projection.proj)
    module = nn.Sequential(PixelShuffle((side, side), model.config.scale_factor), projection)
    return Connector(module, reads="all", final_norm=True)


def _qwen(model: Any, options: GraphOptions) -> Connector:
    merger = model.model.visual.merger
    module = Projector(merger.mlp[0], merger.mlp[1], merger.mlp[2], options, norm=merger.ln_q)
    return Connector(module, reads="all", final_norm=False)


CONNECTORS: dict[str, Callable[[Any, GraphOptions], Connector]] = {
    "llava": _llava,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "qwen2_5_vl": _qwen,
}
