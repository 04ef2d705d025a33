"""One cell: prune, count what was done, score the result."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comp_edge.bench.method.attribution import Pricing, removed_by_mode
from comp_edge.bench.method.dense import DenseModel, Tell, test_batches
from comp_edge.bench.method.grid import Cell
from comp_edge.budget import Budget
from comp_edge.checkpoint import load_dense, load_pretrained, load_processor
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.files import read_json, write_json
from comp_edge.pruning import prune
from comp_edge.session import METRICS_FILE, STATE_FILE, TRACE_FILE, WORK_SUFFIX
from comp_edge.settings import Progress
from comp_edge.state import State
from comp_edge.tasks import load_task

OPTIONS_FILE, ROWS_FILE, FOLDER = "options.json", "rows.jsonl", "pruned"
# What a cell's file keeps of each stage.
TOLD = ("stage", "mode", "why", "also", "walks", "score", "cost_fraction")


class UnequalBudget(RuntimeError):
    """A pruning took another number of optimizer steps than every cell of the run is to take."""


class CountingTask:
    """A task that counts the rows of all batches that gradients of the model were computed on; otherwise the same."""

    def __init__(self, task: Any) -> None:
        self._task = task
        self._last: Any = None
        self.rows = 0

    @property
    def __class__(self) -> type:  # what is checked of tasks by `isinstance` holds for this one as well
        return type(self._task)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._task, name)
        return self._counting(value) if name in ("loss", "logits") else value

    def _counting(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(call)
        def counted(model: Any, batch: dict[str, Tensor], *args: Any, **options: Any) -> Tensor:
            # Selection looks at the model in eval mode, and a teacher is asked without gradients. A batch counts once,
            # though an objective may look at it twice.
            if model.training and torch.is_grad_enabled() and batch is not self._last:
                self._last = batch
                self.rows += len(next(iter(batch.values())))
            return call(model, batch, *args, **options)

        return counted

    def taken(self) -> int:
        """The rows since the last time that this was asked."""
        rows, self.rows, self._last = self.rows, 0, None
        return rows


class Ledger:
    """Rows of every optimizer step, on disk: a step that is repeated after an interruption counts once.

    A line a step is appended: what a killed process has handed to the kernel is not lost.
    """

    def __init__(self, path: Path, *, limit: int) -> None:
        self.path, self.limit = path, limit

    def book(self, step: int, rows: int) -> None:
        """Step number `step` (the first is 1) took so many rows.

        Raises:
            UnequalBudget: there is no such step.
        """
        if not 1 <= step <= self.limit:
            raise UnequalBudget(f"optimizer step {step} was taken; every cell of this run takes {self.limit}")
        with self.path.open("a", encoding="ascii") as file:
            file.write(f"[{step}, {rows}]\n")

    def total(self) -> tuple[int, int]:
        """Steps and samples that were taken.

        Raises:
            UnequalBudget: other steps than all up to the limit.
        """
        rows: dict[int, int] = {}
        with suppress(FileNotFoundError):
            for line in self.path.read_text(encoding="ascii").splitlines():
                with suppress(json.JSONDecodeError):  # the process was killed in the middle of it
                    step, count = json.loads(line)
                    rows[step] = count
        if set(rows) != set(range(1, self.limit + 1)):
            raise UnequalBudget(f"{len(rows)} optimizer steps were counted; every cell of this run takes {self.limit}")
        return len(rows), sum(rows.values())


def cell_file(out: Path, cell: Cell) -> Path:
    """The file of a finished cell."""
    return out / "cells" / f"{cell.key}.json"


def work_folder(out: Path, cell: Cell) -> Path:
    """Where a cell keeps what it needs to go on."""
    return out / "work" / cell.key


def run_cell(cell: Cell, dense: DenseModel, out: Path, tell: Tell) -> None:
    """Run a cell, or go on with it, and write its file.

    Raises:
        InputError: what `prune` refuses, such as a reduction that the method cannot reach.
        UnequalBudget: it took other steps than it should.
    """
    work = work_folder(out, cell)
    model, processor = load_dense(dense.folder), load_processor(dense.folder)
    task = CountingTask(load_task(cell.target.task, processor, model))
    family = family_of(model)
    start = State.of(model, base=cell.target.model, request=family.request(model, task.example_inputs()))
    price = Pricing(model, start)
    follows = dict(start.follows)
    beginning = start.to_json()
    options = cell.options(dense.weights)
    if not (work / FOLDER / METRICS_FILE).is_file():  # otherwise only the score is missing
        _prune(cell, model, task, processor, work, options, tell)
    tell(cell.steps, "score")
    metrics = read_json(work / FOLDER / METRICS_FILE, what="metrics")
    trace = [json.loads(line) for line in (work / FOLDER / TRACE_FILE).read_text(encoding="utf-8").splitlines()]
    steps, samples = Ledger(work / ROWS_FILE, limit=cell.steps).total()
    if metrics["steps"] != steps:
        raise UnequalBudget(f"the pruning says that it took {metrics['steps']} optimizer steps; {steps} were counted")
    # What counts is what can be loaded again.
    score = task.score(load_pretrained(work / FOLDER), test_batches(task, cell.test_examples))
    seconds = metrics["seconds"]
    record = {
        **cell.labels,
        "score": score,
        "dense_score": dense.scores["test_score"],
        "val_score": metrics["pruned"]["val_score"],
        "steps": steps,
        "samples": samples,
        "selection_seconds": seconds["selection"],
        "training_seconds": seconds["training"],
        "scoring_seconds": seconds["scoring"],
        "peak_memory_bytes": metrics["peak_memory_bytes"],
        "macs": metrics["pruned"]["macs"],
        "dense_macs": metrics["dense"]["macs"],
        "stages": metrics["stages"],
        "modes": removed_by_mode(beginning, trace, price=price, follows=follows),
        "options": options,
    }
    told = [{name: stage[name] for name in TOLD if name in stage} for stage in trace]
    write_json(cell_file(out, cell), {**record, "trace": told})
    shutil.rmtree(work, ignore_errors=True)


def _prune(
    cell: Cell, model: Any, task: CountingTask, processor: Any, work: Path, options: dict[str, Any], tell: Tell
) -> None:
    out = work / FOLDER
    checkpoint = out.with_name(out.name + WORK_SUFFIX) / STATE_FILE
    if not (resume := checkpoint.is_file()):
        shutil.rmtree(work, ignore_errors=True)
    write_json(work / OPTIONS_FILE, options)
    ledger = Ledger(work / ROWS_FILE, limit=cell.steps)

    message = ""

    def on_progress(progress: Progress) -> None:
        nonlocal message
        message = progress.message or message
        if (rows := task.taken()) and progress.phase != "scout":  # what was trained for trial was put back
            ledger.book(progress.step, rows)
        text = message if progress.phase in ("prune", "scout") and message else progress.phase
        tell(min(progress.step, cell.steps), text)

    torch.manual_seed(cell.prune_seed)  # for what may draw from it: the result is not to depend on the cell before
    try:
        prune(
            model,
            task,
            budget=Budget(macs=round(1 - cell.reduction, 12)),
            strategy=cell.method.strategy,
            out=out,
            seed=cell.prune_seed,
            config=cell.method.config,
            processor=processor,
            base=cell.target.model,
            resume=resume,
            evaluate=False,
            on_progress=on_progress,
        )
    except InputError:
        if not checkpoint.is_file():  # refused before anything was done
            shutil.rmtree(work, ignore_errors=True)
        raise
