"""How a stage's proposal is chosen: in fixed turns, by the paper's MPS, or by the probe, which has walked ahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from comp_edge.calibrate import Collector, TokenStatistics, collect, gradient_scores
from comp_edge.masks import UnitMasks
from comp_edge.proposals import Proposal, Proposer
from comp_edge.schedule import Schedule
from comp_edge.scouting import JUMPS, WAYS, best, bold, bracket, rests
from comp_edge.settings import PruneConfig
from comp_edge.state import State
from comp_edge.strategy import BASELINES, MPS, turn
from comp_edge.tasks.packing import examples, take_rows
from comp_edge.units import Site

PARTS = 4  # gradients are summed per part of a batch: finer parts tell apart what a mean would cancel
ROUNDING = 0.05  # of a stage's goal: less is not worth asking another mode for


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
    target: float
    trial: Callable[[Callable[[Callable[[State, int], None]], float]], float]
    trial_steps: int


class Selector(Protocol):
    """Chooses a proposal for each stage, and learns what it did.

    Attributes:
        ways: how many ways to the budget it walks for trial before the first stage.
    """

    ways: int

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


@dataclass
class FixedSelector:
    """The baselines `params`, `tokens` and `joint`: parameters and tokens in turn, each of all streams at once.

    Parameters of all streams share one ranking, and tokens of all streams one threshold, as methods for a single mode have
    it; turns of five modes would wipe out the small streams first.
    """

    ways: ClassVar[int] = 0

    def select(
        self, setting: Setting, state: State, *, goal: float, stage: int
    ) -> tuple[Proposal | None, dict[str, Any]]:
        """What the turn says, or the other kind when that cannot save any more."""
        kinds = [kind for kind in ("params", "tokens") if streams_of(setting.modes, kind)]
        importance = Importances(setting)
        for kind in turn(kinds, stage):
            proposal = propose(setting, state, kind, streams_of(setting.modes, kind), importance, goal)
            if proposal is not None:
                return proposal, {"why": "in turn"}
        return None, {}

    def booked(self, mode: str, *, stage: int, score_change: float, cost_change: float) -> None:
        """Nothing: turns are fixed."""

    def to_json(self) -> dict[str, Any]:
        """Nothing is remembered."""
        return {}

    def restore(self, value: Mapping[str, Any]) -> None:
        """Nothing is remembered."""


@dataclass
class CompSelector:
    """CoMP as published: structured Wanda with CIM ranks, MPS chooses the mode."""

    mps: MPS
    ways: ClassVar[int] = 0

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
class ProbeSelector:
    """Ours: walk a few short ways to the budget first, and take the share of tokens whose way ends best (`scouting`).

    Every stage then takes tokens and parameters in that proportion. Units of all streams share one ranking, by the gradient of
    the loss per unit of cost and by Wanda relative to the layer's mean (see `importance.blend`). (A probe that tried single
    actions and took those that cost least at once was worse than removing parameters alone: see `docs/method.md`.)

    Attributes:
        losses: of the ways that were walked, per share of tokens; empty before the first stage, unless there is but one way.
    """

    ways: int = WAYS
    losses: dict[float, float] = field(default_factory=dict)

    def select(
        self, setting: Setting, state: State, *, goal: float, stage: int
    ) -> tuple[Proposal | None, dict[str, Any]]:
        """Tokens and parameters in the proportion that was found, or what still can be saved."""
        why: dict[str, Any] = {}
        if not self.losses:
            self.losses = bracket(lambda share: _walk(setting, state, share))
            self.ways = len(self.losses)
            ends = {share: loss if math.isfinite(loss) else None for share, loss in self.losses.items()}
            why = {"walks": [{"tokens": share, "loss": loss} for share, loss in ends.items()]}
        share = best(self.losses)
        taken = mixed(setting, state, share, goal)
        if not taken:
            return None, {}
        after = taken[-1].state
        savings = _savings(setting, state, after)
        mode = max(savings, key=lambda m: savings[m])  # the trace books a stage to what saved most of it
        also = [other for other, saving in savings.items() if saving > 0 and other != mode]
        chosen = Proposal(mode, after, sum(proposal.saving for proposal in taken))
        return chosen, {"why": "scouted", "token_share": share, "also": also, **why}

    def booked(self, mode: str, *, stage: int, score_change: float, cost_change: float) -> None:
        """Nothing: the way has been found."""

    def to_json(self) -> dict[str, Any]:
        """What the walks ended with."""
        return {"losses": list(self.losses.items())}

    def restore(self, value: Mapping[str, Any]) -> None:
        """What the walks ended with."""
        self.losses = {float(share): float(loss) for share, loss in value["losses"]}
        self.ways = len(self.losses) if self.ways else 0


def _walk(setting: Setting, state: State, share: float) -> float:
    """The loss at the end of a short way to the budget; infinite where it does not get there, or training diverges."""
    price, config = setting.proposer.price, setting.config
    limits = setting.proposer.limits
    limits = replace(limits, share=bold(limits.share, stages=config.stages))
    far = replace(setting, proposer=setting.proposer.within(limits))

    def walk(train: Callable[[State, int], None]) -> float:
        now, goal, pauses = state, (price(state) - setting.target) / JUMPS, rests(setting.trial_steps)
        done = 0
        try:
            while (left := price(now) - setting.target) > 0:
                if not (taken := mixed(far, now, share, min(goal, left))):
                    return math.inf
                now, pause = taken[-1].state, next(pauses)
                train(now, pause)
                done += pause
            train(now, setting.trial_steps - done)
            return _loss(setting, now)
        except FloatingPointError:
            return math.inf

    return setting.trial(walk)


@torch.no_grad()
def _loss(setting: Setting, state: State) -> float:
    apply_state(setting.masks, setting.schedule, state, state, fade=0.0, cit=setting.config.cit)
    return sum(setting.loss(setting.model, batch) for batch in setting.probe) / len(setting.probe)


def _savings(setting: Setting, old: State, new: State) -> dict[str, float]:
    """What each mode's changes would have saved alone."""
    found, before = {}, setting.proposer.price(old)
    for mode in setting.modes:
        stream, kind = mode.rsplit("_", 1)
        if kind == "tokens":
            alone = setting.proposer.with_tokens(old, stream, new.tokens[stream])
        else:
            alone = old.copy()
            alone.alive |= {site: alive for site, alive in new.alive.items() if site.stream == stream}
        found[mode] = before - setting.proposer.price(alone)
    return found


