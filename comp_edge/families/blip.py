"""BLIP: an image tower, a BERT that attends to the image between its layers; answers, matches or captions."""

from __future__ import annotations

import dataclasses
from typing import Any

from comp_edge.families.base import VIT, Count, LayerNames, LayerView, StreamShape, StreamView, linear_macs, patch_macs
from comp_edge.families.blip_parts import (
    BERT,
    LeftOfQuestion,
    MaskOfCross,
    NarrowAttention,
    cross_layer,
    skip_block,
    skip_feed_forward,
    text_layer,
)
from comp_edge.families.paired import Paired

BLIP_VIT = dataclasses.replace(VIT, qkv="qkv", out="projection")


class Blip(Paired):
    """BLIP for question answering, for image-text retrieval, and for captioning.

    `language` is the text encoder, or the decoder that writes captions; `cross` are the attentions to the image between its
    layers. Captions drop no text tokens. The decoder that writes answers stays dense; it reads the question's tokens that
    are left.
    """

    model_type = "blip"
    architectures = ("BlipForQuestionAnswering", "BlipForImageTextRetrieval", "BlipForConditionalGeneration")
    returns_probabilities = True
    shortest_text = 1  # captions begin with one token

    def streams(self, model: Any) -> dict[str, StreamView]:
        captions, width = self.generates(model), model.config.text_config.hidden_size
        encoder = model.text_decoder.bert.encoder if captions else model.text_encoder.encoder
        return {
            "vision": self.vision_stream(model, protected="first"),
            "language": StreamView(
                name="language",
                root=encoder,
                layers=tuple(text_layer(layer) for layer in encoder.layer),
                width=width,
                causal=captions,
                protected="last" if captions else "first",
                drops=() if captions else tuple(range(1, len(encoder.layer))),
                spread=not captions,
            ),
            "cross": StreamView(
                name="cross",
                root=encoder,
                layers=tuple(cross_layer(layer) for layer in encoder.layer),
                width=width,
                causal=False,
                protected="none",
                follows="language",
            ),
        }

    def names(self, stream: str) -> LayerNames:
        return BLIP_VIT if stream == "vision" else BERT

    def generates(self, model: Any) -> bool:
        return not hasattr(model, "text_encoder")

    def shape(self, model: Any, stream: str) -> StreamShape:
        shape = super().shape(model, stream)
        if stream != "cross":
            return shape
        source = model.config.vision_config.hidden_size
        return dataclasses.replace(
            shape, ffn=0, projections=0, source=source, keys_from="vision", layer_norms=1, outer_norms=0
        )

    def dense_vision_tokens(self, model: Any) -> int:
        return self.grid_tokens(model) + 1

    def fixed_macs(self, model: Any) -> dict[str, Count]:
        patches = model.vision_model.embeddings.patch_embedding
        fixed = {"vision": Count(per_image=patch_macs(patches, self.grid_tokens(model)))}
        if not hasattr(model, "text_decoder"):
            return fixed | {"head": Count(constant=linear_macs(model.itm_head))}
        words = model.text_decoder.cls.predictions
        head = linear_macs(words.transform.dense, words.decoder)
        fixed |= {"head": Count(constant=head), "decode": Count(constant=head)}
        if not self.generates(model):
            # The first of an answer's tokens brings the question's keys and values along.
            token, keys = _answering(model)
            width = model.config.text_config.hidden_size
            layers = len(model.text_decoder.bert.encoder.layer)
            products = 2 * width * layers  # with one key
            fixed["decoder"] = Count(constant=token + products, per_language_token=keys + products)
            fixed["decode"] = Count(constant=head + token + 2 * products, per_language_token=products)
        return fixed

    def attach_extras(self, schedule: Any) -> list[Any]:
        model = schedule.model
        if self.generates(model) or not hasattr(model, "text_decoder"):
            return []
        handles = [model.text_decoder.register_forward_pre_hook(LeftOfQuestion(schedule), with_kwargs=True)]
        for layer in model.text_decoder.bert.encoder.layer:
            attention = layer.crossattention.self
            handles.append(attention.register_forward_pre_hook(MaskOfCross(), with_kwargs=True))
        return handles

    def skip_attention(self, stream: str, layer: LayerView) -> None:
        if stream == "vision":
            super().skip_attention(stream, layer)
        else:
            skip_block(layer.module if stream == "cross" else layer.module.attention)

    def skip_mlp(self, stream: str, layer: LayerView) -> None:
        if stream == "vision":
            super().skip_mlp(stream, layer)
        else:
            skip_feed_forward(layer.module)

    def resize_attention(self, stream: str, layer: LayerView) -> None:
        if stream == "vision" and not isinstance(layer.attn.module, NarrowAttention):
            layer.module.self_attn = NarrowAttention(layer.attn.module, layer.attn.heads)
        else:
            super().resize_attention(stream, layer)

    def layer_config(self, config: Any, stream: str, layer: LayerView) -> dict[str, int]:
        if stream != "cross":
            return super().layer_config(config, stream, layer)
        # transformers has no name for it, so there is no value for the whole model either.
        return {"num_cross_attention_heads": layer.attn.heads if layer.attn else 0}


def _answering(model: Any) -> tuple[int, int]:
    """Weights of the answer decoder's layers that a token of the answer, and that one of the question, passes."""
    token = keys = 0
    for layer in model.text_decoder.bert.encoder.layer:
        own, cross = text_layer(layer), cross_layer(layer).attn
        token += linear_macs(own.attn.q, own.attn.k, own.attn.v, own.attn.out, *own.mlp.up, own.mlp.down)
        token += linear_macs(cross.q, cross.out)
        keys += linear_macs(cross.k, cross.v)
    return token, keys
