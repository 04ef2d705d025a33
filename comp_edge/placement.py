"""Where a model computes, and batches that follow it there.

Tasks make their batches on the CPU and need not know of any device. A pass keeps what it decides on (which units live,
importance, scores) on the CPU, and moves what a forward pass takes to where the model's parameters are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from comp_edge.errors import InputError
from comp_edge.parallel import local_index

CPU = torch.device("cpu")


def device_of(model: Any) -> torch.device:
    """Where the parameters of a model are; all are in one place."""
    return next(model.parameters()).device


def placed(batches: Iterable[dict[str, Tensor]], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The batches on a device, each moved when its turn comes."""
    for batch in batches:
        yield {name: value.to(device) for name, value in batch.items()}


def computing_device(name: str | None) -> torch.device:
    """The device of this name, such as `cuda:1`; without a name a CUDA device where there is one, and else the CPU.

    Other accelerators have to be asked for: not all of them know float64 and every operation that models need. Where the
    name has no number, processes that were launched together on a machine get a device each.

    Raises:
        InputError: torch knows no such device, or this machine has none.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cpu":
            return CPU
        if device.index is None:
            device = torch.device(device.type, local_index())
        # A device can only be found out to be missing by using it; "meta" is there, and computes nothing.
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        there = ", ".join(["cpu", *_accelerators()])
        raise InputError(f"{name!r} is no device that torch can compute on here; give one of {there}.") from error
    return device


def _accelerators() -> list[str]:
    """Names of the accelerators that torch finds on this machine."""
    kind = torch.accelerator.current_accelerator()
    return [] if kind is None else [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())]
