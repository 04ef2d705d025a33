"""What ranks units, and how much tokens should bring: short ways to the budget, walked and compared at their end.

What a removal costs at once says little of what it costs in the end: training makes good nearly all of what removing
parameters costs, and never gives back what a dropped token knew (`docs/method.md` has figures). So nothing is judged where
it is removed. Some ways to the budget, which differ in what ranks units and in the share of tokens, are walked to their end,
in few large stages and with few training steps each; what the model has unlearnt there decides, and everything is put back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from comp_edge.settings import Importance

IMPORTANCES: tuple[Importance, ...] = ("fisher", "wanda")  # of units; which keeps what matters is not known beforehand
JUMPS = 3  # stages of a way that is walked for trial
TRIAL = 1 / 6  # training steps of such a way, as a share of the pass's; half of them were too few (docs/method.md)
ROWS = 2  # only one of so many parts of a training batch is used: steps tell more of a way's end than examples do
# A way that drops more tokens must end with at most this share of the loss of one that drops fewer. A walk is far shorter than
# the pass, and the steps that it lacks make good what parameters lost, and not what tokens knew (docs/method.md).
CLEARLY = 0.25
# Where half of the saving by tokens does not even bring this share of the loss without them, a quarter is not walked for trial.
HOPEFUL = 0.5
RESTING = 0.5  # share of these steps that are taken between the jumps; the rest recovers at the end


class Way(NamedTuple):
    """A way to the budget.

    Attributes:
        importance: what ranks units.
        tokens: share of what is saved that dropping tokens brings.
    """

    importance: Importance
    tokens: float


def bold(share: float, *, stages: int) -> float:
    """Which share of a sub-layer a jump may take, so that jumps come as far as so many stages."""
    return 1 - (1 - share) ** max(1.0, stages / JUMPS)


def explore(loss_of: Callable[[Way], float], *, importances: Sequence[Importance], tokens: bool) -> dict[Way, float]:
    """Walk ways to the budget: first without tokens by each importance; with the better one then with half of the saving by
    tokens, and between or beyond the two where that may be better.

    Args:
        loss_of: the loss at the end of a way; infinite where it does not get there.
        importances: of units, to choose among.
        tokens: whether tokens can be dropped.

    Returns:
        the losses, in the order in which the ways were walked.
    """
    losses = {way: loss_of(way) for way in (Way(importance, 0.0) for importance in importances)}
    plain = _least(losses)

    def walk(share: float) -> float:
        way = plain._replace(tokens=share)
        losses[way] = loss_of(way)
        return losses[way]

    if not tokens:
        return losses
    half, none = walk(0.5), losses[plain]
    if _clearly(half, none):
        walk(0.75)
    elif not half > HOPEFUL * none:
        walk(0.25)
    return losses


def best(losses: Mapping[Way, float]) -> Way:
    """The way that ends with the least loss, and clearly so where it drops more tokens.

    Raises:
        FloatingPointError: no loss is finite.
    """
    importance = _least({way: loss for way, loss in losses.items() if not way.tokens}).importance
    found = None
    for way in sorted(way for way in losses if way.importance == importance):
        if _clearly(losses[way], math.inf if found is None else losses[found]):
            found = way
    if found is None:
        raise FloatingPointError("every way to the budget that was tried ends in a loss that is not finite")
    return found


def _least(losses: Mapping[Way, float]) -> Way:
    return min(losses, key=lambda way: losses[way] if math.isfinite(losses[way]) else math.inf)


def _clearly(more: float, fewer: float) -> bool:
    """Whether the way with more tokens ends clearly better than the one with fewer."""
    return math.isfinite(more) and more <= CLEARLY * fewer


def rests(steps: int) -> Iterator[int]:
    """Training steps after each jump, as many numbers as one asks for: nothing is left for a fourth jump of three."""
    left = round(RESTING * steps)
    each = -(-left // JUMPS)
    while True:
        yield min(each, left)
        left -= min(each, left)
