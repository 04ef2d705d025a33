"""Gradient checkpointing under a token schedule: the same gradients, from layers that run twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.masks import UnitMasks
from comp_edge.recomputation import Recomputation
from comp_edge.schedule import active_schedule, attach, drops_tokens
from comp_edge.state import State
from comp_edge.units import mask_of
from tests.families import CASES, FamilyCase

TOLERANCE = 1e-5  # of gradients, relative to the largest: the second run repeats the first's operations


def falling(model: Any, state: State) -> dict[str, tuple[int, ...]]:
    """A schedule that drops wherever the model can: a fifth of the tokens at every point."""
    schedule = {}
    for name, stream in family_of(model).streams(model).items():
        counts = list(state.tokens[name])
        for point in stream.drop_points:
            if point == len(stream.layers):
                counts[point] = min(counts[point], family_of(model).image_tokens(model, counts[point - 1])) * 3 // 4
            else:
                counts[point:] = [max(4, counts[point - 1] * 4 // 5)] * (len(counts) - point)
        schedule[name] = tuple(counts)
    if family_of(model).fusion(model) is not None:
        gone = state.tokens["language"][0] - family_of(model).delivered(model, state.tokens["vision"])
        first = gone + family_of(model).delivered(model, schedule["vision"])
        schedule["language"] = tuple(min(first, n) for n in schedule["language"])
    for name, stream in family_of(model).streams(model).items():
        if stream.follows:
            schedule[name] = schedule[stream.follows]
    return schedule


def masked(model: Any, state: State) -> UnitMasks:
    """Half of the units of every other sub-layer fade."""
    masks = UnitMasks(family_of(model).streams(model))
    for index, (site, alive) in enumerate(state.alive.items()):
        mask = torch.ones(len(alive))
        if index % 2:
            mask = 0.3 + 0.7 * mask_of(range(0, len(alive), 2), len(alive))
        masks.masks[site] = mask
        if site.kind == "heads":
            active_schedule(model).head_masks[(site.stream, site.layer)] = mask
    return masks


def gradients(model: Any, loss: Callable[[], Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.train()
    model.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    return float(value.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def counted(modules: list[Any]) -> Iterator[list[int]]:
    """How often the modules run while this is active."""
    runs = [0]

    def count(*_: Any) -> None:
        runs[0] += 1

    handles = [module.register_forward_hook(count) for module in modules]
    yield runs
    for handle in handles:
        handle.remove()


def assert_equal_gradients(model: Any, loss: Callable[[], Tensor]) -> None:
    expected_loss, expected = gradients(model, loss)
    recomputation = Recomputation(model)
    got_loss, got = gradients(model, loss)
    recomputation.detach()
    assert got_loss == expected_loss and set(got) == set(expected)
    for name, gradient in expected.items():
        error = float((got[name] - gradient).abs().max())
        assert error <= TOLERANCE * max(1.0, float(gradient.abs().max())), (name, error)
    assert gradients(model, loss)[0] == expected_loss


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_every_family(case: FamilyCase) -> None:
    """Masks, drops in every stream that can drop, and padding; what a layer computed really is computed twice."""
    model, inputs = case.model(seed=1), case.inputs(4)
    request = family_of(model).default_request(model, inputs["input_ids"].shape[1])
    state = State.of(model, base="", request=request)
    attach(model, falling(model, state))
    masks = masked(model, state)
    streams = family_of(model).streams(model)
    assert any(drops_tokens(model, name) for name in streams)
    assert_equal_gradients(model, lambda: case.loss(model, inputs))
    sinks = [masks.sink(site) for site in masks.unit_sizes]
    with counted(sinks) as once:
        gradients(model, lambda: case.loss(model, inputs))
    recomputation = Recomputation(model)
    with counted(sinks) as twice:
        gradients(model, lambda: case.loss(model, inputs))
    recomputation.detach()
    # The last linear layer of what is run again may be left out: nothing needs its output.
    assert once[0] == len(sinks) and 1.5 * once[0] <= twice[0] <= 2 * once[0]


@pytest.mark.parametrize("language", [(24, 24, 24), (16, 11, 6)], ids=["shared prefix", "drops"])
def test_gradients_of_a_task(make_model: Any, tiny_task: Any, language: tuple[int, ...]) -> None:
    """Where questions share a prompt's cache, the language layers keep their activations: the cache must be filled."""
    model, batch = make_model(), next(tiny_task.train_batches(0))
    drops = language[0] < 24
    attach(model, {"vision": (17, 12, 9) if drops else (17, 17, 17), "language": language})
    assert_equal_gradients(model, lambda: tiny_task.loss(model, batch))
    tower = [layer.mlp.fc1 for layer in model.model.vision_tower.encoder.layers]
    decoder = [layer.mlp.gate_proj for layer in model.model.language_model.layers]

    def runs() -> list[int]:
        """Of a layer of each stream, in a training step."""
        found = []
        for layers in (tower, decoder):
            with counted(layers) as count:
                gradients(model, lambda: tiny_task.loss(model, batch))
            found.append(count[0] // len(layers))
        return found

    assert runs() == [1, 1 if drops else 2]
    recomputation = Recomputation(model)
    assert runs() == [2, 2]
    recomputation.detach()


def test_a_loss_of_two_passes(make_model: Any, tiny_task: Any) -> None:
    """Each second run scores tokens by the context of its own pass: here the passes differ in length."""
    model = make_model()
    attach(model, {"vision": (17, 12, 9), "language": (16, 11, 6)})
    short, long = ({k: v[:n] for k, v in next(tiny_task.train_batches(n)).items()} for n in (2, 5))

    def loss() -> Tensor:
        return tiny_task.loss(model, short) + tiny_task.loss(model, long)

    assert_equal_gradients(model, loss)


def test_evaluation_keeps_its_cache(make_model: Any, tiny_task: Any) -> None:
    model, batches = make_model(), list(tiny_task.val_batches())
    attach(model, {"vision": (17, 12, 9), "language": (16, 11, 6)})
    answers = tiny_task.generate(model, batches[0])
    recomputation = Recomputation(model)
    assert tiny_task.generate(model.eval(), batches[0]) == answers
    recomputation.detach()
    assert not model.is_gradient_checkpointing


def test_a_model_without_checkpointing_is_refused(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(InputError, match="LlavaForConditionalGeneration has layers without gradient checkpointing"):
        Recomputation(model)
