"""InternVL 3: InternViT, pixel shuffle into a projector, a Qwen2 decoder (or another one with Llama's layers)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from comp_edge.families.base import LLAMA, Count, LayerNames, StreamView, layer_view, linear_macs, patch_macs
from comp_edge.families.llava import Llava, language_stream

INTERN_VIT = LayerNames(
    norm_attn="layernorm_before",
    norm_mlp="layernorm_after",
    attn="attention",
    out="projection_layer",
    scales=("lambda_1", "lambda_2"),
    head_norms=("q_norm", "k_norm"),
)


class InternVL(Llava):
    """`InternVLForConditionalGeneration`.

    The pixel shuffle in front of the projector needs the whole grid of patches: image tokens are dropped behind it. Where
    the tower normalises queries and keys over all heads at once (InternViT-6B), heads go all or none.
    """

    model_type = "internvl"
    architectures = ("InternVLForConditionalGeneration",)
    hands_over = True

    def streams(self, model: Any) -> dict[str, StreamView]:
        tower = model.model.vision_tower
        used = tower.encoder.layer[: self.used_vision_layers(model)]
        return {
            "vision": StreamView(
                name="vision",
                root=tower,
                layers=tuple(layer_view(layer, INTERN_VIT) for layer in used),
                width=model.config.vision_config.hidden_size,
                causal=False,
                protected="none",
                hands_over=self.hands_over,
            ),
            "language": language_stream(model.model.language_model),
        }

    def names(self, stream: str) -> LayerNames:
        return INTERN_VIT if stream == "vision" else LLAMA

    def dense_vision_tokens(self, model: Any) -> int:
        config = model.config.vision_config
        return (config.image_size[0] // config.patch_size[0]) ** 2 + 1

    def image_tokens(self, model: Any, vision_tokens: int) -> int:
        return int(super().image_tokens(model, vision_tokens) * model.config.downsample_ratio**2)

    def fixed_macs(self, model: Any) -> dict[str, Count]:
        projector, embeddings = model.model.multi_modal_projector, model.model.vision_tower.embeddings
        head, patches = linear_macs(model.lm_head), self.dense_vision_tokens(model) - 1
        return {
            "vision": Count(per_image=patch_macs(embeddings.patch_embeddings.projection, patches)),
            "connector": Count(per_image_token=linear_macs(projector.linear_1, projector.linear_2)),
            "head": Count(constant=head),
            "decode": Count(constant=head),
        }

    def connector(self, model: Any) -> nn.Module:
        return model.model.multi_modal_projector

    def pool_scores(self, model: Any, scores: Tensor, arguments: Mapping[str, Any]) -> Sequence[Tensor]:
        scores = scores[:, scores.shape[1] - super().image_tokens(model, scores.shape[1]) :]
        side = int(scores.shape[1] ** 0.5)
        # The model's own shuffle brings the patches of an image token together.
        grid = scores.reshape(len(scores), side, side, 1)
        return model.model.pixel_shuffle(grid, scale_factor=model.config.downsample_ratio).mean(-1).flatten(1)
