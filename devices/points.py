"""What to measure: blocks that tell what a layer costs, spread over its sizes, and whole models that tell what blocks cannot.

Pure: from a model without weights to plans. The same model gives the same points, so that a profile can be taken up again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy.optimize import bisect
from scipy.stats import qmc

from comp_edge.cost import MacsCost
from comp_edge.families import family_of
from comp_edge.families.base import StreamView
from comp_edge.plan import LayerPlan, Plan, stream_plan
from devices.latency.program import Program
from devices.lowering import Wanted
from devices.programs import Subject
from export.encoder_methods import kind_of

BLOCK_LAYERS = 2
# Of methods that read one row: behind the last attention all but that row goes, so that layer 1 must not be the last.
BLOCK_LAYERS_OF_ONE_ROW = 3
# What share of the longest prompt the blocks of a stream have: short prompts are no long ones with tokens dropped.
BLOCK_PROMPTS = (1.0, 0.5, 0.15)
# What the whole models keep of the MACs of a request with the same prompt; the first is dense. A curve takes four, and one
# more to leave out.
WHOLE_KEEP = (1.0, 0.7, 0.45, 0.3, 0.2)
WHOLE_PROMPTS = (1.0, 0.1, 0.5, 1.0, 0.25)
LEAST = 0.15  # of a sub-layer's units, and of the tokens, in a block; of the longest prompt, in a plan that is held out
STEP = 32  # widths are multiples of it, as in plans
FEWEST = 6  # tokens that stay, as in plans
DROPS = 8  # drop points that a whole model uses in a stream, at most
SEED = 7


@dataclass(frozen=True)
class PointSpec:
    """One program to measure.

    Attributes:
        layers: see `devices.profiles.Point`.
        methods: which of the program's are timed; empty for all.
    """

    id: str
    kind: Literal["block", "whole"]
    layers: dict[str, int]
    plan: Plan
    methods: tuple[str, ...] = ()

    @property
    def wanted(self) -> Wanted:
        """What to lower."""
        return Wanted(self.plan, self.layers if self.kind == "block" else None, self.methods)


def choose_points(subject: Subject, *, seed: int = SEED) -> list[PointSpec]:
    """The points of a profile, the informative first: the dense model, blocks of each stream, the other whole models."""
    model = subject.shallow(None)
    generator = np.random.default_rng(seed)
    shares = list(zip(WHOLE_KEEP, WHOLE_PROMPTS, strict=True))[1:]
    plans = [
        subject.dense(model),
        *(balanced_plan(prompted(subject, model, share), model, keep, generator) for keep, share in shares),
    ]
    whole = [
        PointSpec(f"whole-{keep:.2f}", "whole", _layers(plan), plan)
        for keep, plan in zip(WHOLE_KEEP, plans, strict=True)
    ]
    blocks = [point for stream in ("vision", "language") for point in _blocks(subject, stream, seed=seed)]
    return [whole[0], *blocks, *whole[1:]]


def held_out_plans(subject: Subject, count: int, *, least: float = 0.2, most: float = 0.85, seed: int) -> list[Plan]:
    """Plans of the whole model at shares of the MACs between two bounds, each with another balance of what goes and prompt.

    They are what `comp-edge bench latency` judges predictions by, and no profile has measured them. More of them begin with
    those of fewer.
    """
    model, plans = subject.shallow(None), []
    for index, (keep, prompt) in enumerate(qmc.Halton(2, seed=seed).random(count).tolist()):
        asked = prompted(subject, model, LEAST + (1 - LEAST) * prompt)
        generator = np.random.default_rng([seed, index])
        plans.append(balanced_plan(asked, model, least + (most - least) * keep, generator))
    return plans


def prompted(subject: Subject, model: Any, share: float) -> Subject:
    """The same with a prompt of a share of its length, of a few tokens at least; texts that are always padded have no other."""
    if family_of(model).streams(model)["language"].protected == "final":
        return subject
    wanted = max(min(FEWEST, subject.text_tokens), round(subject.text_tokens * share))
    return replace(subject, text_tokens=family_of(model).default_request(model, wanted).text_tokens)


def balanced_plan(subject: Subject, model: Any, keep: float, generator: np.random.Generator) -> Plan:
    """A plan of the whole model at about a share of a request's MACs, in a random balance of streams, widths and tokens.

    Every sub-layer and drop point has a random rate r and keeps exp(-r x) of what it has; x is what meets the share.
    """
    dense, cost = subject.dense(model), MacsCost(model)
    rates = {name: _Rates.draw(view, generator) for name, view in family_of(model).streams(model).items()}
    total = cost.predict(dense)

    def plan_at(x: float) -> Plan:
        return thinned(model, dense, {name: rate.shares(x) for name, rate in rates.items()})

    def missing(x: float) -> float:
        return cost.predict(plan_at(x)) / total - keep

    return plan_at(bisect(missing, 0.0, 30.0, xtol=1e-3))


@dataclass(frozen=True)
class Shares:
    """What a stream keeps.

    Attributes:
        heads, ffn: of every layer, 0 to 1.
        tokens: of what the stream had before, by drop point.
    """

    heads: tuple[float, ...]
    ffn: tuple[float, ...]
    tokens: dict[int, float]


@dataclass(frozen=True)
class _Rates:
    heads: np.ndarray
    ffn: np.ndarray
    tokens: dict[int, float]

    @classmethod
    def draw(cls, view: StreamView, generator: np.random.Generator) -> _Rates:
        count, points = len(view.layers), list(view.drop_points)
        heads, ffn, tokens = generator.gamma(2.0, 0.5, size=3)
        chosen = generator.permutation(len(points))[: generator.integers(1, DROPS + 1)]
        return cls(
            heads * generator.uniform(0.4, 1.6, count),
            ffn * generator.uniform(0.4, 1.6, count),
            {points[i]: tokens / len(chosen) * generator.uniform(0.4, 1.6) for i in sorted(chosen)},
        )

    def shares(self, x: float) -> Shares:
        return Shares(
            tuple(np.exp(-self.heads * x)),
            tuple(np.exp(-self.ffn * x)),
            {point: float(np.exp(-rate * x)) for point, rate in self.tokens.items()},
        )


def _blocks(subject: Subject, name: str, *, seed: int) -> list[PointSpec]:
    """Models of few layers in which one stream's widths and tokens are spread over their range (Sobol points)."""
    model = subject.shallow({"vision": BLOCK_LAYERS, "language": BLOCK_LAYERS} | {name: _block_layers(subject, name)})
    views = family_of(model).streams(model)
    streams = [name, *(other for other, view in views.items() if view.follows == name)]
    layers = [len(views[stream].layers) for stream in streams]
    # Sobol points are balanced in powers of two; the first of them are, too.
    count = len(BLOCK_PROMPTS)
    rows = qmc.Sobol(2 * sum(layers) + 1, seed=seed).random(1 << (count - 1).bit_length())[:count]
    rows = LEAST + (1 - LEAST) * rows
    rows[0] = 1.0  # a dense layer is the end of the range that predictions start from
    points = []
    for index, (row, prompt) in enumerate(zip(rows.tolist(), BLOCK_PROMPTS, strict=True)):
        dense = prompted(subject, model, prompt).dense(model)
        last = row.pop()
        shares = {}
        for stream, length in zip(streams, layers, strict=True):
            tokens = {point: last for point in views[stream].drop_points[:1]}
            shares[stream] = Shares(tuple(row[:length]), tuple(row[length : 2 * length]), tokens)
            row = row[2 * length :]
        plan = thinned(model, dense, shares)
        points.append(PointSpec(f"{name}-{index}", "block", _layers(plan), plan, _methods_of(model, name)))
    return points


