"""Idefics3 and SmolVLM: a SigLIP-like tower, pixel shuffle into a projection, a Llama decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from comp_edge.families.base import (
    LLAMA,
    VIT,
    Count,
    Generative,
    LayerNames,
    StreamView,
    layer_view,
    linear_macs,
    patch_macs,
)
from comp_edge.families.llava import language_stream


class Idefics3(Generative):
    """`Idefics3ForConditionalGeneration`.

    The pixel shuffle in front of the projection needs the whole grid of patches: image tokens are dropped behind it. Images
    that the processor cuts into tiles count as one image a tile.
    """

    model_type = "idefics3"
    architectures = ("Idefics3ForConditionalGeneration",)
    hands_over = True

    def streams(self, model: Any) -> dict[str, StreamView]:
        tower = model.model.vision_model
        return {
            "vision": StreamView(
                name="vision",
                root=tower,
                layers=tuple(layer_view(layer, VIT) for layer in tower.encoder.layers),
                width=model.config.vision_config.hidden_size,
                causal=False,
                protected="none",
                hands_over=self.hands_over,
            ),
            "language": language_stream(model.model.text_model),
        }

    def names(self, stream: str) -> LayerNames:
        return VIT if stream == "vision" else LLAMA

    def dense_vision_tokens(self, model: Any) -> int:
        config = model.config.vision_config
        return (config.image_size // config.patch_size) ** 2

    def image_tokens(self, model: Any, vision_tokens: int) -> int:
        return vision_tokens // model.config.scale_factor**2

    def fixed_macs(self, model: Any) -> dict[str, Count]:
        patches, head = self.dense_vision_tokens(model), linear_macs(model.lm_head)
        return {
            "vision": Count(per_image=patch_macs(model.model.vision_model.embeddings.patch_embedding, patches)),
            "connector": Count(per_image_token=linear_macs(model.model.connector.modality_projection.proj)),
            "head": Count(constant=head),
            "decode": Count(constant=head),
        }

    def connector(self, model: Any) -> nn.Module:
        return model.model.connector

    def pool_scores(self, model: Any, scores: Tensor, arguments: Mapping[str, Any]) -> Sequence[Tensor]:
        # The model's own shuffle brings the patches of an image token together.
        return model.model.connector.pixel_shuffle(scores[..., None], model.config.scale_factor).mean(-1)

    def stream_config(self, model: Any, stream: str) -> Any:
        return model.config.vision_config if stream == "vision" else model.config.text_config


class SmolVLM(Idefics3):
    """`SmolVLMForConditionalGeneration`, the same in small."""

    model_type = "smolvlm"
    architectures = ("SmolVLMForConditionalGeneration",)
