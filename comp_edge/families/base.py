"""What the pruner and the exporters need to know of a model family.

A family is one thin file: it says where the layers, projections and norms are, which tokens are protected, where tokens may
be dropped and how the streams hang together. Everything else (masks, surgery, token dropping, counting, lowering) is written
once on views. `docs/families.md` shows how to add one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from comp_edge.errors import InputError
from comp_edge.families.counting import Count, Request, StreamShape, linear_macs, patch_macs
from comp_edge.families.views import (
    LLAMA,
    VIT,
    AttentionView,
    LayerNames,
    LayerView,
    MlpView,
    Projection,
    Protected,
    RowSlice,
    SkippedAttention,
    SkippedMlp,
    StreamView,
    layer_view,
    thirds,
)


class Family(ABC):
    """One model family. Stateless: every method takes the model.

    Attributes:
        model_type: transformers' name of the config.
        architectures: classes that are supported; the first is built where a config names none.
        returns_probabilities: attention modules return their probabilities themselves instead of asking transformers'
            attention interface.
        hands_over: of the vision stream, tokens are dropped behind the connector (see `StreamView`).
        variable_images: images may have any size, so that a plan's first vision count is not the model's to say.
        absolute_positions: image tokens that stay keep the positions that they have in the whole image (M-RoPE);
            otherwise they follow each other.
    """

    model_type: str
    architectures: tuple[str, ...]
    returns_probabilities: bool = False
    variable_images: bool = False
    hands_over: bool = False
    absolute_positions: bool = False

    # ---- structure

    @abstractmethod
    def streams(self, model: Any) -> dict[str, StreamView]:
        """Views on the live model, by stream name."""

    @abstractmethod
    def names(self, stream: str) -> LayerNames:
        """What the layers of a stream call their parts."""

    @abstractmethod
    def stream_config(self, model: Any, stream: str) -> Any:
        """The transformers sub-config that describes a stream."""

    def modes(self, model: Any) -> tuple[str, ...]:
        """What can be pruned: parameters of every stream, and tokens of those that have somewhere to drop them."""
        streams = self.streams(model)
        tokens = tuple(f"{name}_tokens" for name, stream in streams.items() if stream.drop_points)
        return tuple(f"{name}_params" for name in streams) + tokens

    def shape(self, model: Any, stream: str) -> StreamShape:
        """Dense widths of a stream, from its config."""
        config = self.stream_config(model, stream)
        heads = _first(config, "num_attention_heads", "num_heads")
        return StreamShape(
            width=config.hidden_size,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            ffn=config.intermediate_size,
            projections=len(self.names(stream).up) + 1,
        )

    # ---- what a request is

    @abstractmethod
    def request(self, model: Any, inputs: Mapping[str, Tensor]) -> Request:
        """The shape of a request that is given as `forward` takes it (batch 1).

        Raises:
            InputError: it does not fit the model (size of the image, number of image tokens).
        """

    @abstractmethod
    def default_request(self, model: Any, text_tokens: int) -> Request:
        """A request with one image of the model's usual size."""

    def image_tokens(self, model: Any, vision_tokens: int) -> int:
        """How many tokens the connector makes of an image whose last vision layer computes on this many."""
        return vision_tokens

    def language_tokens(self, model: Any, request: Request) -> int:
        """Tokens of the dense language stream."""
        return request.text_tokens

    # ---- counting

    @abstractmethod
    def fixed_macs(self, model: Any) -> dict[str, Count]:
        """MACs of what is never pruned, by part; a part named like a stream is added to it.

        Parts are of a whole request up to the first token, except `decode`: what one more generated token costs outside the
        language stream's layers.
        """

    def generates(self, model: Any) -> bool:
        """Whether the language stream generates tokens with a key-value cache."""
        return self.fusion(model) is not None

    # ---- how the streams hang together

    def fusion(self, model: Any) -> nn.Module | None:
        """The module that gets `input_ids` and images, and runs a language model on both; None for other kinds."""
        return None

    def connector(self, model: Any) -> nn.Module | None:
        """The module whose output (see `change_features`) are the image features that the language model gets."""
        return None

    def change_features(self, output: Any, change: Callable[[Tensor], Tensor]) -> Any:
        """Apply `change`, [rows, width] -> [rows, width], to all image features in the connector's output."""
        return change(output.flatten(0, 1)).view(len(output), -1, output.shape[-1])

    def pool_scores(self, model: Any, scores: Tensor, arguments: Mapping[str, Any]) -> Sequence[Tensor]:
        """Token importance after the connector, [image tokens] for each image.

        Args:
            scores: [images, vision tokens]; [1, tokens of all images] of a packed stream.
            arguments: keyword arguments that the vision stream's entry was called with.
        """
        return scores

    def positions(self, model: Any, arguments: Mapping[str, Any]) -> Tensor:
        """Positions [..., b, n] of a whole prompt as the fusion module got it, for `absolute_positions`."""
        raise NotImplementedError(f"{type(self).__name__} has no absolute positions")

    def later_positions(self, model: Any, passed: Tensor, count: int) -> Tensor:
        """Positions [..., b, count] of tokens that follow `passed` [b, 1] real ones, for `absolute_positions`."""
        raise NotImplementedError(f"{type(self).__name__} has no absolute positions")

    def attach_extras(self, schedule: Any) -> list[Any]:
        """Further hooks that a token schedule needs in this family; their handles."""
        return []

    # ---- surgery

    def skip_attention(self, stream: str, layer: LayerView) -> None:
        """Replace a layer's attention by a module that adds nothing, in place."""
        names = self.names(stream)
        skipped = SkippedAttention if names.tuple_output else SkippedMlp
        setattr(layer.module, names.attn, skipped(layer.attn.out.bias))

    def skip_mlp(self, stream: str, layer: LayerView) -> None:
        """Replace a layer's feed-forward by a module that adds nothing, in place."""
        setattr(layer.module, self.names(stream).mlp, SkippedMlp(layer.mlp.down.bias))

    def resize_attention(self, stream: str, layer: LayerView) -> None:
        """Bring the attributes of an attention module (head counts, groups) in line with its resized projections.

        The scale stays what it is: transformers' modules store it, so it is never derived from the pruned width.
        """
        view = layer.attn
        now = {
            "num_heads": view.heads,
            "num_attention_heads": view.heads,
            "num_key_value_heads": view.kv_heads,
            "num_key_value_groups": view.heads // view.kv_heads,
            "embed_dim": view.heads * view.head_dim,
            "all_head_size": view.heads * view.head_dim,
        }
        for name, value in now.items():
            if name in vars(view.module):
                setattr(view.module, name, value)

    # ---- config

    def layer_config(self, config: Any, stream: str, layer: LayerView) -> dict[str, int]:
        """What `per_layer_config` records of a layer, in the names of the stream's config; 0 for a skipped sub-layer."""
        attn, mlp = layer.attn, layer.mlp
        widths = {
            "num_attention_heads": attn.heads if attn else 0,
            "num_heads": attn.heads if attn else 0,
            "num_key_value_heads": attn.kv_heads if attn else 0,
            "intermediate_size": mlp.channels if mlp else 0,
        }
        return {name: value for name, value in widths.items() if hasattr(config, name)}

    # ---- derived

    def dense_tokens(self, model: Any, request: Request) -> dict[str, tuple[int, ...]]:
        """The token schedule that drops nothing."""
        found: dict[str, tuple[int, ...]] = {}
        for name, stream in self.streams(model).items():
            vision = (stream.follows or name) == "vision"
            first = request.vision_tokens if vision else self.language_tokens(model, request)
            handed = (self.image_tokens(model, first),) if stream.hands_over else ()
            found[name] = (first,) * len(stream.layers) + handed
        return found

    def delivered(self, model: Any, vision: Sequence[int]) -> int:
        """Image tokens that the language stream gets of an image, from the vision stream's token schedule."""
        return vision[-1] if self.hands_over else self.image_tokens(model, vision[-1])


