"""What long measurements share: finished parts on disk, one whole file each, jobs for the others, a dense model a seed."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comp_edge.bench.method.pool import Failure, Job, run_jobs
from comp_edge.checkpoint import check_dense
from comp_edge.errors import InputError
from comp_edge.files import read_json, write_json

LOCK_FILE, PARTS = ".lock", "parts"
RESULTS_FILE, TABLE_FILE = "results.json", "table.md"


def finished_part(path: Path, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """A part that an earlier run finished; None where there is none.

    Args:
        options: what the part's numbers depend on.

    Raises:
        InputError: it was measured with other options.
    """
    if not path.is_file():
        return None
    record = read_json(path, what="part")
    known = record.get("options", {}) if isinstance(record, dict) else {}
    for name, value in options.items():
        if known.get(name) != value:
            raise InputError(
                f"{str(path)!r} was measured with {name} {known.get(name)!r}, this run has {value!r}; give the same options or "
                "another --out."
            )
    return record


def write_part(path: Path, record: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Write a finished part, with the options that `finished_part` compares."""
    write_json(path, {**record, "options": dict(options)})


def finished_parts(out: Path, *, counts: Callable[[dict[str, Any]], bool] = lambda part: True) -> list[dict[str, Any]]:
    """All finished parts of a folder, by name.

    Args:
        counts: whether a part is one that there is something to report of.

    Raises:
        InputError: there is none that counts.
    """
    parts = [read_json(path, what="part") for path in sorted((out / PARTS).glob("*.json"))]
    if not any(map(counts, parts)):
        raise InputError(f"{str(out)!r} holds no finished parts; run the command without --redo first.")
    return parts


def write_results(out: Path, parts: list[dict[str, Any]], *, command: str | None) -> dict[str, Any]:
    """Write results.json; returns what it holds.

    Args:
        command: as it was given; None: as it was written before.
    """
    if command is None and (out / RESULTS_FILE).is_file():
        command = read_json(out / RESULTS_FILE, what="results").get("command")
    results = {"command": command, "parts": parts}
    write_json(out / RESULTS_FILE, results)
    return results


def run_parts(
    out: Path,
    list_jobs: Callable[[], Iterable[Job]],
    *,
    workers: int,
    on_progress: Callable[[int, int, str], None],
) -> list[Failure]:
    """Run what is not finished, alone in a folder; returns the jobs that went wrong.

    Args:
        list_jobs: called when the folder is this run's.
        on_progress: how much is done, of how much, what is going on.

    Raises:
        InputError: another run is at work in the folder; see also `list_jobs`.
    """
    with alone(out):
        jobs = list(list_jobs())
        total = sum(job.steps for job in jobs)
        return run_jobs(
            jobs,
            workers=workers,
            on_progress=lambda done, text: on_progress(done, total, text),
            on_end=lambda job, failure: None,
        )


def dense_model(name: str, seed: int, given: Path | None) -> str:
    """What to load as the dense model of a seed: FOLDER/NAME-SEED where it lies, otherwise the model of that name.

    Args:
        given: FOLDER, as `comp-edge bench method` leaves it in its `dense`; None: every seed prunes the same model.

    Raises:
        InputError: there is no such model, or it is pruned already; a folder was given and does not hold this seed's. (Seed 0
            is that of the shipped models, so it need not lie there.)
    """
    found: str | Path = name
    if given is not None:
        own = given / f"{Path(name).name}-{seed}"
        if own.is_dir():
            found = own
        elif seed != 0:
            raise InputError(f"dense model {str(own)!r} does not exist; --dense must hold every seed's.")
    check_dense(found)
    return str(found)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """One run at a time works in a folder; the kernel lets go of the lock when a process ends, however it ends.

    Raises:
        InputError: another one is at work.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another run is at work in {str(out)!r}; wait for it or give another --out.") from None
        yield
