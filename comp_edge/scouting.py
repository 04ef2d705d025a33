"""How much tokens and how much parameters should bring: short ways to the budget, walked and compared at their end.

What a removal costs at once says little of what it costs in the end: training makes good nearly all of what removing
parameters costs, and never gives back what a dropped token knew (`docs/method.md` has figures). So nothing is judged where
it is removed. Two or three ways to the budget that differ in the share of tokens are walked to their end, in few large stages
and with few training steps each; what the model has unlearnt there decides, and everything is put back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

WAYS = 3  # at most, see `bracket`
JUMPS = 3  # stages of a way that is walked for trial
TRIAL = 1 / 6  # training steps of such a way, as a share of the pass's; half of them were too few (docs/method.md)
ROWS = 2  # only one of so many parts of a training batch is used: steps tell more of a way's end than examples do
# A way that drops more tokens must end with at most this share of the loss of one that drops fewer. A walk is far shorter than
# the pass, and the steps that it lacks make good what parameters lost, and not what tokens knew (docs/method.md).
CLEARLY = 0.25
# Where half of the saving by tokens does not even bring this share of the loss without them, a quarter is not walked for trial.
HOPEFUL = 0.5
RESTING = 0.5  # share of these steps that are taken between the jumps; the rest recovers at the end


def bold(share: float, *, stages: int) -> float:
    """Which share of a sub-layer a jump may take, so that jumps come as far as so many stages."""
    return 1 - (1 - share) ** max(1.0, stages / JUMPS)


def bracket(loss_of: Callable[[float], float]) -> dict[float, float]:
    """Losses of shares of tokens in all that is saved: none, half, and then between them or beyond where that may be better."""
    losses = {share: loss_of(share) for share in (0.0, 0.5)}
    if _clearly(losses[0.5], losses[0.0]):
        return {**losses, 0.75: loss_of(0.75)}
    if losses[0.5] > HOPEFUL * losses[0.0]:
        return losses
    return {**losses, 0.25: loss_of(0.25)}


def best(losses: dict[float, float]) -> float:
    """The share of tokens whose way ends with the least loss, and clearly so where it is more tokens.

    Raises:
        FloatingPointError: no loss is finite.
    """
    found = None
    for share in sorted(losses):
        if _clearly(losses[share], math.inf if found is None else losses[found]):
            found = share
    if found is None:
        raise FloatingPointError("every way to the budget that was tried ends in a loss that is not finite")
    return found


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
