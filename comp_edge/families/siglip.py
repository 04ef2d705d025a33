"""SigLIP and SigLIP 2: an image tower that a probe attends to, and a text tower that is read at its last position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from comp_edge.families.base import VIT, Count, Request, StreamView, layer_view, linear_macs, patch_macs
from comp_edge.families.paired import Paired


class Siglip(Paired):
    """`SiglipModel`, and with it SigLIP 2 at a fixed resolution. Any image token may be dropped: the pooling head attends to
    what the last layer computes on. Of the text the last position stays, which is read even where it is padding."""

    model_type = "siglip"
    architectures = ("SiglipModel",)

    def streams(self, model: Any) -> dict[str, StreamView]:
        text = model.text_model
        return {
            "vision": self.vision_stream(model, protected="none"),
            "language": StreamView(
                name="language",
                root=text.encoder,  # the text model itself reads the last position
                layers=tuple(layer_view(layer, VIT) for layer in text.encoder.layers),
                width=model.config.text_config.hidden_size,
                causal=False,
                protected="final",
                drops=tuple(range(1, len(text.encoder.layers))),
                spread=True,
            ),
        }

    def dense_vision_tokens(self, model: Any) -> int:
        return self.grid_tokens(model)

    def patch_embedding(self, model: Any) -> Count:
        """MACs before the first layer."""
        patches = model.vision_model.embeddings.patch_embedding
        return Count(per_image=patch_macs(patches, self.grid_tokens(model)))

    def fixed_macs(self, model: Any) -> dict[str, Count]:
        head, width = model.vision_model.head, model.config.vision_config.hidden_size
        # The probe is one query: its own projection, keys and values of all tokens, two products, the output. The
        # comparison itself is one more row.
        probe = width**2 + linear_macs(head.attention.out_proj, head.mlp.fc1, head.mlp.fc2) + width
        return {
            "vision": self.patch_embedding(model),
            "head": Count(
                constant=linear_macs(model.text_model.head),
                per_image=probe,
                per_vision_token=2 * width**2 + 2 * width,
            ),
        }


class Siglip2(Siglip):
    """`Siglip2Model` (NaFlex): images come as patches, as many as their shape has, padded to a common number.

    A plan is for that padded number, which the layers compute on. Of images with more patches as many go as of the plan's,
    smaller ones keep at most what the plan keeps.
    """

    model_type = "siglip2"
    architectures = ("Siglip2Model",)
    variable_images = True

    def dense_vision_tokens(self, model: Any) -> int:
        return model.config.vision_config.num_patches

    def request(self, model: Any, inputs: Mapping[str, Tensor]) -> Request:
        return Request(inputs["pixel_values"].shape[1], inputs["input_ids"].shape[1])

    def patch_embedding(self, model: Any) -> Count:
        return Count(per_patch=linear_macs(model.vision_model.embeddings.patch_embedding))

    def attach_extras(self, schedule: Any) -> list[Any]:
        head: nn.Module = schedule.model.vision_model.head
        return [head.register_forward_pre_hook(_Survivors(schedule))]


@dataclass
class _Survivors:
    """Pre-hook of the pooling head: its mask is of the tokens that are left."""

    schedule: Any

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        kept = self.schedule.kept("vision")
        if kept is None or len(args) < 2 or args[1] is None:
            return None
        return args[0], self.schedule.reached("vision").gather(1, kept).to(args[1].dtype)
