"""What reaching a device means: push, pull, run; and a private folder on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

OUTPUT_LIMIT = 4 * 2**20  # bytes of stdout and of stderr that a command may print; what exceeds it is an error
TIMEOUT = 60.0  # seconds


@dataclass(frozen=True)
class Completed:
    """A command that ended; output decoded as UTF-8, with what is not UTF-8 replaced."""

    exit_code: int
    stdout: str
    stderr: str


class Transport(ABC):
    """A way to one device.

    Words of a command are an argument vector: whatever they hold, no shell gets to see it unquoted. Paths on the device are
    absolute, with forward slashes.

    Attributes:
        address: as the user gave it, such as `ssh://pi@board:2222`.
    """

    address: str

    @abstractmethod
    def run(
        self,
        command: Sequence[str],
        *,
        timeout: float = TIMEOUT,
        limit: int = OUTPUT_LIMIT,
        environment: Mapping[str, str] | None = None,
    ) -> Completed:
        """Run a command to its end.

        Args:
            timeout: seconds; enforced on the device as well, so that nothing goes on there.
            limit: bytes of output that are accepted, of stdout and of stderr each.
            environment: variables that are set besides the device's own.

        Raises:
            DeviceTimeout: it took longer; it does not run any more.
            DeviceGone: the connection broke, or there is no device.
            DeviceError: it printed more than the limit.
        """

    @abstractmethod
    def push(self, local: Path, remote: str, *, executable: bool = False) -> None:
        """Copy a file to the device.

        Raises:
            DeviceGone: the connection broke.
            DeviceError: it cannot be written there (no space, no permission).
        """

    def offer(self, local: Path, remote: str) -> None:
        """Let programs on the device read a file as `remote`, where there is nothing yet: a copy, but on this machine a link.

        Nobody should write into the file meanwhile.

        Raises:
            DeviceGone, DeviceError: as `push`.
        """
        self.push(local, remote)

    @abstractmethod
    def pull(self, remote: str, local: Path, *, limit: int) -> None:
        """Copy a file of at most `limit` bytes from the device; it appears whole or not at all.

        Raises:
            DeviceGone: the connection broke.
            DeviceError: there is no such file, or it is larger.
        """

    @contextmanager
    @abstractmethod
    def workspace(self) -> Iterator[str]:
        """A new private folder on the device, readable by this user alone, removed afterwards (also after Ctrl-C)."""

    def close(self) -> None:  # noqa: B027 -- most have nothing to let go of
        """Let go of the connection."""
