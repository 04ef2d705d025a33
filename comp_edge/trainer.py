"""The optimizer steps of a pass: on the batches of a chunk, cut into parts, in all processes, beside the dense model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from comp_edge.errors import InputError
from comp_edge.microbatches import check_divisible, micro_batches, unshared
from comp_edge.optim import Optimizer, use_muon, with_prefix
from comp_edge.parallel import Processes
from comp_edge.placement import device_of, placed
from comp_edge.recomputation import Recomputation
from comp_edge.recovery import Distillation
from comp_edge.settings import PruneConfig
from comp_edge.tasks import Task
from comp_edge.tasks.packing import examples

MODEL, OPTIMIZER = "model.", "optimizer."  # what names of a checkpoint's tensors begin with


class Trainer:
    """Trains a model that is masked, then smaller; made while it is still dense, which is copied as the teacher.

    Attributes:
        distillation: the objective, with the dense model in it; None without training, where there is nothing to learn.
        optimizer: None without training, and until `begin`.
    """

    def __init__(self, model: Any, task: Task, *, config: PruneConfig, seed: int, processes: Processes) -> None:
        self.model, self.task, self.config, self.seed, self.processes = model, task, config, seed, processes
        self.distillation = (
            Distillation(model, task, weight=config.distill, hidden=config.distill_hidden) if config.trains else None
        )
        # Decided once: what is left at the end may be small enough.
        self.muon = use_muon(model.parameters()) if config.muon is None else config.muon
        self.optimizer: Optimizer | None = None
        self.recomputation: Recomputation | None = None

    def check_batch(self, batch: dict[str, Tensor]) -> None:
        """Check that training batches, of which this is one, can be cut as the options ask.

        Raises:
            InputError: they cannot.
        """
        parts = self.config.accumulate * self.processes.count
        if self.config.trains:
            check_divisible(self.task, batch, parts)
        if parts > 1 and self.config.distill_hidden:
            raise InputError(
                f"distill_hidden {self.config.distill_hidden} measures errors against the variance of a whole batch, which "
                "its parts do not see; give 0 with several processes or accumulation."
            )

    def begin(self) -> None:
        """Train what the model now is: once masks are attached, and again once it is smaller."""
        if not self.config.trains:
            return
        config = self.config
        named = self.model.named_parameters()
        self.optimizer = Optimizer(named, matrix_lr=config.matrix_lr, lr=config.lr, muon=self.muon)
        if config.checkpointing:
            self.recomputation = Recomputation(self.model)

    def end(self) -> None:
        """Leave the model's parts alone."""
        if self.recomputation is not None:
            self.recomputation.detach()
            self.recomputation = None

    @contextmanager
    def batches(self, chunk: int, count: int) -> Iterator[Iterable[dict[str, Tensor]]]:
        """The batches of a chunk; dropout within it is drawn by its seed, whatever was drawn before."""
        seed, device = self.seed * 100_003 + 17 + chunk, device_of(self.model)
        own = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
        with torch.random.fork_rng(**own):
            torch.manual_seed(seed + self.processes.index)
            yield placed(itertools.islice(self.task.train_batches(seed), count), device)

    def step(self, batch: dict[str, Tensor], factor: float, *, where: str, processes: Processes | None = None) -> float:
        """One optimizer step on a batch of all processes; the task's own loss on it, for the record.

        Args:
            factor: of the peak learning rates.
            where: says in an error which step it was.
            processes: that share the batch, where not all do.

        Raises:
            FloatingPointError: loss or gradient are not finite; the parameters are as they were.
        """
        processes, recorded = processes or self.processes, 0.0

        def objectives() -> Iterator[Tensor]:
            nonlocal recorded
            each = self._own_parts(batch, processes)
            parts = micro_batches(self.task, batch, each * processes.count, own=processes.own(each))
            for weight, part in parts:
                objective, loss = self.distillation.objective(self.model, part)
                recorded += weight * loss
                yield weight * objective

        try:
            self.optimizer.step_in_parts(objectives(), factor=factor, processes=processes)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}, in {where}") from None
        return processes.sum(recorded)

    def _own_parts(self, batch: dict[str, Tensor], processes: Processes) -> int:
        """Into how many parts this process cuts its share of a training batch."""
        wanted = self.config.accumulate
        if self.config.distill_hidden or getattr(self.task, "least_examples", 1) > 1:
            return wanted
        rows = (examples(batch) or 0) // (wanted * processes.count)
        return wanted * max(1, min(unshared(self.model, batch), rows))

    def undo(self) -> None:
        """As before the first step: the teacher's weights are those that the model had, and optimizers remember nothing."""
        self.model.load_state_dict(self.distillation.dense.state_dict())
        self.optimizer.load_state_tensors({})

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that training has changed, by name."""
        tensors = {f"{MODEL}{k}": v for k, v in self.model.state_dict().items()}
        return tensors | {f"{OPTIMIZER}{k}": v for k, v in self.optimizer.state_tensors().items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `state_tensors` gave."""
        self.model.load_state_dict(with_prefix(tensors, MODEL))
        self.optimizer.load_state_tensors(with_prefix(tensors, OPTIMIZER))
