"""What the removal of heads and feed-forward channels changes, beside what each importance says of them.

Heads are removed one by one: every live head of every stream. A feed-forward layer has hundreds of channels, and one of them
changes the loss by little; of each layer a sample of groups of eight live neighbours by index is removed, of which a group's
importance is the sum, and a smaller effect is looked for in a sample of single channels. A large set of training questions
that stays the same throughout makes small changes comparable; the agreement between two halves of it says how far they can
be trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from comp_edge.families.base import StreamView
from comp_edge.importance import per_unit, relative_to_mean, wanda
from comp_edge.selectors import Importances, Setting, apply_state, comparable
from comp_edge.state import State
from comp_edge.tasks.dialogue import IGNORE
from comp_edge.tasks.folding import distinct_images
from comp_edge.units import Site, sites

HEADS, GROUPS, CHANNELS = "heads", "ffn groups", "ffn channels"
GROUP = 8  # channels
# Options of `PruneConfig` under which `Importances` gives each of them.
IMPORTANCES: dict[str, dict[str, Any]] = {
    "wanda": {"importance": "wanda", "cip": False},
    "wanda + CIP": {"importance": "wanda", "cip": True},
    "taylor": {"importance": "taylor"},
    "fisher": {"importance": "fisher"},
}
MAGNITUDE, RANDOM = "magnitude", "random"  # floors
Batches = Sequence[dict[str, Tensor]]


@dataclass(frozen=True)
class Removal:
    """Units of one sub-layer that are removed together.

    Attributes:
        kind: HEADS, GROUPS or CHANNELS.
    """

    kind: str
    site: Site
    units: tuple[int, ...]


def list_removals(
    state: State, streams: Mapping[str, StreamView], *, groups: int, channels: int, rng: np.random.Generator
) -> list[Removal]:
    """What is removed alone, each of it, from a state.

    Args:
        groups, channels: how many of them to draw from each feed-forward layer, at most.
    """
    found = []
    for site in sites(streams):
        living = state.alive[site].nonzero()[:, 0].tolist()
        if site.kind == "heads":
            # Without the last head of the first layer nothing would rank tokens: no stage may take it either.
            if site.layer > 0 or len(living) > 1:
                found += [Removal(HEADS, site, (head,)) for head in living]
            continue
        starts = range(0, len(living) - GROUP + 1, GROUP)
        found += [Removal(GROUPS, site, tuple(living[i : i + GROUP])) for i in _sample(starts, groups, rng)]
        found += [Removal(CHANNELS, site, (unit,)) for unit in _sample(living, channels, rng)]
    return found


def _sample(items: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
    return sorted(rng.choice(items, min(count, len(items)), replace=False).tolist()) if len(items) else []


def importances(setting: Setting, state: State, rng: np.random.Generator) -> dict[str, dict[Site, Tensor]]:
    """[units] per site, by every importance, from the calibration batches that a stage would have.

    Scores whose scale differs between layers are relative to the layer's mean, as a stage ranks them across layers.
    """
    found: dict[str, dict[Site, Tensor]] = {}
    for name, options in IMPORTANCES.items():
        asked = replace(setting, config=replace(setting.config, **options))
        scores = Importances(asked).units
        found[name] = scores if comparable(asked) else _relative(scores, state)
    sizes, sink = setting.masks.unit_sizes, setting.masks.sink
    plain = {
        site: per_unit(wanda(sink(site).weight, torch.ones(sink(site).in_features)), sizes[site]) for site in sizes
    }
    found[MAGNITUDE] = _relative(plain, state)
    found[RANDOM] = {site: torch.from_numpy(rng.random(len(alive))) for site, alive in state.alive.items()}
    return found


def _relative(scores: Mapping[Site, Tensor], state: State) -> dict[Site, Tensor]:
    return {site: relative_to_mean(values, state.alive[site]) for site, values in scores.items()}


def scores_of(removals: Sequence[Removal], importance: Mapping[Site, Tensor]) -> np.ndarray:
    """[n] importance of each removal: the sum of its units'."""
    return np.array([float(importance[r.site][list(r.units)].double().sum()) for r in removals])


def removal_changes(
    setting: Setting, state: State, removals: Sequence[Removal], batches: Batches, tell: Callable[[], None]
) -> np.ndarray:
    """What each removal alone changes: [n, 3], on all images, and on either half of them.

    Args:
        tell: called after each removal.
    """
    now = _totals(setting, state, batches)
    changes = np.zeros((len(removals), 3))
    for row, removal in zip(changes, removals, strict=True):
        without = state.copy()
        without.alive[removal.site][list(removal.units)] = False
        then = _totals(setting, without, batches)
        row[:] = [_loss(then[part]) - _loss(now[part]) for part in (slice(None), slice(0, None, 2), slice(1, None, 2))]
        tell()
    apply_state(setting.masks, setting.schedule, state, state, fade=0.0, cit=setting.config.cit)
    return changes


def _totals(setting: Setting, state: State, batches: Batches) -> np.ndarray:
    """[2 * batches, 2] of a state: summed cross-entropy of the answers' tokens, and their number.

    A batch's images are divided into two rows by turns.
    """
    apply_state(setting.masks, setting.schedule, state, state, fade=0.0, cit=setting.config.cit)
    rows = []
    for batch in batches:
        losses, counts = question_losses(setting.model, setting.task, batch)
        half = distinct_images(batch["image_ids"])[1] % 2
        rows += [[float(losses[half == i].sum()), float(counts[half == i].sum())] for i in (0, 1)]
    return np.array(rows)


def _loss(totals: np.ndarray) -> float:
    losses, counts = totals.sum(0)
    return losses / counts if counts else 0.0


def mean_loss(setting: Setting, state: State, batches: Batches) -> float:
    """The task's loss in a state, over all batches."""
    return _loss(_totals(setting, state, batches))


@torch.no_grad()
def question_losses(model: Any, task: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of each question [n] the summed cross-entropy of its answer's tokens, and how many these are.

    The sum over all questions by the sum of the counts is the task's loss.
    """
    logits, targets = task.logits(model, batch), task.targets(batch)
    # In double precision: what one channel changes is far below the loss.
    each = F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="none", ignore_index=IGNORE)
    return each.view(targets.shape).sum(1), (targets != IGNORE).sum(1)


def by_kind(removals: Sequence[Removal]) -> Iterator[tuple[str, list[int]]]:
    """Every kind, with the places of its removals."""
    for kind in (HEADS, GROUPS, CHANNELS):
        if places := [i for i, removal in enumerate(removals) if removal.kind == kind]:
            yield kind, places
