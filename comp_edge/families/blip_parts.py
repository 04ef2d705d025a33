"""Parts of BLIP: views on its BERT layers, what stands where a part was pruned away, and hooks on the answer decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from comp_edge.families.base import AttentionView, LayerNames, LayerView, MlpView, SkippedMlp
from comp_edge.selection import take

# Names lead from the layer to its parts; those of projections from there.
BERT = LayerNames(
    norm_attn="attention.output.LayerNorm",
    norm_mlp="output.LayerNorm",
    attn="attention.self",
    mlp="intermediate",
    q="query",
    k="key",
    v="value",
    out="attention.output.dense",
    up=("dense",),
    down="output.dense",
    act="intermediate_act_fn",
)


def text_layer(layer: Any) -> LayerView:
    """Self-attention and feed-forward of a BERT layer."""
    no_mlp = isinstance(layer.intermediate, SkippedMlp)
    attn, rest = _attention(layer.attention)
    return LayerView(
        module=layer,
        norm_attn=layer.attention.output.LayerNorm,
        attn=attn,
        norm_mlp=layer.output.LayerNorm,
        mlp=None
        if no_mlp
        else MlpView(
            module=layer.intermediate,
            up=(layer.intermediate.dense,),
            down=layer.output.dense,
            act=layer.intermediate.intermediate_act_fn,
        ),
        attn_rest=rest,
        mlp_rest=layer.output.dense.bias if no_mlp else None,
        post_norm=True,
    )


def cross_layer(layer: Any) -> LayerView:
    """The attention to the image between a BERT layer's self-attention and its feed-forward."""
    attn, rest = _attention(layer.crossattention)
    return LayerView(
        module=layer.crossattention,
        norm_attn=layer.crossattention.output.LayerNorm,
        attn=attn,
        norm_mlp=None,
        mlp=None,
        attn_rest=rest,
        post_norm=True,
    )


def _attention(block: Any) -> tuple[AttentionView | None, Tensor | None]:
    inner, out = block.self, block.output.dense
    if isinstance(inner, SkippedContext):
        return None, out.bias
    size = inner.attention_head_size
    view = AttentionView(
        module=inner, q=inner.query, k=inner.key, v=inner.value, out=out, head_dim=size, scale=size**-0.5
    )
    return view, None


def skip_block(block: Any) -> None:
    """Take the heads out of a BERT attention block, in place; its norm and the bias of its output stay."""
    block.self = SkippedContext(block.self.layer_idx)
    block.output.dense = SkippedMlp(block.output.dense.bias)


def skip_feed_forward(layer: Any) -> None:
    """The same for the feed-forward of a BERT layer."""
    layer.intermediate = SkippedMlp()
    layer.output.dense = SkippedMlp(layer.output.dense.bias)


class SkippedContext(nn.Module):
    """Stands where BERT's attention computed its context, of which the output (a bias now) needs nothing."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """The input, and no probabilities."""
        if past_key_values is not None and encoder_hidden_states is None:
            # transformers asks the first layer's cache how many tokens have passed.
            cache = getattr(past_key_values, "self_attention_cache", past_key_values)
            passed = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(passed, passed, self.layer_idx)
        return hidden_states, None


class NarrowAttention(nn.Module):
    """BLIP's vision attention with fewer heads: transformers' own derives a head's width from that of its input."""

    def __init__(self, attention: Any, heads: int) -> None:
        super().__init__()
        self.config = attention.config
        self.num_heads, self.head_dim, self.scale = heads, attention.head_dim, attention.scale
        self.qkv, self.projection, self.dropout = attention.qkv, attention.projection, attention.dropout
        self.train(attention.training)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """[b, n, d] -> [b, n, d] and the probabilities [b, heads, n, n]."""
        b, n, _ = hidden_states.shape
        q, k, v = self.qkv(hidden_states).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        probabilities = self.dropout((q @ k.transpose(-1, -2) * self.scale).softmax(-1))
        context = (probabilities @ v).transpose(1, 2).reshape(b, n, -1)
        return self.projection(context), probabilities


@dataclass
class LeftOfQuestion:
    """Pre-hook of the answer decoder: it attends to the question's tokens that are left, never to padding.

    transformers takes padding for words in `generate`.
    """

    schedule: Any

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        states, real = kwargs.get("encoder_hidden_states"), self.schedule.reached("language")
        if states is None or real is None or states.shape[1] != real.shape[1] or len(states) % len(real):
            return None  # not what the latest question became
        beams = len(states) // len(real)
        if (kept := self.schedule.kept("language")) is not None:
            states, real = take(states, kept.repeat_interleave(beams, 0), 1), real.gather(1, kept)
        mask = real.long().repeat_interleave(beams, 0)
        return args, kwargs | {"encoder_hidden_states": states, "encoder_attention_mask": mask}


class MaskOfCross:
    """Pre-hook of a decoder's cross-attention: transformers 5 hands its mask over as that of self-attention, unused."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if kwargs.get("encoder_attention_mask") is not None:
            return None
        return args, kwargs | {"encoder_attention_mask": kwargs.get("attention_mask")}
