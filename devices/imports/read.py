"""Reading a file of results, whatever program wrote it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from devices.errors import DeviceError
from devices.imports import aihub, coreml, minibench, observer, tflite, xctest
from devices.imports.model import Contents, Imported, Malformed, checked

SIZE_LIMIT = 64 * 2**20  # bytes of a file

_JSON = (minibench, aihub, coreml)
# An XCTest log may have lines of the others in it, printed by the application.
_TEXT = (xctest, tflite, observer)


def import_results(path: str | Path) -> Imported:
    """Timings that somebody else's program measured; which program it was is seen from what the file says.

    Raises:
        DeviceError: there is no such file, it is too large, of no known format, or malformed; says where.
    """
    where = f"results {str(path)!r}"
    data = _read(Path(path), where)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DeviceError(f"{where} are no text in UTF-8 (byte {error.start}).") from None
    try:
        found, contents = _contents(text)
        known = {
            "format": found,
            "sha256": hashlib.sha256(data).hexdigest(),
            "device": contents.device,
            "timings": tuple(contents.timings),
            "notes": tuple(contents.notes),
        }
        return checked(Imported, known, place="file")
    except Malformed as error:
        raise DeviceError(f"{where}: {error}.") from None


def _read(path: Path, where: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
    except FileNotFoundError:
        raise DeviceError(f"{where} do not exist; give a file that a benchmark has written.") from None
    except OSError as error:
        raise DeviceError(f"{where} cannot be read: {error.strerror or error}.") from None
    if len(data) > SIZE_LIMIT:
        raise DeviceError(f"{where} are larger than {SIZE_LIMIT // 2**20} MiB.")
    return data


def _contents(text: str) -> tuple[str, Contents]:
    for importer in _TEXT:  # first: a log may begin with a bracket, too
        if importer.recognises(text):
            return importer.FORMAT, importer.parse(text)
    if text.lstrip()[:1] in ("{", "["):
        value = _json(text)
        for importer in _JSON:
            if importer.recognises(value):
                return importer.FORMAT, importer.parse(value)
    accepted = ", ".join(importer.FORMAT for importer in (*_TEXT, *_JSON))
    raise Malformed(f"the format is not known; accepted: {accepted}")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Malformed(f"line {error.lineno}, column {error.colno}: JSON was expected ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets without end
        raise Malformed(f"JSON cannot be read: {str(error)[:100]}") from None
