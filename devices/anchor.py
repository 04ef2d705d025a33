"""The anchor: a small program that always does the same work, to tell a disturbed device from a slow program."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from devices.agent.protocol import Job
from export.executorch.lower import Method, lower

TOKENS, WIDTH, HIDDEN = 64, 384, 1536  # about 75 million multiply-accumulates, as a small layer's feed-forward has


def write_anchor(folder: Path, *, threads: int, cpus: tuple[int, ...]) -> Job:
    """Lower it into a folder; the job that times it."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
    method = Method(module=module, inputs=(torch.zeros(1, TOKENS, WIDTH),), spec=None)
    path = folder / "anchor.pte"
    path.write_bytes(lower({"forward": method}, constants={}).program)
    return Job(program=path, threads=threads, cpus=cpus, warmup=2, iterations=8)
