"""Training that recovers what pruning cost: the task's loss, and what the dense model would have said."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from comp_edge.tasks import Task


class Distillation:
    """The dense model as a teacher of answer logits.

    A task takes part by having `logits(model, batch)` and `targets(batch)`, as `VQATask` has; others are trained on
    their own loss alone.

    Attributes:
        dense: the dense model, frozen.

    Args:
        teacher: the dense model; copied, frozen.
        weight: share of the teacher's term in the objective, 0 to 1.
        temperature: softens both distributions; the term is scaled by its square to keep gradients comparable.
    """

    def __init__(self, teacher: Any, task: Task, *, weight: float = 0.7, temperature: float = 2.0) -> None:
        self.task, self.temperature = task, temperature
        self.weight = weight if hasattr(task, "logits") and hasattr(task, "targets") else 0.0
        self.dense = copy.deepcopy(teacher).eval().requires_grad_(False)

    def objective(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
        """What to minimise on a batch, and the task's own loss for the record."""
        if not self.weight:
            loss = self.task.loss(model, batch)
            return loss, float(loss.detach())
        logits, targets = self.task.logits(model, batch), self.task.targets(batch)
        with torch.no_grad():
            wanted = self.task.logits(self.dense, batch)
        answered = targets.flatten() != -100
        student, teacher = logits.flatten(0, 1)[answered].float(), wanted.flatten(0, 1)[answered].float()
        loss = F.cross_entropy(student, targets.flatten()[answered])
        t = self.temperature
        term = F.kl_div((student / t).log_softmax(-1), (teacher / t).log_softmax(-1), log_target=True,
                        reduction="batchmean") * t * t  # fmt: skip
        return (1 - self.weight) * loss + self.weight * term, float(loss.detach())
