"""Agents: programs on a device that time methods of other programs. A new one is one new file, and one line here."""

from __future__ import annotations

from devices.agent.native import NativeAgent
from devices.agent.protocol import Agent, AgentError, Answer, Checksum, Job, parse_answer
from devices.agent.python_board import PythonAgent
from devices.agent.trtexec import TrtexecAgent
from devices.errors import DeviceError

AGENTS = {"native": NativeAgent, "python": PythonAgent, "trtexec": TrtexecAgent}


def agent_named(name: str) -> type:
    """The agent of this name.

    Raises:
        DeviceError: there is none.
    """
    if name not in AGENTS:
        raise DeviceError(f"unknown agent {name!r}; accepted: {', '.join(AGENTS)}.")
    return AGENTS[name]


__all__ = [
    "AGENTS",
    "Agent",
    "AgentError",
    "Answer",
    "Checksum",
    "Job",
    "NativeAgent",
    "PythonAgent",
    "TrtexecAgent",
    "agent_named",
    "parse_answer",
]
