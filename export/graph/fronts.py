"""How each kind of image tower begins and ends: everything about it that its layers do not show.

A tower's embeddings are affine in the pixels, so what they make of black pixels (zeros after normalization) is all that they
add to the convolution: class tokens, positions and biases, whatever way the model computes them. A new kind of tower is a
function here and a line in `FRONTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from comp_edge.errors import InputError
from export.graph.layers import Windows

Size = tuple[int, int]


@dataclass(frozen=True)
class Front:
    """What comes before a tower's layers and after them.

    Attributes:
        patches: [width, 3, patch, patch], the weight of the convolution whose stride is its size.
        table: [1, tokens, width], added to its output; class tokens as they are come first. None for nothing.
        classes: class tokens.
        norm: before the layers.
        final: after them.
        order: [patches], where the layers want them in another order than rows of the image.
        windows: of the layers with windowed attention, in that order.
        angles: RoPE's cosines and sines, [patches, head_dim] in that order.
        places: [image tokens], the image token (row by row) that each group of patches becomes, in that order.
        given: [patches], where each patch is in the order of the transformers module.
        arguments: what the transformers module gets beside pixels for one image.
    """

    patches: Tensor
    table: Tensor | None
    classes: int = 0
    norm: nn.Module | None = None
    final: nn.Module | None = None
    order: Tensor | None = None
    windows: tuple[Windows, ...] = ()
    angles: tuple[Tensor, Tensor] | None = None
    places: Tensor | None = None
    given: Tensor | None = None
    arguments: Mapping[str, Tensor] = field(default_factory=dict)


def front_of(tower: Any, size: Size | None = None) -> Front:
    """The front of a tower, a transformers module.

    Args:
        size: height and width of the images, in pixels; by default what the tower's config says.

    Raises:
        InputError: another kind of tower, or images of a size that it cannot take.
    """
    kind = tower.config.model_type
    if kind not in FRONTS:
        raise InputError(f"image tower {kind!r} cannot be exported; supported: {', '.join(FRONTS)}.")
    with torch.no_grad():
        return FRONTS[kind](tower, size or _usual_size(tower.config))


def _usual_size(config: Any) -> Size:
    side = getattr(config, "image_size", None)
    if side is None:
        raise InputError(f"image tower {config.model_type!r} takes images of any size; one must be given.")
    return (side, side) if isinstance(side, int) else tuple(side)


def _black(tower: Any, size: Size) -> Tensor:
    return torch.zeros(1, 3, *size, dtype=tower.dtype)


def _clip(tower: Any, size: Size) -> Front:
    return Front(
        patches=tower.embeddings.patch_embedding.weight,
        table=tower.embeddings(_black(tower, size)),
        classes=1,
        norm=tower.pre_layrnorm,
        final=tower.post_layernorm,
    )


def _siglip(tower: Any, size: Size) -> Front:
    table = tower.embeddings(_black(tower, size))
    return Front(patches=tower.embeddings.patch_embedding.weight, table=table, final=tower.post_layernorm)


def _siglip2(tower: Any, size: Size) -> Front:
    linear, side = tower.embeddings.patch_embedding, tower.config.patch_size
    grid = _grid(size, side)
    black = torch.zeros(1, grid[0] * grid[1], linear.in_features, dtype=tower.dtype)
    return Front(
        # Its processor writes a patch pixel by pixel, not channel by channel.
        patches=linear.weight.view(-1, side, side, 3).permute(0, 3, 1, 2).contiguous(),
        table=tower.embeddings(black, torch.tensor([grid])),
        final=tower.post_layernorm,
    )


def _blip(tower: Any, size: Size) -> Front:
    table = tower.embeddings(_black(tower, size))
    return Front(patches=tower.embeddings.patch_embedding.weight, table=table, classes=1, final=tower.post_layernorm)


def _idefics3(tower: Any, size: Size) -> Front:
    # Every pixel is one of the image.
    mask = torch.ones(1, *_grid(size, tower.config.patch_size), dtype=torch.bool)
    table = tower.embeddings(_black(tower, size), mask)
    return Front(patches=tower.embeddings.patch_embedding.weight, table=table, final=tower.post_layernorm)


def _internvl(tower: Any, size: Size) -> Front:
    return Front(
        patches=tower.embeddings.patch_embeddings.projection.weight,
        table=tower.embeddings(_black(tower, size)),
        classes=1,
        final=None if isinstance(tower.layernorm, nn.Identity) else tower.layernorm,
    )


def _qwen(tower: Any, size: Size) -> Front:
    """Windows of equal length are put behind each other, so that each length is one batch of small attentions."""
    merge = tower.spatial_merge_size
    height, width = _grid(size, tower.patch_size, step=tower.patch_size * merge)
    grid = torch.tensor([[1, height, width]])
    index, ends = get_vision_window_index(
        grid, spatial_merge_size=merge, window_size=tower.window_size, patch_size=tower.patch_size
    )
    unit = merge * merge
    groups = index.split((ends.diff() // unit).tolist())
    lengths = sorted({len(group) for group in groups}, reverse=True)
    runs = [[group for group in groups if len(group) == length] for length in lengths]
    places = torch.cat([group for run in runs for group in run])
    # Of the order in which its processor writes patches: the `unit` patches of an image token together.
    patches = (places[:, None] * unit + torch.arange(unit)).flatten()
    positions = get_vision_position_ids(grid, merge)[patches]
    cos, sin = tower.rotary_pos_emb(torch.zeros(1), positions)
    return Front(
        # An image is a film of equal pictures.
        patches=tower.patch_embed.proj.weight.double().sum(2).to(tower.patch_embed.proj.weight.dtype),
        table=None,
        order=positions[:, 0] * width + positions[:, 1],
        windows=tuple(Windows(len(run), len(run[0]) * unit) for run in runs),
        angles=(cos, sin),
        places=places,
        given=(index.argsort()[places][:, None] * unit + torch.arange(unit)).flatten(),
        arguments={"grid_thw": grid},
    )


def _grid(size: Size, side: int, *, step: int | None = None) -> Size:
    """Patches by height and width.

    Raises:
        InputError: the size is no multiple of `step`, a patch by default.
    """
    step = step or side
    if size[0] % step or size[1] % step:
        raise InputError(f"images of {size[0]}x{size[1]} pixels do not fit; both must be multiples of {step}.")
    return size[0] // side, size[1] // side


FRONTS: dict[str, Callable[[Any, Size], Front]] = {
    "clip_vision_model": _clip,
    "siglip_vision_model": _siglip,
    "siglip2_vision_model": _siglip2,
    "blip_vision_model": _blip,
    "idefics3_vision": _idefics3,
    "smolvlm_vision": _idefics3,
    "internvl_vision": _internvl,
    "qwen2_5_vl_vision": _qwen,
}
