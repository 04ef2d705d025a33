"""Positions of a prompt whose image has two dimensions (M-RoPE), as `prefill` takes them.

A text token has one position, an image token three: time, height and width. Text before the image counts up to it; the image's
first token continues the count, its others are so many rows and columns further; text after the image continues after its
longer side. Where tokens of the image were dropped, those that stay keep their positions.

RoPE sees differences only, so that the count may begin anywhere. Here it begins so that text after the image, generated tokens
included, has the same distance from its slot in every prompt: `decode` needs no position beside its slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageGrid:
    """An image in a prompt: `height` x `width` tokens, of which so many are delivered."""

    height: int
    width: int
    delivered: int

    @property
    def before(self) -> int:
        """Position of a slot before the image, less the slot's index."""
        return max(self.delivered - max(self.height, self.width), 0)

    @property
    def after(self) -> int:
        """Position of a slot after the image, less the slot's index."""
        return max(max(self.height, self.width) - self.delivered, 0)


def prompt_positions(grid: ImageGrid, *, slots: int, first: int, kept: Sequence[int] | None = None) -> Tensor:
    """[3, slots] int64: time, height and width of each slot of a padded prompt.

    Args:
        slots: length of the padded prompt.
        first: slot of the image's first row.
        kept: which of the image's tokens (counted row by row) were delivered, ascending; None for all.
    """
    places = torch.arange(grid.delivered) if kept is None else torch.as_tensor(kept)
    positions = torch.arange(slots).repeat(3, 1)
    positions[:, :first] += grid.before
    end = first + grid.delivered
    positions[:, first:end] = first + grid.before
    positions[1, first:end] += places // grid.width
    positions[2, first:end] += places % grid.width
    positions[:, end:] += grid.after
    return positions


def positions_about(grid: ImageGrid) -> str:
    """How positions are counted, in words, for a bundle's manifest."""
    return (
        f"with `first` the slot of the image's first row and P = first + {grid.before}: slot + {grid.before} before the image; "
        f"P, P + kept / {grid.width}, P + kept % {grid.width} for each of its rows (kept is the vision encoder's second "
        f"output, 0, 1, 2, ... where it has none); slot + {grid.after} after it"
    )
