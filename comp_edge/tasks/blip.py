"""Questions as BLIP takes them: the question goes to an encoder and the answer to a decoder, or both to one decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comp_edge.errors import InputError
from comp_edge.families.blip_parts import MaskOfCross
from comp_edge.schedule import active_schedule
from comp_edge.tasks.dialogue import IGNORE
from comp_edge.tasks.folding import distinct_images, repeated_features
from comp_edge.tasks.packing import image_rows

_REQUEST = ("input_ids", "attention_mask", "pixel_values", "decoder_input_ids", "decoder_attention_mask")


class BlipQuestions:
    """`BlipForQuestionAnswering`, and `BlipForConditionalGeneration`, which answers by going on behind the question.

    Questions are padded on the right, as BERT counts positions from the left. `decoder_input_ids` [n, answer] begin with
    what answers begin with, `answers` [n, answer] end with what they end with.

    Args:
        options: arguments of the image processor.
        start: id of the token that answers begin with; by default the tokenizer's, and when a model is called its own.
    """

    def __init__(self, processor: Any, options: Mapping[str, Any], *, start: int | None = None) -> None:
        self.processor, self.options = processor, dict(options)
        self._start = start

    # ---- tokens

    def prompt(self, question: str) -> str:
        """The question itself."""
        return question

    def prompt_ids(self, prompt: str, image: np.ndarray) -> list[int]:
        """Token ids of a question, between [CLS] and [SEP]."""
        return self.processor.tokenizer(prompt)["input_ids"]

    def answer_ids(self, answer: str, prompt: str) -> list[int]:
        """Token ids of an answer and the [SEP] that ends it."""
        tokenizer = self.processor.tokenizer
        return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]

    def readable(self, answer: str) -> str:
        """An answer as `generate` writes it when it is right: BERT's tokenizer knows lower case only."""
        return self.processor.tokenizer.decode(self.answer_ids(answer, ""), skip_special_tokens=True).strip()

    # ---- batches

    def images(self, images: Sequence[np.ndarray], prompt: str) -> dict[str, Tensor]:
        """pixel_values [n, 3, H, W]."""
        inputs = self.processor.image_processor(images=list(images), return_tensors="pt", **self.options)
        return image_rows(inputs, len(images))

    def text(
        self, prompts: Sequence[list[int]], answers: Sequence[list[int]], *, prompt_length: int, answer_length: int
    ) -> dict[str, Tensor]:
        """input_ids and attention_mask [n, prompt]; decoder_input_ids, decoder_attention_mask and answers [n, answer]."""
        tokenizer, n = self.processor.tokenizer, len(prompts)
        pad = tokenizer.pad_token_id
        input_ids, mask = torch.full((n, prompt_length), pad), torch.zeros((n, prompt_length), dtype=torch.long)
        replies, targets = torch.full((n, answer_length), pad), torch.full((n, answer_length), IGNORE)
        reply_mask = torch.zeros((n, answer_length), dtype=torch.long)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            question = prompt if len(prompt) <= prompt_length else [*prompt[: prompt_length - 1], prompt[-1]]
            reply = answer[:answer_length]
            input_ids[i, : len(question)] = torch.tensor(question)
            mask[i, : len(question)] = 1
            replies[i, : len(reply)] = torch.tensor([self._first, *reply[:-1]])
            targets[i, : len(reply)] = torch.tensor(reply)
            reply_mask[i, : len(reply)] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "decoder_input_ids": replies,
            "decoder_attention_mask": reply_mask,
            "answers": targets,
        }

    def request(self, batch: Mapping[str, Tensor], *, prompt_length: int) -> dict[str, Tensor]:
        """What `forward` takes to answer a batch: of the answers their first token."""
        return {name: batch[name][:, :1] if "decoder" in name else batch[name] for name in _REQUEST}

    # ---- the model

    def logits(self, model: Any, batch: Mapping[str, Tensor], *, prompt_length: int) -> Tensor:
        """Logits [n, answer, vocabulary] that predict the answer tokens; an image is encoded once for its questions."""
        replies = batch["decoder_input_ids"].clone()
        replies[:, 0] = model.config.text_config.bos_token_id
        with self._folded(model, batch) as pixels:
            if _continues(model):
                return self._continued(model, batch, pixels, replies)
            seen: list[Tensor] = []  # the model's output does not carry them
            handle = model.text_decoder.register_forward_hook(lambda _, __, output: seen.append(output.logits))
            try:
                model(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    pixel_values=pixels,
                    decoder_input_ids=replies,
                    decoder_attention_mask=batch["decoder_attention_mask"],
                )
            finally:
                handle.remove()
            return seen[0]

    def _continued(self, model: Any, batch: Mapping[str, Tensor], pixels: Tensor, replies: Tensor) -> Tensor:
        """The same of a captioning model, whose answers follow their question without a gap."""
        questions, mask = batch["input_ids"], batch["attention_mask"]
        lengths = mask.sum(1) - 1  # without [SEP]
        width = questions.shape[1] + replies.shape[1] - 2
        rows = questions.new_full((len(questions), width), self.processor.tokenizer.pad_token_id)
        real = torch.zeros_like(rows)
        for i, length in enumerate(lengths.tolist()):
            # The answer's first token is a captioning model's first token.
            row = torch.cat([replies[i, :1], questions[i, 1:length], replies[i, 1:]])
            rows[i, : len(row)] = row
            real[i, : length + int(batch["decoder_attention_mask"][i].sum()) - 1] = 1
        logits = model(pixel_values=pixels, input_ids=rows, attention_mask=real).logits
        places = lengths[:, None] - 1 + torch.arange(replies.shape[1], device=replies.device)
        return logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1]))

    def targets(self, batch: Mapping[str, Tensor], *, prompt_length: int) -> Tensor:
        """Token ids [n, answer] that `logits` should predict, -100 where there is nothing to predict."""
        return batch["answers"]

    def generate(self, model: Any, batch: Mapping[str, Tensor], *, prompt_length: int, new_tokens: int) -> list[str]:
        """Greedily generated answers, through transformers' `generate`."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        options = {"max_new_tokens": new_tokens, "do_sample": False}
        texts: dict[int, str] = {}
        # Padding between question and answer would be read.
        every = torch.arange(len(ids), device=ids.device)
        groups = _equal_lengths(mask) if _continues(model) else [(every, ids.shape[1])]
        for rows, length in groups:
            part = {name: batch[name][rows] for name in ("image_ids", "pixel_values", "attention_mask")}
            with self._folded(model, part) as pixels:
                output = model.generate(
                    # transformers writes into the ids that a captioning model is given.
                    input_ids=ids[rows, :length].clone(),
                    attention_mask=mask[rows, :length],
                    pixel_values=pixels,
                    **options,
                )
            new = output[:, length - 1 if _continues(model) else 1 :]
            decoded = self.processor.batch_decode(new, skip_special_tokens=True)
            texts.update(zip(rows.tolist(), decoded, strict=True))
        return [texts[i].strip() for i in range(len(ids))]

    # ---- small things

    @property
    def _first(self) -> int:
        if self._start is not None:
            return self._start
        tokenizer = self.processor.tokenizer
        return tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    @contextmanager
    def _folded(self, model: Any, batch: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """The pixels of distinct images, while features are repeated for the rows and padding stays unread."""
        if not hasattr(model, "text_decoder"):
            raise InputError(
                f"{type(model).__name__} answers no questions; tasks of questions are for models that generate text."
            )
        first, inverse = distinct_images(batch["image_ids"])
        with ExitStack() as stack:
            stack.enter_context(repeated_features(model.vision_model, inverse))
            if not _continues(model) and active_schedule(model) is None:  # a schedule sees to it itself
                stack.enter_context(_unread_padding(model, batch["attention_mask"]))
            yield batch["pixel_values"][first]


@contextmanager
def _unread_padding(model: Any, mask: Tensor) -> Iterator[None]:
    """While active, the answer decoder does not attend to a question's padding, as transformers has it.

    Args:
        mask: [n, prompt] of the questions.
    """

    def honour(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        beams = len(kwargs["encoder_hidden_states"]) // len(mask)
        return args, kwargs | {"encoder_attention_mask": mask.repeat_interleave(beams, 0)}

    layers = model.text_decoder.bert.encoder.layer
    handles = [model.text_decoder.register_forward_pre_hook(honour, with_kwargs=True)]
    handles += [
        layer.crossattention.self.register_forward_pre_hook(MaskOfCross(), with_kwargs=True) for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _continues(model: Any) -> bool:
    """Whether the model has one decoder for question and answer, and no encoder."""
    return not hasattr(model, "text_encoder")


def _equal_lengths(mask: Tensor) -> list[tuple[Tensor, int]]:
    """Rows of each length, and that length."""
    lengths = mask.sum(1)
    return [((lengths == length).nonzero()[:, 0], int(length)) for length in lengths.unique()]
