"""Answers to chat conversations: a processor, a model and transformers' `generate`, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comp_edge.errors import InputError

Conversation = list[dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes:
        text: without special tokens and without the prompt.
        prompt_tokens: tokens of the prompt, image placeholders included.
        new_tokens: tokens that were generated, the end of sequence included unless it is also the padding token.
    """

    text: str
    prompt_tokens: int
    new_tokens: int


def answers(model: Any, processor: Any, conversations: Sequence[Conversation], **options: Any) -> list[Answer]:
    """The answers to conversations, in their order.

    Args:
        conversations: lists of messages `{"role": …, "content": [{"type": "image", "image": PIL image, path or URL},
            {"type": "text", "text": …}, …]}`, as the processor's chat template takes them.
        options: of transformers' `generate`.

    Raises:
        InputError: something else than images and text, or a processor that does not say how to write such a prompt.
    """
    groups: dict[int, list[int]] = {}
    for index, conversation in enumerate(conversations):
        # Processors differ in what they make of a batch with more images in one row than in another.
        groups.setdefault(len(_images(conversation)), []).append(index)
    found: dict[int, Answer] = {}
    for indices in groups.values():
        found.update(zip(indices, _answer(model, processor, [conversations[i] for i in indices], options), strict=True))
    return [found[index] for index in range(len(conversations))]


def _answer(model: Any, processor: Any, conversations: list[Conversation], options: dict[str, Any]) -> list[Answer]:
    """The answers to conversations with equally many images."""
    if getattr(processor, "chat_template", None):
        return _generate(model, processor, _templated(processor, conversations), options)
    # A prompt without a template is of a model with an encoder for it (BLIP), which padding can change: one at a time.
    return [
        answer
        for conversation in conversations
        for answer in _generate(model, processor, _plain(processor, conversation), options)
    ]


def _templated(processor: Any, conversations: list[Conversation]) -> Any:
    """Inputs of the model for a batch, padded on the left."""
    return processor.apply_chat_template(
        # transformers replaces the messages' content: the caller's stay as they are.
        [[dict(message) for message in conversation] for conversation in conversations],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


def _plain(processor: Any, conversation: Conversation) -> Any:
    """Inputs of the model for one conversation, whose texts are the prompt as they are."""
    if getattr(processor, "image_token", None) is not None:
        raise InputError(
            f"the processor {type(processor).__name__} has no chat template: save one as chat_template.jinja in the model "
            "folder, so that the prompt says where the image goes."
        )
    parts = [part for message in conversation for part in message["content"]]
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    images = _images(conversation)
    return processor(images=images or None, text=[text], return_tensors="pt")


def _images(conversation: Conversation) -> list[Any]:
    parts = [part for message in conversation for part in message["content"]]
    for part in parts:
        if part["type"] not in ("text", "image"):
            raise InputError(f"a conversation holds {part['type']!r}; comp-edge models take 'image' and 'text'.")
    return [part["image"] for part in parts if part["type"] == "image"]


def _generate(model: Any, processor: Any, inputs: Any, options: dict[str, Any]) -> list[Answer]:
    padding = processor.tokenizer.pad_token_id
    if model.generation_config.pad_token_id is None:
        options = {"pad_token_id": padding, **options}
    inputs = inputs.to(model.device, model.dtype)
    prompts, mask = inputs["input_ids"], inputs["attention_mask"]
    output = model.generate(**inputs, **options)
    new = output[:, _echo(prompts, output) :]
    texts = processor.batch_decode(new, skip_special_tokens=True)
    return [
        Answer(text=text, prompt_tokens=int(real.sum()), new_tokens=int((row != padding).sum()))
        for text, real, row in zip(texts, mask, new, strict=True)
    ]


def _echo(prompts: Tensor, output: Tensor) -> int:
    """How many tokens of `output` [b, m] are the prompts [b, n] again.

    Decoders return the prompt before the answer, and BLIP's captions all of it but its last token (the first is replaced
    by its own); models with an encoder for the prompt return the answer alone.
    """
    for length in (prompts.shape[1], prompts.shape[1] - 1):
        if torch.equal(output[:, 1:length], prompts[:, 1:length]):
            return length
    return 0
