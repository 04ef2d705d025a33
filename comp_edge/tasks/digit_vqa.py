"""`digit_vqa`: questions about coloured handwritten digits in a grid. Made on the spot, the same everywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comp_edge.tasks import digits
from comp_edge.tasks.cache import cached_split
from comp_edge.tasks.vqa import Split, VQATask


class DigitVQA(VQATask):
    """4x4 grid, 3-6 coloured digits from scikit-learn's `load_digits`; 12,000/1,500/1,500 images.

    The handwritten sources of train, validation and test are disjoint. Five question kinds, see `digits.KINDS`.
    """

    name = "digit_vqa"
    kinds = digits.KINDS

    def load_split(self, split: str) -> Split:
        def make() -> Split:
            images, cells, questions = digits.generate(split)
            return Split(images=images, questions=questions, extra={"cells": cells})

        return cached_split(f"{self.name}-3-{split}", make)

    def auxiliary_head(self, width: int, patches: int) -> nn.Module:
        """A per-patch classifier for dense training only: which digit, which colour does each patch belong to?

        Args:
            width: channels of the vision tower's output.
            patches: its number of patches (a square grid).
        """
        return _PatchClassifier(width, patches)

    def patch_labels(self, image_ids: Tensor, split: str = "train") -> Tensor:
        """Digit and colour of each grid cell: [n, 16, 2] int64 for the images with these indices."""
        return torch.from_numpy(self.split(split).extra["cells"])[image_ids].long()


class _PatchClassifier(nn.Module):
    def __init__(self, width: int, patches: int) -> None:
        super().__init__()
        side = int(patches**0.5)
        index = torch.arange(side) * digits.GRID // side
        self.register_buffer("cell", (index[:, None] * digits.GRID + index[None]).flatten())
        self.linear = nn.Linear(width, 11 + len(digits.NAMES) + 1)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Loss of patch features [n, patches, width] against cell labels [n, 16, 2]."""
        digit, color = self.linear(features).split([11, len(digits.NAMES) + 1], dim=-1)
        target = labels[:, self.cell]
        # Most cells are empty: without a weight the classifier would learn to say so.
        weight = torch.where(target[..., 0] < 10, 1.0, 0.2).flatten()
        weight = weight / weight.sum()
        loss = F.cross_entropy(digit.flatten(0, 1), target[..., 0].flatten(), reduction="none")
        loss = loss + F.cross_entropy(color.flatten(0, 1), target[..., 1].flatten(), reduction="none")
        return (loss * weight).sum()
