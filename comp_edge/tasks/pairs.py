"""Image-text pairs: which text belongs to which image, for models that compare the two (CLIP, SigLIP, BLIP's matcher)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comp_edge.errors import InputError
from comp_edge.tasks.folding import repeated_features
from comp_edge.tasks.packing import image_rows, model_inputs, packed
from comp_edge.tasks.vqa import Split, answer_loss

SIGLIP_LENGTH = 64  # tokens of every text that the released models were trained on
_REQUEST = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask", "spatial_shapes")


class PairTask:
    """Base of tasks on image-text pairs; a task of your own needs `load_split` only.

    A batch is a dictionary of tensors, batch (pair) first: what the model's `forward` takes, and `pair_ids` [n]. The loss
    is each family's own, as a cross-entropy: CLIP's contrast within the batch, SigLIP's verdict on every combination of an
    image and a text, the verdict of BLIP's matcher on the pairs and as many wrong ones. The score is recall@1: how many
    images find their text, among all for CLIP and SigLIP, among those of its batch for BLIP, which reads image and text
    together.

    Args:
        pairs_per_batch: of a training batch.
        eval_batch: pairs of other batches.
        within_batch: look for an image's text among those of its batch, whatever the model. A part of a split is then as
            hard as the whole, and texts need to be distinct within a batch only.
    """

    name = "pairs"
    splits = ("train", "val", "test")
    least_examples = 2  # a single pair has nothing to be told apart from

    def __init__(
        self, processor: Any, *, pairs_per_batch: int = 16, eval_batch: int = 64, within_batch: bool = False
    ) -> None:
        self.processor, self.pairs_per_batch, self.eval_batch = processor, pairs_per_batch, eval_batch
        self.within_batch = within_batch
        self._splits: dict[str, Split] = {}

    # ---- data

    def load_split(self, split: str) -> Split:
        """Images and texts of "train", "val" or "test"; of a split's questions the first two entries count here:
        [image index, text]."""
        raise NotImplementedError(f"{type(self).__name__} must implement load_split(split)")

    def split(self, split: str) -> Split:
        """The split, loaded once."""
        if split not in self._splits:
            self._splits[split] = self.load_split(split)
        return self._splits[split]

    @cached_property
    def comparison(self) -> Comparison:
        """How the processor's models compare.

        Raises:
            InputError: they do not.
        """
        name = type(self.processor).__name__
        found = next((kind for prefix, kind in COMPARISONS.items() if name.startswith(prefix)), None)
        if found is None:
            raise InputError(
                f"task {self.name!r} is of image-text pairs, for processors that begin with {', '.join(COMPARISONS)}; "
                f"{name} is none of them."
            )
        return found

    @cached_property
    def text_length(self) -> int:
        """Tokens of a text: those of the longest, or of SigLIP's, which reads its last position and knows no padding."""
        tokenizer, limit = self.processor.tokenizer, self.processor.tokenizer.model_max_length
        if self.comparison is SIGMOID:
            return min(SIGLIP_LENGTH, limit)
        texts = [row[1] for split in ("train", "val") for row in self.split(split).questions]
        return min(max(len(ids) for ids in tokenizer(texts)["input_ids"]), limit)

    def batch(self, split: str, pairs: list[int]) -> dict[str, Tensor]:
        """The batch with these pairs of a split (see the class)."""
        data = self.split(split)
        rows = [data.questions[i] for i in pairs]
        text = self.processor.tokenizer(
            [row[1] for row in rows],
            padding="max_length",
            truncation=True,
            max_length=self.text_length,
            return_tensors="pt",
        )
        found = {"input_ids": text["input_ids"]}
        if self.comparison is not SIGMOID:
            found["attention_mask"] = text["attention_mask"]
        images = self.processor.image_processor(images=[data.images[row[0]] for row in rows], return_tensors="pt")
        return {**found, **image_rows(images, len(rows)), "pair_ids": torch.tensor(pairs)}

    # ---- the task protocol

    def train_batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Endless random batches of `pairs_per_batch` pairs, no two of one image."""
        rng, data = np.random.default_rng(seed), self.split("train")
        usable = [i for i, group in enumerate(data.by_image) if group]
        while True:
            images = rng.choice(usable, min(self.pairs_per_batch, len(usable)), replace=False)
            yield self.batch("train", [int(rng.choice(data.by_image[image])) for image in images])

    def val_batches(self) -> Iterator[dict[str, Tensor]]:
        """The validation split, in order."""
        return self.ordered_batches("val")

    def test_batches(self) -> Iterator[dict[str, Tensor]]:
        """The test split, in order."""
        return self.ordered_batches("test")

    def ordered_batches(self, split: str) -> Iterator[dict[str, Tensor]]:
        """Every pair of a split once, in order."""
        n = len(self.split(split).questions)
        for start in range(0, n, self.eval_batch):
            yield self.batch(split, list(range(start, min(start + self.eval_batch, n))))

    def logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Logits [decisions, 1, choices] of everything that is compared in a batch."""
        return self.comparison.logits(model, batch)[:, None]

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        """The right choices [decisions, 1]."""
        return self.comparison.targets(_numbers(batch))[:, None]

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the decisions (a scalar)."""
        return answer_loss(self.logits(model, batch), self.targets(batch))

    @torch.no_grad()
    def score(self, model: Any, batches: Iterable[dict[str, Tensor]]) -> float:
        """Recall@1 of the text for an image, 0..1."""
        right = total = 0
        for gallery in ([batch] for batch in batches) if self.within_batch else [batches]:
            for table in self.comparison.similarities(model, gallery):
                right += int((table.argmax(1) == torch.arange(len(table), device=table.device)).sum())
                total += len(table)
        if not total:
            raise ValueError("there is nothing to score: no batches were given")
        return right / total

    def example_inputs(self) -> dict[str, Tensor]:
        """Inputs of one request, as the model's `forward` takes them: one image, one text."""
        return packed({name: value for name, value in self.batch("val", [0]).items() if name in _REQUEST})


