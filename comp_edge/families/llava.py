"""LLaVA: a CLIP vision tower, a projector, a Llama decoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from comp_edge.families.base import (
    AttentionView,
    Family,
    FixedMacs,
    LayerView,
    MlpView,
    SkippedAttention,
    SkippedMlp,
    StreamView,
)


class Llava(Family):
    """`LlavaForConditionalGeneration` with a CLIP tower (CLS token) and a Llama language model."""

    model_type = "llava"
    modes = ("vision_params", "language_params", "vision_tokens", "language_tokens")

    def streams(self, model: Any) -> dict[str, StreamView]:
        tower, decoder = model.model.vision_tower, model.model.language_model
        vision = [_clip_layer(layer) for layer in tower.encoder.layers[: self.used_vision_layers(model)]]
        language = [_llama_layer(layer) for layer in decoder.layers]
        text = model.config.text_config
        return {
            "vision": StreamView(
                name="vision",
                root=tower,
                layers=tuple(vision),
                width=model.config.vision_config.hidden_size,
                causal=False,
                protected="first",
            ),
            "language": StreamView(
                name="language",
                root=decoder,
                layers=tuple(language),
                width=text.hidden_size,
                causal=True,
                protected="last",
            ),
        }

    def used_vision_layers(self, model: Any) -> int:
        """Layers up to the one whose output the projector takes (-1 is the last, -2 the one before)."""
        layer, total = model.config.vision_feature_layer, model.config.vision_config.num_hidden_layers
        return layer if layer >= 0 else total + 1 + layer

    def image_size(self, model: Any) -> int:
        return model.config.vision_config.image_size

    def dense_vision_tokens(self, model: Any) -> int:
        config = model.config.vision_config
        return (config.image_size // config.patch_size) ** 2 + 1

    def image_tokens(self, model: Any, vision_tokens: int) -> int:
        return vision_tokens - 1 if model.config.vision_feature_select_strategy == "default" else vision_tokens

    def fixed_macs(self, model: Any) -> FixedMacs:
        vision = model.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        projector = model.model.multi_modal_projector
        return FixedMacs(
            patch_embedding=patches * vision.num_channels * vision.patch_size**2 * vision.hidden_size,
            connector_per_token=projector.linear_1.weight.numel() + projector.linear_2.weight.numel(),
            head_per_token=model.lm_head.weight.numel(),
        )

    def fusion(self, model: Any) -> nn.Module:
        return model.model

    def connector(self, model: Any) -> nn.Module:
        return model.model.multi_modal_projector

    def mlp_projections(self, stream: str) -> int:
        return 3 if stream == "language" else 2

    def skip_attention(self, layer: LayerView) -> None:
        layer.module.self_attn = SkippedAttention(layer.attn.out.bias)

    def skip_mlp(self, layer: LayerView) -> None:
        layer.module.mlp = SkippedMlp(layer.mlp.down.bias)

    def resize_attention(self, layer: LayerView) -> None:
        view = layer.attn
        if hasattr(view.module, "num_key_value_groups"):
            view.module.num_key_value_groups = view.heads // view.kv_heads
        else:
            view.module.num_heads = view.heads
            view.module.embed_dim = view.heads * view.head_dim

    def layer_config(self, stream: str, layer: LayerView) -> dict[str, int]:
        attn, mlp = layer.attn, layer.mlp
        entry = {
            "num_attention_heads": attn.heads if attn else 0,
            "intermediate_size": mlp.channels if mlp else 0,
        }
        if stream == "language":
            entry["num_key_value_heads"] = attn.kv_heads if attn else 0
        return entry

    def stream_config(self, model: Any, stream: str) -> Any:
        return model.config.vision_config if stream == "vision" else model.config.text_config


def _clip_layer(layer: Any) -> LayerView:
    return _view(layer, norms=("layer_norm1", "layer_norm2"), out="out_proj", scale="scale", up=("fc1",), down="fc2",
                 act="activation_fn")  # fmt: skip


def _llama_layer(layer: Any) -> LayerView:
    return _view(layer, norms=("input_layernorm", "post_attention_layernorm"), out="o_proj", scale="scaling",
                 up=("gate_proj", "up_proj"), down="down_proj", act="act_fn")  # fmt: skip


def _view(
    layer: Any, *, norms: tuple[str, str], out: str, scale: str, up: tuple[str, ...], down: str, act: str
) -> LayerView:
    attn, mlp = layer.self_attn, layer.mlp
    no_attn, no_mlp = isinstance(attn, SkippedAttention), isinstance(mlp, SkippedMlp)
    return LayerView(
        module=layer,
        norm_attn=getattr(layer, norms[0]),
        attn=None
        if no_attn
        else AttentionView(
            module=attn,
            q=attn.q_proj,
            k=attn.k_proj,
            v=attn.v_proj,
            out=getattr(attn, out),
            head_dim=attn.head_dim,
            scale=getattr(attn, scale),
        ),
        norm_mlp=getattr(layer, norms[1]),
        mlp=None
        if no_mlp
        else MlpView(
            module=mlp, up=tuple(getattr(mlp, name) for name in up), down=getattr(mlp, down), act=getattr(mlp, act)
        ),
        attn_rest=attn.bias if no_attn else None,
        mlp_rest=mlp.bias if no_mlp else None,
    )
