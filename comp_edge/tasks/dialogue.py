"""Questions as a language model with image placeholders takes them: one sequence of prompt and answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comp_edge.errors import InputError
from comp_edge.tasks.folding import encode_images, shared_prefix_logits
from comp_edge.tasks.packing import image_rows, model_inputs, packed

IGNORE = -100
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
# In place of these the model gets features: the same image is encoded once.
_ENCODED = ("pixel_values", "pixel_attention_mask")


class Dialogue:
    """LLaVA, Idefics3, SmolVLM, Qwen-VL, InternVL and their like, through their processor and its chat template.

    Prompts are padded on the left, so that all end in the same column and answers begin in the next one.

    Args:
        options: arguments of the processor's image part, such as `do_image_splitting=False`.
    """

    def __init__(self, processor: Any, options: Mapping[str, Any]) -> None:
        self.processor, self.options = processor, dict(options)
        self._placeholders: list[int] | None = None
        self._types = False

    # ---- tokens

    def prompt(self, question: str) -> str:
        """The chat template's prompt, as a user would send it."""
        if not getattr(self.processor, "chat_template", None):
            raise InputError(
                f"the processor {type(self.processor).__name__} has no chat template: save one as chat_template.jinja in "
                "the model folder, so that the prompt says where the image goes."
            )
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def prompt_ids(self, prompt: str, image: np.ndarray) -> list[int]:
        """Token ids of a prompt about an image of this size, as the processor gives them.

        It is asked once: what it puts in place of the image depends on the image's size alone, and splitting a large
        image for every question takes its time.
        """
        ids = self.processor.tokenizer(prompt)["input_ids"]
        token = self.processor.image_token_id
        if ids.count(token) != 1:
            return self._asked(image, prompt)
        at = ids.index(token)
        before, after = ids[:at], ids[at + 1 :]
        if self._placeholders is None:
            whole = self._asked(image, prompt)
            end = len(whole) - len(after)
            if whole[:at] != before or whole[end:] != after:
                return whole
            self._placeholders = whole[at:end]
        return before + self._placeholders + after

    def _asked(self, image: np.ndarray, prompt: str) -> list[int]:
        inputs = self._process([image], [prompt])
        self._types = "mm_token_type_ids" in inputs
        return inputs["input_ids"][0]

    def answer_ids(self, answer: str, prompt: str) -> list[int]:
        """Token ids of an answer behind a prompt, end of sequence included."""
        tokenizer = self.processor.tokenizer
        space = "" if prompt[-1:].isspace() else " "
        return [*tokenizer(space + answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def readable(self, answer: str) -> str:
        """An answer as `generate` writes it when it is right."""
        return answer

    # ---- batches

    def images(self, images: Sequence[np.ndarray], prompt: str) -> dict[str, Tensor]:
        """Image inputs, one row an image (see `comp_edge.tasks.packing`).

        Raises:
            InputError: images become different numbers of tokens.
        """
        inputs = self._process(images, [prompt] * len(images), return_tensors="pt", padding=True)
        counts = (inputs["input_ids"] == self.processor.image_token_id).sum(1).tolist()
        if self._placeholders is not None:
            counts.append(self._placeholders.count(self.processor.image_token_id))
        if len(set(counts)) > 1:
            raise InputError(
                f"images of the task become {min(counts)} to {max(counts)} tokens; give all of them the same size, so that "
                "every prompt has as many."
            )
        return image_rows({name: value for name, value in inputs.items() if name not in _TEXT}, len(images))

    def text(
        self, prompts: Sequence[list[int]], answers: Sequence[list[int]], *, prompt_length: int, answer_length: int
    ) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels [n, prompt + answer]; mm_token_type_ids for models that ask for them."""
        n, width = len(prompts), prompt_length + answer_length
        input_ids = torch.full((n, width), self._pad)
        labels = torch.full((n, width), IGNORE)
        mask = torch.zeros((n, width), dtype=torch.long)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            question, reply = self._fitted(prompt, prompt_length), answer[:answer_length]
            end = prompt_length + len(reply)
            input_ids[i, prompt_length - len(question) : prompt_length] = torch.tensor(question)
            input_ids[i, prompt_length:end] = torch.tensor(reply)
            labels[i, prompt_length:end] = torch.tensor(reply)
            mask[i, prompt_length - len(question) : end] = 1
        found = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
        if self._types:
            found["mm_token_type_ids"] = (input_ids == self.processor.image_token_id).int()
        return found

    def _fitted(self, prompt: list[int], length: int) -> list[int]:
        """The prompt, cut to a length where it is longer than any of the training data."""
        surplus, token = len(prompt) - length, self.processor.image_token_id
        if surplus <= 0:
            return prompt
        if token not in prompt[:surplus]:
            return prompt[surplus:]  # the end is what matters
        last = len(prompt) - prompt[::-1].index(token)
        return prompt[:last] + prompt[last + surplus :]

    def request(self, batch: Mapping[str, Tensor], *, prompt_length: int) -> dict[str, Tensor]:
        """What `forward` takes to answer a batch."""
        prompts = {name: value[:, :prompt_length] for name, value in batch.items() if name in _TEXT}
        known = {*_TEXT, "labels", "image_ids", "question_ids", "split"}
        return packed({**prompts, **{name: value for name, value in batch.items() if name not in known}})

    # ---- the model

    def logits(self, model: Any, batch: Mapping[str, Tensor], *, prompt_length: int) -> Tensor:
        """Logits [n, answer, vocabulary] that predict the answer tokens.

        An image is encoded once for all its questions, and where the language model drops nothing the questions of an
        image also share its part of the prompt: the same numbers for a fraction of the work.
        """
        shared = shared_prefix_logits(model, batch, prompt_length=prompt_length)
        if shared is not None:
            return shared
        output = model(**self._encoded(model, batch), mm_encoder_outputs=encode_images(model, batch))
        return output.logits[:, prompt_length - 1 : -1]

    def targets(self, batch: Mapping[str, Tensor], *, prompt_length: int) -> Tensor:
        """Token ids [n, answer] that `logits` should predict, -100 where there is nothing to predict."""
        return batch["labels"][:, prompt_length:]

    def generate(self, model: Any, batch: Mapping[str, Tensor], *, prompt_length: int, new_tokens: int) -> list[str]:
        """Greedily generated answers, through transformers' `generate`."""
        inputs = self._encoded(model, batch)
        del inputs["labels"]
        output = model.generate(
            **{name: value[:, :prompt_length] if name in _TEXT else value for name, value in inputs.items()},
            mm_encoder_outputs=encode_images(model, batch),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=self._pad,
            eos_token_id=self.processor.tokenizer.eos_token_id,
        )
        texts = self.processor.batch_decode(output[:, prompt_length:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    # ---- small things

    @property
    def _pad(self) -> int:
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def _process(self, images: Sequence[np.ndarray], prompts: list[str], **options: Any) -> Any:
        # One list an image: some processors take a flat one for the images of a single prompt.
        return self.processor(images=[[image] for image in images], text=prompts, **options, **self.options)

    def _encoded(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in model_inputs(model, batch).items() if name not in _ENCODED}
