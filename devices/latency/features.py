"""What a layer of an exported program computes, as a few sums that mean something; pure arithmetic on shapes."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from comp_edge.families.base import StreamShape

# What each feature counts; MACs, elements and weights in millions. Activations and softmax are in proportion to the MACs that
# they stand beside, in all layers of a stream: nothing can tell them apart.
FEATURES = {
    "calls": "call",
    "ffn": "million multiply-accumulates of feed-forwards, activations included",
    "projections": "million multiply-accumulates of attention's projections",
    "products": "million multiply-accumulates of scores and weighted values, softmax included",
    "fixed": "million multiply-accumulates of what is never pruned",
    "cache": "million elements of key-value caches that are written",
    "sublayers": "sub-layer",
    "norms": "million elements that norms and residuals touch",
    "drops": "drop of tokens",
    "dropping": "million elements that a drop ranks or gathers",
    "weights": "million weights of layers",
}
MACS = ("ffn", "projections", "products", "fixed")
COUNTS = ("calls", "sublayers", "drops")
MEGA = 1e-6

Vector = tuple[float, ...]
# Tokens that are read behind the layers: all, one from the last attention on, or one (of a tower) unless drops count all.
Reading = Literal["all", "one", "class"]


def vector(**values: float) -> Vector:
    """Values by feature, in their order; counts as they are, everything else in millions."""
    return tuple(values.get(name, 0.0) * (1.0 if name in COUNTS else MEGA) for name in FEATURES)


ZERO = vector()


@lru_cache(maxsize=2**14)
def rows(
    tokens: tuple[int, ...], attending: tuple[bool, ...], reading: Reading, step: int = 1
) -> tuple[tuple[int, int, int], ...]:
    """Of each layer: the tokens that come in, those that leave its attention, and those before a drop (0: no drop).

    Args:
        attending: which layers have attention.
        step: counts of several tokens are rounded up to multiples of it.
    """
    up = [n if n == 1 else -(-n // step) * step for n in tokens]
    falls = [0] + [up[i - 1] if tokens[i] < tokens[i - 1] else 0 for i in range(1, len(tokens))]
    last = max((i for i, has in enumerate(attending) if has), default=-1)
    if reading == "class" and (last < 0 or tokens[-1] < tokens[last]):
        last = len(tokens) - 1  # the drops behind the last attention count on all tokens
    if reading == "all":
        last = len(tokens)
    return tuple(
        (n, n, fall) if i < last else (n, 1, fall) if i == last else (1, 1, 0)
        for i, (n, fall) in enumerate(zip(up, falls, strict=True))
    )


def window(shape: StreamShape, layer: int, tokens: int) -> int:
    """Tokens that each of `tokens` attends to in a layer."""
    size = shape.windows[layer] if shape.windows else 0
    return min(size, tokens) if size else tokens


def attention(
    shape: StreamShape, heads: int, groups: int, *, n: int, read: int, keys: int, told: int, written: int
) -> Vector:
    """Features of one attention.

    Args:
        n, read: tokens that are normalized, and those that ask.
        keys, told: tokens that are attended to, and those of which keys and values are projected.
        written: entries of the caches that are written.
    """
    wide, narrow = heads * shape.head_dim, groups * shape.head_dim
    query, key = 2 * shape.width * wide, 2 * shape.source * narrow
    return vector(
        projections=read * query + told * key,
        products=2 * read * keys * wide,
        cache=2 * written * narrow,
        sublayers=1,
        norms=n * shape.width,
        weights=query + (key if told else 0),
    )


def feed_forward(shape: StreamShape, channels: int, n: int) -> Vector:
    """Features of one feed-forward on n tokens."""
    weights = shape.width * channels * shape.projections
    return vector(ffn=n * weights, sublayers=1, norms=n * shape.width, weights=weights)
