"""How each family's transformers model takes one image and a prompt, from what a bundle takes: an image as it is.

A new one is a function here and a line in `IMAGES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from comp_edge.errors import InputError
from comp_edge.families import family_of


def image_inputs(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """What `get_image_features` takes for an image [1, 3, H, W].

    Raises:
        InputError: another family.
    """
    kind = model.config.model_type
    if kind not in IMAGES:
        raise InputError(f"model type {kind!r} cannot be exported as a whole; supported: {', '.join(IMAGES)}.")
    return IMAGES[kind](model, pixel_values)


def image_grid(model: Any, size: tuple[int, int]) -> tuple[int, int] | None:
    """Height and width of an image in tokens, where they have positions in two dimensions; None where they follow each other.

    Args:
        size: height and width of the image in pixels.
    """
    if not family_of(model).absolute_positions:
        return None
    config = model.config.vision_config
    step = config.patch_size * config.spatial_merge_size
    return size[0] // step, size[1] // step


def request_inputs(model: Any, pixel_values: Tensor, ids: Sequence[int], *, image_tokens: int) -> dict[str, Tensor]:
    """What `generate` takes for an image [1, 3, H, W] and a prompt.

    Args:
        ids: of the prompt, the image token once.
        image_tokens: how often the dense model's prompt holds it.
    """
    image = model.config.image_token_id
    whole = torch.tensor([[part for i in ids for part in ([image] * image_tokens if i == image else [i])]])
    inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole), **image_inputs(model, pixel_values)}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (whole == image).int()
    return inputs


def _plain(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": pixels}


def _idefics3(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Images of a prompt have a dimension of their own, and every pixel is one of the image."""
    mask = torch.ones(1, 1, *pixels.shape[-2:], dtype=torch.long)
    return {"pixel_values": pixels[None], "pixel_attention_mask": mask}


def _qwen2_5_vl(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Patches as its processor writes them: those of an image token together, a film of equal pictures."""
    config = model.config.vision_config
    side, merge, frames = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    height, width = pixels.shape[-2] // side, pixels.shape[-1] // side
    film = pixels.expand(frames, -1, -1, -1)
    parts = film.reshape(frames, 3, height // merge, merge, side, width // merge, merge, side)
    patches = parts.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(height * width, -1)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, height, width]])}


IMAGES: dict[str, Callable[[Any, Tensor], dict[str, Tensor]]] = {
    "llava": _plain,
    "internvl": _plain,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "qwen2_5_vl": _qwen2_5_vl,
}
