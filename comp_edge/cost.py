"""What a plan costs: the protocol that the pruner sees, and its default, multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from comp_edge.families import family_of
from comp_edge.plan import LayerPlan, Plan, StreamPlan
from comp_edge.surgery import PLAN_ATTRIBUTE
from comp_edge.units import dense_plan

DEFAULT_PROMPT_TOKENS = 32


@runtime_checkable
class Cost(Protocol):
    """Anything that predicts what one request costs under a plan: MACs, or milliseconds on a device."""

    name: str

    def predict(self, plan: Plan) -> float:
        """The cost of one request; called thousands of times, so it must be fast."""


@dataclass(frozen=True)
class _StreamShape:
    """What the count of a stream needs, of the dense model.

    Attributes:
        group: query heads per key-value head.
        projections: matrices of a feed-forward: 2, or 3 when gated.
    """

    width: int
    head_dim: int
    group: int
    projections: int

    def linears(self, layer: LayerPlan) -> int:
        """MACs per token of a layer's projections."""
        key_value_heads = len({head // self.group for head in layer.heads})
        attention = 2 * self.head_dim * (len(layer.heads) + key_value_heads)
        return self.width * (attention + self.projections * len(layer.ffn))

    def products(self, layer: LayerPlan, queries: int, keys: int) -> int:
        """MACs of attention itself: scores, and the weighted sum of values."""
        return 2 * queries * keys * len(layer.heads) * self.head_dim


class MacsCost:
    """Multiply-accumulates of one request: one image, a prompt, the first token; then `decode_tokens` more.

    Counts every linear, convolution and attention product of what is deployed. Softmax, activations, norms and biases
    are not counted, as is usual.

    Args:
        model: the model that plans speak of; a pruned one counts like the dense model that it came from.
        decode_tokens: tokens generated after the first.
    """

    name = "macs"

    def __init__(self, model: Any, *, decode_tokens: int = 0) -> None:
        family = family_of(model)
        self.decode_tokens = decode_tokens
        self._fixed = family.fixed_macs(model)
        self._shapes: dict[str, _StreamShape] = {}
        for name in family.streams(model):
            config = family.stream_config(model, name)
            heads = config.num_attention_heads
            self._shapes[name] = _StreamShape(
                width=config.hidden_size,
                head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
                group=heads // (getattr(config, "num_key_value_heads", None) or heads),
                projections=family.mlp_projections(name),
            )
        dense = family.dense_vision_tokens(model)
        self._image_tokens = [family.image_tokens(model, n) for n in range(dense + 1)]

    def predict(self, plan: Plan) -> float:
        """MACs of one request under a plan."""
        return float(self.parts(plan)["total"])

    def parts(self, plan: Plan) -> dict[str, int]:
        """MACs by part: each stream, connector, head, one decoded token; `total` is of a request."""
        parts = {name: _prefill(shape, plan.streams[name]) for name, shape in self._shapes.items()}
        parts["vision"] += self._fixed.patch_embedding
        images = self._image_tokens[plan.streams["vision"].tokens[-1]]
        parts["connector"] = images * self._fixed.connector_per_token
        parts["head"] = self._fixed.head_per_token
        total = sum(parts.values())
        language, shape = plan.streams["language"], self._shapes["language"]
        decoded = [
            _decode(shape, language, past) + self._fixed.head_per_token for past in range(max(self.decode_tokens, 1))
        ]
        parts["decode_per_token"] = decoded[0]
        parts["total"] = total + (sum(decoded) if self.decode_tokens else 0)
        return parts


def _prefill(shape: _StreamShape, stream: StreamPlan) -> int:
    layers = zip(stream.layers, stream.tokens, strict=True)
    return sum(n * shape.linears(layer) + shape.products(layer, n, n) for layer, n in layers)


def _decode(shape: _StreamShape, stream: StreamPlan, past: int) -> int:
    layers = zip(stream.layers, stream.tokens, strict=True)
    return sum(shape.linears(layer) + shape.products(layer, 1, n + past + 1) for layer, n in layers)


def macs(model: Any, plan: Plan | None = None, *, prompt_tokens: int = DEFAULT_PROMPT_TOKENS) -> dict[str, int]:
    """Multiply-accumulates of one request (an image, a prompt, the first token), by part and in `total`.

    Args:
        plan: what to count; by default the plan that the model was pruned to, or everything for a dense model.
        prompt_tokens: length of the prompt's text for a dense model without a plan.
    """
    plan = plan or getattr(model, PLAN_ATTRIBUTE, None) or dense_plan(model, prompt_tokens=prompt_tokens, base="")
    return MacsCost(model).parts(plan)