def mixed(setting: Setting, state: State, share: float, goal: float) -> list[Proposal]:
    """Take tokens for a share of a goal and parameters for the rest; what one kind cannot save, the other does.

    Returns:
        What was taken, each from the state of the one before; empty where nothing can be saved any more.
    """
    importance, taken, saved = Importances(setting), [], 0.0
    for kind, part in (("tokens", share), ("params", 1.0), ("tokens", 1.0)):
        streams, wanted = streams_of(setting.modes, kind), min(part * goal, goal - saved)
        if not streams or wanted <= ROUNDING * goal:
            continue
        now = taken[-1].state if taken else state
        if (proposal := propose(setting, now, kind, streams, importance, wanted)) is not None:
            taken.append(proposal)
            saved += proposal.saving
    return taken


class Importances:
    """What units and tokens matter by the calibration batches, as the config says; computed when asked for."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @cached_property
    def listened(self) -> Collector:
        """Statistics of forward passes: Wanda's, and token importance."""
        return self._listen(self.setting.calibration)

    @cached_property
    def tokens(self) -> TokenStatistics:
        """Of every layer."""
        return self.listened.ranked_tokens()

    @cached_property
    def units(self) -> dict[Site, Tensor]:
        """[units] per site; of a blend the part that gradients know."""
        s = self.setting
        if s.config.importance == "wanda":
            return self.listened.wanda()
        return gradient_scores(
            s.model, s.task, s.masks, self._parts(), power=1 if s.config.importance == "taylor" else 2
        )

    @cached_property
    def beside(self) -> dict[Site, Tensor]:
        """[units] per site, of a blend the part that activations know: for sums over tokens a part of the examples will do."""
        return self._listen(self._parts(most=1)).wanda()

    def _listen(self, batches: Iterable[dict[str, Tensor]]) -> Collector:
        config, s = self.setting.config, self.setting
        return collect(s.model, s.masks, s.schedule, batches, cip=config.cip, cit=config.cit, norm=config.token_norm)

    def _parts(self, *, most: int | None = None) -> Iterator[dict[str, Tensor]]:
        # Contrastive losses say nothing of a single example.
        least = getattr(self.setting.task, "least_examples", 1)
        return cut(self.setting.calibration, PARTS, least=least, most=most)


