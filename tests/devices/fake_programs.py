"""Shell scripts that stand for a device's programs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest


def fake_programs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`put(name, script)`, which makes programs that are found in the PATH before all others."""
    folder.mkdir()
    folder.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def put(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)

    return put
