"""What the loss of a single vision token changes, beside what each importance says of it.

A token is taken away before a layer, from there on, and the loss of its image's questions is compared with what it was. All
images of a batch lose one at a time, each its own.

A schedule that drops tokens at that layer or behind it chooses by the very importance that is judged here: only tokens that
it ranked high can be taken away, and one that it would drop in the next layer anyway changes nothing. So everything is
measured twice, in the model as it is, and with all drops from that layer on lifted. What fell before is gone in both.

Base importance and CIT see the same tokens. They differ where heads of the layer before are removed: those keep their
attention in the masked model, and their mask is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comp_edge.bench.ranking_units import RANDOM, Batches, question_losses
from comp_edge.errors import InputError
from comp_edge.importance import normalize
from comp_edge.schedule import Schedule
from comp_edge.selection import PROTECTED, keep_within
from comp_edge.selectors import Setting, apply_state
from comp_edge.state import State
from comp_edge.tasks.folding import distinct_images

TOKENS, LIFTED = "tokens", "tokens (lifted)"
BASE, CIT = "base", "CIT"
STREAM = "vision"


@dataclass(frozen=True)
class Taken:
    """Tokens that were taken away before one layer.

    Attributes:
        changes: [images, k, 3] of the loss of the image's questions, of every second one, and of the others.
        importances: [images, k] by name.
    """

    changes: np.ndarray
    importances: dict[str, np.ndarray]


def measured_layers(schedule: Schedule) -> tuple[int, ...]:
    """The layers before which tokens are taken away: the first, the middle and the last of those that may drop any."""
    stream = schedule.streams[STREAM]
    drops = () if stream.packed or stream.hands_over or stream.protected not in ("first", "none") else stream.drops
    return tuple(sorted({drops[0], drops[len(drops) // 2], drops[-1]})) if drops else ()


def forks(state: State, layer: int) -> bool:
    """Whether lifting the drops from a layer on changes anything."""
    return state.tokens[STREAM][-1] < state.tokens[STREAM][layer - 1]


@torch.no_grad()
def take_tokens(
    setting: Setting,
    state: State,
    batches: Batches,
    layer: int,
    *,
    count: int,
    lift: bool,
    rng: np.random.Generator,
    tell: Callable[[], None] = lambda: None,
) -> Taken:
    """Take `count` tokens of each image away before a layer, one at a time.

    Args:
        lift: let all layers from this one on compute on what the one before does.
        tell: called after each of them.

    Raises:
        InputError: the vision stream has other rows than one for each distinct image.
    """
    tokens = list(state.tokens[STREAM])
    if lift:
        tokens[layer:] = [tokens[layer - 1]] * len(tokens[layer:])
    whole = setting.proposer.with_tokens(state, STREAM, tokens)
    less = setting.proposer.with_tokens(
        state, STREAM, tokens[:layer] + [min(n, tokens[layer] - 1) for n in tokens[layer:]]
    )
    schedule, norm = setting.schedule, setting.config.token_norm
    try:
        _apply(setting, whole)
        seen = [_look(setting, batch, layer) for batch in batches]
        choices = [_choose(schedule, scores, stay=tokens[layer], count=count, rng=rng) for scores, _ in seen]
        count = min(len(chosen[0]) for chosen in choices)
        with _without_mask(schedule, layer - 1):
            plain = [_look(setting, batch, layer)[0] for batch in batches]
        named = {CIT: [scores for scores, _ in seen], BASE: plain}
        importances = {
            name: _joined(
                [normalize(s.float(), norm).gather(1, c[:, :count]) for s, c in zip(rows, choices, strict=True)]
            )
            for name, rows in named.items()
        }
        _apply(setting, less)
        changes = np.zeros((*importances[CIT].shape, 3))
        for place in range(count):
            now = []
            for batch, chosen, (scores, before) in zip(batches, choices, seen, strict=True):
                with _last(schedule, layer, chosen[:, place], stay=min(tokens[layer], scores.shape[1]) - 1):
                    now.append(_image_losses(setting, batch) - before)
            changes[:, place] = _joined(now)
            tell()
    finally:
        _apply(setting, state)
    importances[RANDOM] = rng.random(changes.shape[:2])
    return Taken(changes=changes, importances=importances)


def _apply(setting: Setting, state: State) -> None:
    apply_state(setting.masks, setting.schedule, state, state, fade=0.0, cit=setting.config.cit)


def _joined(rows: Sequence[Tensor]) -> np.ndarray:
    return torch.cat(list(rows)).double().numpy()


def _look(setting: Setting, batch: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    """Importance [images, n] of the tokens that the layer before gives, and the losses [images, 3]."""
    found: list[Tensor] = []

    def note(stream: str, index: int, scores: Tensor, valid: Tensor) -> None:
        if (stream, index) == (STREAM, layer - 1):
            found.append(scores)

    setting.schedule.observe = note
    try:
        losses = _image_losses(setting, batch)
    finally:
        setting.schedule.observe = None
    if [len(scores) for scores in found] != [len(losses)]:
        raise InputError(
            f"{type(setting.model).__name__} does not see each image as one row of tokens; tokens can be taken away from "
            "models that do, such as those with CLIP's or BLIP's vision tower."
        )
    return found[0], losses


def _image_losses(setting: Setting, batch: dict[str, Tensor]) -> Tensor:
    """[images, 3] mean loss of an image's questions, of every second one, and of the others; images as they appear."""
    losses, counts = question_losses(setting.model, setting.task, batch)
    first, inverse = distinct_images(batch["image_ids"])
    second = torch.arange(len(losses)) % 2
    parts = []
    for chosen in (torch.ones_like(second), 1 - second, second):
        total, number = (
            torch.zeros(len(first), dtype=torch.double).index_add(0, inverse, values.double() * chosen)
            for values in (losses, counts)
        )
        parts.append(total / number.clamp(min=1))
    return torch.stack(parts, 1)