def streams_of(modes: Sequence[str], kind: str) -> list[str]:
    """The streams whose parameters or tokens are among these modes."""
    return [mode.rsplit("_", 1)[0] for mode in modes if mode.endswith(kind)]


def propose(
    setting: Setting, state: State, kind: str, streams: Sequence[str], importance: Importances, goal: float
) -> Proposal | None:
    """What a stage of parameters or tokens of these streams would do."""
    if kind == "tokens":
        return setting.proposer.tokens_by_threshold(state, importance.tokens, streams=streams, goal=goal)
    beside = importance.beside if setting.config.importance == "blend" else None
    options = {"streams": streams, "goal": goal, "per_cost": comparable(setting), "beside": beside}
    return setting.proposer.parameters(state, importance.units, **options)


def comparable(setting: Setting) -> bool:
    """Whether scores of different layers share a scale: gradients do, Wanda's do not."""
    return setting.config.importance != "wanda"


def make_selector(strategy: str, config: PruneConfig, modes: Sequence[str]) -> Selector:
    """The selector of a strategy named in `strategy.STRATEGIES`, for these modes."""
    if strategy in BASELINES:
        return FixedSelector()
    if strategy == "comp":
        return CompSelector(MPS(config.mps))
    tokens, params = streams_of(modes, "tokens"), streams_of(modes, "params")
    return ProbeSelector() if tokens and params else ProbeSelector(ways=0, losses={float(bool(tokens)): 0.0})


def apply_state(masks: UnitMasks, schedule: Schedule, old: State, new: State, *, fade: float, cit: bool) -> None:
    """Set masks and token counts on the way from one state to the next: `fade` 1 is the old one, 0 the new one.

    Args:
        cit: the tokens that are kept while heads fade are chosen by what is left of those; otherwise by the whole heads.
    """
    masks.masks = {}
    for site, alive in new.alive.items():
        mask = (alive.float() + fade * (old.alive[site] & ~alive).float()).to(masks.device(site))
        masks.masks[site] = mask
        if site.kind == "heads":
            schedule.head_masks[(site.stream, site.layer)] = mask if cit else (mask > 0).float()
    schedule.tokens = {
        name: tuple(n + round(fade * (m - n)) for m, n in zip(old.tokens[name], counts, strict=True))
        for name, counts in new.tokens.items()
    }


def cut(
    batches: Iterable[dict[str, Tensor]], parts: int, *, least: int, most: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """The batches cut by examples; one whose tensors disagree on how many it has stays whole.

    Args:
        parts: of each batch, or fewer where a part would have fewer than `least` examples.
        most: only the first so many parts of each batch are given.
    """
    for batch in batches:
        size = examples(batch)
        if size is None:
            yield batch
            continue
        step = max(1, min(least, size), size // parts)
        for start in range(0, size - step + 1, step)[:most]:
            yield take_rows(batch, slice(start, start + step))
