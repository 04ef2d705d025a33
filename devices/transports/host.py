"""This machine as a device."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from devices.errors import DeviceError, DeviceTimeout
from devices.transports.base import OUTPUT_LIMIT, TIMEOUT, Completed, Transport
from devices.transports.local import Capture, arriving, check_path, check_words, read_chunks, reading, supervise

# What shells answer where a program cannot be started.
NOT_FOUND, NOT_RUNNABLE = 127, 126


class HostTransport(Transport):
    """Commands and files of this machine, without a shell.

    Raises:
        DeviceError: the address is not `host`.
    """

    def __init__(self, address: str = "host") -> None:
        if address != "host":
            raise DeviceError(f"address {address!r} is none of this machine; accepted: 'host'.")
        self.address = address

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
        try:
            code = supervise(command, capture, timeout=timeout, environment=os.environ | dict(environment or {}))
        except TimeoutError:
            raise DeviceTimeout(f"{command[0]!r} on {self.address} took longer than {timeout:g} s.") from None
        except OSError as error:
            code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_RUNNABLE
            capture.add_stderr(f"{command[0]}: {error.strerror}\n".encode())
        return Completed(code, *(_text(stream.getvalue()) for stream in (capture.stdout, capture.stderr)))

    def push(self, local: Path, remote: str, *, executable: bool = False) -> None:
        check_path(remote)
        with reading(local) as source, arriving(Path(remote)) as target:
            if executable:
                os.fchmod(target.fileno(), 0o700)
            shutil.copyfileobj(source, target)

    def offer(self, local: Path, remote: str) -> None:
        check_path(remote)
        with reading(local):  # so that it fails here, as a copy would
            pass
        try:
            Path(remote).symlink_to(local.absolute())
        except OSError as error:
            raise DeviceError(f"{remote!r} cannot be written ({error.strerror or error}).") from None

    def pull(self, remote: str, local: Path, *, limit: int) -> None:
        check_path(remote)
        with reading(Path(remote)) as source, arriving(local) as target:
            for chunk in read_chunks(source):
                if target.tell() + len(chunk) > limit:
                    raise DeviceError(f"{remote!r} on {self.address} is larger than the {limit} bytes accepted.")
                target.write(chunk)

    @contextmanager
    def workspace(self) -> Iterator[str]:
        # No TemporaryDirectory: where it lacks a permission it changes modes, in some versions those of what links lead to.
        folder = tempfile.mkdtemp(prefix="comp-edge.")
        try:
            yield folder
        finally:
            with suppress(FileNotFoundError):  # somebody else may have cleaned up
                shutil.rmtree(folder)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
