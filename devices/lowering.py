"""Programs lowered ahead, by several processes: lowering takes far longer than timing what it gives."""

from __future__ import annotations

import gc
import multiprocessing
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from comp_edge.plan import Plan
from comp_edge.workers import begin_worker
from devices.errors import DeviceError
from devices.programs import Program, Subject, write_programs


@dataclass(frozen=True)
class Wanted:
    """A plan to lower; `layers` and `methods` as `devices.programs.write_programs` takes them."""

    plan: Plan
    layers: Mapping[str, int] | None = None
    methods: Sequence[str] = ()


@contextmanager
def lowered_ahead(
    subject: Subject, wanted: Sequence[Wanted], folder: Path, *, form: str, jobs: int
) -> Iterator[Iterator[list[Program]]]:
    """The programs of one plan after the other; their files are gone when the next ones are asked for.

    As many plans as there are jobs are lowered at once, and none while what they gave is timed: neighbours that work would
    slow it down.

    Args:
        form: see `devices.programs.write_programs`.
        jobs: processes; one means this one.

    Raises:
        DeviceError: a process was killed.
        InputError: a plan has no deployment form.
    """
    lower = partial(_lower, subject, form)
    if min(jobs, len(wanted)) <= 1:
        yield _one_by_one((lower(folder / "programs", one) for one in wanted), [folder / "programs"] * len(wanted))
        return
    context = multiprocessing.get_context("spawn")  # forked threads of torch would hang
    with ProcessPoolExecutor(min(jobs, len(wanted)), mp_context=context, initializer=begin_worker) as pool:
        try:
            yield _in_batches(pool, lower, wanted, folder, jobs)
        except BrokenProcessPool:
            raise DeviceError(
                f"one of {jobs} processes that lower programs was killed, perhaps for lack of memory; give fewer with --jobs."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _lower(subject: Subject, form: str, folder: Path, wanted: Wanted) -> list[Program]:
    try:
        return write_programs(subject, wanted.plan, folder, layers=wanted.layers, methods=wanted.methods, form=form)
    finally:
        gc.collect()  # graphs are full of circles and hold weights; a dozen models would fill the memory


def _in_batches(
    pool: ProcessPoolExecutor, lower: partial[list[Program]], wanted: Sequence[Wanted], folder: Path, jobs: int
) -> Iterator[list[Program]]:
    for start in range(0, len(wanted), jobs):
        batch = wanted[start : start + jobs]
        folders = [folder / f"programs-{index}" for index in range(len(batch))]
        futures = [pool.submit(lower, *one) for one in zip(folders, batch, strict=True)]
        wait(futures)
        yield from _one_by_one((future.result() for future in futures), folders)


def _one_by_one(each: Iterator[list[Program]], folders: Sequence[Path]) -> Iterator[list[Program]]:
    """Each, with its folder for as long as it is the last that was asked for."""
    for folder in folders:
        try:
            yield next(each)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
