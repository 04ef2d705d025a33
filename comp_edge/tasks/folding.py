"""Several questions about one image: encode the image once, and share the prompt's common beginning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from comp_edge.schedule import drops_tokens


def distinct_images(image_ids: Tensor) -> tuple[Tensor, Tensor]:
    """First row of every image, in order of appearance, and for every row which of those it shows."""
    same = image_ids[:, None] == image_ids[None]
    representative = same.int().argmax(1)
    return representative.unique(return_inverse=True)


def encode_images(model: Any, pixel_values: Tensor, image_ids: Tensor) -> dict[str, BaseModelOutputWithPooling]:
    """Image features for each row, with every distinct image encoded once.

    Args:
        pixel_values: [n, 3, H, W]; rows with equal `image_ids` [n] show the same image.

    Returns:
        What transformers' multimodal `forward` and `generate` take as `mm_encoder_outputs`.
    """
    first, inverse = distinct_images(image_ids)
    features = model.get_image_features(pixel_values=pixel_values[first], return_dict=True).pooler_output
    return {"image": BaseModelOutputWithPooling(pooler_output=[features[i] for i in inverse.tolist()])}


def shared_prefix_logits(model: Any, batch: dict[str, Tensor], *, prompt_length: int) -> Tensor | None:
    """Answer logits [n, answer, vocabulary] with the questions of an image behind one copy of the image's tokens.

    The prompt's beginning up to the last image token is run once an image; its key-value cache is then repeated for
    the image's questions. That is exact as long as no layer of the language model drops tokens, because what a causal
    model computes for the beginning does not depend on the question.

    Returns:
        None where it does not apply: tokens are dropped in the language model, images have different numbers of
        questions or prompts with different beginnings.
    """
    if drops_tokens(model, "language"):
        return None
    ids, mask, image_ids = batch["input_ids"], batch["attention_mask"], batch["image_ids"]
    first, inverse = distinct_images(image_ids)
    n, images = len(ids), len(first)
    if n % images or not torch.equal(inverse, torch.arange(images).repeat_interleave(n // images)):
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
    columns = start[:, None] + torch.arange(head_length)
    prefix = ids.gather(1, columns)
    if not torch.equal(prefix, prefix[first][inverse]):
        return None
    output = model(
        input_ids=prefix[first],
        attention_mask=torch.ones_like(prefix[first]),
        pixel_values=batch["pixel_values"][first],
        use_cache=True,
        logits_to_keep=1,
    )
    cache = output.past_key_values
    cache.batch_repeat_interleave(n // images)
    past = cache.get_seq_length()
    # The tails end where the batch ends, so that they are left-padded as well.
    columns = ids.shape[1] - longest + torch.arange(longest)
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
