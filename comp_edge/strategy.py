"""Which mode a stage advances: fixed turns, or MPS as published. Pure: state in, decision out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from comp_edge.errors import InputError

BASELINES = ("params", "tokens", "joint")
STRATEGIES = (*BASELINES, "comp", "probe")


@dataclass(frozen=True)
class MPSConfig:
    """Constants of MPS, with the paper's values.

    Attributes:
        explore: rho, how often a mode is drawn instead of chosen.
        temperature: tau of that draw.
        history: lambda_0, weight of a mode's previous cost when it ran in the stage before.
        horizon: I_max, stages after which nothing of the previous cost is left.
        cost_aware: choose by cost; otherwise the modes take turns, and the rest has no say (an ablation).

    Raises:
        InputError: a number that makes no sense; says which numbers do.
    """

    explore: float = 0.2
    temperature: float = 5.0
    history: float = 0.4
    horizon: int = 5
    cost_aware: bool = True

    def __post_init__(self) -> None:
        for name in ("explore", "history"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise InputError(f"{name} {value}: give a number from 0 to 1.")
        if not self.temperature > 0:
            raise InputError(f"temperature {self.temperature}: give a number above 0.")
        if not self.horizon >= 1:
            raise InputError(f"horizon {self.horizon}: give 1 or more.")


@dataclass
class MPS:
    """Multi-mode pruning strategy: advance the mode that lost least accuracy per unit of cost when it last ran.

    Attributes:
        costs: R_m, history-weighted accuracy lost per unit of cost saved (lower is better); absent until tried.
        last: stage T_m in which each mode last ran.
    """

    config: MPSConfig = field(default_factory=MPSConfig)
    costs: dict[str, float] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)

    def choose(self, modes: Sequence[str], *, stage: int, rng: np.random.Generator) -> tuple[str, str]:
        """The mode of stage `stage` among those that can still advance, and why.

        Every mode is tried once; then with probability rho one is drawn from Softmax(I_m / tau), else the cheapest runs.
        """
        untried = [mode for mode in modes if mode not in self.costs]
        if untried:
            return untried[0], "first try"
        if not self.config.cost_aware:
            return min(modes, key=lambda mode: self.last[mode]), "in turn"
        if rng.random() < self.config.explore:
            idle = np.array([stage - self.last[mode] for mode in modes]) / self.config.temperature
            weights = np.exp(idle - idle.max())
            return str(rng.choice(list(modes), p=weights / weights.sum())), "explored"
        return min(modes, key=lambda mode: self.costs[mode]), "cheapest"

    def update(self, mode: str, *, stage: int, score_change: float, cost_change: float) -> float:
        """Book what a stage did: R_m <- lambda R_m + (1 - lambda) r with r = d score / d cost.

        Args:
            score_change: validation score after minus before.
            cost_change: cost after minus before (negative), as a fraction of the dense cost.

        Returns:
            The mode's new R_m. Both changes are usually negative, so a low r is a small loss for much saved.
        """
        r = score_change / min(cost_change, -1e-9)
        if mode in self.costs:
            idle = stage - self.last[mode]
            weight = history_weight(idle, self.config)
            r = weight * self.costs[mode] + (1 - weight) * r
        self.costs[mode], self.last[mode] = r, stage
        return r

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint records."""
        return {"costs": self.costs, "last": self.last}

    def restore(self, value: Mapping[str, Any]) -> None:
        """Take over what `to_json` gave."""
        self.costs, self.last = dict(value["costs"]), {k: int(v) for k, v in value["last"].items()}


def strategy_modes(strategy: str, modes: Sequence[str]) -> list[str]:
    """Those of a model's modes that a strategy uses."""
    return [mode for mode in modes if strategy not in ("params", "tokens") or mode.endswith(f"_{strategy}")]


def turn(kinds: Sequence[str], stage: int) -> list[str]:
    """Fixed alternation: what is to go in a stage, and what comes in its place when that cannot save any more."""
    return [*kinds[stage % len(kinds) :], *kinds[: stage % len(kinds)]]


def history_weight(idle: int, config: MPSConfig) -> float:
    """lambda = max(lambda_0 - lambda_0 / I_max (I_m - 1), 0): how much of the old cost is believed."""
    return max(config.history - config.history / config.horizon * (idle - 1), 0.0)
