"""Images of a batch: one row an example while a batch is cut and shuffled, as `forward` wants them right before it runs.

Some models take what belongs to all images of a batch behind each other: Qwen-VL its patches, InternVL its tiles. A batch
holds them as `pixel_values` [n, k, ...], and in `image_rows` [n] says k; `model_inputs` puts them behind each other. What
other models want an image at a time (Idefics3's tiles [n, tiles, 3, H, W]) is left as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from comp_edge.errors import InputError

PIXELS, ROWS = "pixel_values", "image_rows"


def image_rows(inputs: Mapping[str, Tensor], images: int) -> dict[str, Tensor]:
    """What a processor made of so many images, with one row an image.

    Raises:
        InputError: the images differ in their number of patches or tiles.
    """
    found: dict[str, Tensor] = {}
    for name, value in inputs.items():
        each, left = divmod(len(value), images)
        if left or each > 1 and name != PIXELS:
            raise InputError(
                f"{images} images became {len(value)} rows of {name}, which no number of rows an image explains; give "
                "images of one size."
            )
        found[name] = value if each == 1 else value.unflatten(0, (images, each))
        if each > 1:
            found[ROWS] = value.new_full((images,), each).long()
    return found


def packed(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows as a model takes them: without `image_rows`, which says whether pixels lie behind each other."""
    inputs = {name: value for name, value in rows.items() if name != ROWS}
    if ROWS in rows and PIXELS in inputs:
        inputs[PIXELS] = inputs[PIXELS].flatten(0, 1)
    return inputs


def model_inputs(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch that the model's `forward` takes, as it takes it."""
    accepted = {*inspect.signature(model.forward).parameters, ROWS}
    return packed({name: value for name, value in batch.items() if name in accepted})


def take_rows(batch: Mapping[str, Tensor], rows: Any) -> dict[str, Tensor]:
    """These examples (a slice or indices) of a batch."""
    return {name: value[rows] for name, value in batch.items()}


def examples(batch: Mapping[str, Tensor]) -> int | None:
    """How many examples a batch holds; None where its tensors disagree, so that it cannot be cut into parts."""
    sizes = {len(value) for value in batch.values()}
    return sizes.pop() if len(sizes) == 1 else None
