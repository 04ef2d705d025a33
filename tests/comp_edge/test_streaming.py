"""Importance in streaming form: however many calibration batches there are, none of them leaves an activation behind."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from comp_edge.calibrate import Collector, Draws, collect, gradient_scores
from comp_edge.families import family_of
from comp_edge.masks import UnitMasks
from comp_edge.schedule import attach
from comp_edge.state import State
from comp_edge.tasks.packing import model_inputs
from tests.families import CASES, FamilyCase

BATCHES = 6


def live_bytes() -> int:
    """Bytes of all tensors that anything in Python holds, each storage counted once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, Tensor) and type(found) in (Tensor, torch.nn.Parameter):
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(storages.values())


def watched(task: Any, seen: list[int]) -> Iterator[dict[str, Tensor]]:
    """Batches; notes what is held whenever the next one is asked for, and all that was asked for has been given back."""
    for batch in itertools.islice(task.train_batches(0), BATCHES):
        yield batch
        del batch
        seen.append(live_bytes())


def set_up(model: Any) -> tuple[UnitMasks, Any]:
    schedule = attach(model, {"vision": (17, 12, 9), "language": (16, 11, 6)})
    masks = UnitMasks(family_of(model).streams(model))
    state = State.of(model, base="", prompt_tokens=8)
    masks.masks = {site: torch.ones(len(alive)) for site, alive in state.alive.items()}
    return masks, schedule


@pytest.mark.parametrize("cip", [True, False])
def test_wanda_and_token_statistics(make_model: Any, tiny_task: Any, cip: bool) -> None:
    """What grows are the scores of tokens, one number each; an activation of a single layer would show at once."""
    model, seen = make_model(), []
    masks, schedule = set_up(model)
    collector = collect(model, masks, schedule, watched(tiny_task, seen), cip=cip, cit=True, norm="mean")
    scores = sum(part.nbytes for parts in collector.tokens.scores.values() for part in parts) // BATCHES
    smallest = 12 * 6 * 32 * 4  # the input of the last language layer's smallest projection, of one batch
    growth = [b - a for a, b in itertools.pairwise(seen[1:])]
    assert len(seen) == BATCHES and all(0 <= more - scores <= smallest // 4 for more in growth), (growth, scores)
    assert not collector._waiting


@pytest.mark.parametrize("power", [1, 2])
def test_gradients_by_masks(make_model: Any, tiny_task: Any, power: int) -> None:
    model, seen = make_model(), []
    masks, _ = set_up(model)
    gradient_scores(model, tiny_task, masks, watched(tiny_task, seen), power=power)
    growth = [b - a for a, b in itertools.pairwise(seen[1:])]
    assert len(seen) == BATCHES and all(abs(more) < 1000 for more in growth), growth
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_few_inputs_wait(case: FamilyCase) -> None:
    """At most three projections' inputs a stream at any time (four with cross-attention), and none after the pass."""
    model = case.model()
    inputs = case.inputs(3)
    request = family_of(model).default_request(model, inputs["input_ids"].shape[1])
    schedule = attach(model, State.of(model, base="", request=request).tokens)
    masks = UnitMasks(family_of(model).streams(model))
    most: dict[str, int] = {}

    def count(collector: Collector, stream: str) -> None:
        waiting = [
            w for w in collector._waiting if (schedule.streams[w.site.stream].follows or w.site.stream) == stream
        ]
        most[stream] = max(most.get(stream, 0), len(waiting))

    with torch.no_grad(), Collector(masks, schedule, cip=True) as collector:
        for site in masks.unit_sizes:
            stream = schedule.streams[site.stream].follows or site.stream
            masks.sink(site).register_forward_hook(lambda *_, stream=stream: count(collector, stream))
        model(**model_inputs(model, inputs))
    assert set(collector.energy) == set(masks.unit_sizes) and not collector._waiting
    limit = 4 if "cross" in schedule.streams else 3
    assert most and all(found <= (limit if stream == "language" else 3) for stream, found in most.items()), most


def test_draws_are_drawn_anew(tiny_task: Any) -> None:
    draws = Draws(tiny_task, 3, 2)
    expected = list(itertools.islice(tiny_task.train_batches(3), 2))
    for _ in range(2):
        for batch, other in zip(draws, expected, strict=True):
            assert batch.keys() == other.keys() and all(
                torch.equal(value, other[name]) for name, value in batch.items()
            )
    assert len(draws) == 2
    held = weakref.ref(next(iter(draws))["pixel_values"])
    del batch, other
    gc.collect()
    assert held() is None


def test_what_is_not_finite_is_told(make_model: Any, tiny_task: Any) -> None:
    """Rather than ranked by: which layer, of which stream."""
    model = make_model()
    masks, schedule = set_up(model)
    batches = list(itertools.islice(tiny_task.train_batches(0), 1))
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[1].mlp.fc1.bias[3] = float("inf")
    collector = collect(model, masks, schedule, batches, cip=False, cit=True, norm="mean")
    with pytest.raises(FloatingPointError, match="activations at the ffn of layer 1 in stream 'vision' are not finite"):
        collector.wanda()
    with pytest.raises(FloatingPointError, match="token importance in layer 2 of stream 'vision' is not finite"):
        collector.ranked_tokens()
    with pytest.raises(FloatingPointError, match="gradients at the .* are not finite"):
        gradient_scores(model, tiny_task, masks, batches, power=1)
