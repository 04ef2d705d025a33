"""Qwen2.5-VL: a tower with windowed attention and images of any size, a merger, a Qwen2 decoder with M-RoPE."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from comp_edge.errors import InputError
from comp_edge.families.base import (
    LLAMA,
    Count,
    Generative,
    LayerNames,
    Request,
    StreamShape,
    StreamView,
    layer_view,
    linear_macs,
    patch_macs,
)
from comp_edge.families.llava import language_stream

QWEN_VIT = LayerNames(
    norm_attn="norm1",
    norm_mlp="norm2",
    attn="attn",
    qkv="qkv",
    out="proj",
    scale="scaling",
    up=("gate_proj", "up_proj"),
    down="down_proj",
    act="act_fn",
    tuple_output=False,
)
DEFAULT_SIDE = 448  # pixels: where nobody says how large images are


class Qwen2_5VL(Generative):
    """`Qwen2_5_VLForConditionalGeneration`.

    Nothing is dropped inside the tower: most of its layers attend within windows, and the merger needs groups of patches.
    Image tokens are dropped behind the merger, and those that stay keep their 2-D positions. A plan is for images of one
    size; of larger ones as many tokens go as of the plan's, smaller ones keep at most what the plan keeps.
    """

    model_type = "qwen2_5_vl"
    architectures = ("Qwen2_5_VLForConditionalGeneration",)
    variable_images = True
    absolute_positions = True
    hands_over = True

    def streams(self, model: Any) -> dict[str, StreamView]:
        tower = model.model.visual
        layers = [
            layer_view(block, QWEN_VIT, windowed=index not in tower.fullatt_block_indexes)
            for index, block in enumerate(tower.blocks)
        ]
        return {
            "vision": StreamView(
                name="vision",
                root=tower,
                layers=tuple(layers),
                width=model.config.vision_config.hidden_size,
                causal=False,
                protected="none",
                hands_over=self.hands_over,
                packed=True,
            ),
            "language": language_stream(model.model.language_model),
        }

    def names(self, stream: str) -> LayerNames:
        return QWEN_VIT if stream == "vision" else LLAMA

    def shape(self, model: Any, stream: str) -> StreamShape:
        shape, config = super().shape(model, stream), model.config.vision_config
        if stream != "vision":
            return shape
        window = (config.window_size // config.patch_size) ** 2
        full = config.fullatt_block_indexes
        return dataclasses.replace(shape, windows=tuple(0 if i in full else window for i in range(config.depth)))

    def image_size(self, model: Any) -> int:
        config = model.config.vision_config
        step = config.patch_size * config.spatial_merge_size
        return DEFAULT_SIDE // step * step

    def dense_vision_tokens(self, model: Any) -> int:
        return (self.image_size(model) // model.config.vision_config.patch_size) ** 2

    def image_tokens(self, model: Any, vision_tokens: int) -> int:
        return vision_tokens // model.config.vision_config.spatial_merge_size**2

    def request(self, model: Any, inputs: Mapping[str, Tensor]) -> Request:
        grids = inputs["image_grid_thw"]
        if len(grids.unique(dim=0)) != 1:
            raise InputError(f"the task's request shows images of different sizes {grids.tolist()}; a plan is for one.")
        return self.with_placeholders(model, inputs, Request(int(grids[0].prod()), 0, len(grids)))

    def fixed_macs(self, model: Any) -> dict[str, Count]:
        tower, head = model.model.visual, linear_macs(model.lm_head)
        return {
            "vision": Count(per_vision_token=patch_macs(tower.patch_embed.proj, 1)),
            "connector": Count(per_image_token=linear_macs(tower.merger.mlp[0], tower.merger.mlp[2])),
            "head": Count(constant=head),
            "decode": Count(constant=head),
        }

    def connector(self, model: Any) -> nn.Module:
        # The tower itself: it brings the merger's rows back from the order of windows.
        return model.model.visual

    def change_features(self, output: Any, change: Callable[[Tensor], Tensor]) -> Any:
        output.pooler_output = change(output.pooler_output)
        return output

    def pool_scores(self, model: Any, scores: Tensor, arguments: Mapping[str, Any]) -> Sequence[Tensor]:
        tower, grids = model.model.visual, arguments["grid_thw"]
        order, _ = get_vision_window_index(
            grids,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        unit = tower.spatial_merge_unit
        merged = scores.view(-1, unit).mean(-1)[order.argsort()]
        return merged.split((grids.prod(-1) // unit).tolist())

    def positions(self, model: Any, arguments: Mapping[str, Any]) -> Tensor:
        given, ids = arguments.get("position_ids"), arguments["input_ids"]
        if given is None:
            names = ("input_ids", "image_grid_thw", "video_grid_thw", "attention_mask", "mm_token_type_ids")
            wanted = {name: arguments.get(name) for name in names}
            given = model.model.compute_3d_position_ids(**wanted, inputs_embeds=None, past_key_values=None)
        if given is None:  # without mm_token_type_ids transformers counts text and image alike
            given = ids.new_ones(ids.shape).cumsum(1) - 1
        if given.ndim == 2:
            given = given[None].expand(3, -1, -1)
        return given[-3:]  # `generate` puts plain positions in front

    def later_positions(self, model: Any, passed: Tensor, count: int) -> Tensor:
        steps = passed + passed.new_ones(1, count).cumsum(1) - 1
        return (steps + model.model.rope_deltas.to(steps)).expand(3, -1, -1)

    def stream_config(self, model: Any, stream: str) -> Any:
        return model.config.vision_config if stream == "vision" else model.config.text_config