def _choose(schedule: Schedule, scores: Tensor, *, stay: int, count: int, rng: np.random.Generator) -> Tensor:
    """[images, <= count] columns, drawn from those that stay when nothing is taken away; CLS is not among them."""
    protected = torch.zeros_like(scores, dtype=torch.bool)
    protected[:, 0] = schedule.streams[STREAM].protected == "first"
    goal = torch.full((len(scores),), stay)
    open_ = keep_within(scores.float() + PROTECTED * protected, goal) & ~protected
    order = torch.from_numpy(rng.random(scores.shape)).masked_fill(~open_, -1.0).argsort(1, descending=True)
    return order[:, : min(count, int(open_.sum(1).min()))]


@contextmanager
def _without_mask(schedule: Schedule, layer: int) -> Iterator[None]:
    """While active, importance in a vision layer counts removed heads as well."""
    masks = dict(schedule.head_masks)
    schedule.head_masks.pop((STREAM, layer), None)
    try:
        yield
    finally:
        schedule.head_masks = masks


@contextmanager
def _last(schedule: Schedule, layer: int, columns: Tensor, *, stay: int) -> Iterator[None]:
    """While active, a column [images] of each image ranks below all others in the drop before a layer."""

    def decide(stream: str, index: int, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor] | None:
        if (stream, index) != (STREAM, layer):
            return None
        return scores.scatter(1, columns[:, None], -1.0), torch.full((len(scores),), stay)

    schedule.decide = decide
    try:
        yield
    finally:
        schedule.decide = None


def rankings(taken: Sequence[Taken]) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """All tokens that were taken away at several layers: importances [n] by name, changes [n, 3], rankings [n].

    The tokens of one image before one layer are a ranking.
    """
    names: list[Any] = list(taken[0].importances)
    shapes = [part.changes.shape[:2] for part in taken]
    starts = np.cumsum([0, *(images for images, _ in shapes)])
    places = [np.repeat(np.arange(images) + start, k) for (images, k), start in zip(shapes, starts, strict=False)]
    return (
        {name: np.concatenate([part.importances[name].ravel() for part in taken]) for name in names},
        np.concatenate([part.changes.reshape(-1, 3) for part in taken]),
        np.concatenate(places),
    )
