"""Which mode removed what share of the cost, from the plans that a trace records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from comp_edge.cost import MacsCost
from comp_edge.plan import LayerPlan, StreamPlan
from comp_edge.state import State

# What a plan records of its streams (see `State.to_json`): {stream: {"layers": [...], "tokens": [...], ...}}.
Record = Mapping[str, Mapping[str, Any]]
TOKENS = ("tokens", "delivered")


def removed_by_mode(
    dense: Record, trace: Iterable[Mapping[str, Any]], *, price: Callable[[Record], float], follows: Mapping[str, str]
) -> dict[str, float]:
    """Share of the dense cost that each mode removed, over all stages; they add up to what the pruning saved.

    The cost is no sum over modes: a token less is worth less in a narrower layer. Within a stage every mode that changed
    something gets its Shapley value, the mean of what its change saves over all orders in which the changes could have been
    made. Over stages these are added, so that each stage counts at the prices of its own time.

    Args:
        dense: the record before the first stage.
        trace: the stages, with the record after each as "plan".
        price: the cost of a record as a fraction of the dense cost.
        follows: streams that compute on the tokens of another one.
    """
    total: dict[str, float] = {}
    before = dense
    for stage in trace:
        for mode, share in shapley(before, stage["plan"], price=price, follows=follows).items():
            total[mode] = total.get(mode, 0.0) + share
        before = stage["plan"]
    return total


def shapley(
    before: Record, after: Record, *, price: Callable[[Record], float], follows: Mapping[str, str]
) -> dict[str, float]:
    """What each mode that changed something contributes to the saving between two records."""
    modes = changed_modes(before, after, follows=follows)
    values = {
        chosen: price(before) - price(_part_way(before, after, set(chosen), follows=follows))
        for size in range(len(modes) + 1)
        for chosen in combinations(modes, size)
    }
    n = len(modes)
    shares = {}
    for mode in modes:
        rest = [other for other in modes if other != mode]
        shares[mode] = sum(
            math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            * (values[tuple(m for m in modes if m in chosen or m == mode)] - values[chosen])
            for size in range(n)
            for chosen in combinations(rest, size)
        )  # fmt: skip
    return shares


def changed_modes(before: Record, after: Record, *, follows: Mapping[str, str]) -> list[str]:
    """The modes that changed something between two records.

    Fewer tokens of the language stream are the doing of `vision_tokens` as far as they follow from fewer image tokens.
    """
    found = [f"{name}_params" for name in before if before[name]["layers"] != after[name]["layers"]]
    for name in before:
        if name not in follows and (any(_own(before, after, name)) or _handed_on(before, after, name)):
            found.append(f"{name}_tokens")
    return found


def _part_way(before: Record, after: Record, modes: set[str], *, follows: Mapping[str, str]) -> Record:
    """The record before, with the changes of some modes made."""
    found: dict[str, dict[str, Any]] = {}
    for name in before:
        found[name] = {"layers": (after if f"{name}_params" in modes else before)[name]["layers"]}
        if name in follows:
            continue
        own, cut = _own(before, after, name), f"{name}_tokens" in modes
        pairs = zip(before[name]["tokens"], after[name]["tokens"], own, strict=True)
        tokens = [new if cut and mine else old for old, new, mine in pairs]
        if "vision_tokens" in modes:
            tokens = [min(n, _entry(before, after, name)) for n in tokens]
        found[name]["tokens"] = tokens
        delivered = (after if cut else before)[name].get("delivered")
        if delivered is not None:
            found[name]["delivered"] = min(delivered, tokens[-1])
    for name, leader in follows.items():
        found[name] |= {key: value for key, value in found[leader].items() if key in TOKENS}
    return found


def _own(before: Record, after: Record, name: str) -> list[bool]:
    """Per layer of a stream, whether it has fewer tokens for another reason than that the vision stream hands on fewer."""
    entry = _entry(before, after, name)
    pairs = zip(before[name]["tokens"], after[name]["tokens"], strict=True)
    return [new < min(old, entry) for old, new in pairs]


def _entry(before: Record, after: Record, name: str) -> float:
    """Tokens that the language stream begins with, where the vision stream may have changed them; else no bound."""
    if name == "language" and (any(_own(before, after, "vision")) or _handed_on(before, after, "vision")):
        return after[name]["tokens"][0]
    return math.inf


def _handed_on(before: Record, after: Record, name: str) -> bool:
    return before[name].get("delivered") != after[name].get("delivered")


class Pricing:
    """MACs of records as a fraction of those of the dense model.

    Args:
        model: the dense model, or what it was pruned to.
        start: its state before the first stage.
    """

    def __init__(self, model: Any, start: State) -> None:
        self.cost, self.template = MacsCost(model), start.plan()
        self.dense = self.cost.predict(self.template)

    def __call__(self, record: Record) -> float:
        """The price of a record."""
        streams = {name: _stream(value["layers"], value) for name, value in record.items()}
        return self.cost.predict(self.template.model_copy(update={"streams": streams})) / self.dense


def _stream(layers: Sequence[Mapping[str, Sequence[int]]], value: Mapping[str, Any]) -> StreamPlan:
    # Not validated: this runs hundreds of times.
    kept = tuple(LayerPlan.model_construct(heads=tuple(layer["heads"]), ffn=tuple(layer["ffn"])) for layer in layers)
    return StreamPlan.model_construct(layers=kept, tokens=tuple(value["tokens"]), delivered=value.get("delivered"))
