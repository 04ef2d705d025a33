"""Files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from comp_edge.errors import InputError


def cache_folder() -> Path:
    """Where data sets and agents are kept: $COMP_EDGE_CACHE, else comp-edge below the user's cache folder."""
    if folder := os.environ.get("COMP_EDGE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "comp-edge"


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


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically: through a temporary file in the same folder, then a rename.

    Raises:
        InputError: the folder cannot be written to (read-only, full, missing).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fchmod(file.fileno(), 0o644)  # mkstemp makes it private; it is for others to read
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror or error}.") from None


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically (see `write_bytes`)."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically (see `write_bytes`)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_writable(folder: str | Path) -> None:
    """Fail early, before hours of work, where the output could not be written at the end.

    What a killed process left of it is put in order (see `recover_folder`).

    Raises:
        InputError: `folder` is a file, or neither it nor its nearest existing parent can be written to.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {str(folder)!r} is a file; give a folder (it is created when missing).")
    recover_folder(folder)
    probe = folder
    while not probe.exists():
        probe = probe.parent
    try:
        with tempfile.TemporaryFile(dir=probe):
            pass
    except OSError as error:
        raise InputError(f"output {str(folder)!r} cannot be written: {error.strerror or error}.") from None


def recover_folder(folder: str | Path) -> None:
    """Put in order what a process left that was killed while it wrote a folder with `whole_folder`.

    A kill between its two renames leaves the old folder under a hidden name, and nothing in its place: it is put back.
    Other leftovers are removed. Those of a process that is still at work are left alone.
    """
    folder = Path(folder)
    with suppress(OSError):  # where nothing can be read or renamed, nothing was left either
        for found in sorted(folder.parent.iterdir()):
            if not found.name.startswith((_hidden(folder, "new"), _hidden(folder, "old"))) or not _abandoned(found):
                continue
            if (found / _OLD).is_dir() and not folder.exists():
                os.replace(found / _OLD, folder)
            _remove(found, folder)


_OLD = "old"  # what the old folder is called inside the hidden one


def _hidden(target: Path, kind: str) -> str:
    return f".{target.name}.{kind}."


def _hidden_folder(target: Path, kind: str, stack: ExitStack) -> Path:
    """A new hidden sibling of `target`, removed and known to be in use until the stack is closed."""
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=_hidden(target, kind)))
    stack.callback(_remove, folder, target)
    handle = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, handle)
    with suppress(OSError):  # some file systems have no locks
        fcntl.flock(handle, fcntl.LOCK_EX)  # the kernel takes it back when the process is gone
    return folder


def _remove(hidden: Path, target: Path) -> None:
    """Remove a hidden folder, but not the only copy of what `target` was."""
    old = hidden / _OLD
    if old.exists() and not target.exists():
        return
    with suppress(OSError):  # mostly there is none; a part of it must not be put back after a kill
        os.replace(old, hidden / "replaced")
    shutil.rmtree(hidden, ignore_errors=True)


def _abandoned(folder: Path) -> bool:
    """Whether the process that made a hidden folder is gone."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


@contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """A temporary sibling folder that takes `target`'s place when the block ends without an exception.

    A previous `target` is replaced as a whole; when anything goes wrong it stays as it was. (After a kill in the wrong
    moment it has a hidden name, until `recover_folder`, which everything that writes begins with.)

    Raises:
        InputError: the folder cannot be written to.
    """
    target = Path(target)
    check_writable(target)
    retired = None
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            staging = _hidden_folder(target, "new", stack)
            staging.chmod(0o755)
            yield staging
            for path in staging.rglob("*"):  # safetensors makes its files private
                path.chmod(0o755 if path.is_dir() else 0o644)
            if target.exists():
                retired = _hidden_folder(target, "old", stack)
                os.replace(target, retired / _OLD)
            os.replace(staging, target)
        except (OSError, SafetensorError) as error:
            if retired is not None and not target.exists():
                with suppress(OSError):  # then it stays hidden, to be recovered
                    os.replace(retired / _OLD, target)
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot write {str(target)!r}: {reason}.") from None
