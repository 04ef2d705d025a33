"""Visual question answering as generation: prompts, batches, loss and exact match for any processor and VLM."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comp_edge.errors import InputError
from comp_edge.tasks.blip import BlipQuestions
from comp_edge.tasks.dialogue import IGNORE, Dialogue

# Pixel values (three a pixel) that a batch holds at most: as many as 16 images of 512x512.
MOST_PIXELS = 16 * 3 * 512 * 512


@dataclass
class Split:
    """images [n, H, W, 3] uint8; questions as [image index, question, answer, kind], grouped by image."""

    images: np.ndarray
    questions: list[list]
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def by_image(self) -> list[list[int]]:
        """Question indices of every image."""
        groups: list[list[int]] = [[] for _ in range(len(self.images))]
        for i, question in enumerate(self.questions):
            groups[question[0]].append(i)
        return groups


class VQATask:
    """Base of the built-in tasks; a task of your own needs `load_split` only.

    A batch is a dictionary of tensors, batch (question) first. `image_ids` [n] says which questions share an image,
    `question_ids` [n] and `split` where the answers are. The rest is what the model's `forward` takes, and depends on the
    processor (see `Dialogue` and `BlipQuestions`): for a model with image placeholders `input_ids`, `attention_mask` and
    `labels` [n, prompt + answer] (-100 but for the answer and the end-of-sequence token), and its image inputs, one row a
    question (see `comp_edge.tasks.packing`). Prompts are padded to `prompt_length`, so all batches have one shape.

    Args:
        images_per_batch, questions_per_image: of a training batch, at most; fewer where images are large (`MOST_PIXELS`).
        eval_batch: questions of other batches, at most.
        image_options: arguments of the processor's image part, such as `{"do_image_splitting": False}`.
        model: the model that the task is for, where it is known: `example_inputs` then holds what its `forward` takes and
            no more. (BLIP's models share a processor, and take different things.)
    """

    name = "vqa"
    kinds: tuple[str, ...] = ()
    splits = ("train", "val", "test")

    def __init__(
        self,
        processor: Any,
        *,
        images_per_batch: int = 16,
        questions_per_image: int = 6,
        eval_batch: int = 250,
        image_options: Mapping[str, Any] | None = None,
        model: Any = None,
    ) -> None:
        self.processor = processor
        self.images_per_batch = images_per_batch
        self.questions_per_image = questions_per_image
        self.eval_batch = eval_batch
        self.image_options = dict(image_options or {})
        self._taken = None if model is None else frozenset(inspect.signature(model.forward).parameters)
        self._start = None if model is None else model.config.get_text_config().bos_token_id
        self._splits: dict[str, Split] = {}
        self._prompts: dict[str, list[int]] = {}
        self._answers: dict[str, list[int]] = {}

    # ---- data

    def load_split(self, split: str) -> Split:
        """Images and questions of "train", "val" or "test"."""
        raise NotImplementedError(f"{type(self).__name__} must implement load_split(split)")

    def split(self, split: str) -> Split:
        """The split, loaded once."""
        if split not in self._splits:
            self._splits[split] = self.load_split(split)
        return self._splits[split]

    @cached_property
    def layout(self) -> Dialogue | BlipQuestions:
        """How the processor's models take questions and answers.

        Raises:
            InputError: they do not answer questions.
        """
        if type(self.processor).__name__.startswith("Blip"):
            return BlipQuestions(self.processor, self.image_options, start=self._start)
        if getattr(self.processor, "image_token", None) is None:
            raise InputError(
                f"task {self.name!r} asks questions, and models with the processor {type(self.processor).__name__} answer "
                "none; give a task of image-text pairs, such as synthetic."
            )
        return Dialogue(self.processor, self.image_options)

    def prompt(self, question: str) -> str:
        """The text that the processor gets for a question: its chat template's, as a user would send it."""
        return self.layout.prompt(question)

    def prompt_ids(self, question: str) -> list[int]:
        """Token ids of the prompt with its image placeholders, through the real processor."""
        if question not in self._prompts:
            self._prompts[question] = self.layout.prompt_ids(self.prompt(question), self._blank)
        return list(self._prompts[question])

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of an answer, end of sequence included."""
        if answer not in self._answers:
            self._answers[answer] = self.layout.answer_ids(answer, self._some_prompt)
        return list(self._answers[answer])

    @cached_property
    def prompt_length(self) -> int:
        """Tokens of the longest prompt of the data, image placeholders included."""
        texts = {q[1] for split in ("train", "val") for q in self.split(split).questions}
        return max(len(self.prompt_ids(text)) for text in texts)

    @cached_property
    def answer_length(self) -> int:
        """Tokens of the longest answer, end of sequence included."""
        return max(len(self.answer_ids(answer)) for answer in {q[2] for q in self.split("train").questions})

    @cached_property
    def rows_that_fit(self) -> int:
        """How many rows a batch may have (see `MOST_PIXELS`)."""
        return max(1, MOST_PIXELS // self.layout.images([self._blank], self._some_prompt)["pixel_values"].numel())

    def batch(self, split: str, questions: list[int]) -> dict[str, Tensor]:
        """The batch with these questions of a split (see the class)."""
        data = self.split(split)
        rows = [data.questions[i] for i in questions]
        image_ids = [row[0] for row in rows]
        unique = list(dict.fromkeys(image_ids))
        text = self.layout.text(
            [self.prompt_ids(row[1]) for row in rows],
            [self.answer_ids(row[2]) for row in rows],
            prompt_length=self.prompt_length,
            answer_length=self.answer_length,
        )
        images = self.layout.images(list(data.images[unique]), self._some_prompt)
        where = {image: i for i, image in enumerate(unique)}
        shown = [where[i] for i in image_ids]
        return {
            **text,
            **{name: value[shown] for name, value in images.items()},
            "image_ids": torch.tensor(image_ids),
            "question_ids": torch.tensor(questions),
            "split": torch.full((len(rows),), self.splits.index(split)),
        }

    # ---- the task protocol

    def train_batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Endless random batches: `images_per_batch` images with `questions_per_image` questions each."""
        rng, data = np.random.default_rng(seed), self.split("train")
        usable = [i for i, group in enumerate(data.by_image) if group]
        each = min(self.questions_per_image, self.rows_that_fit)
        count = min(self.images_per_batch, len(usable), max(1, self.rows_that_fit // each))
        while True:
            images = rng.choice(usable, count, replace=False)
            chosen: list[int] = []
            for image in images:
                group = data.by_image[image]
                chosen += rng.choice(group, each, replace=len(group) < each).tolist()
            yield self.batch("train", chosen)

    def val_batches(self) -> Iterator[dict[str, Tensor]]:
        """The validation split, in order."""
        return self.ordered_batches("val")

    def test_batches(self) -> Iterator[dict[str, Tensor]]:
        """The test split, in order."""
        return self.ordered_batches("test")

    def ordered_batches(self, split: str) -> Iterator[dict[str, Tensor]]:
        """Every question of a split once, in order."""
        n, step = len(self.split(split).questions), min(self.eval_batch, self.rows_that_fit)
        for start in range(0, n, step):
            yield self.batch(split, list(range(start, min(start + step, n))))

    def logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Logits [n, answer, vocabulary] that predict the answer tokens."""
        return self.layout.logits(model, batch, prompt_length=self.prompt_length)

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the answer tokens (a scalar)."""
        return answer_loss(self.logits(model, batch), self.targets(batch))

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        """What `logits` should predict: token ids [n, answer], -100 where there is nothing to predict."""
        return self.layout.targets(batch, prompt_length=self.prompt_length)

    @torch.no_grad()
    def score(self, model: Any, batches: Iterable[dict[str, Tensor]]) -> float:
        """Exact match of greedily generated answers, 0..1."""
        right = total = 0
        for batch in batches:
            for answer, truth in zip(self.generate(model, batch), self.truths(batch), strict=True):
                right += answer == self.layout.readable(truth)
                total += 1
        if not total:
            raise ValueError("there is nothing to score: no batches were given")
        return right / total

    def truths(self, batch: dict[str, Tensor]) -> list[str]:
        """The right answers of a batch."""
        data = self.split(self.splits[int(batch["split"][0])])
        return [data.questions[i][2] for i in batch["question_ids"].tolist()]

    @torch.no_grad()
    def generate(self, model: Any, batch: dict[str, Tensor]) -> list[str]:
        """Greedily generated answers of a batch, through transformers' `generate`."""
        return self.layout.generate(model, batch, prompt_length=self.prompt_length, new_tokens=self.answer_length)

    def example_inputs(self) -> dict[str, Tensor]:
        """Inputs of one request, as the model's `forward` takes them: one image, its prompt."""
        inputs = self.layout.request(self.batch("val", [0]), prompt_length=self.prompt_length)
        return {name: value for name, value in inputs.items() if self._taken is None or name in self._taken}

    # ---- what stands for all of the task's

    @property
    def _blank(self) -> np.ndarray:
        return np.zeros_like(self.split("val").images[0])

    @property
    def _some_prompt(self) -> str:
        return self.prompt(self.split("val").questions[0][1])


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits [n, t, vocabulary] against targets [n, t], averaged over what is not -100."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)
