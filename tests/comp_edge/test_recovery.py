"""Distillation: the objective by hand, and a teacher that nothing changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from comp_edge.recovery import Distillation, hidden_error
from comp_edge.schedule import attach
from comp_edge.state import State


class Logits:
    """A task whose models are tensors of logits [n, t, vocabulary]."""

    def __init__(self, targets: torch.Tensor) -> None:
        self._targets = targets

    def logits(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return model.logits

    def targets(self, batch: Any) -> torch.Tensor:
        return self._targets

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model.logits.flatten(0, 1), self._targets.flatten(), ignore_index=-100)


class LossOnly:
    """A task of somebody's own, without logits."""

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return model.logits.square().mean()


def model_of(seed: int) -> torch.nn.Module:
    model = torch.nn.Module()
    model.logits = torch.nn.Parameter(torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(seed)))
    return model


TARGETS = torch.tensor([[1, 2, -100, -100], [0, -100, -100, -100], [4, 3, 2, 1]])


@pytest.mark.parametrize("weight", [0.7, 1.0, 0.2])
@pytest.mark.parametrize("temperature", [2.0, 1.0])
def test_the_objective_by_hand(weight, temperature):
    student, teacher = model_of(1), model_of(2)
    distillation = Distillation(teacher, Logits(TARGETS), weight=weight, temperature=temperature)
    objective, recorded = distillation.objective(student, {})
    hard, soft, n = 0.0, 0.0, 0
    for row in range(3):
        for position in range(4):
            target = int(TARGETS[row, position])
            if target == -100:
                continue
            z, w = student.logits[row, position].tolist(), teacher.logits[row, position].tolist()
            p = [math.exp(x / temperature) / sum(math.exp(y / temperature) for y in w) for x in w]
            q = [math.exp(x / temperature) / sum(math.exp(y / temperature) for y in z) for x in z]
            soft += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) * temperature**2
            hard += -math.log(math.exp(z[target]) / sum(math.exp(x) for x in z))
            n += 1
    assert float(objective) == pytest.approx((1 - weight) * hard / n + weight * soft / n, rel=1e-4)
    assert recorded == pytest.approx(hard / n, rel=1e-5)  # the record is the task's own loss, whatever the weight


def test_a_student_like_its_teacher_has_nothing_to_learn_from_it():
    teacher = model_of(1)
    distillation = Distillation(teacher, Logits(TARGETS), weight=1.0)
    objective, _ = distillation.objective(teacher, {})
    assert abs(float(objective)) < 1e-6


@pytest.mark.parametrize("task", [Logits(TARGETS), LossOnly()], ids=["weight 0", "no logits"])
def test_without_a_teacher_it_is_the_tasks_loss(task):
    student = model_of(1)
    weight = 0.0 if isinstance(task, Logits) else 0.7
    distillation = Distillation(model_of(2), task, weight=weight)
    objective, recorded = distillation.objective(student, {})
    assert torch.equal(objective, task.loss(student, {})) and recorded == float(objective)
    assert objective.requires_grad


def test_only_answers_have_gradients():
    student = model_of(1)
    Distillation(model_of(2), Logits(TARGETS)).objective(student, {})[0].backward()
    touched = student.logits.grad.abs().sum(-1) > 0
    assert torch.equal(touched, TARGETS != -100)


def test_the_teacher_stays_what_it_was(make_model, tiny_task):
    model = make_model()
    distillation = Distillation(model, tiny_task)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not any(parameter.requires_grad for parameter in distillation.dense.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    batch = next(tiny_task.train_batches(0))
    for _ in range(2):
        objective, recorded = distillation.objective(model, batch)
        objective.backward()
        optimizer.step()
    assert math.isfinite(recorded) and not distillation.dense.training
    assert not torch.equal(model.state_dict()["lm_head.weight"], before["lm_head.weight"])
    for name, value in distillation.dense.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_recorded_loss_is_the_tasks(make_model, tiny_task):
    model, batch = make_model(), next(tiny_task.train_batches(0))
    with torch.no_grad():
        objective, recorded = Distillation(make_model(seed=1), tiny_task).objective(model, batch)
        assert recorded == pytest.approx(float(tiny_task.loss(model, batch)), rel=1e-5)
    assert float(objective) != recorded


def test_hidden_states_are_compared_where_tokens_survive(make_model, tiny_task):
    """Against hidden states gathered by hand, with a schedule that drops tokens."""
    student, teacher, batch = make_model(), make_model(seed=1), next(tiny_task.train_batches(0))
    distillation = Distillation(teacher, tiny_task, weight=0.0, hidden=1.0)
    tokens = State.of(student, base="", prompt_tokens=8).tokens
    tokens["vision"][-1] = tokens["vision"][0] // 2
    schedule = attach(student, tokens)
    seen: dict[str, torch.Tensor] = {}

    def note(name):
        return lambda module, args, output: seen.update({name: output if torch.is_tensor(output) else output[0]})

    for name, model in (("student", student), ("teacher", distillation.dense)):
        model.model.vision_tower.encoder.layers[-1].register_forward_hook(note(name))
    objective, loss = distillation.objective(student, batch)
    kept = schedule.kept("vision")
    assert kept.shape[1] == tokens["vision"][-1]
    by_hand = torch.stack([states[rows] for states, rows in zip(seen["teacher"], kept, strict=True)])
    error = (seen["student"] - by_hand).square().mean() / by_hand.var()
    assert float(objective) == pytest.approx(loss + float(error), rel=1e-5)
    assert float(hidden_error(student, "vision", by_hand, seen["teacher"])) == 0.0
    objective.backward()
    assert all(p.grad is None for p in distillation.dense.parameters())
