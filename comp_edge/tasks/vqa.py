"""Visual question answering as generation: prompts, batches, loss and exact match for any processor and VLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comp_edge.tasks.folding import encode_images, shared_prefix_logits

IGNORE = -100
_INPUTS = ("input_ids", "attention_mask", "pixel_values")


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

    A batch is a dictionary of tensors, batch (question) first. The model's `forward` takes `input_ids` and
    `attention_mask` [n, prompt + answer], `pixel_values` [n, 3, H, W] and `labels` (-100 but for the answer and
    the end-of-sequence token). `image_ids` [n] says which questions share an image, `question_ids` [n] and `split`
    where the answers are. Prompts are padded on the left to `prompt_length`, so all batches have one shape.
    """

    name = "vqa"
    kinds: tuple[str, ...] = ()
    splits = ("train", "val", "test")

    def __init__(
        self, processor: Any, *, images_per_batch: int = 16, questions_per_image: int = 6, eval_batch: int = 250
    ) -> None:
        self.processor = processor
        self.images_per_batch = images_per_batch
        self.questions_per_image = questions_per_image
        self.eval_batch = eval_batch
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

    def prompt(self, question: str) -> str:
        """The text that the processor gets for a question: its chat template's, as a user would send it."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def prompt_ids(self, question: str) -> list[int]:
        """Token ids of the prompt with its image placeholders, through the real processor."""
        if question not in self._prompts:
            blank = np.zeros_like(self.split("val").images[0])
            self._prompts[question] = self.processor(images=[blank], text=[self.prompt(question)])["input_ids"][0]
        return list(self._prompts[question])

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of an answer, end of sequence included."""
        if answer not in self._answers:
            tokenizer = self.processor.tokenizer
            ids = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
            self._answers[answer] = [*ids, tokenizer.eos_token_id]
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

    def batch(self, split: str, questions: list[int]) -> dict[str, Tensor]:
        """The batch with these questions of a split (see the class)."""
        data, tokenizer = self.split(split), self.processor.tokenizer
        rows = [data.questions[i] for i in questions]
        image_ids = [row[0] for row in rows]
        unique = list(dict.fromkeys(image_ids))
        pixels = self.processor.image_processor(images=list(data.images[unique]), return_tensors="pt")["pixel_values"]
        n, prompt, answer = len(rows), self.prompt_length, self.answer_length
        input_ids = torch.full((n, prompt + answer), tokenizer.pad_token_id)
        labels = torch.full((n, prompt + answer), IGNORE)
        mask = torch.zeros((n, prompt + answer), dtype=torch.long)
        for i, row in enumerate(rows):
            # The end is what matters in a prompt that is longer than any of the training data.
            question, reply = self.prompt_ids(row[1])[-prompt:], self.answer_ids(row[2])[:answer]
            input_ids[i, prompt - len(question) : prompt] = torch.tensor(question)
            input_ids[i, prompt : prompt + len(reply)] = torch.tensor(reply)
            labels[i, prompt : prompt + len(reply)] = torch.tensor(reply)
            mask[i, prompt - len(question) : prompt + len(reply)] = 1
        where = {image: i for i, image in enumerate(unique)}
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "pixel_values": pixels[[where[i] for i in image_ids]],
            "labels": labels,
            "image_ids": torch.tensor(image_ids),
            "question_ids": torch.tensor(questions),
            "split": torch.full((n,), self.splits.index(split)),
        }

    # ---- the task protocol

    def train_batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Endless random batches: `images_per_batch` images with `questions_per_image` questions each."""
        rng, data = np.random.default_rng(seed), self.split("train")
        usable = [i for i, group in enumerate(data.by_image) if group]
        while True:
            images = rng.choice(usable, min(self.images_per_batch, len(usable)), replace=False)
            chosen: list[int] = []
            for image in images:
                group = data.by_image[image]
                few = len(group) < self.questions_per_image
                chosen += rng.choice(group, self.questions_per_image, replace=few).tolist()
            yield self.batch("train", chosen)

    def val_batches(self) -> Iterator[dict[str, Tensor]]:
        """The validation split, in order."""
        return self.ordered_batches("val")

    def test_batches(self) -> Iterator[dict[str, Tensor]]:
        """The test split, in order."""
        return self.ordered_batches("test")

    def ordered_batches(self, split: str) -> Iterator[dict[str, Tensor]]:
        """Every question of a split once, in order."""
        n = len(self.split(split).questions)
        for start in range(0, n, self.eval_batch):
            yield self.batch(split, list(range(start, min(start + self.eval_batch, n))))

    def logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Logits [n, answer, vocabulary] that predict the answer tokens.

        An image is encoded once for all its questions, and where the language model drops nothing the questions of an
        image also share its part of the prompt: the same numbers for a fraction of the work.
        """
        shared = shared_prefix_logits(model, batch, prompt_length=self.prompt_length)
        if shared is not None:
            return shared
        output = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
            mm_encoder_outputs=encode_images(model, batch["pixel_values"], batch["image_ids"]),
        )
        return output.logits[:, self.prompt_length - 1 : -1]

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the answer tokens (a scalar)."""
        return answer_loss(self.logits(model, batch), self.targets(batch))

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        """What `logits` should predict: token ids [n, answer], -100 where there is nothing to predict."""
        return batch["labels"][:, self.prompt_length :]

    @torch.no_grad()
    def score(self, model: Any, batches: Iterable[dict[str, Tensor]]) -> float:
        """Exact match of greedily generated answers, 0..1."""
        right = total = 0
        for batch in batches:
            for answer, truth in zip(self.generate(model, batch), self.truths(batch), strict=True):
                right += answer == truth
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
        length = self.prompt_length
        output = model.generate(
            input_ids=batch["input_ids"][:, :length],
            attention_mask=batch["attention_mask"][:, :length],
            mm_encoder_outputs=encode_images(model, batch["pixel_values"], batch["image_ids"]),
            max_new_tokens=self.answer_length,
            do_sample=False,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            eos_token_id=self.processor.tokenizer.eos_token_id,
        )
        texts = self.processor.batch_decode(output[:, length:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def example_inputs(self) -> dict[str, Tensor]:
        """Inputs of one request: one image, its prompt."""
        batch = self.batch("val", [0])
        length = self.prompt_length
        return {name: batch[name] if name == "pixel_values" else batch[name][:, :length] for name in _INPUTS}


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits [n, t, vocabulary] against targets [n, t], averaged over what is not -100."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)
