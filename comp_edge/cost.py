"""What a plan costs: the protocol that the pruner sees, and its default, multiply-accumulates."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

from comp_edge.families import family_of
from comp_edge.families.base import Count, StreamShape
from comp_edge.plan import LayerPlan, Plan, plan_of
from comp_edge.units import dense_plan

DEFAULT_PROMPT_TOKENS = 32
NORM_COST = 5  # fvcore counts a layer norm as five operations an element


@runtime_checkable
class Cost(Protocol):
    """Anything that predicts what one request costs under a plan: MACs, or milliseconds on a device."""

    name: str

    def predict(self, plan: Plan) -> float:
        """The cost of one request; called thousands of times, so it must be fast."""


class MacsCost:
    """Multiply-accumulates of one request: its images, a prompt, the first token; then `decode_tokens` more.

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
        self.generates = family.generates(model)
        self._fixed = family.fixed_macs(model)
        self._decode_fixed = self._fixed.pop("decode", Count())
        self._shapes = {name: family.shape(model, name) for name in family.streams(model)}
        self._connected = lru_cache(maxsize=None)(lambda tokens: family.image_tokens(model, tokens))

    def predict(self, plan: Plan) -> float:
        """MACs of one request under a plan."""
        return float(self.parts(plan)["total"])

    def parts(self, plan: Plan) -> dict[str, int]:
        """MACs by part: each stream, connector, head; `total` is of a request.

        Besides, not to be added: `prefill`, everything behind the connector up to the first token, and
        `decode_per_token`, the token after it.
        """
        parts = {name: self._stream(name, plan) for name in self._shapes}
        for name, count in self._fixed.items():
            parts[name] = parts.get(name, 0) + self._count(count, plan)
        total = sum(parts.values())
        parts["prefill"] = total - parts["vision"] - parts.get("connector", 0)
        decoded = [self._decode(plan, past) for past in range(max(self.decode_tokens, 1))]
        parts["decode_per_token"] = decoded[0]
        parts["total"] = total + (sum(decoded) if self.decode_tokens else 0)
        return parts

    def fvcore(self, plan: Plan, stream: str = "vision") -> int:
        """Operations of one image or prompt in a stream as fvcore counts them, the convention of the papers.

        One MAC is one operation, and a norm is five an element.
        """
        shape, planned = self._shapes[stream], plan.streams[stream]
        images = plan.images if stream == "vision" else 1
        norms = sum(shape.layer_norms * n for n in planned.tokens) + shape.outer_norms * planned.tokens[-1]
        whole = self._stream(stream, plan) + self._count(self._fixed.get(stream, Count()), plan)
        return whole // images + NORM_COST * norms * shape.width

    def _stream(self, name: str, plan: Plan) -> int:
        shape, stream = self._shapes[name], plan.streams[name]
        keys = None if shape.keys_from is None else plan.images * plan.streams[shape.keys_from].tokens[-1]
        images = plan.images if name == "vision" else 1
        return images * sum(
            _layer(shape, layer, n, _window(shape, i, n) if keys is None else keys)
            for i, (layer, n) in enumerate(zip(stream.layers, stream.tokens, strict=True))
        )

    def _count(self, count: Count, plan: Plan) -> int:
        patches, vision = plan.streams["vision"].tokens[0], plan.streams["vision"].tokens[-1]
        language = plan.streams["language"].tokens[-1]
        an_image = count.per_image + patches * count.per_patch + vision * count.per_vision_token
        an_image += self._connected(vision) * count.per_image_token
        return count.constant + plan.images * an_image + language * count.per_language_token

    def _decode(self, plan: Plan, past: int) -> int:
        """The token after `past` generated ones: every language layer computes on one, and attends to all that it kept."""
        total = self._count(self._decode_fixed, plan)
        if not self.generates:
            return total
        for name, shape in self._shapes.items():
            stream = plan.streams[name]
            if name == "language":
                for layer, n in zip(stream.layers, stream.tokens, strict=True):
                    total += _linears(shape, layer) + _products(shape, layer, 1, n + past + 1)
            elif shape.keys_from is not None:
                keys = plan.images * plan.streams[shape.keys_from].tokens[-1]
                for layer in stream.layers:
                    total += _queries(shape, layer) + _products(shape, layer, 1, keys)
        return total


def _window(shape: StreamShape, layer: int, tokens: int) -> int:
    size = shape.windows[layer] if shape.windows else 0
    return min(size, tokens) if size else tokens


def _queries(shape: StreamShape, layer: LayerPlan) -> int:
    """MACs per token of queries and output."""
    return 2 * shape.width * shape.head_dim * len(layer.heads)


def _keys(shape: StreamShape, layer: LayerPlan) -> int:
    """MACs per token of keys and values."""
    return 2 * shape.source * shape.head_dim * len({head // shape.group for head in layer.heads})


def _linears(shape: StreamShape, layer: LayerPlan) -> int:
    """MACs per token of a layer's projections, where a token is query and key."""
    return _queries(shape, layer) + _keys(shape, layer) + shape.width * shape.projections * len(layer.ffn)


def _products(shape: StreamShape, layer: LayerPlan, queries: int, keys: int) -> int:
    """MACs of attention itself: scores, and the weighted sum of values."""
    return 2 * queries * keys * len(layer.heads) * shape.head_dim


def _layer(shape: StreamShape, layer: LayerPlan, tokens: int, keys: int) -> int:
    products = _products(shape, layer, tokens, keys)
    if shape.keys_from is None:
        return tokens * _linears(shape, layer) + products
    return tokens * _queries(shape, layer) + keys * _keys(shape, layer) + products


def macs(model: Any, plan: Plan | None = None, *, prompt_tokens: int = DEFAULT_PROMPT_TOKENS) -> dict[str, int]:
    """Multiply-accumulates of one request (its images, a prompt, the first token), by part and in `total`.

    Args:
        plan: what to count; by default the plan that the model was pruned to, or everything for a dense model.
        prompt_tokens: length of the prompt's text for a dense model without a plan.
    """
    plan = plan or plan_of(model) or dense_plan(model, prompt_tokens=prompt_tokens, base="")
    return MacsCost(model).parts(plan)
