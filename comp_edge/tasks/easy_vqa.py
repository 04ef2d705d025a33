"""`easy_vqa`: the data set that the package `easy-vqa` ships (one coloured shape an image)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from comp_edge.errors import InputError
from comp_edge.tasks.cache import cached_split
from comp_edge.tasks.vqa import Split, VQATask

HELD_OUT = 600  # of the 4,000 training images: they steer the pruning, no training step sees them


class EasyVQA(VQATask):
    """4,000 training and 1,000 test images, 48,248 questions; validation is held out from the training images."""

    name = "easy_vqa"

    def load_split(self, split: str) -> Split:
        return cached_split(f"{self.name}-2-{split}", lambda: _read(split))


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
    return Split(images=images, questions=questions, extra={})
