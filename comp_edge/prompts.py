"""Prompts whose images became shorter: which columns stay, and how the caller's view maps to them.

Callers send one placeholder per image token of the *dense* model. What the language model computes on is the compact
prompt without the surplus. Outputs, masks and positions are mapped back and forth here; pure functions on tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Compaction:
    """Which columns of a prompt stay. Rows that keep fewer than others are padded on the left.

    Attributes:
        real: [b, given] bool, False for surplus placeholders.
        columns: [b, n] the given column in each compact slot (0 in padding).
        present: [b, n] bool, False for slots that are padding.
    """

    real: Tensor
    columns: Tensor
    present: Tensor

    @classmethod
    def of(cls, real: Tensor) -> Compaction:
        """The compaction that keeps the `real` columns."""
        batch, given = real.shape
        counts = real.sum(1, keepdim=True)
        n = int(counts.max())
        slots = torch.where(real, real.long().cumsum(1) - 1 + n - counts, n)
        places = torch.arange(given, device=real.device).expand(batch, -1)
        columns = real.new_zeros(batch, n + 1, dtype=torch.long).scatter(1, slots, places)[:, :n]
        present = torch.arange(n, device=real.device)[None] >= n - counts
        return cls(real=real, columns=columns, present=present)

    @property
    def full(self) -> bool:
        """Whether no slot is padding."""
        return bool(self.present.all())

    @property
    def surplus(self) -> Tensor:
        """[b, 1] how many columns of each row go."""
        return (~self.real).sum(1, keepdim=True)

    def gather(self, values: Tensor, *, fill: int = 0) -> Tensor:
        """[..., b, given] -> [..., b, n]; padding reads `fill`."""
        columns = self.columns.expand(*values.shape[:-1], -1)
        return values.gather(-1, columns).masked_fill(~self.present, fill)

    def start(self, given: Tensor) -> Tensor:
        """Compact slots [b] of given columns [b] (one past the end is allowed)."""
        before = torch.cat([self.real.new_zeros(len(self.real), 1), self.real], 1).long().cumsum(1)
        padding = (~self.present).sum(1)
        return before.gather(1, given[:, None])[:, 0] + padding

    def spread(self, hidden: Tensor) -> Tensor:
        """[b, n, d] -> [b, given, d]; columns that went read zero."""
        given = self.real.shape[1]
        return spread(hidden, torch.where(self.present, self.columns, given), given + 1)[:, :given]


def spread(hidden: Tensor, index: Tensor, width: int) -> Tensor:
    """[b, k, d] at positions `index` [b, k] of [b, width, d]; zero elsewhere."""
    whole = hidden.new_zeros(hidden.shape[0], width, hidden.shape[2])
    return whole.scatter(1, index[..., None].expand(-1, -1, hidden.shape[2]), hidden)


def surplus_placeholders(is_image: Tensor, stays: Tensor) -> Tensor:
    """[b, n] bool, False for placeholders of image tokens that went.

    Args:
        is_image: [b, n] bool, the placeholders, in the order of the images' tokens.
        stays: [tokens of all images] bool.
    """
    real = ~is_image
    real[is_image] = stays
    return real


def answer_starts(labels: Tensor, ignore: int = -100) -> Tensor:
    """[b] the first labelled column of each row; the width where none is."""
    labelled = labels != ignore
    first = labelled.int().argmax(1)
    return torch.where(labelled.any(1), first, torch.full_like(first, labels.shape[1]))
