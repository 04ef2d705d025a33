"""What families share that read an image and a text in towers of their own: no placeholders, nothing that joins the two."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from comp_edge.errors import InputError
from comp_edge.families.base import VIT, Family, LayerNames, Protected, Request, StreamView, layer_view


class Paired(Family):
    """A family whose `forward` takes an image and a text.

    Attributes:
        shortest_text: tokens that every text has, those that mark its ends.
    """

    shortest_text: int = 2

    @abstractmethod
    def dense_vision_tokens(self, model: Any) -> int:
        """Tokens of the dense vision stream (CLS included) for an image of the usual size."""

    def names(self, stream: str) -> LayerNames:
        return VIT

    def stream_config(self, model: Any, stream: str) -> Any:
        return model.config.vision_config if stream == "vision" else model.config.text_config

    def grid_tokens(self, model: Any) -> int:
        """Patches of a square image."""
        config = model.config.vision_config
        return (config.image_size // config.patch_size) ** 2

    def default_request(self, model: Any, text_tokens: int) -> Request:
        most = model.config.text_config.max_position_embeddings
        return Request(self.dense_vision_tokens(model), min(max(text_tokens, self.shortest_text), most))

    def request(self, model: Any, inputs: Mapping[str, Tensor]) -> Request:
        side, given = model.config.vision_config.image_size, tuple(inputs["pixel_values"].shape[-2:])
        if given != (side, side):
            raise InputError(f"the task gives images of {given[0]}x{given[1]} pixels, the model takes {side}x{side}.")
        return Request(self.dense_vision_tokens(model), inputs["input_ids"].shape[1])

    def vision_stream(self, model: Any, *, protected: Protected) -> StreamView:
        """The view of a tower that drops tokens before every layer but the first."""
        layers = model.vision_model.encoder.layers
        return StreamView(
            name="vision",
            root=model.vision_model,
            layers=tuple(layer_view(layer, self.names("vision")) for layer in layers),
            width=model.config.vision_config.hidden_size,
            causal=False,
            protected=protected,
            drops=tuple(range(1, len(layers))),
        )
