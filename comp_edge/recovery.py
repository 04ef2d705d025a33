"""Training that recovers what pruning cost: the task's loss, and what the dense model would have said and felt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from comp_edge.families import family_of
from comp_edge.schedule import active_schedule, drops_tokens
from comp_edge.tasks import Task


class Distillation:
    """The dense model as a teacher: of answer logits, and of hidden states where tokens survive.

    A task takes part by having `logits(model, batch)` and `targets(batch)`, as `VQATask` has; others are trained on
    their own loss alone. Hidden states are what the last layer of an encoder gives (the vision tower, the text tower or
    encoder). Language models of LLaVA's kind are left out: their hidden states are a step away from the logits.

    Attributes:
        dense: the dense model, frozen.

    Args:
        teacher: the dense model; copied, frozen.
        weight: share of the teacher's logits in the objective, 0 to 1.
        hidden: weight of the error of hidden states (relative to their variance), on top of that; 0 leaves them out.
        temperature: softens both distributions; the term is scaled by its square to keep gradients comparable.
    """

    def __init__(
        self, teacher: Any, task: Task, *, weight: float = 0.7, hidden: float = 0.0, temperature: float = 2.0
    ) -> None:
        self.task, self.temperature, self.hidden = task, temperature, hidden
        takes_part = hasattr(task, "logits") and hasattr(task, "targets")
        self.weight = weight if takes_part else 0.0
        self.hidden = hidden if takes_part else 0.0
        self.dense = copy.deepcopy(teacher).eval().requires_grad_(False)

    def objective(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
        """What to minimise on a batch, and the task's own loss for the record."""
        if not self.weight and not self.hidden:
            loss = self.task.loss(model, batch)
            return loss, float(loss.detach())
        with torch.no_grad(), _last_hidden(self.dense, on=self.hidden > 0, frozen=True) as teacher_hidden:
            wanted = self.task.logits(self.dense, batch)
        with _last_hidden(model, on=self.hidden > 0) as student_hidden:
            logits, targets = self.task.logits(model, batch), self.task.targets(batch)
        answered = targets.flatten() != -100
        student, teacher = logits.flatten(0, 1)[answered].float(), wanted.flatten(0, 1)[answered].float()
        loss = F.cross_entropy(student, targets.flatten()[answered])
        t = self.temperature
        term = F.kl_div((student / t).log_softmax(-1), (teacher / t).log_softmax(-1), log_target=True,
                        reduction="batchmean") * t * t  # fmt: skip
        objective = (1 - self.weight) * loss + self.weight * term
        for name, states in teacher_hidden.items():
            objective = objective + self.hidden * hidden_error(model, name, student_hidden[name], states)
        return objective, float(loss.detach())


def hidden_error(model: Any, stream: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of the surviving tokens' hidden states, over the variance of the teacher's (a scalar).

    Args:
        student: [b, n, d] of the tokens that reached the last layer in the latest forward pass.
        teacher: [b, m, d] of all tokens, n <= m.
    """
    schedule = active_schedule(model)
    kept = None if schedule is None else schedule.kept(stream)
    valid = None if schedule is None else schedule.reached(stream)
    if kept is not None:
        teacher = teacher.gather(1, kept[..., None].expand(-1, -1, teacher.shape[-1]))
        valid = valid.gather(1, kept)
    if valid is not None:
        student, teacher = student[valid], teacher[valid]
    student, teacher = student.float(), teacher.float()
    return F.mse_loss(student, teacher) / teacher.var().clamp(min=torch.finfo(torch.float32).tiny)


@contextmanager
def _last_hidden(model: Any, *, on: bool, frozen: bool = False) -> Iterator[dict[str, Tensor]]:
    """While active, notes what the last layer of every encoder gives: [b, n, d] per stream."""
    found: dict[str, Tensor] = {}
    handles = []
    if on:
        family = family_of(model)
        generative = family.fusion(model) is not None
        for name, stream in family.streams(model).items():
            if stream.follows or stream.packed or generative and name == "language":
                continue
            if frozen and drops_tokens(model, name):
                continue  # a teacher that was pruned itself has other tokens than its student
            handles.append(stream.layers[-1].module.register_forward_hook(_note(found, name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _note(found: dict[str, Tensor], name: str) -> Callable:
    def note(module: Any, args: tuple, output: Any) -> None:
        found[name] = output if isinstance(output, Tensor) else output[0]

    return note
