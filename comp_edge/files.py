"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from comp_edge.errors import InputError


def read_json(path: str | Path, *, what: str) -> Any:
    """Parse a JSON file; `what` names it in the error ("plan", "trace", ...).

    Raises:
        InputError: the file is missing, unreadable or not JSON (with line and column).
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{what} {str(path)!r} does not exist.") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{what} {str(path)!r} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg})."
        ) from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{what} {str(path)!r} cannot be read: {error}.") from None


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically: through a temporary file in the same folder, then a rename.

    Raises:
        InputError: the folder cannot be written to (read-only, full, missing).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fchmod(file.fileno(), 0o644)  # mkstemp makes it private; it is for others to read
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror or error}.") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically (see `write_text`)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_writable(folder: str | Path) -> None:
    """Fail early, before hours of work, where the output could not be written at the end.

    Raises:
        InputError: `folder` is a file, or neither it nor its nearest existing parent can be written to.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {str(folder)!r} is a file; give a folder (it is created when missing).")
    probe = folder
    while not probe.exists():
        probe = probe.parent
    try:
        with tempfile.TemporaryFile(dir=probe):
            pass
    except OSError as error:
        raise InputError(f"output {str(folder)!r} cannot be written: {error.strerror or error}.") from None


@contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """A temporary sibling folder that takes `target`'s place when the block ends without an exception.

    A previous `target` is replaced as a whole; when anything goes wrong it stays as it was.

    Raises:
        InputError: the folder cannot be written to.
    """
    target = Path(target)
    check_writable(target)
    staging = retired = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        staging.chmod(0o755)
        yield staging
        for path in staging.rglob("*"):  # safetensors makes its files private
            path.chmod(0o755 if path.is_dir() else 0o644)
        if target.exists():
            retired = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
            os.replace(target, retired / "old")
        os.replace(staging, target)
    except (OSError, SafetensorError) as error:
        if retired is not None and not target.exists():
            os.replace(retired / "old", target)
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {str(target)!r}: {reason}.") from None
    finally:
        for leftover in (staging, retired):
            if leftover is not None:
                shutil.rmtree(leftover, ignore_errors=True)
