"""Batches in parts: the weighted parts add up to the whole batch, loss and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import comp_edge
from comp_edge.errors import InputError
from comp_edge.microbatches import micro_batches, unshared
from comp_edge.recovery import Distillation
from comp_edge.schedule import attach
from comp_edge.tasks.packing import take_rows
from tests.comp_edge.test_pruning import QUICK

SCHEDULES = {
    "dense": {"vision": (17, 17, 17), "language": (24, 24, 24)},
    "drops": {"vision": (17, 12, 9), "language": (16, 11, 6)},
}


@pytest.fixture(scope="module")
def batch(tiny_task: Any) -> dict[str, Tensor]:
    """Four images, three questions each; some answers lack their end, so rows count differently."""
    batch = next(tiny_task.train_batches(3))
    batch["labels"][[0, 4, 5, 9], tiny_task.prompt_length + 1] = -100
    counts = (tiny_task.targets(batch) != -100).sum(1)
    assert len(counts) == 12 and counts.min() < counts.max()
    return batch


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 12])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("distill", [0.0, 0.7])
def test_losses_and_gradients_add_up(
    make_model: Any, tiny_task: Any, batch: dict[str, Tensor], parts: int, schedule: str, distill: float
) -> None:
    model = make_model().train()
    attach(model, SCHEDULES[schedule])
    distillation = Distillation(make_model(seed=1), tiny_task, weight=distill)
    objective, recorded = distillation.objective(model, batch)
    objective.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total, loss, weights, rows = 0.0, 0.0, 0.0, 0
    for weight, part in micro_batches(tiny_task, batch, parts):
        value, own = distillation.objective(model, part)
        (weight * value).backward()
        total, loss, weights = total + weight * float(value.detach()), loss + weight * own, weights + weight
        rows += len(part["input_ids"])
    assert rows == 12 and weights == pytest.approx(1.0)
    assert total == pytest.approx(float(objective.detach()), abs=1e-5) and loss == pytest.approx(recorded, abs=1e-5)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_questions_of_an_image_stay_together(tiny_task: Any, batch: dict[str, Tensor]) -> None:
    """As far as there are images enough: each is encoded once."""
    for parts, sizes in ((2, [6, 6]), (3, [3, 3, 6]), (4, [3, 3, 3, 3]), (6, [2] * 6), (1, [12])):
        assert [len(part["input_ids"]) for _, part in micro_batches(tiny_task, batch, parts)] == sizes
    ids = [part["image_ids"].unique().tolist() for _, part in micro_batches(tiny_task, batch, 4)]
    assert all(len(images) == 1 for images in ids)


def test_own_parts(tiny_task: Any, batch: dict[str, Tensor]) -> None:
    """What two processes take with two micro-batches each is what one takes with four."""
    whole = [(weight, part["question_ids"].tolist()) for weight, part in micro_batches(tiny_task, batch, 4)]
    halves = [
        (weight, part["question_ids"].tolist())
        for own in (slice(0, 2), slice(2, 4))
        for weight, part in micro_batches(tiny_task, batch, 4, own=own)
    ]
    assert halves == whole


def test_rows_without_an_answer_weigh_nothing(tiny_task: Any, batch: dict[str, Tensor]) -> None:
    """A part of them has no loss (a mean over nothing); it is left out."""
    silent = {name: value.clone() for name, value in batch.items()}
    silent["labels"][:6] = -100
    parts = list(micro_batches(tiny_task, silent, 2))
    assert [weight for weight, _ in parts] == [1.0]
    assert torch.equal(parts[0][1]["question_ids"], batch["question_ids"][6:])


def test_a_task_without_targets_counts_rows() -> None:
    class Mine:
        def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
            return batch["x"].mean()

    batch = {"x": torch.arange(7.0)}
    parts = list(micro_batches(Mine(), batch, 3))
    assert [len(part["x"]) for _, part in parts] == [2, 2, 3]
    assert sum(weight * float(part["x"].mean()) for weight, part in parts) == pytest.approx(3.0)


def test_what_cannot_be_cut(tiny_task: Any, batch: dict[str, Tensor]) -> None:
    class Mine:
        least_examples = 1

    class Contrast(Mine):
        name, least_examples = "contrast", 2

    few = take_rows(batch, slice(0, 2))
    ragged = {**batch, "extra": torch.zeros(3)}
    for task, given, says in (
        (tiny_task, few, "has 2 examples and cannot be cut into 3 parts"),
        (tiny_task, ragged, "task 'tiny_vqa' has tensors of different lengths"),
        (Contrast(), batch, "task 'contrast' compares the examples of a batch with each other"),
        (Mine(), ragged, "task 'Mine' has tensors of different lengths"),
    ):
        with pytest.raises(InputError, match=says):
            next(micro_batches(task, given, 3))
        assert next(micro_batches(task, given, 1))[1] is given


def test_the_plan_is_the_whole_batchs(make_model: Any, tiny_task: Any) -> None:
    """A pass with micro-batches and checkpointing prunes what a pass without prunes, and learns the same function.

    Biases of keys shift all of a query's logits alike, so they have no gradient but rounding, which Adam scales up.
    """
    whole = comp_edge.prune(
        make_model(), tiny_task, budget=comp_edge.Budget(macs=0.5), config=QUICK, base="tiny", evaluate=False
    )
    config = replace(QUICK, accumulate=3, checkpointing=True)
    model = make_model()
    parts = comp_edge.prune(
        model, tiny_task, budget=comp_edge.Budget(macs=0.5), config=config, base="tiny", evaluate=False
    )
    assert parts.plan == whole.plan and not model.is_gradient_checkpointing
    for line, expected in zip(parts.trace, whole.trace, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    for name, value in whole.model.state_dict().items():
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(parts.model.state_dict()[name], value, atol=1e-5, rtol=0, msg=name)
    inputs = tiny_task.example_inputs()
    torch.testing.assert_close(parts.model(**inputs).logits, whole.model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_what_is_not_shared_any_more_is_cut(make_model: Any, tiny_task: Any, batch: dict[str, Tensor]) -> None:
    """Three questions an image: together 4 x 16 image tokens and 12 texts; each alone, 12 x 16 and the texts."""
    model, text = make_model(), batch["input_ids"].shape[1] - 16
    assert unshared(model, batch) == 1
    for language, mean in (((24, 24, 24), None), ((24, 20, 16), 20 / 24), ((24, 12, 6), 14 / 24)):
        attach(model, {"vision": (17, 17, 17), "language": language})
        expected = 1 if mean is None else max(1, round(mean * 12 * (16 + text) / (4 * 16 + 12 * text)))
        assert unshared(model, batch) == expected
    many = {name: value[:1].repeat(12, *[1] * (value.ndim - 1)) for name, value in batch.items()}
    attach(model, {"vision": (17, 17, 17), "language": (24, 24, 23)})
    assert unshared(model, many) == round(71 / 72 * 12 * (16 + text) / (16 + 12 * text)) >= 2
    attach(model, {"vision": (17, 12, 9), "language": (16, 16, 16)})
    assert unshared(model, many) == 1
