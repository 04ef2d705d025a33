"""Agents: programs on a device that time methods of other programs. A new one is one new file, and one line here."""

from __future__ import annotations

from devices.agent.native import NativeAgent
from devices.agent.protocol import Agent, AgentError, Answer, Checksum, Job, parse_answer
from devices.agent.python_board import PythonAgent
from devices.agent.trtexec import TrtexecAgent

AGENTS = {"native": NativeAgent, "python": PythonAgent, "trtexec": TrtexecAgent}

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
    "parse_answer",
]
