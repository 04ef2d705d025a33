"""`synthetic`: made-up data of the size that a model wants, to measure time and memory without any data set."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from comp_edge.errors import InputError
from comp_edge.tasks.pairs import PairTask
from comp_edge.tasks.vqa import Split, VQATask

IMAGES = {"train": 64, "val": 16, "test": 16}
COARSE = 8  # blobs along an edge of an image
WORDS, QUESTION = 256, 8  # words to draw from, words of a question or text
GRID = 32  # patches along an edge, for models that take images of any size: 448 px with patches of 14


class Synthetic:
    """Images of coarse noise, questions and texts of random words of the tokenizer; 64/16/16 images.

    Everything is a function of the seed and the processor. **Scores and losses mean nothing**: there is nothing to learn
    but by heart, and a model with random weights answers at random. What the runs measure is seconds, memory and MACs.

    For models that generate (LLaVA, Idefics3, SmolVLM, Qwen-VL, InternVL, BLIP) it gives one question an image, to be
    answered by a word, and one image a batch; an image becomes one tile where the processor would split it. For models
    that compare (CLIP, SigLIP, SigLIP 2, and BLIP's image-text retrieval) it gives image-text pairs, four a batch, with
    recall@1 as the score.

    Args:
        model: the model that the task is for; without it, BLIP's processor means questions.
        options: of the class that it becomes, `SyntheticQuestions` or `SyntheticPairs`.
    """

    def __new__(cls, processor: Any, *, model: Any = None, **options: Any) -> Any:
        """The questions or pairs for this processor."""
        blip = type(processor).__name__.startswith("Blip")
        if hasattr(model, "itm_head") or not blip and getattr(processor, "image_token", None) is None:
            return SyntheticPairs(processor, **options)
        return SyntheticQuestions(processor, model=model, **options)


class SyntheticQuestions(VQATask):
    """Random questions about noise; see `Synthetic`.

    Args:
        side: edge of the images in pixels; by default what the processor wants.
        images: how many each split has.
    """

    name = "synthetic"

    def __init__(
        self,
        processor: Any,
        *,
        seed: int = 0,
        side: int | None = None,
        images: dict[str, int] | None = None,
        model: Any = None,
    ) -> None:
        whole = {"do_image_splitting": False} if hasattr(processor.image_processor, "do_image_splitting") else {}
        super().__init__(
            processor, images_per_batch=1, questions_per_image=1, eval_batch=4, image_options=whole, model=model
        )
        self.seed, self.side, self.images = seed, side or image_side(processor), images or IMAGES

    def load_split(self, split: str) -> Split:
        return make_split(self.processor.tokenizer, split, self.images[split], side=self.side, seed=self.seed)


class SyntheticPairs(PairTask):
    """Noise and random texts in pairs; see `Synthetic`.

    Args:
        side: edge of the images in pixels; by default what the processor wants.
        images: how many each split has.
    """

    name = "synthetic"

    def __init__(
        self, processor: Any, *, seed: int = 0, side: int | None = None, images: dict[str, int] | None = None
    ) -> None:
        super().__init__(processor, pairs_per_batch=4, eval_batch=4)
        self.seed, self.side, self.images = seed, side or image_side(processor), images or IMAGES

    def load_split(self, split: str) -> Split:
        return make_split(self.processor.tokenizer, split, self.images[split], side=self.side, seed=self.seed)


def make_split(tokenizer: Any, split: str, images: int, *, side: int, seed: int) -> Split:
    """So many images of noise, each with one question of random words and a word for an answer."""
    rng = np.random.default_rng([seed, VQATask.splits.index(split)])
    words = random_words(tokenizer, WORDS, seed=seed)
    questions = []
    for i in range(images):
        *question, answer = rng.choice(words, QUESTION + 1).tolist()
        questions.append([i, " ".join(question), answer, 0])
    return Split(images=np.stack([noise(rng, side) for _ in range(images)]), questions=questions)


def noise(rng: np.random.Generator, side: int) -> np.ndarray:
    """[side, side, 3] uint8: a few blobs of random colours."""
    blobs = Image.fromarray(rng.integers(0, 256, (COARSE, COARSE, 3), dtype=np.uint8))
    return np.asarray(blobs.resize((side, side), Image.Resampling.BICUBIC))


def random_words(tokenizer: Any, count: int, *, seed: int) -> list[str]:
    """Words that are one entry of the tokenizer's vocabulary, as many as there are up to `count`."""
    order = np.random.default_rng(seed).permutation(len(tokenizer)).tolist()
    found: dict[str, None] = {}
    for entry in order:
        # Some tokenizers leave the mark of a word's beginning to the caller.
        word = tokenizer.decode([entry], skip_special_tokens=True).replace("\u2581", " ").strip()
        if word.isascii() and word.isalpha():
            found[word.lower()] = None
        if len(found) == count:
            break
    if not found:
        raise InputError("the tokenizer's vocabulary holds no words of letters, of which the synthetic task is made.")
    return list(found)


def image_side(processor: Any) -> int:
    """Edge in pixels of the square images that a processor makes of others.

    Raises:
        InputError: its image processor does not say.
    """
    images = processor.image_processor
    # Before `size`, which may be of an image that is cropped or split afterwards.
    for name in ("crop_size", "max_image_size", "size"):
        size = dict(getattr(images, name, None) or {})
        for key in ("height", "longest_edge", "shortest_edge"):
            if name == "size" and getattr(images, "merge_size", None):
                break  # Qwen-VL's are numbers of pixels of an image of any shape
            if size.get(key):
                return int(size[key])
    if getattr(images, "patch_size", None):
        return int(images.patch_size) * min(GRID, math.isqrt(getattr(images, "max_num_patches", None) or GRID**2))
    raise InputError(f"the image processor {type(images).__name__} does not say how large its images are.")