@dataclass(frozen=True)
class Comparison:
    """How a kind of model compares images with texts.

    Attributes:
        logits: of a model on a batch, [decisions, choices].
        targets: the right choices [decisions] in a batch, of the numbers [n] of its pairs.
        similarities: of a model on batches, tables [images, texts] whose diagonal are the pairs.
    """

    logits: Callable[[Any, dict[str, Tensor]], Tensor]
    targets: Callable[[Tensor], Tensor]
    similarities: Callable[[Any, Iterable[dict[str, Tensor]]], list[Tensor]]


def _embedded(model: Any, batches: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    """[images, texts] of all batches together, by the embeddings of two towers; nothing where there are no batches."""
    outputs = (model(**model_inputs(model, batch)) for batch in batches)
    found = [(output["image_embeds"], output["text_embeds"]) for output in outputs]
    if not found:
        return []
    images, texts = map(torch.cat, zip(*found, strict=True))
    return [images @ texts.T]


def _contrast(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """[2n, n]: the texts for each image, the images for each text."""
    output = model(**model_inputs(model, batch))
    return torch.cat([output.logits_per_image, output.logits_per_text])


def _each(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """[n * n, 2]: no and yes for every image with every text."""
    yes = model(**model_inputs(model, batch)).logits_per_image.flatten()
    return torch.stack([torch.zeros_like(yes), yes], 1)


def _matched(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """[2n, 2]: no and yes for the pairs, and for each image with its neighbour's text."""
    own = _numbers(batch)
    return _read_together(model, batch, images=own.repeat(2), texts=torch.cat([own, own.roll(-1)]))


def _tables(model: Any, batches: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    """[n, n] of each batch, how well the matcher finds each text to suit each image."""
    return [_table(model, batch) for batch in batches]


def _table(model: Any, batch: dict[str, Tensor]) -> Tensor:
    rows, texts = [], _numbers(batch)
    for image in range(len(texts)):  # one at a time, or memory grows with the square of the batch
        alone = batch | {"pixel_values": batch["pixel_values"][image : image + 1]}
        verdicts = _read_together(model, alone, images=torch.zeros_like(texts), texts=texts)
        rows.append(verdicts[:, 1] - verdicts[:, 0])
    return torch.stack(rows)


def _read_together(model: Any, batch: dict[str, Tensor], *, images: Tensor, texts: Tensor) -> Tensor:
    """[k, 2] the matcher's verdicts on these images with these texts; an image is encoded once."""
    with repeated_features(model.vision_model, images):
        return model(
            input_ids=batch["input_ids"][texts],
            attention_mask=batch["attention_mask"][texts],
            pixel_values=batch["pixel_values"],
        ).itm_score


def _numbers(batch: dict[str, Tensor]) -> Tensor:
    """[n] 0, 1, 2, ... for the pairs of a batch, where it is."""
    return torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device)


SOFTMAX = Comparison(_contrast, lambda own: own.repeat(2), _embedded)
SIGMOID = Comparison(_each, lambda own: (own[:, None] == own).long().flatten(), _embedded)
MATCHING = Comparison(_matched, lambda own: torch.cat([torch.ones_like(own), torch.zeros_like(own)]), _tables)
# How the name of a processor begins, for the models that it is of.
COMPARISONS = {"CLIP": SOFTMAX, "Siglip": SIGMOID, "Blip": MATCHING}
