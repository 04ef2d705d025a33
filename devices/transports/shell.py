"""What devices with a POSIX shell share: how a command is wrapped, files copied, a folder made and removed."""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import shlex
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from devices.errors import DeviceError, DeviceGone, DeviceTimeout
from devices.transports.base import OUTPUT_LIMIT, TIMEOUT, Completed, Transport
from devices.transports.local import Capture, arriving, check_path, check_words, read_chunks, reading

GRACE = 15.0  # seconds beyond a command's time after which the device, not the command, is taken to hang
SLOWEST = 2**18  # bytes a second; a slower copy is taken to hang
MESSAGES = 2**16  # bytes of stderr that commands of our own may print

# A command is one process group with its shell, a clock, and, where nothing is sent to it, a watcher of stdin: that is held
# open here, and ends when the connection breaks or whoever asked is gone. Any of them ends the group as a whole. What came
# of the command is told at the end of stderr, after a token that nobody can guess, for ssh's own exit code says too little.
# (Not `timeout`: those of busybox and toybox leave children alive. Not `wait`: Android's shell forgets what has ended.)
SCRIPT = """exec 3<&0 </dev/null
{{ sleep {seconds} >/dev/null 2>&1; printf '{token}{late}' >&2; kill -9 0; }} &
{watch}
{words} {stdin}
printf '{token}%03d' $? >&2
kill -9 0
"""
WATCH = "{ read -r _ <&3; kill -9 0; } >/dev/null 2>&1 &"
LATE = "999"  # in the place of an exit code

# sshd and adbd start a session, with a process group, for each command; a server that does not (dropbear) must not be ended
# with it.
GROUPED = """script={script}
read -r _ _ _ _ group _ </proc/$$/stat
if [ "$group" = $$ ]; then eval "$script"; fi
exec setsid sh -c "$script"
"""

PUSH = """umask 077
if [ -d "$1" ]; then echo "is a folder" >&2; exit 1; fi
cat >"$2" && sum=$(sha256sum <"$2") && [ "${sum%% *}" = "$4" ] && chmod "$3" "$2" && mv -f "$2" "$1" && exit
rm -f "$2"
exit 1"""
EXAMINE = """[ -f "$1" ] || { echo "there is no such file" >&2; exit 1; }
wc -c <"$1" && sha256sum <"$1" """
EXAMINED = re.compile(r"\s*([0-9]{1,18})\s+([0-9a-f]{64})\s.*", re.DOTALL)
WORKSPACE = re.compile(r"(?:/+[A-Za-z0-9_.+-]+)*/+comp-edge\.[A-Za-z0-9]{6,}")


