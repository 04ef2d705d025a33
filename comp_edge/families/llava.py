"""LLaVA 1.5: a CLIP vision tower, a projector, a Llama decoder (or another one with Llama's layers)."""

from __future__ import annotations

from typing import Any

from torch import nn

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


class Llava(Generative):
    """`LlavaForConditionalGeneration`. Tokens are dropped inside both streams: the projector takes each token alone."""

    model_type = "llava"
    architectures = ("LlavaForConditionalGeneration",)

    def streams(self, model: Any) -> dict[str, StreamView]:
        tower, decoder = model.model.vision_tower, model.model.language_model
        used = self.used_vision_layers(model)
        return {
            "vision": StreamView(
                name="vision",
                root=tower,
                layers=tuple(layer_view(layer, VIT) for layer in tower.encoder.layers[:used]),
                width=model.config.vision_config.hidden_size,
                causal=False,
                protected="first",
                drops=tuple(range(1, used)),
            ),
            "language": language_stream(decoder),
        }

    def names(self, stream: str) -> LayerNames:
        return VIT if stream == "vision" else LLAMA

    def used_vision_layers(self, model: Any) -> int:
        """Layers up to the one whose output the projector takes (-1 is the last, -2 the one before)."""
        layer, total = model.config.vision_feature_layer, model.config.vision_config.num_hidden_layers
        return layer if layer >= 0 else total + 1 + layer

    def dense_vision_tokens(self, model: Any) -> int:
        config = model.config.vision_config
        return (config.image_size // config.patch_size) ** 2 + 1

    def image_tokens(self, model: Any, vision_tokens: int) -> int:
        return vision_tokens - 1 if model.config.vision_feature_select_strategy == "default" else vision_tokens

    def fixed_macs(self, model: Any) -> dict[str, Count]:
        projector = model.model.multi_modal_projector
        patches = self.dense_vision_tokens(model) - 1
        head = linear_macs(model.lm_head)
        return {
            "vision": Count(per_image=patch_macs(model.model.vision_tower.embeddings.patch_embedding, patches)),
            "connector": Count(per_image_token=linear_macs(projector.linear_1, projector.linear_2)),
            "head": Count(constant=head),
            "decode": Count(constant=head),
        }

    def connector(self, model: Any) -> nn.Module:
        return model.model.multi_modal_projector

    def stream_config(self, model: Any, stream: str) -> Any:
        return model.config.vision_config if stream == "vision" else model.config.text_config


def language_stream(decoder: Any) -> StreamView:
    """The view of a decoder with Llama's layers that the other generative families share."""
    return StreamView(
        name="language",
        root=decoder,
        layers=tuple(layer_view(layer, LLAMA) for layer in decoder.layers),
        width=decoder.config.hidden_size,
        causal=True,
        protected="last",
        drops=tuple(range(1, len(decoder.layers))),
        spread=True,
    )
