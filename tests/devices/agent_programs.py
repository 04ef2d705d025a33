"""Small programs for agents to run, and what they must compute."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.executorch.lower import Method, lower

WIDTH, TOKENS, ENTRIES = 32, 8, 5


class Mixed(nn.Module):
    """Inputs and outputs of several dtypes; most of it runs in XNNPACK, the look-up does not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.table = nn.Embedding(ENTRIES, WIDTH)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Shapes:
            x: [1, TOKENS, WIDTH]; ids: [1, TOKENS], int64.
        """
        y = self.down(torch.relu(self.up(x))) + self.table(ids)
        return y, ids * 2 - 3, y > 0


class Write(nn.Module):
    """Puts its input into a memory that `Read` sees."""

    def __init__(self, memory: Tensor) -> None:
        super().__init__()
        self.register_buffer("memory", memory)

    def forward(self, x: Tensor) -> Tensor:
        self.memory.copy_(x)
        return x.sum(-1)


class Read(nn.Module):
    """Counts its own calls in the memory."""

    def __init__(self, memory: Tensor) -> None:
        super().__init__()
        self.register_buffer("memory", memory)

    def forward(self, step: Tensor) -> Tensor:
        self.memory.add_(step)
        return self.memory * 1.0


class Narrow(nn.Module):
    """Dtypes that no model of ours has as an input, but others may."""

    def forward(self, half: Tensor, double: Tensor, short: Tensor, flag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return half.float() * 2, double + short, torch.logical_not(flag)


def mixed_inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, TOKENS, WIDTH, generator=generator), torch.arange(TOKENS)[None] % ENTRIES


@cache
def mixed() -> Mixed:
    torch.manual_seed(5)
    return Mixed().eval().requires_grad_(False)


def raw(tensors: Sequence[Tensor]) -> bytes:
    """As a job's `inputs`."""
    return b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)


@cache
def program(name: str) -> bytes:
    """`mixed` (methods `forward` and `again`), `shared` (methods `write` and `read`) or `narrow`."""
    methods: dict[str, tuple[nn.Module, tuple[Tensor, ...]]]
    if name == "mixed":
        methods = {"forward": (mixed(), mixed_inputs()), "again": (mixed(), mixed_inputs())}
    elif name == "shared":
        memory = torch.zeros(1, WIDTH)
        methods = {"write": (Write(memory), (torch.ones(1, WIDTH),)), "read": (Read(memory), (torch.ones(1, WIDTH),))}
    else:
        example = (torch.ones(6).half(), torch.ones(6).double(), torch.ones(6).short(), torch.zeros(6).bool())
        methods = {"forward": (Narrow(), example)}
    made: Any = {key: Method(module=module, inputs=inputs, spec=None) for key, (module, inputs) in methods.items()}
    return lower(made, constants={}).program


def write_program(folder: Path, name: str) -> Path:
    path = folder / f"{name}.pte"
    path.write_bytes(program(name))
    return path
