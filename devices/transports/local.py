"""This side of a transport: processes with a deadline, output with a limit, files that appear whole."""

from __future__ import annotations

import io
import os
import re
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from devices.errors import DeviceError

CHUNK = 2**16  # bytes read or written at a time
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_words(command: Sequence[str], environment: Mapping[str, str] | None) -> None:
    """
    Raises:
        DeviceError: no system can be told to run this.
    """
    if not command or not command[0] or command[0].startswith("-") or "=" in command[0]:
        raise DeviceError(
            f"a command that begins with {list(command[:1])} cannot be run; its first word names a program."
        )
    for word in (*command, *(environment or {}).values()):
        if "\0" in word:
            raise DeviceError(f"{word[:80]!r} in a command has a zero byte; words of text are accepted.")
    for name in environment or ():
        if not VARIABLE.fullmatch(name):
            raise DeviceError(f"{name[:80]!r} names no variable; letters, digits and _ are accepted.")


def check_path(remote: str) -> None:
    """
    Raises:
        DeviceError: it is no path on a device.
    """
    if not remote.startswith("/") or "\0" in remote:
        raise DeviceError(f"path {remote[:80]!r} is no place on a device; an absolute path is accepted.")


@dataclass
class Capture:
    """What a command prints, as far as it is accepted.

    Attributes:
        where: the device's address, for messages.
        limit: bytes of stdout.
        stderr_limit: bytes of stderr.
        spare: bytes of stderr beyond the limit, for what a transport adds to it.
        stdout: where stdout goes: memory, or a file.
    """

    where: str
    limit: int
    stderr_limit: int
    spare: int = 0
    stdout: BinaryIO = field(default_factory=io.BytesIO)
    stderr: io.BytesIO = field(default_factory=io.BytesIO)

    def add_stdout(self, data: bytes) -> None:
        """
        Raises:
            DeviceError: it is more than the limit.
        """
        self._add(self.stdout, data, self.limit, 0, "stdout")

    def add_stderr(self, data: bytes) -> None:
        """
        Raises:
            DeviceError: it is more than the limit.
        """
        self._add(self.stderr, data, self.stderr_limit, self.spare, "stderr")

    def _add(self, stream: BinaryIO, data: bytes, limit: int, spare: int, name: str) -> None:
        if stream.tell() + len(data) > limit + spare:
            raise DeviceError(f"a command on {self.where} printed more on {name} than the {limit} bytes accepted.")
        stream.write(data)


def supervise(
    command: Sequence[str],
    capture: Capture,
    *,
    timeout: float,
    environment: Mapping[str, str],
    feed: Iterable[bytes] | None = None,
    hold: bool = False,
) -> int:
    """Run a process of this machine to its end; nothing of its process group is left when this is left early.

    Args:
        timeout: seconds until its output is closed and it has ended.
        environment: its whole environment.
        feed: what it reads from stdin; None for nothing.
        hold: stdin stays open after `feed`, until the process has ended.

    Returns:
        Its exit code; 128 + n when signal n ended it, as a shell says it.

    Raises:
        TimeoutError: it took longer.
        DeviceError: it printed more than the limit.
        OSError: it cannot be started.
    """
    deadline = time.monotonic() + timeout
    process = subprocess.Popen(
        command,
        bufsize=0,
        stdin=subprocess.DEVNULL if feed is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(environment),
        start_new_session=True,  # a group to end as a whole, and one that a terminal's Ctrl-C does not reach
    )
    with process.stdout, process.stderr:
        try:
            if feed is None:
                _collect(process, capture, deadline)
            else:
                with feeding(feed, process.stdin.write, None if hold else process.stdin.close):
                    _collect(process, capture, deadline)
            code = process.wait(max(deadline - time.monotonic(), 0.01))
        except BaseException as error:
            # It has not been waited for: its number is still its own, even if it has ended and a child goes on.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError from None
            raise
        finally:
            if process.stdin is not None:
                with suppress(OSError):
                    process.stdin.close()
    return code if code >= 0 else 128 - code


def _collect(process: subprocess.Popen, capture: Capture, deadline: float) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, capture.add_stdout)
        selector.register(process.stderr, selectors.EVENT_READ, capture.add_stderr)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            for key, _ in selector.select(left):
                data = os.read(key.fd, CHUNK)
                if data:
                    key.data(data)
                else:
                    selector.unregister(key.fileobj)


@contextmanager
def feeding(
    chunks: Iterable[bytes], write: Callable[[bytes], object], close: Callable[[], object] | None
) -> Iterator[None]:
    """Write in the background while output is read, so that neither side waits for the other for ever.

    The other side may stop reading whenever it likes: that is not an error here, it will say why.
    """

    def work() -> None:
        with suppress(OSError, ValueError):  # closed at the other end, or at this one
            for chunk in chunks:
                view = memoryview(chunk)
                while view:
                    written = write(view)
                    view = view[written if isinstance(written, int) else len(view) :]
            if close is not None:
                close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield
    thread.join(1)


def read_chunks(file: BinaryIO) -> Iterator[bytes]:
    """A file's content from where it stands."""
    while chunk := file.read(CHUNK):
        yield chunk


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open a local file that is to be copied to a device.

    Raises:
        DeviceError: it is no file, or cannot be read.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise DeviceError(f"{str(path)!r} cannot be read ({error.strerror}); give a file.") from None
    with file:
        yield file


@contextmanager
def arriving(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, readable by this user alone, that gets its name when this is left without an error.

    Raises:
        DeviceError: it cannot be written (no folder, no permission, no space).
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".arriving-")
        try:
            with os.fdopen(handle, "w+b") as file:
                yield file
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DeviceError(f"{str(path)!r} cannot be written ({error.strerror or error}).") from None
