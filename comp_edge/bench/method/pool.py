"""Jobs in worker processes of one thread each: one at a time, in order, those first whose needs are done."""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from comp_edge.errors import InputError
from comp_edge.workers import begin_worker

REFUSED, FAILED = "refused", "failed"
TELL_EVERY = 0.25  # seconds
Tell = Callable[[int, str], None]


@dataclass(frozen=True)
class Job:
    """Something to do.

    Attributes:
        call: what to do; gets a function to tell its progress (steps done, what is going on). It must be picklable, and
            leaves its result on disk.
        steps: how much it is.
        needs: key of a job that must be done before.
        name: for people.
    """

    key: str
    call: Callable[[Tell], None]
    steps: int
    name: str
    needs: str | None = None


@dataclass(frozen=True)
class Failure:
    """A job that gave no result: it was refused (`InputError`), or failed."""

    key: str
    kind: str
    reason: str


@dataclass
class _Board:
    """What is waiting, running, done and failed."""

    waiting: list[Job]
    done: set[str] = field(default_factory=set)
    failed: dict[str, Failure] = field(default_factory=dict)

    def take(self) -> Job | None:
        """The first job that can begin; what needs a failed one fails as well."""
        for job in list(self.waiting):
            if job.needs in self.failed:
                self.waiting.remove(job)
                because = self.failed[job.needs]
                self.failed[job.key] = Failure(job.key, because.kind, f"{job.needs} is missing: {because.reason}")
            elif job.needs is None or job.needs in self.done:
                self.waiting.remove(job)
                return job
        return None

    def close(self, job: Job, failure: Failure | None) -> None:
        """A job is over."""
        if failure is None:
            self.done.add(job.key)
        else:
            self.failed[job.key] = failure


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int,
    on_progress: Callable[[int, str], None],
    on_end: Callable[[Job, Failure | None], None],
) -> list[Failure]:
    """Run all jobs; with one worker in this process, otherwise in processes that die with this one.

    Args:
        on_progress: steps done in all jobs so far, what is going on in one of them.
        on_end: a job is over.

    Returns:
        the jobs that gave no result.
    """
    board = _Board(list(jobs))
    if workers == 1:
        _run_here(board, on_progress, on_end)
    else:
        _run_apart(board, min(workers, max(len(jobs), 1)), on_progress, on_end)
    return list(board.failed.values())


def attempt(job: Job, tell: Tell) -> Failure | None:
    """Run a job; what goes wrong in one cell is no reason to leave the others undone."""
    try:
        job.call(tell)
    except InputError as error:
        return Failure(job.key, REFUSED, str(error))
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return Failure(job.key, FAILED, f"{type(error).__name__}: {error}")
    return None


# ---- in this process


def _run_here(board: _Board, on_progress: Any, on_end: Any) -> None:
    finished = 0
    with _one_thread():
        while (job := board.take()) is not None:

            def tell(done: int, text: str, name: str = job.name, before: int = finished) -> None:
                on_progress(before + done, f"{name}: {text}")

            failure = attempt(job, tell)
            finished += job.steps
            board.close(job, failure)
            on_end(job, failure)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---- in worker processes


@dataclass
class _Worker:
    process: Any
    connection: Connection
    job: Job | None = None
    done: int = 0


def _run_apart(board: _Board, count: int, on_progress: Any, on_end: Any) -> None:
    context = multiprocessing.get_context("spawn")  # forked threads of torch would hang
    finished = 0

    def hire() -> _Worker:
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there,), daemon=True)
        process.start()
        there.close()
        return _Worker(process, here)

    def give_all() -> None:
        for place, worker in enumerate(workers):
            if worker.job is None and (job := board.take()) is not None:
                if not worker.process.is_alive():
                    worker = workers[place] = hire()
                worker.job, worker.done = job, 0
                worker.connection.send(job)

    workers = [hire() for _ in range(count)]
    try:
        give_all()
        while busy := [worker for worker in workers if worker.job is not None]:
            for connection in wait([worker.connection for worker in busy]):
                worker = next(w for w in busy if w.connection is connection)
                job = worker.job
                try:
                    message = connection.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    message = Failure(job.key, FAILED, f"its process ended with exit code {worker.process.exitcode}")
                if isinstance(message, tuple):
                    worker.done = message[0]
                    on_progress(finished + sum(w.done for w in busy), f"{job.name}: {message[1]}")
                    continue
                finished += job.steps
                worker.job, worker.done = None, 0
                board.close(job, message)
                on_end(job, message)
                give_all()  # others may have waited for this job
                break  # `busy` has changed
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


def _serve(connection: Connection) -> None:
    """A worker: takes jobs, tells their progress as (steps, text), and answers with a failure or None."""
    begin_worker()
    with suppress(EOFError):
        while True:
            job, last = connection.recv(), 0.0

            def tell(done: int, text: str) -> None:
                nonlocal last
                if (now := time.monotonic()) - last >= TELL_EVERY:
                    last = now
                    connection.send((done, text))

            connection.send(attempt(job, tell))
