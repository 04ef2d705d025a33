"""`digit_pairs`: which caption belongs to which picture of coloured handwritten digits? Made on the spot, like `digit_vqa`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from comp_edge.tasks import digits
from comp_edge.tasks.cache import cached_split
from comp_edge.tasks.digit_vqa import DigitVQA
from comp_edge.tasks.pairs import PairTask
from comp_edge.tasks.vqa import Split


class DigitPairs(PairTask):
    """Pictures as those of `digit_vqa`, with captions that name every digit: "a red 7, a blue 3 and a green 1".

    12,000/1,500/1,500 images; the handwritten sources of train, validation and test are disjoint. Captions name the
    digits in a random order (four orders an image in training). The score is recall@1 of the text for an image in a
    gallery of 250: batches of validation and test are galleries, in which no two images show the same.
    """

    name = "digit_pairs"

    def __init__(self, processor: Any) -> None:
        super().__init__(processor, pairs_per_batch=48, eval_batch=digits.GALLERY, within_batch=True)

    def load_split(self, split: str) -> Split:
        def make() -> Split:
            images, cells, captions = digits.generate_pairs(split)
            return Split(images=images, questions=captions, extra={"cells": cells})

        return cached_split(f"{self.name}-1-{split}", make)

    def batch(self, split: str, pairs: list[int]) -> dict[str, Tensor]:
        """As `PairTask.batch`, and `image_ids` [n]."""
        rows = self.split(split).questions
        return {**super().batch(split, pairs), "image_ids": torch.tensor([rows[i][0] for i in pairs])}

    # The pictures are of one kind, and so is what a vision tower may be taught of their patches.
    auxiliary_head = DigitVQA.auxiliary_head
    patch_labels = DigitVQA.patch_labels
