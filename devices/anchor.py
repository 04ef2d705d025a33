"""The anchor: a small program that always does the same work, to tell a disturbed device from a slow program."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from devices.agent.onnx_export import write_onnx
from devices.agent.protocol import Job
from export.executorch.lower import Method, lower

TOKENS, WIDTH, HIDDEN = 64, 384, 1536  # about 75 million multiply-accumulates, as a small layer's feed-forward has
NAME = "anchor"


def write_anchor(folder: Path, *, form: str, threads: int, cpus: tuple[int, ...]) -> Job:
    """Lower it into a folder; the job that times it.

    Args:
        form: see `devices.programs.write_programs`.
    """
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH)).eval()
    inputs = (torch.zeros(1, TOKENS, WIDTH),)
    if form == "onnx":
        path = write_onnx(NAME, module, inputs, folder).path
    else:
        path = folder / f"{NAME}.pte"
        path.write_bytes(lower({NAME: Method(module=module, inputs=inputs)}, constants={}).program)
    return Job(program=path, method=NAME, threads=threads, cpus=cpus, warmup=1, iterations=5)
