"""Plans for the tiny model of the tests, with everything a plan can say."""

from __future__ import annotations

from typing import Any

from comp_edge.plan import LayerPlan, Plan, StreamPlan


def layer(heads: Any, ffn: Any) -> LayerPlan:
    """A layer that keeps these heads and channels."""
    return LayerPlan(heads=tuple(heads), ffn=tuple(ffn))


def tiny_plan(
    *, prompt: int, vision_tokens: tuple[int, ...] = (17, 12, 9), language_drops: tuple[int, ...] = (12, 7)
) -> Plan:
    """Heads and channels gone, one feed-forward and (in the language stream) one attention pruned away, tokens dropped.

    For three vision layers (4 heads, 64 channels, 16 patches) and three language layers (4 heads in 2 groups).
    """
    delivered = vision_tokens[-1] - 1
    return Plan(
        model_type="llava",
        base="tiny",
        streams={
            "vision": StreamPlan(
                layers=(layer(range(4), range(64)), layer((0, 2, 3), range(0, 64, 2)), layer((1,), ())),
                tokens=vision_tokens,
            ),
            "language": StreamPlan(
                layers=(layer((0, 2), range(32)), layer((), range(0, 64, 3)), layer((2, 3), range(5, 64))),
                tokens=(delivered + prompt, *language_drops),
            ),
        },
    )
