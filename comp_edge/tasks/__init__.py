"""What a model should be good at: data, loss and score behind one small protocol."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from comp_edge.errors import InputError

BUILT_IN = {
    "digit_pairs": ("comp_edge.tasks.digit_pairs", "DigitPairs"),
    "digit_vqa": ("comp_edge.tasks.digit_vqa", "DigitVQA"),
    "easy_vqa": ("comp_edge.tasks.easy_vqa", "EasyVQA"),
    "synthetic": ("comp_edge.tasks.synthetic", "Synthetic"),
}


@runtime_checkable
class Task(Protocol):
    """What the pruner needs to know of a task. Constructed as `Class(processor)`.

    Batches are made on the CPU. `loss` and `score` get them where the model is, and what tensors they make of their own must be
    there, too.
    """

    def train_batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Endless training batches, a function of the seed alone."""

    def val_batches(self) -> Iterable[dict[str, Tensor]]:
        """Batches that steer the pruning."""

    def test_batches(self) -> Iterable[dict[str, Tensor]]:
        """Batches for the final score; nothing is ever chosen on them."""

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """A scalar to minimise."""

    def score(self, model: Any, batches: Iterable[dict[str, Tensor]]) -> float:
        """Higher is better."""

    def example_inputs(self) -> dict[str, Tensor]:
        """Inputs of one request (batch 1), as `forward` takes them; its text length is the plan's reference."""


def load_task(spec: str, processor: Any, model: Any = None) -> Task:
    """A task by name (see `BUILT_IN`) or as `path/to/file.py:ClassName`, constructed with the processor.

    Args:
        model: the model that the task is for; given as well to a class whose constructor takes a `model`. (BLIP's models
            share a processor: of them only the model says what they do.)

    Raises:
        InputError: unknown name, missing file or class, or a class that is no task.
    """
    found = task_class(spec)
    if model is not None and "model" in inspect.signature(found).parameters:
        return found(processor, model=model)
    return found(processor)


def task_class(spec: str) -> type:
    """The class behind a task's name (see `load_task`), without constructing it."""
    if spec in BUILT_IN:
        module, name = BUILT_IN[spec]
        return getattr(importlib.import_module(module), name)
    path, _, name = spec.rpartition(":")
    if not path:
        known = ", ".join(sorted(BUILT_IN))
        raise InputError(f"unknown task {spec!r}: give one of {known}, or path/to/file.py:ClassName.")
    file = Path(path)
    if not file.is_file():
        raise InputError(f"task file {path!r} does not exist (task {spec!r}).")
    module_name = f"comp_edge_task_{file.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, file)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"task file {path!r} is not a Python file.")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises is the user's to see, in one line
        raise InputError(f"task file {path!r} cannot be imported: {type(error).__name__}: {error}.") from error
    found = getattr(module, name, None)
    if not isinstance(found, type):
        classes = ", ".join(sorted(k for k, v in vars(module).items() if isinstance(v, type))) or "none"
        raise InputError(f"task file {path!r} has no class {name!r}; its classes are: {classes}.")
    missing = [m for m in ("train_batches", "val_batches", "test_batches", "loss", "score", "example_inputs")
               if not callable(getattr(found, m, None))]  # fmt: skip
    if missing:
        raise InputError(f"class {name!r} in {path!r} is no task: it lacks {', '.join(missing)}.")
    try:
        inspect.signature(found).bind(None)
    except TypeError as error:
        raise InputError(f"class {name!r} in {path!r} cannot be constructed with a processor alone: {error}.") from None
    return found


def take_examples(batches: Iterable[dict[str, Tensor]], count: int) -> Iterator[dict[str, Tensor]]:
    """Whole batches from the beginning, until they hold at least `count` examples."""
    taken = 0
    for batch in batches:
        if taken >= count:
            return
        yield batch
        taken += len(next(iter(batch.values())))