class Generative(Family):
    """A family whose language model gets image features in place of placeholder tokens."""

    def image_size(self, model: Any) -> int:
        """Side of the square images that the vision stream takes, in pixels."""
        size = model.config.vision_config.image_size
        return size if isinstance(size, int) else size[0]

    @abstractmethod
    def dense_vision_tokens(self, model: Any) -> int:
        """Tokens of the dense vision stream (CLS included) for an image of the usual size."""

    def language_tokens(self, model: Any, request: Request) -> int:
        return request.images * self.image_tokens(model, request.vision_tokens) + request.text_tokens

    def default_request(self, model: Any, text_tokens: int) -> Request:
        return Request(vision_tokens=self.dense_vision_tokens(model), text_tokens=text_tokens)

    def request(self, model: Any, inputs: Mapping[str, Tensor]) -> Request:
        side, given = self.image_size(model), tuple(inputs["pixel_values"].shape[-2:])
        if given != (side, side):
            raise InputError(f"the task gives images of {given[0]}x{given[1]} pixels, the model takes {side}x{side}.")
        images = inputs["pixel_values"].shape[:-3].numel()
        return self.with_placeholders(model, inputs, Request(self.dense_vision_tokens(model), 0, images))

    def with_placeholders(self, model: Any, inputs: Mapping[str, Tensor], request: Request) -> Request:
        """Complete a request by the text of its prompt.

        Raises:
            InputError: the prompt holds another number of image tokens than the model makes of the images.
        """
        wanted = request.images * self.image_tokens(model, request.vision_tokens)
        ids = inputs["input_ids"]
        placeholders = int((ids[0] == model.config.image_token_id).sum())
        if placeholders != wanted:
            what = "an image" if request.images == 1 else f"{request.images} images"
            raise InputError(
                f"the task's prompt holds {placeholders} image tokens, the model makes {wanted} of {what}."
            )
        return Request(request.vision_tokens, ids.shape[1] - placeholders, request.images)

    def fusion(self, model: Any) -> nn.Module:
        return model.model

    @abstractmethod
    def connector(self, model: Any) -> nn.Module:
        """See `Family.connector`."""


def _first(config: Any, *names: str) -> int:
    return next(value for name in names if (value := getattr(config, name, None)) is not None)


__all__ = [
    "LLAMA",
    "VIT",
    "AttentionView",
    "Count",
    "Family",
    "Generative",
    "LayerNames",
    "LayerView",
    "MlpView",
    "Projection",
    "Protected",
    "Request",
    "RowSlice",
    "SkippedAttention",
    "SkippedMlp",
    "StreamShape",
    "StreamView",
    "layer_view",
    "linear_macs",
    "patch_macs",
    "thirds",
]
