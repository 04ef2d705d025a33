"""`easy_vqa`: the data set that the package `easy-vqa` ships (one coloured shape an image)."""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comp_edge.errors import InputError
from comp_edge.tasks.cache import cached_split
from comp_edge.tasks.dialogue import IGNORE
from comp_edge.tasks.vqa import Split, VQATask

SHAPES = ("circle", "rectangle", "triangle")
BACKGROUND, UNKNOWN = 0, IGNORE  # beside 1, 2, 3 for the shapes; what is unknown is not learnt from
HELD_OUT = 600  # of the 4,000 training images: they steer the pruning, no training step sees them


class EasyVQA(VQATask):
    """4,000 training and 1,000 test images, 48,248 questions; validation is held out from the training images."""

    name = "easy_vqa"

    def load_split(self, split: str) -> Split:
        return cached_split(f"{self.name}-4-{split}", lambda: _read(split))

    def auxiliary_head(self, width: int, patches: int) -> nn.Module:
        """A per-patch classifier for dense training only: which shape is seen here, if any?

        Without it the tower learns colours in minutes and shapes hardly at all.

        Args:
            width: channels of the vision tower's output.
            patches: its number of patches (a square grid).
        """
        return _PatchClassifier(width, patches)

    def patch_labels(self, image_ids: Tensor, split: str = "train") -> Tensor:
        """What each pixel shows: [n, H, W] int64, `BACKGROUND`, 1 + index in `SHAPES`, or `UNKNOWN`, for these images."""
        extra = self.split(split).extra
        shapes = torch.from_numpy(extra["shapes"])[image_ids][:, None, None]
        painted = torch.from_numpy(extra["painted"])[image_ids]
        return torch.where(painted | (shapes == UNKNOWN), shapes, BACKGROUND)


class _PatchClassifier(nn.Module):
    def __init__(self, width: int, patches: int) -> None:
        super().__init__()
        self.side = isqrt(patches)
        self.linear = nn.Linear(width, 1 + len(SHAPES))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Loss of patch features [n, patches, width] against pixel labels [n, H, W]: a patch shows what any of it does."""
        target = F.adaptive_max_pool2d(labels.float()[:, None], self.side).flatten(1).long()
        if bool((target == UNKNOWN).all()):  # the mean over nothing would not be finite
            return 0 * self.linear(features).sum()
        # Most patches are background: without a weight the classifier would learn to say so.
        weight = torch.ones(1 + len(SHAPES), device=features.device)
        weight[BACKGROUND] = 0.2
        return F.cross_entropy(self.linear(features).flatten(0, 1), target.flatten(), weight, ignore_index=UNKNOWN)


def _read(split: str) -> Split:
    try:
        import easy_vqa
    except ImportError:
        raise InputError("task 'easy_vqa' needs the package easy-vqa (pip install easy-vqa==1.0).") from None
    from PIL import Image

    source = "test" if split == "test" else "train"
    texts, answers, ids = getattr(easy_vqa, f"get_{source}_questions")()
    paths: dict[int, str] = getattr(easy_vqa, f"get_{source}_image_paths")()
    order = sorted(paths)
    if split != "test":
        shuffled = np.random.default_rng(0).permutation(order)
        order = sorted((shuffled[:HELD_OUT] if split == "val" else shuffled[HELD_OUT:]).tolist())
    position = {image: i for i, image in enumerate(order)}
    images = np.stack([np.asarray(Image.open(Path(paths[i])).convert("RGB")) for i in order])
    questions = [
        [position[i], text.rstrip("?").strip(), answer, 0]
        for text, answer, i in zip(texts, answers, ids, strict=True)
        if i in position
    ]
    questions.sort(key=lambda q: q[0])
    data = Split(images=images, questions=questions)
    shapes = np.array([_shape((questions[i][1], questions[i][2]) for i in group) for group in data.by_image])
    data.extra.update(shapes=shapes, painted=_painted(images))
    return data


def _shape(asked: Iterable[tuple[str, str]]) -> int:
    """Which shape an image shows, as far as its questions and answers say: 1 + index in `SHAPES`, or `UNKNOWN`."""
    left = set(SHAPES)
    for text, answer in asked:
        words = set(text.split())
        named = set(SHAPES) & words
        if answer in SHAPES:
            left = {answer}
        elif named and (answer not in ("yes", "no") or (answer == "yes") != bool(words & {"no", "not"})):
            left &= named  # "what is the color of the circle", "is a circle present": there is one
        elif named:
            left -= named
    return 1 + SHAPES.index(left.pop()) if len(left) == 1 else UNKNOWN


def _painted(images: np.ndarray) -> np.ndarray:
    """Which pixels [n, H, W] of images [n, H, W, 3] are of the shape: the border's usual colour is the background."""
    painted = []
    for image in images:
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        colors, counts = np.unique(border, axis=0, return_counts=True)
        painted.append((image != colors[counts.argmax()]).any(-1))
    return np.stack(painted)
