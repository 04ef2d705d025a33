"""Several questions about one image: encode the image once, and share the prompt's common beginning."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from comp_edge.families import family_of
from comp_edge.schedule import drops_tokens
from comp_edge.tasks.packing import ROWS, packed


def distinct_images(image_ids: Tensor) -> tuple[Tensor, Tensor]:
    """First row of every image, in order of appearance, and for every row which of those it shows."""
    same = image_ids[:, None] == image_ids[None]
    representative = same.int().argmax(1)
    return representative.unique(return_inverse=True)


def encode_images(
    model: Any, batch: Mapping[str, Tensor], *, each_row: bool = True
) -> dict[str, BaseModelOutputWithPooling]:
    """Image features, with every distinct image encoded once.

    Args:
        batch: the image inputs of the model's `get_image_features`, one row a question; rows with equal `image_ids` [n]
            show the same image.
        each_row: features for each row; otherwise for each distinct image, in order of appearance.

    Returns:
        What transformers' multimodal `forward` and `generate` take as `mm_encoder_outputs`.
    """
    first, inverse = distinct_images(batch["image_ids"])
    wanted = {*inspect.signature(model.get_image_features).parameters, ROWS}
    rows = packed({name: value[first] for name, value in batch.items() if name in wanted})
    features = model.get_image_features(**rows, return_dict=True).pooler_output
    if each_row:
        # A model with tiles may give features of each tile.
        each = len(features) // len(first)
        order = (inverse[:, None] * each + torch.arange(each, device=inverse.device)).flatten()
        # Models take the kind of container that they make.
        features = features[order] if isinstance(features, Tensor) else [features[i] for i in order.tolist()]
    return {"image": BaseModelOutputWithPooling(pooler_output=features)}


@contextmanager
def repeated_features(tower: nn.Module, inverse: Tensor) -> Iterator[None]:
    """While active, what a vision tower gives for distinct images is repeated for the rows that show them.

    For models that take no features in place of images: they get the pixels of the distinct images alone.

    Args:
        inverse: [n] which image each row shows.
    """

    def repeat(module: nn.Module, args: tuple, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[inverse]
        return output

    handle = tower.register_forward_hook(repeat)
    try:
        yield
    finally:
        handle.remove()


def shared_prefix_logits(model: Any, batch: Mapping[str, Tensor], *, prompt_length: int) -> Tensor | None:
    """Answer logits [n, answer, vocabulary] with the questions of an image behind one copy of the image's tokens.

    The prompt's beginning up to the last image token is run once an image; its key-value cache is then repeated for
    the image's questions. That is exact as long as no layer of the language model drops tokens, because what a causal
    model computes for the beginning does not depend on the question.

    Returns:
        None where it does not apply: tokens are dropped in the language model, or have positions of more than one
        dimension, which transformers derives from whole prompts; no two questions share an image, images have different
        numbers of questions, or prompts different beginnings.
    """
    if drops_tokens(model, "language") or family_of(model).absolute_positions:
        return None
    ids, mask, image_ids = batch["input_ids"], batch["attention_mask"], batch["image_ids"]
    first, inverse = distinct_images(image_ids)
    n, images = len(ids), len(first)
    if n == images or n % images:
        return None
    if not torch.equal(inverse, torch.arange(images, device=ids.device).repeat_interleave(n // images)):
        return None
    is_image = ids == model.config.image_token_id
    if not is_image.any(1).all():
        return None
    start = mask.argmax(1)  # left padding
    tail = ids.shape[1] - is_image.flip(1).int().argmax(1)  # first token after the image
    head = tail - start
    if len(head.unique()) != 1:
        return None
    head_length, longest = int(head[0]), int((ids.shape[1] - tail).max())
    columns = start[:, None] + torch.arange(head_length, device=ids.device)
    prefix = ids.gather(1, columns)
    if not torch.equal(prefix, prefix[first][inverse]):
        return None
    output = model(
        input_ids=prefix[first],
        attention_mask=torch.ones_like(prefix[first]),
        mm_encoder_outputs=encode_images(model, batch, each_row=False),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = output.past_key_values
    cache.batch_repeat_interleave(n // images)
    past = cache.get_seq_length()
    # The tails end where the batch ends, so that they are left-padded as well.
    columns = ids.shape[1] - longest + torch.arange(longest, device=ids.device)
    inside = columns[None] >= tail[:, None]
    suffix_mask = inside & (mask[:, columns] > 0)
    positions = past + (columns[None] - tail[:, None]).clamp(min=0)
    output = model(
        input_ids=ids[:, columns],
        attention_mask=torch.cat([suffix_mask.new_ones(n, past), suffix_mask], 1).long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    return output.logits[:, longest - (ids.shape[1] - prompt_length) - 1 : -1]
