"""What long measurements share: finished parts on disk, one whole file each, and a dense model for each seed."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comp_edge.checkpoint import is_pruned, resolve
from comp_edge.errors import InputError
from comp_edge.files import read_json, write_json

LOCK_FILE, PARTS = ".lock", "parts"


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
    resolve(found)
    if is_pruned(found):
        raise InputError(f"{str(found)!r} is pruned already; give a dense model, this command prunes it itself.")
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


def write_bytes(path: Path, content: bytes) -> None:
    """A file that appears whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)
        os.replace(name, path)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror or error}.") from None
