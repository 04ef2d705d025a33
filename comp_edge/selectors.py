"""How a stage's proposal is chosen: in fixed turns, by the paper's MPS, or by the look-ahead probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from comp_edge.calibrate import Collector, collect, gradient_scores
from comp_edge.masks import UnitMasks
from comp_edge.proposals import Proposal, Proposer
from comp_edge.schedule import Schedule
from comp_edge.settings import PruneConfig
from comp_edge.state import State
from comp_edge.strategy import BASELINES, MPS, prices_of, turn
from comp_edge.tasks.packing import examples, take_rows
from comp_edge.units import KINDS, Site

PARTS = 4  # gradients are summed per part of a batch: finer parts tell apart what a mean would cancel
MOST_POINTS = 8  # of a stream's drop points that the probe tries: each costs a forward pass


@dataclass(frozen=True)
class Setting:
    """What choosing may look at; nothing here comes from the test split.

    Attributes:
        loss: the task's own loss of the model on a batch, without gradients being kept.
        calibration, probe: training batches for importance, and others for looking ahead.
    """

    model: Any
    task: Any
    masks: UnitMasks
    schedule: Schedule
    proposer: Proposer
    modes: Sequence[str]
    config: PruneConfig
    seed: int
    calibration: Sequence[dict[str, Tensor]]
    probe: Sequence[dict[str, Tensor]]
    loss: Callable[[Any, dict[str, Tensor]], float]


class Selector(Protocol):
    """Chooses a proposal for each stage, and learns what it did."""

    def select(
        self, setting: Setting, state: State, *, goal: float, stage: int
    ) -> tuple[Proposal | None, dict[str, Any]]:
        """The proposal of a stage (None: nothing can be saved any more), and what the trace records of the choice."""

    def booked(self, mode: str, *, stage: int, score_change: float, cost_change: float) -> None:
        """A stage is over: validation score and cost (fraction of dense) changed by this much."""

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint records."""

    def restore(self, value: Mapping[str, Any]) -> None:
        """Take over what `to_json` gave."""


class _Memoryless:
    """Of selectors to which it does not matter what a stage did."""

    def booked(self, mode: str, *, stage: int, score_change: float, cost_change: float) -> None:
        """Nothing: turns are fixed, or the next stage looks for itself."""

    def to_json(self) -> dict[str, Any]:
        """Nothing is remembered."""
        return {}

    def restore(self, value: Mapping[str, Any]) -> None:
        """Nothing is remembered."""


@dataclass
class FixedSelector(_Memoryless):
    """The baselines `params`, `tokens` and `joint`: parameters and tokens in turn, each of all streams at once.

    Parameters of all streams share one ranking, and tokens of all streams one threshold, as methods for a single mode have
    it; turns of five modes would wipe out the small streams first.
    """

    def select(
        self, setting: Setting, state: State, *, goal: float, stage: int
    ) -> tuple[Proposal | None, dict[str, Any]]:
        """What the turn says, or the other kind when that cannot save any more."""
        kinds = [kind for kind in ("params", "tokens") if any(mode.endswith(kind) for mode in setting.modes)]
        importance = Importances(setting)
        for kind in turn(kinds, stage):
            streams = [mode.rsplit("_", 1)[0] for mode in setting.modes if mode.endswith(kind)]
            proposal = propose(setting, state, kind, streams, importance, goal)
            if proposal is not None:
                return proposal, {"why": "in turn"}
        return None, {}


@dataclass
class CompSelector:
    """CoMP as published: structured Wanda with CIM ranks, MPS chooses the mode."""

    mps: MPS

    def select(
        self, setting: Setting, state: State, *, goal: float, stage: int
    ) -> tuple[Proposal | None, dict[str, Any]]:
        """The mode that MPS chooses among those that can still save."""
        importance = Importances(setting)
        proposals = {}
        for mode in setting.modes:
            stream, kind = mode.rsplit("_", 1)
            if (proposal := propose(setting, state, kind, [stream], importance, goal)) is not None:
                proposals[mode] = proposal
        if not proposals:
            return None, {}
        rng = np.random.default_rng([setting.seed, stage])
        mode, why = self.mps.choose(list(proposals), stage=stage, rng=rng)
        return proposals[mode], {"why": why, "costs": dict(self.mps.costs)}

    def booked(self, mode: str, *, stage: int, score_change: float, cost_change: float) -> None:
        """Update the mode's history-weighted cost."""
        self.mps.update(mode, stage=stage, score_change=score_change, cost_change=cost_change)

    def to_json(self) -> dict[str, Any]:
        """MPS's memory."""
        return self.mps.to_json()

    def restore(self, value: Mapping[str, Any]) -> None:
        """MPS's memory."""
        self.mps.restore(value)