class ShellTransport(Transport):
    """A device that runs scripts of a POSIX shell; subclasses say how a script gets there.

    Coreutils, busybox and toybox have the commands that it uses, such as `mktemp` and `sha256sum`.
    """

    # Where workspaces are made, as the device's shell reads it between double quotes.
    _folder = "${TMPDIR:-/tmp}"

    @abstractmethod
    def _execute(self, script: str, capture: Capture, *, timeout: float, feed: Iterable[bytes] | None) -> None:
        """Run a script to its end.

        Args:
            feed: what it reads from stdin; None: stdin stays open, with nothing in it, until the script has ended.

        Raises:
            TimeoutError: it had not ended in time.
            DeviceGone: the connection broke (need not be noticed here).
            DeviceError: it printed more than `capture` takes.
        """

    def run(
        self,
        command: Sequence[str],
        *,
        timeout: float = TIMEOUT,
        limit: int = OUTPUT_LIMIT,
        environment: Mapping[str, str] | None = None,
    ) -> Completed:
        check_words(command, environment)
        capture = Capture(self.address, limit=limit, stderr_limit=limit)
        code = self._call(command, capture, timeout=timeout, environment=environment or {})
        return Completed(code, *(_text(stream.getvalue()) for stream in (capture.stdout, capture.stderr)))

    def push(self, local: Path, remote: str, *, executable: bool = False) -> None:
        check_path(remote)
        with reading(local) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            timeout = TIMEOUT + file.tell() / SLOWEST
            file.seek(0)
            part = f"{remote}.{secrets.token_hex(4)}"
            words = ["sh", "-c", PUSH, "sh", remote, part, "700" if executable else "600", digest]
            capture = self._messages()
            try:
                code = self._call(words, capture, timeout=timeout, feed=read_chunks(file))
            except DeviceTimeout:
                with suppress(DeviceError):
                    self.run(["rm", "-f", part])
                raise
        if code != 0:
            reason = last_line(capture.stderr.getvalue()) or "it arrived damaged"
            raise DeviceError(f"{remote!r} cannot be written on {self.address}: {reason}.")

    def pull(self, remote: str, local: Path, *, limit: int) -> None:
        check_path(remote)
        examined = self.run(["sh", "-c", EXAMINE, "sh", remote], limit=MESSAGES)
        found = EXAMINED.fullmatch(examined.stdout)
        if examined.exit_code != 0 or not found:
            reason = last_line(examined.stderr.encode()) or f"no size and sum, but {examined.stdout[:80]!r}"
            raise DeviceError(f"{remote!r} cannot be read on {self.address}: {reason}.")
        size, digest = int(found[1]), found[2]
        if size > limit:
            raise DeviceError(f"{remote!r} on {self.address} has {size} bytes; at most {limit} are accepted.")
        with arriving(local) as file:
            capture = self._messages(file, limit=size)
            self._call(["cat", remote], capture, timeout=TIMEOUT + size / SLOWEST)
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise DeviceError(f"{remote!r} on {self.address} did not arrive as it is there; is it being written?")

    @contextmanager
    def workspace(self) -> Iterator[str]:
        made = self.run(["sh", "-c", f'umask 077; mktemp -d "{self._folder}/comp-edge.XXXXXX"'], limit=MESSAGES)
        folder = made.stdout.removesuffix("\n")
        if made.exit_code != 0 or not WORKSPACE.fullmatch(folder) or ".." in folder.split("/"):
            reason = last_line(made.stderr.encode()) or f"it is called {folder[:80]!r}"
            raise DeviceError(f"no folder can be made on {self.address}: {reason}.")
        try:
            yield folder
        except BaseException:
            # What went wrong is what the caller must hear, also where the device has gone with its folder.
            with suppress(DeviceError):
                self._remove(folder)
            raise
        self._remove(folder)

    def _remove(self, folder: str) -> None:
        removed = self.run(["rm", "-rf", "--", folder])
        if removed.exit_code != 0:
            reason = last_line(removed.stderr.encode())
            raise DeviceError(f"{folder!r} cannot be removed from {self.address}: {reason}.")

    def _messages(self, stdout: BinaryIO | None = None, *, limit: int = MESSAGES) -> Capture:
        output = {} if stdout is None else {"stdout": stdout}
        return Capture(self.address, limit=limit, stderr_limit=MESSAGES, **output)

    def _call(
        self,
        words: Sequence[str],
        capture: Capture,
        *,
        timeout: float,
        environment: Mapping[str, str] | None = None,
        feed: Iterable[bytes] | None = None,
    ) -> int:
        """Run words in time; the exit code. `capture` then holds what they printed.

        Args:
            feed: what it reads from stdin.
        """
        token = secrets.token_hex(16)
        seconds = max(math.ceil(timeout), 1)  # not every `sleep` takes fractions
        # `env` also where it has nothing to set: what it starts is a program, never a word of the shell's own.
        line = ["env", *(f"{name}={value}" for name, value in (environment or {}).items()), *words]
        script = SCRIPT.format(
            seconds=seconds,
            token=token,
            late=LATE,
            watch=WATCH if feed is None else "",
            words=shlex.join(line),
            stdin="3<&-" if feed is None else "<&3",
        )
        capture.spare = len(token) + len(LATE)
        try:
            self._execute(GROUPED.format(script=shlex.quote(script)), capture, timeout=seconds + GRACE, feed=feed)
        except TimeoutError:
            raise DeviceGone(f"{self.address} has not answered for {seconds + GRACE:g} s.") from None
        stderr, told, rest = capture.stderr.getvalue().rpartition(token.encode())
        if not told or not rest[:3].isdigit():
            raise DeviceGone(f"{self.address} cannot be reached: {last_line(stderr + rest) or 'the connection broke'}.")
        if rest[:3] == LATE.encode():
            raise DeviceTimeout(f"{words[0]!r} on {self.address} took longer than {timeout:g} s.")
        capture.stderr.seek(0)
        capture.stderr.truncate()
        capture.stderr.write(stderr)
        return int(rest[:3])


def last_line(data: bytes) -> str:
    """What a device says is wrong, fit to be shown."""
    lines = [line for line in _text(data).splitlines() if line.strip()]
    return "".join(c for c in lines[-1] if c.isprintable())[:200].strip().rstrip(".") if lines else ""


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