def _block_layers(subject: Subject, name: str) -> int:
    """Layers that a stream's blocks need, so that one of them computes on all of the tokens that are left behind a drop."""
    program = Program(subject.shallow(None), room=subject.new_tokens)
    runs = [run for run in program.runs if run.stream == name and not run.decodes]
    return BLOCK_LAYERS if all(run.reading == "all" for run in runs) else BLOCK_LAYERS_OF_ONE_ROW


def thinned(model: Any, dense: Plan, shares: dict[str, Shares]) -> Plan:
    """The plan that keeps given shares of the dense one: the first units of each sub-layer, widths rounded as in plans.

    Where less than half of a head or of `STEP` channels would stay, the sub-layer goes; the first attention, which ranks
    tokens, never does.
    """
    family = family_of(model)
    views = family.streams(model)
    layers = {name: stream.layers for name, stream in dense.streams.items()}
    tokens = {name: list(stream.schedule) for name, stream in dense.streams.items()}
    for name, kept in shares.items():
        group = family.shape(model, name).group
        layers[name] = tuple(
            LayerPlan(
                heads=_kept_heads(layer.heads, heads, group=group, least=index == 0),
                ffn=_kept_channels(layer.ffn, ffn),
            )
            for index, (layer, heads, ffn) in enumerate(zip(layers[name], kept.heads, kept.ffn, strict=True))
        )
        for point, share in kept.tokens.items():
            fewer = max(min(FEWEST, tokens[name][point]), round(tokens[name][point] * share))
            tokens[name] = [min(n, fewer) if i >= point else n for i, n in enumerate(tokens[name])]
    if family.fusion(model) is not None:
        gone = family.delivered(model, dense.streams["vision"].schedule) - family.delivered(model, tokens["vision"])
        first = tokens["language"][0] - gone
        tokens["language"] = [min(n, first) for n in tokens["language"]]
    for name, view in views.items():
        if view.follows:
            tokens[name] = tokens[view.follows][: len(layers[name])]
    streams = {name: stream_plan(layers[name], tokens[name]) for name in dense.streams}
    return dense.model_copy(update={"streams": streams})


def _kept_heads(heads: Sequence[int], share: float, *, group: int, least: bool) -> tuple[int, ...]:
    """The first so many heads; with grouped queries, the first so many of the first so many groups."""
    groups = len(heads) // group
    if group == 1:
        return tuple(heads[: max(round(groups * share), int(least))])
    kept, each = (max(round(count * share**0.5), int(least)) for count in (groups, group))
    return tuple(head for head in heads if head < kept * group and head % group < each)


def _kept_channels(channels: Sequence[int], share: float) -> tuple[int, ...]:
    step = STEP if len(channels) >= 4 * STEP else 1
    return tuple(channels[: round(len(channels) * share / step) * step])


def _layers(plan: Plan) -> dict[str, int]:
    return {name: len(stream.layers) for name, stream in plan.streams.items()}


def _methods_of(model: Any, stream: str) -> tuple[str, ...]:
    """The methods whose time a stream's layers are."""
    kind = "language model" if family_of(model).fusion(model) is not None else kind_of(model)
    if kind == "towers":
        return {"vision": ("image_encoder",), "language": ("text_encoder",)}[stream]
    if kind == "matcher":
        return {"vision": ("vision_encoder",), "language": ("matcher",)}[stream]
    return {"vision": ("vision_encoder",), "language": ("prefill", "decode")}[stream]