@dataclass
class ProbeSelector(_Memoryless):
    """Ours: try every action for a moment on the current weights; the least loss per unit of cost saved wins.

    Actions are finer than modes: heads and channels apart, and token counts from each layer on. Units are ranked by
    first-order Taylor importance per unit of cost. Actions are taken in the order of their price until the stage's goal is
    met; once something substantial is taken, only nearly free ones follow. (Filling stages at any price was tried: one
    dear action at the end of the way cost more than fine-tuning could recover. Ending a stage with a tiny saving was
    tried too: it costs a stage's training and gains nothing.)
    """

    enough: float = 0.8  # a stage is full when it saves this share of its goal
    substantial: float = 0.3  # a stage that saves less than this share goes on, whatever the price
    nearly_free: float = 1.0  # price: rise of the loss, were the whole dense cost saved at this rate

    def select(
        self, setting: Setting, state: State, *, goal: float, stage: int
    ) -> tuple[Proposal | None, dict[str, Any]]:
        """The cheapest actions by looking ahead, until the goal is met."""
        scores = Importances(setting).units
        actions = _actions(setting, state)
        options = {action: _propose(setting, state, action, scores, goal) for action in actions}
        usable = {action: proposal for action, proposal in options.items() if proposal is not None}
        if not usable:
            return None, {}
        base = self._loss(setting, state, state)
        losses = {action: self._loss(setting, state, proposal.state) for action, proposal in usable.items()}
        apply_state(setting.masks, setting.schedule, state, state, fade=0.0, cit=setting.config.cit)
        prices = prices_of(losses, {action: p.saving for action, p in usable.items()}, base=base)
        ranked = sorted(prices, key=lambda action: prices[action])
        taken: list[Proposal] = []
        saved = 0.0
        for action in ranked:
            if saved >= self.enough * goal or saved >= self.substantial * goal and prices[action] > self.nearly_free:
                break
            more = _propose(setting, taken[-1].state if taken else state, action, scores, goal - saved)
            if more is not None:
                taken.append(more)
                saved += more.saving
        # The trace books a stage to the action that saved most of it.
        main = max(taken, key=lambda proposal: proposal.saving)
        also = [proposal.name for proposal in taken if proposal is not main]
        chosen = replace(main, state=taken[-1].state, saving=saved)
        return chosen, {"why": "cheapest", "also": also, "costs": {usable[a].name: prices[a] for a in prices}}

    @torch.no_grad()
    def _loss(self, setting: Setting, old: State, new: State) -> float:
        apply_state(setting.masks, setting.schedule, old, new, fade=0.0, cit=setting.config.cit)
        return sum(setting.loss(setting.model, batch) for batch in setting.probe) / len(setting.probe)


class Importances:
    """What units and tokens matter by the calibration batches, as the config says; computed when asked for."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @cached_property
    def listened(self) -> Collector:
        """Statistics of forward passes: Wanda's, and token importance."""
        config, s = self.setting.config, self.setting
        return collect(s.model, s.masks, s.schedule, s.calibration, cip=config.cip, norm=config.token_norm)

    @cached_property
    def units(self) -> dict[Site, Tensor]:
        """[units] per site."""
        s = self.setting
        if s.config.importance == "wanda":
            return self.listened.wanda()
        # Contrastive losses say nothing of a single example.
        parts = cut(s.calibration, PARTS, least=getattr(s.task, "least_examples", 1))
        return gradient_scores(s.model, s.task, s.masks, parts, power=1 if s.config.importance == "taylor" else 2)


def propose(
    setting: Setting, state: State, kind: str, streams: Sequence[str], importance: Importances, goal: float
) -> Proposal | None:
    """What a stage of parameters or tokens of these streams would do."""
    if kind == "tokens":
        return setting.proposer.tokens_by_threshold(state, importance.listened.tokens, streams=streams, goal=goal)
    per_cost = comparable(setting)
    return setting.proposer.parameters(state, importance.units, streams=streams, goal=goal, per_cost=per_cost)


def comparable(setting: Setting) -> bool:
    """Whether scores of different layers share a scale: gradients do, Wanda's do not."""
    return setting.config.importance != "wanda"


def spaced(points: Sequence[int], most: int) -> list[int]:
    """At most so many of the points, first and last included, evenly spaced."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _actions(setting: Setting, state: State) -> list[tuple[str, str | int]]:
    """What the probe may try: (mode, kind of unit) and (mode, first layer with fewer tokens)."""
    found: list[tuple[str, str | int]] = []
    for mode in setting.modes:
        stream, what = mode.rsplit("_", 1)
        parts = KINDS if what == "params" else spaced(setting.schedule.streams[stream].drop_points, MOST_POINTS)
        found += [(mode, part) for part in parts]
    return found


def _propose(
    setting: Setting, state: State, action: tuple[str, str | int], scores: Any, goal: float
) -> Proposal | None:
    mode, part = action
    stream = mode.rsplit("_", 1)[0]
    if isinstance(part, int):
        return setting.proposer.tokens_from_layer(state, stream=stream, layer=part, goal=goal)
    options = {"streams": [stream], "kinds": (part,), "goal": goal, "per_cost": comparable(setting)}
    return setting.proposer.parameters(state, scores, **options)


def make_selector(strategy: str, config: PruneConfig) -> Selector:
    """The selector of a strategy named in `strategy.STRATEGIES`."""
    if strategy in BASELINES:
        return FixedSelector()
    return CompSelector(MPS(config.mps)) if strategy == "comp" else ProbeSelector()


def apply_state(masks: UnitMasks, schedule: Schedule, old: State, new: State, *, fade: float, cit: bool) -> None:
    """Set masks and token counts on the way from one state to the next: `fade` 1 is the old one, 0 the new one.

    Args:
        cit: token importance sees fading heads fade; otherwise it sees them until they are gone.
    """
    masks.masks = {}
    for site, alive in new.alive.items():
        mask = alive.float() + fade * (old.alive[site] & ~alive).float()
        masks.masks[site] = mask
        if site.kind == "heads":
            schedule.head_masks[(site.stream, site.layer)] = mask if cit else (mask > 0).float()
    schedule.tokens = {
        name: tuple(n + round(fade * (m - n)) for m, n in zip(old.tokens[name], counts, strict=True))
        for name, counts in new.tokens.items()
    }


def cut(batches: Sequence[dict[str, Tensor]], parts: int, *, least: int) -> Iterator[dict[str, Tensor]]:
    """The batches cut by examples; one whose tensors disagree on how many it has stays whole."""
    for batch in batches:
        size = examples(batch)
        if size is None:
            yield batch
            continue
        step = max(1, min(least, size), size // parts)
        for start in range(0, size - step + 1, step):
            yield take_rows(batch, slice(start, start + step))
