"""What the pruner and the exporters need to know of a model family: views on a live transformers model.

A family is one thin file: it says where the layers, projections and norms are, which tokens are protected and how the
streams hang together. Everything else (masks, surgery, token dropping, counting, lowering) is written once on views.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionView:
    """One attention sub-layer. `q`, `k`, `v` map the width to heads x head_dim, `out` maps back."""

    module: nn.Module
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    out: nn.Linear
    head_dim: int
    scale: float

    @property
    def heads(self) -> int:
        """Query heads, as they are now."""
        return self.q.out_features // self.head_dim

    @property
    def kv_heads(self) -> int:
        """Key-value heads, as they are now."""
        return self.k.out_features // self.head_dim


@dataclass(frozen=True)
class MlpView:
    """One feed-forward sub-layer: `down(act(up[0](x)))`, or gated `down(act(up[0](x)) * up[1](x))`."""

    module: nn.Module
    up: tuple[nn.Linear, ...]
    down: nn.Linear
    act: Callable[[Tensor], Tensor]

    @property
    def channels(self) -> int:
        """Width of the hidden layer, as it is now."""
        return self.down.in_features


@dataclass(frozen=True)
class LayerView:
    """A pre-norm residual layer: `x + attn(norm_attn(x))`, then `x + mlp(norm_mlp(x))`.

    `attn` or `mlp` is None where the sub-layer was pruned away; the bias of its output projection, if it had one, stays
    as `attn_rest` or `mlp_rest` and is still added to the residual stream.
    """

    module: nn.Module
    norm_attn: nn.Module
    attn: AttentionView | None
    norm_mlp: nn.Module
    mlp: MlpView | None
    attn_rest: Tensor | None = None
    mlp_rest: Tensor | None = None


@dataclass(frozen=True)
class StreamView:
    """The layers of one stream that the model's output depends on.

    Attributes:
        root: the module whose forward runs the layers.
        width: channels of the residual stream.
        causal: a token sees only those before it (and the stream has a key-value cache).
        protected: which token is never dropped: the first (CLS) or the last (it predicts the next token).
    """

    name: str
    root: nn.Module
    layers: tuple[LayerView, ...]
    width: int
    causal: bool
    protected: Literal["first", "last"]


@dataclass(frozen=True)
class FixedMacs:
    """MACs outside the prunable layers, per request, as (where, count)."""

    patch_embedding: int
    connector_per_token: int
    head_per_token: int


class Family(ABC):
    """One model family. Stateless: every method takes the model (or its config)."""

    model_type: str
    modes: tuple[str, ...]

    @abstractmethod
    def streams(self, model: Any) -> dict[str, StreamView]:
        """Views on the live model, by stream name."""

    @abstractmethod
    def image_tokens(self, model: Any, vision_tokens: int) -> int:
        """How many tokens the language model gets for an image whose last vision layer computes on this many."""

    @abstractmethod
    def dense_vision_tokens(self, model: Any) -> int:
        """Tokens of the dense vision stream (CLS included)."""

    @abstractmethod
    def image_size(self, model: Any) -> int:
        """Side of the square images that the vision stream takes, in pixels."""

    @abstractmethod
    def fixed_macs(self, model: Any) -> FixedMacs:
        """MACs of what is never pruned."""

    @abstractmethod
    def mlp_projections(self, stream: str) -> int:
        """Matrices of a feed-forward in this stream: 2, or 3 when it is gated."""

    @abstractmethod
    def skip_attention(self, layer: LayerView) -> None:
        """Replace a layer's attention by a module that adds nothing, in place."""

    @abstractmethod
    def skip_mlp(self, layer: LayerView) -> None:
        """Replace a layer's feed-forward by a module that adds nothing, in place."""

    @abstractmethod
    def resize_attention(self, layer: LayerView) -> None:
        """Bring a layer's attributes (head counts, groups) in line with its resized projections."""

    @abstractmethod
    def layer_config(self, stream: str, layer: LayerView) -> dict[str, int]:
        """What `per_layer_config` records of a layer, in the names of the family's config; 0 for a skipped sub-layer."""

    @abstractmethod
    def stream_config(self, model: Any, stream: str) -> Any:
        """The transformers sub-config that describes a stream."""

    @abstractmethod
    def fusion(self, model: Any) -> nn.Module:
        """The module that joins the streams: it gets `input_ids` and images, and runs the language model."""

    @abstractmethod
    def connector(self, model: Any) -> nn.Module:
        """The module that turns vision tokens into image features [images, tokens, language width]."""

    def dense_tokens(self, model: Any, prompt_tokens: int) -> dict[str, tuple[int, ...]]:
        """The token schedule that drops nothing, for a prompt of `prompt_tokens` text tokens and one image."""
        n = self.dense_vision_tokens(model)
        first = {"vision": n, "language": self.image_tokens(model, n) + prompt_tokens}
        return {name: (first[name],) * len(view.layers) for name, view in self.streams(model).items()}

    def prompt_tokens(self, model: Any, tokens: dict[str, Iterable[int]]) -> int:
        """Text tokens of the reference prompt, from the token schedules of a plan."""
        return next(iter(tokens["language"])) - self.image_tokens(model, list(tokens["vision"])[-1])


class SkippedAttention(nn.Module):
    """Stands where an attention sub-layer was; adds what its output projection added without any head: the bias."""

    def __init__(self, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """The bias (or a zero), which broadcasts over tokens, and no attention weights."""
        return hidden_states.new_zeros(()) if self.bias is None else self.bias, None


class SkippedMlp(SkippedAttention):
    """The same for a feed-forward sub-layer."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The bias (or a zero), which broadcasts over tokens."""
        return super().forward(hidden_states)[0]
