"""Training batches in parts: for less memory, or for several processes. Their weighted sum is the batch, to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from comp_edge.errors import InputError
from comp_edge.schedule import active_schedule
from comp_edge.tasks.dialogue import IGNORE
from comp_edge.tasks.packing import examples, take_rows


def micro_batches(
    task: Any, batch: dict[str, Tensor], parts: int, *, own: slice = slice(None)
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """A batch cut along its rows, with the weight of each part: losses times weights add up to the loss of the batch.

    A loss is a mean, and not every row counts alike in it: with `targets(batch)`, as `VQATask` has it, the answer tokens
    count, otherwise rows do. Rows that show the same image stay together where there are enough images. A part in which
    nothing counts is left out.

    Args:
        own: which of the parts are wanted; by default all.

    Raises:
        InputError: the batch cannot be cut into so many parts (see `check_divisible`).
    """
    if parts == 1:
        yield 1.0, batch
        return
    check_divisible(task, batch, parts)
    whole = _terms(task, batch)
    for start, stop in list(pairwise(_bounds(batch, parts)))[own]:
        part = take_rows(batch, slice(start, stop))
        if terms := _terms(task, part):
            yield terms / whole, part


def check_divisible(task: Any, batch: dict[str, Tensor], parts: int) -> None:
    """Whether a training batch can be cut into so many parts.

    Raises:
        InputError: the task compares the examples of a batch with each other, the batch's tensors disagree on how many
            examples there are, or there are fewer than parts.
    """
    if parts == 1:
        return
    what = f"{parts} parts (micro-batches times processes)"
    name = getattr(task, "name", type(task).__name__)
    if getattr(task, "least_examples", 1) > 1:
        raise InputError(
            f"task {name!r} compares the examples of a batch with each other, which cannot be cut into {what}; use one "
            "process and no accumulation."
        )
    size = examples(batch)
    if size is None:
        raise InputError(
            f"a training batch of task {name!r} has tensors of different lengths and cannot be cut into {what}; give each "
            "example one row of every tensor, or use one process and no accumulation."
        )
    if size < parts:
        raise InputError(f"a training batch of task {name!r} has {size} examples and cannot be cut into {what}.")


def unshared(model: Any, batch: dict[str, Tensor]) -> int:
    """How many times more language tokens the model computes on since it drops some: at least 1.

    As long as it drops none, questions of an image share its tokens (see `tasks.folding.shared_prefix_logits`). A drop
    depends on the question, so every question then has image tokens of its own, and a batch that fitted into memory would
    not any more. Cut into so many parts it does.
    """
    schedule = active_schedule(model)
    if schedule is None or schedule.fusion is None or not schedule.drops("language") or "image_ids" not in batch:
        return 1
    ids, tokens = batch["input_ids"], schedule.tokens["language"]
    rows, images = len(ids), len(batch["image_ids"].unique())
    shown = int((ids == model.config.image_token_id).sum()) // rows
    together = images * shown + rows * (ids.shape[1] - shown)
    return max(1, round(rows * ids.shape[1] * sum(tokens) / (tokens[0] * len(tokens)) / together))


def _terms(task: Any, batch: dict[str, Tensor]) -> int:
    """Over how many terms the task's loss on a batch is averaged."""
    targets = getattr(task, "targets", None)
    return examples(batch) if targets is None else int((targets(batch) != IGNORE).sum())


def _bounds(batch: dict[str, Tensor], parts: int) -> list[int]:
    """Row numbers at which the parts begin, and the end."""
    rows = examples(batch)
    starts = torch.arange(rows)
    if (shown := batch.get("image_ids")) is not None:
        first = shown.diff(prepend=shown[:1] - 1) != 0  # an image is encoded once for rows that follow each other
        if int(first.sum()) >= parts:
            starts = first.nonzero()[:, 0]
    return [int(starts[i * len(starts) // parts]) for i in range(parts)] + [rows]
