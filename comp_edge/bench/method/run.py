"""A whole run: what is to be done, by whom, and what came of it."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from comp_edge.bench.method.cell import OPTIONS_FILE, cell_file, run_cell, work_folder
from comp_edge.bench.method.dense import DenseModel, Recipe, find_dense, prepare
from comp_edge.bench.method.grid import Cell, Target
from comp_edge.bench.method.pool import Failure, Job, run_jobs
from comp_edge.bench.method.results import load_cells, write_results
from comp_edge.bench.parts import alone
from comp_edge.errors import InputError
from comp_edge.files import check_writable, read_json
from comp_edge.options import named_options

# What cells of one table may differ in: strategies decide these themselves where nobody else does, models and tasks differ.
OWN = ("importance", "cip", "cit", "task", "dense_weights")
Progress = Callable[[int, int, str], None]


def run(
    cells: Sequence[Cell],
    *,
    out: Path,
    ours: str,
    command: str,
    workers: int,
    dense: Path | None,
    recipe: Callable[[Target], Recipe],
    on_progress: Progress,
) -> list[dict[str, Any]]:
    """Run the cells that are not finished, and write results.json and table.md.

    Args:
        dense: a folder with dense models (see `find_dense`).
        recipe: how a target's dense models are trained.
        on_progress: optimizer steps done, all of them, what is going on.

    Returns:
        the cells that gave no result: their labels, `kind` ("refused" or "failed") and `reason`.

    Raises:
        InputError: the folder holds cells of the same name, or an unfinished one, with other options; another run is at work
            in it; see also `find_dense`.
    """
    check_writable(out)
    with alone(out):
        models = {
            (cell.target, cell.dense_seed): find_dense(
                cell.target, cell.dense_seed, out=out, given=dense, recipe=recipe, test_examples=cell.test_examples
            )
            for cell in cells
        }
        check_options(cells, models, out)
        open_ = [cell for cell in cells if not cell_file(out, cell).is_file()]
        closed = [cell for cell in cells if cell_file(out, cell).is_file()]
        for cell in closed:  # killed right after the cell was written
            shutil.rmtree(work_folder(out, cell), ignore_errors=True)
        jobs = list_jobs(open_, models, out)
        by_key = {cell.key: cell for cell in cells}
        finished, before = len(closed), sum(cell.steps for cell in closed)
        total = before + sum(job.steps for job in jobs)
        failures: dict[str, dict[str, Any]] = {}

        def tell(done: int, text: str) -> None:
            on_progress(before + done, total, f"{finished}/{len(cells)} cells, {text}")

        def end(job: Job, failure: Failure | None) -> None:
            nonlocal finished
            if job.key in by_key:
                finished += failure is None
                book([] if failure is None else [failure])

        def book(failed: Sequence[Failure]) -> None:
            for one in failed:
                if one.key in by_key:
                    failures[one.key] = {**by_key[one.key].labels, "kind": one.kind, "reason": one.reason}
            write_results(out, ours=ours, command=command, failures=list(failures.values()))

        tell(0, "begin")
        book(run_jobs(jobs, workers=workers, on_progress=tell, on_end=end))
    return list(failures.values())


def list_jobs(cells: Sequence[Cell], models: dict[tuple[Target, int], DenseModel], out: Path) -> list[Job]:
    """What is to be done, in order: a dense model comes right before the first cell that needs it."""
    jobs: dict[str, Job] = {}
    for cell in cells:
        dense = models[cell.target, cell.dense_seed]
        needs = None
        if not dense.complete:
            needs = f"dense model {dense.key}"
            if needs not in jobs:
                jobs[needs] = Job(needs, functools.partial(prepare, dense), dense.cost, needs)
        call = functools.partial(run_cell, cell, dense, out)
        jobs[cell.key] = Job(cell.key, call, cell.steps, cell.name, needs)
    return list(jobs.values())


def check_options(cells: Sequence[Cell], models: dict[tuple[Target, int], DenseModel], out: Path) -> None:
    """See `run`."""
    weights = {key: dense.weights for key, dense in models.items()}
    for cell in cells:
        now = cell.options(weights[cell.target, cell.dense_seed])
        finished, begun = cell_file(out, cell), work_folder(out, cell) / OPTIONS_FILE
        if finished.is_file():
            _compare(read_json(finished, what="cell").get("options", {}), now, cell.name, out)
        elif begun.is_file():
            _compare(read_json(begun, what="options"), now, cell.name, out)
    wanted = {cell.method.label: _shared(cell.method.label, cell.options(None)) for cell in cells}
    # Cells are compared in pairs of the same dense seed: what was trained from it elsewhere is another model.
    trained = {(target.label, seed): digest for (target, seed), digest in weights.items() if digest is not None}
    for other in load_cells(out):
        shared = _shared(other["strategy"], other["options"])
        name = f"{other['model']} {other['strategy']} {other['reduction']}"
        for now in wanted.values():
            _compare(shared, now, name, out)
        seed = other["dense_seed"]
        if (digest := trained.get((other["model"], seed))) is not None:
            _compare(other["options"], {"dense_weights": digest}, f"{name} of dense seed {seed}", out)


def _shared(label: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that every cell of a table must have alike: those that its label does not name."""
    own = {*OWN, *named_options(label)}
    if "stages" in own:
        own.add("stage_steps")
    return {name: value for name, value in options.items() if name not in own}


def _compare(then: dict[str, Any], now: dict[str, Any], name: str, out: Path) -> None:
    for option, value in then.items():
        if option in now and now[option] != value:
            raise InputError(
                f"{str(out)!r} holds {name} with {option} {value}, this run has {now[option]}; give the same options or "
                "another --out."
            )
