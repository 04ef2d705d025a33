"""CLIP: an image tower and a causal text tower, compared by one projected token of each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from comp_edge.families.base import VIT, Count, StreamView, layer_view, linear_macs, patch_macs
from comp_edge.families.paired import Paired

LEGACY_EOS = 2  # in configs from before transformers 4.31, whatever the tokenizer's end of text is


class Clip(Paired):
    """`CLIPModel`. Tokens are dropped inside both towers; CLS and the end of the text, which are read at the end, stay."""

    model_type = "clip"
    architectures = ("CLIPModel",)

    def streams(self, model: Any) -> dict[str, StreamView]:
        text = model.text_model
        return {
            "vision": self.vision_stream(model, protected="first"),
            "language": StreamView(
                name="language",
                root=text.encoder,  # the text model itself reads the end of the text by its position
                entry=text,
                layers=tuple(layer_view(layer, VIT) for layer in text.encoder.layers),
                width=model.config.text_config.hidden_size,
                causal=True,
                protected="end",
                drops=tuple(range(1, len(text.encoder.layers))),
                spread=True,
                end=partial(end_of_text, text.eos_token_id),
            ),
        }

    def dense_vision_tokens(self, model: Any) -> int:
        return self.grid_tokens(model) + 1

    def fixed_macs(self, model: Any) -> dict[str, Count]:
        patches = model.vision_model.embeddings.patch_embedding
        return {
            "vision": Count(per_image=patch_macs(patches, self.grid_tokens(model))),
            "head": Count(
                constant=linear_macs(model.text_projection),
                # The comparison itself is one more row of the projected width.
                per_image=linear_macs(model.visual_projection) + model.projection_dim,
            ),
        }


def end_of_text(eos: int, arguments: Mapping[str, Tensor]) -> Tensor:
    """[b] the positions that `CLIPTextModel` reads: the first end of text, or by the legacy rule the largest id.

    Args:
        eos: `eos_token_id` of the text model.
        arguments: what the text model was called with.
    """
    ids = arguments["input_ids"]
    return (ids if eos == LEGACY_EOS else ids == eos).int().view(-1, ids.shape[-1]).argmax(-1)
