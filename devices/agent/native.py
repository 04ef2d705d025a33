"""The C++ agent on a device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from devices.agent.build import EXECUTABLE, MACHINES, SYSTEM, build, requirements
from devices.agent.remote import CommandAgent, last_words
from devices.errors import DeviceError
from devices.transports import Completed, Transport

ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}


class NativeAgent(CommandAgent):
    """The C++ agent, built for the device's processor and brought there with the libraries that it needs.

    Where a device's own C library is too old, or there is none of that kind (Android's is another), the loader and the
    libraries that the agent was linked with are brought along, and the loader runs the agent. So it needs of the device
    nothing but a Linux kernel. That chain is tested with aarch64 code under qemu and through a real adbd; it has never run
    on a phone.

    Args:
        workspace: a private folder on the device.
        machine: the device's processor; by default what `uname -m` says there.
        launcher: words that go before the agent's own, such as those of an emulator.
        cache: see `devices.agent.build.build`.
    """

    def __init__(
        self,
        transport: Transport,
        workspace: str,
        *,
        machine: str | None = None,
        launcher: Sequence[str] = (),
        cache: Path | None = None,
    ) -> None:
        super().__init__(transport, workspace)
        self._machine, self._launcher, self._cache = machine, tuple(launcher), cache

    def install(self) -> None:
        machine = self._machine or self._find_machine()
        folder = build(machine, cache=self._cache)
        self._send(folder, ".")
        agent = f"{self._workspace}/{EXECUTABLE}"
        direct = (*self._launcher, agent)
        first = self._try(direct)
        if _answers(first):
            self._command = direct
            return
        self._send(folder, SYSTEM)
        system = f"{self._workspace}/{SYSTEM}"
        loader = next(path.name for path in (folder / SYSTEM).iterdir() if path.name.startswith("ld-"))
        brought = (*self._launcher, f"{system}/{loader}", "--library-path", f"{system}:{self._workspace}", agent)
        second = self._try(brought)
        if not _answers(second):
            raise DeviceError(
                f"the agent for {machine} does not run on {self._transport.address}: {last_words(first)!r} with its own "
                f"libraries (glibc {requirements(folder)['GLIBC']} or newer is needed), {last_words(second)!r} with those "
                "that were brought along."
            )
        self._command = brought

    def _find_machine(self) -> str:
        done = self._transport.run(["uname", "-m"])
        found = done.stdout.strip()
        machine = ALIASES.get(found, found)
        if done.exit_code != 0 or machine not in MACHINES:
            raise DeviceError(
                f"{self._transport.address} has a processor that the agent does not exist for: {found[:40]!r}; it exists for "
                f"{', '.join(MACHINES)}."
            )
        return machine

    def _send(self, folder: Path, part: str) -> None:
        where = self._workspace if part == "." else f"{self._workspace}/{part}"
        self._transport.run(["mkdir", "-p", where])
        for path in sorted((folder / part).iterdir()):
            if path.is_file():
                executable = path.name == EXECUTABLE or path.name.startswith("ld-")
                self._transport.push(path, f"{where}/{path.name}", executable=executable)

    def _try(self, command: Sequence[str]) -> Completed:
        return self._transport.run([*command, "--version"])


def _answers(done: Completed) -> bool:
    try:
        return done.exit_code == 0 and json.loads(done.stdout)["agent"] == "cpp"
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
