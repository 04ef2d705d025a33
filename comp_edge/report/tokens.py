"""Which tokens a pruned model keeps of sample images and their questions, and how to draw that."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from comp_edge.families import family_of
from comp_edge.schedule import active_schedule
from comp_edge.tasks.vqa import Split, VQATask

VEIL = (196, 194, 189)  # what dropped patches fade to: neutral, and visible on light and on dark pages
VEIL_STRENGTH = 0.86


@dataclass(frozen=True)
class Fate:
    """What became of the tokens of one request.

    Attributes:
        seen: patches (row-major) whose token the vision stream delivers.
        read: those of them whose token reaches the last layer of the language stream.
        text: (token id, reaches the last layer) of the prompt's text, in order.
    """

    seen: tuple[int, ...]
    read: tuple[int, ...]
    text: tuple[tuple[int, bool], ...]


@dataclass(frozen=True)
class Example:
    """One drawn question.

    Attributes:
        image: [H, W, 3] uint8, as the model sees it.
        side: patches along an edge of the image.
        text: pieces of the prompt, and whether their token reaches the last layer.
    """

    question: str
    answer: str
    truth: str
    image: np.ndarray
    side: int
    fate: Fate
    text: tuple[tuple[str, bool], ...]


def fate_of(
    ids: Tensor, mask: Tensor, vision: Tensor, language: Tensor, *, image_token: int, delivered_class: bool = False
) -> Fate:
    """Follow the tokens of one request through both streams.

    Args:
        ids: [n] the prompt with one placeholder per image token of the dense model.
        mask: [n] 0 for padding.
        vision: [tokens] bool, which tokens of the vision stream reached its last layer; a class token may lead.
        language: [n - surplus placeholders] bool, the same for the language stream's compact sequence.
        delivered_class: the class token is handed to the language model too.
    """
    patches = math.isqrt(len(vision)) ** 2
    lead = len(vision) - patches
    survivors = vision.nonzero()[:, 0].tolist()
    delivered = [i - lead for i in survivors if i >= lead or delivered_class]
    is_image = ids == image_token
    real = ~is_image | (is_image.long().cumsum(0) <= len(delivered))
    compact = ids[real]
    if len(compact) != len(language):
        raise ValueError(f"the language stream ran on {len(language)} tokens, the prompt has {len(compact)}")
    shown = language[compact == image_token].tolist()
    read = [patch for patch, kept in zip(delivered, shown, strict=True) if kept and patch >= 0]
    text = (compact != image_token) & (mask[real] > 0)
    return Fate(
        seen=tuple(patch for patch in delivered if patch >= 0),
        read=tuple(read),
        text=tuple(zip(compact[text].tolist(), language[text].tolist(), strict=True)),
    )


def patch_mask(patches: Sequence[int], *, side: int, shape: tuple[int, int]) -> np.ndarray:
    """[H, W] bool: the pixels of these patches, of a square grid in row-major order that fills an image of `shape`."""
    grid = np.zeros(side * side, dtype=bool)
    grid[list(patches)] = True
    rows = np.arange(shape[0]) * side // shape[0]
    columns = np.arange(shape[1]) * side // shape[1]
    return grid.reshape(side, side)[rows[:, None], columns[None]]


def veil(image: np.ndarray, patches: Sequence[int], *, side: int) -> np.ndarray:
    """The image [H, W, 3] with all but these patches faded."""
    kept = patch_mask(patches, side=side, shape=image.shape[:2])[..., None]
    faded = image * (1 - VEIL_STRENGTH) + np.array(VEIL) * VEIL_STRENGTH
    return np.where(kept, image, faded.round()).astype(np.uint8)


def data_uri(image: np.ndarray) -> str:
    """An image [H, W, 3] as a PNG data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def choose_questions(split: Split, count: int) -> list[int]:
    """One question for each of the first images that have any, going round the kinds of question.

    Nothing is picked by how well it turns out.
    """
    kinds = list(dict.fromkeys(_kind(question) for question in split.questions))
    chosen: list[int] = []
    for group in split.by_image:
        if len(chosen) == count:
            break
        wanted = kinds[len(chosen) % len(kinds)] if kinds else None
        chosen += [i for i in group if _kind(split.questions[i]) == wanted][:1] or group[:1]
    return chosen


def printable(text: str) -> str:
    """The text with control characters made visible: an untrained model generates them, and no font has them."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def _kind(question: Sequence[Any]) -> Any:
    return question[3] if len(question) > 3 else None


def drawable(model: Any) -> bool:
    """Whether each vision token is one patch of a square image, so that kept ones can be drawn over it.

    Not where a connector merges patches, nor where vision tokens are only attended to.
    """
    family = family_of(model)
    return family.fusion(model) is not None and not family.streams(model)["vision"].hands_over


@torch.no_grad()
def run_examples(model: Any, task: VQATask, *, count: int) -> list[Example]:
    """Ask a pruned model some validation questions, and record what it kept."""
    questions = choose_questions(task.split("val"), count)
    if not questions or not drawable(model):
        return []
    batch, family, length = task.batch("val", questions), family_of(model), task.prompt_length
    ids, mask = batch["input_ids"][:, :length], batch["attention_mask"][:, :length]
    answers, truths = task.generate(model, batch), task.truths(batch)
    # Generation ends with steps that drop nothing; the prompt alone is what the schedule acts on.
    model(input_ids=ids, attention_mask=mask, pixel_values=batch["pixel_values"], use_cache=False)
    schedule = active_schedule(model)
    vision, language = schedule.reached("vision"), schedule.reached("language")
    tokens = vision.shape[1]
    rows, examples = task.split("val").questions, []
    for i, question in enumerate(questions):
        fate = fate_of(
            ids[i], mask[i], vision[i], language[i], image_token=model.config.image_token_id,
            delivered_class=family.image_tokens(model, tokens) == tokens,
        )  # fmt: skip
        pieces = tuple((printable(task.processor.tokenizer.decode([token])), kept) for token, kept in fate.text)
        examples.append(
            Example(
                question=str(rows[question][1]),
                answer=printable(answers[i]),
                truth=str(truths[i]),
                image=_unnormalised(batch["pixel_values"][i], task.processor.image_processor),
                side=math.isqrt(tokens),
                fate=fate,
                text=pieces,
            )
        )
    return examples


def _unnormalised(pixels: Tensor, image_processor: Any) -> np.ndarray:
    """[3, H, W] as the model gets it -> [H, W, 3] uint8: after resizing and cropping, so that patches are where they are."""
    if image_processor.do_normalize:
        mean, std = (torch.tensor(v)[:, None, None] for v in (image_processor.image_mean, image_processor.image_std))
        pixels = pixels * std + mean
    scale = 255 if image_processor.do_rescale else 1
    return (pixels * scale).round().clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy()
