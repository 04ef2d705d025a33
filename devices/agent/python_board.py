"""The Python agent on a board that has ExecuTorch's Python runtime."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from devices.agent.remote import FAILED, CommandAgent, how_it_ended
from devices.errors import DeviceError
from devices.transports import HostTransport, Transport

SCRIPT = Path(__file__).with_name("python_agent.py")
STARTING = 120.0  # seconds that a slow board takes to import torch


class PythonAgent(CommandAgent):
    """The agent as a script of a board's own Python, which must have `executorch` with its torch.

    A call takes some 20 microseconds more than with the C++ agent, and the memory that it reports is Python's and torch's too.

    Args:
        workspace: a private folder on the device.
        python: the interpreter there; by default `python3`, and on this machine the one that runs this.
    """

    def __init__(self, transport: Transport, workspace: str, *, python: str | None = None) -> None:
        super().__init__(transport, workspace)
        self._python = python or (sys.executable if isinstance(transport, HostTransport) else "python3")

    def install(self) -> None:
        script = f"{self._workspace}/{SCRIPT.name}"
        self._transport.push(SCRIPT, script)
        command = (self._python, script)
        done = self._transport.run([*command, "--version"], timeout=STARTING)
        where = f"{self._python!r} on {self._transport.address}"
        try:
            answer = json.loads(done.stdout.strip().splitlines()[-1])
            if done.exit_code == 0 and answer["agent"] == "python":
                self._command = command
                return
            reason = f"says that {str(answer['error'])[:300]}" if done.exit_code == FAILED else how_it_ended(done)
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            reason = how_it_ended(done)
        raise DeviceError(f"{where} {reason.rstrip(',')}; a Python with executorch and torch is needed there.")
