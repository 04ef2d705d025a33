"""Meeting a budget that can be measured: a prediction is checked when the plan meets it, and the aim is corrected."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from comp_edge.plan import Plan

ROUNDS = 2  # how often the aim is corrected at most
CLOSE = 1.01  # times the target: as close as a measurement can tell


@runtime_checkable
class Measurable(Protocol):
    """A `Cost` that can also be measured, such as milliseconds on a device that is attached."""

    def measure(self, plan: Plan) -> float | None:
        """What one request really costs under a plan, in the unit of `predict`; None where it cannot be measured now."""


@runtime_checkable
class Described(Protocol):
    """A `Cost` that has something to tell for the record: which device, how good its predictions are."""

    def describe(self, dense: Plan, plan: Plan) -> dict[str, Any]:
        """What metrics.json keeps, as JSON."""


class Correction:
    """What was measured of plans that met the budget by prediction, and what to aim at since.

    A plan depends on no weights that are still trained, so it is measured before the fine-tuning: if it is too slow, further
    stages follow, and the training that is left comes after the last of them.

    Args:
        target: what a request may really cost.
    """

    def __init__(self, target: float) -> None:
        self.target = target
        self.found: list[dict[str, Any]] = []

    @property
    def aim(self) -> float:
        """The predicted cost to come down to, so that the real one meets the target as far as is known."""
        aims = [self.target * entry["predicted"] / entry["measured"] for entry in self.found]
        return min([self.target, *aims])

    def look(self, cost: Any, plan: Plan, *, stage: int) -> dict[str, Any] | None:
        """Measure a plan that meets the aim; None where that cannot be done, or was done or corrected often enough."""
        if not isinstance(cost, Measurable) or len(self.found) > ROUNDS:
            return None
        if any(entry["stage"] == stage for entry in self.found):
            return None
        measured = cost.measure(plan)
        if measured is None:
            return None
        return {"stage": stage, "predicted": cost.predict(plan), "measured": measured}

    def book(self, entry: dict[str, Any]) -> bool:
        """Take note of what `look` found; whether that was too much, so that the pass has to go on to a lower aim."""
        self.found.append(entry)
        return entry["measured"] > self.target * CLOSE and len(self.found) <= ROUNDS
