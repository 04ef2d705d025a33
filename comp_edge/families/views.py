"""Views on the layers of a live transformers model, whatever its modules call their parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class RowSlice:
    """Output rows `start` to `stop` of a linear layer: one of the projections that a fused `qkv` holds."""

    linear: nn.Linear
    start: int
    stop: int

    @property
    def weight(self) -> Tensor:
        """[rows, in features], a view."""
        return self.linear.weight[self.start : self.stop]

    @property
    def bias(self) -> Tensor | None:
        """[rows], a view."""
        return None if self.linear.bias is None else self.linear.bias[self.start : self.stop]

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        """Number of rows."""
        return self.stop - self.start


Projection = nn.Linear | RowSlice


@dataclass(frozen=True)
class AttentionView:
    """One attention sub-layer. `q`, `k`, `v` map the width to heads x head_dim, `out` maps back.

    Attributes:
        fused: the layer that holds q, k and v below each other, where they are one.
        norms: norms of queries and keys over head_dim, where the model has them (None, None otherwise).
        separable: whether heads can be removed one by one; not where a norm spans all of them.
        windowed: tokens attend within windows only.
    """

    module: nn.Module
    q: Projection
    k: Projection
    v: Projection
    out: nn.Linear
    head_dim: int
    scale: float
    fused: nn.Linear | None = None
    norms: tuple[nn.Module | None, nn.Module | None] = (None, None)
    separable: bool = True
    windowed: bool = False

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
    """A residual layer of attention and feed-forward.

    Pre-norm: `x + scale * attn(norm_attn(x))`, then the same with the feed-forward; the scales are LayerScale vectors where
    the model has them. Post-norm (`post_norm`, as BERT): `norm_attn(x + attn(x))`, then `norm_mlp(x + mlp(x))`.

    `attn` or `mlp` is None where the sub-layer was pruned away (or never was); the bias of its output projection, if it had
    one, stays as `attn_rest` or `mlp_rest` and is still added to the residual stream.
    """

    module: nn.Module
    norm_attn: nn.Module
    attn: AttentionView | None
    norm_mlp: nn.Module | None
    mlp: MlpView | None
    attn_rest: Tensor | None = None
    mlp_rest: Tensor | None = None
    attn_scale: Tensor | None = None
    mlp_scale: Tensor | None = None
    post_norm: bool = False


# first: CLS. last: the last real token, which predicts the next one. final: the last position, padding or not. end: where the
# family says that the text ends. none: any token may go.
Protected = Literal["first", "last", "final", "end", "none"]


@dataclass(frozen=True)
class StreamView:
    """The layers of one stream that the model's output depends on.

    Attributes:
        root: the module whose forward runs the layers.
        width: channels of the residual stream.
        causal: a token sees only those before it.
        protected: which token is never dropped.
        drops: before which layers tokens may be dropped (none of them is 0).
        hands_over: tokens may be dropped after the last layer, behind the connector that needs all of them.
        spread: the stream's output has one position per token that came in, dropped ones reading zero.
        packed: all images of a batch lie in one row of tokens without a batch dimension.
        follows: the stream whose tokens these layers compute on (cross-attention between its layers); None for its own.
        entry: the module whose keyword arguments `end` and `score_pooling` look at; `root` by default.
        end: [b] positions of the last token that counts, from the entry's arguments; for `protected="end"`.
    """

    name: str
    root: nn.Module
    layers: tuple[LayerView, ...]
    width: int
    causal: bool
    protected: Protected
    drops: tuple[int, ...] = ()
    hands_over: bool = False
    spread: bool = False
    packed: bool = False
    follows: str | None = None
    entry: nn.Module | None = None
    end: Callable[[Mapping[str, Any]], Tensor] | None = None

    @property
    def drop_points(self) -> tuple[int, ...]:
        """Indices into the token schedule that may be lower than the one before."""
        return self.drops + ((len(self.layers),) if self.hands_over else ())


@dataclass(frozen=True)
class LayerNames:
    """What a family's layers call their parts.

    Attributes:
        qkv: the fused projection, where there is one (then `q`, `k`, `v` are not looked at).
        tuple_output: attention returns `(output, probabilities)`, not the output alone.
        scales: LayerScale vectors of the layer.
        head_norms: norms of queries and keys over head_dim.
    """

    norm_attn: str
    norm_mlp: str
    attn: str = "self_attn"
    mlp: str = "mlp"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    qkv: str | None = None
    out: str = "out_proj"
    scale: str = "scale"
    up: tuple[str, ...] = ("fc1",)
    down: str = "fc2"
    act: str = "activation_fn"
    tuple_output: bool = True
    scales: tuple[str, str] | None = None
    head_norms: tuple[str, str] | None = None


# The two forms that most models use.
VIT = LayerNames(norm_attn="layer_norm1", norm_mlp="layer_norm2")
LLAMA = LayerNames(
    norm_attn="input_layernorm",
    norm_mlp="post_attention_layernorm",
    out="o_proj",
    scale="scaling",
    up=("gate_proj", "up_proj"),
    down="down_proj",
    act="act_fn",
    head_norms=("q_norm", "k_norm"),  # Qwen3's; absent in Llama and Qwen2
)


def layer_view(layer: Any, names: LayerNames, *, windowed: bool = False) -> LayerView:
    """The view of a layer whose parts have these names."""
    attn, mlp = getattr(layer, names.attn), getattr(layer, names.mlp)
    no_attn, no_mlp = isinstance(attn, SkippedAttention), isinstance(mlp, SkippedMlp)
    scales = [getattr(layer, name) for name in names.scales or ()] or [None, None]
    rests = [part.bias if gone and part.bias is not None else None for part, gone in ((attn, no_attn), (mlp, no_mlp))]
    return LayerView(
        module=layer,
        norm_attn=getattr(layer, names.norm_attn),
        attn=None if no_attn else _attention_view(attn, names, windowed=windowed),
        norm_mlp=getattr(layer, names.norm_mlp),
        mlp=None
        if no_mlp
        else MlpView(
            module=mlp,
            up=tuple(getattr(mlp, name) for name in names.up),
            down=getattr(mlp, names.down),
            act=getattr(mlp, names.act),
        ),
        attn_rest=rests[0],
        mlp_rest=rests[1],
        attn_scale=scales[0],
        mlp_scale=scales[1],
    )


def _attention_view(attn: Any, names: LayerNames, *, windowed: bool) -> AttentionView:
    fused = None
    if names.qkv is None:
        q, k, v = (getattr(attn, name) for name in (names.q, names.k, names.v))
    else:
        fused = getattr(attn, names.qkv)
        q, k, v = thirds(fused)
    norms = tuple(getattr(attn, name, None) for name in names.head_norms or ()) or (None, None)
    real = tuple(None if isinstance(norm, nn.Identity) else norm for norm in norms)
    spans_all = any(norm is not None and norm.weight.numel() != attn.head_dim for norm in real)
    return AttentionView(
        module=attn,
        q=q,
        k=k,
        v=v,
        out=getattr(attn, names.out),
        head_dim=attn.head_dim,
        scale=getattr(attn, names.scale),
        fused=fused,
        norms=real,
        separable=not spans_all,
        windowed=windowed,
    )


def thirds(fused: nn.Linear) -> tuple[RowSlice, RowSlice, RowSlice]:
    """Queries, keys and values of a fused projection with as many of each."""
    third = fused.out_features // 3
    return tuple(RowSlice(fused, i * third, (i + 1) * third) for i in range(3))


class SkippedAttention(nn.Module):
    """Stands where an attention sub-layer was; adds what its output projection added without any head: the bias."""

    def __init__(self, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """The bias (or a zero), which broadcasts over tokens, and no attention weights."""
        return hidden_states.new_zeros(()) if self.bias is None else self.bias, None


class SkippedMlp(SkippedAttention):
    """The same where a module returns its output alone."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """The bias (or a zero), which broadcasts over tokens."""
        return super().forward(hidden_states)[0]
