"""Where a model computes, and batches that follow it there.

Tasks make their batches on the CPU. A pass keeps what it decides on (which units live, importance, scores) on the CPU, and
moves what a forward pass takes to where the model's parameters are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comp_edge.errors import InputError
from comp_edge.parallel import local_count, local_index

CPU = torch.device("cpu")


def device_of(model: Any) -> torch.device:
    """Where the parameters of a model are; all are in one place."""
    return next(model.parameters()).device


def placed(batches: Iterable[dict[str, Tensor]], device: torch.device) -> Iterable[dict[str, Tensor]]:
    """Batches of the CPU on a device: each is moved when its turn comes, and none where that is the CPU."""
    return batches if device.type == "cpu" else _Placed(batches, device)


@dataclass(frozen=True)
class _Placed:
    batches: Iterable[dict[str, Tensor]]
    device: torch.device

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            yield {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def __len__(self) -> int:
        return len(self.batches)


def computing_device(name: str | None) -> torch.device:
    """The device of this name, such as `cuda:1`; without a name a CUDA device where there is one, and else the CPU.

    Other accelerators have to be asked for: not all of them know float64 and every operation that models need. Where the
    name has no number, processes that were launched together on a machine get a device each, as accelerate deals them out.

    Raises:
        InputError: torch knows no such device, this machine has none, or fewer than processes.
    """
    if name is None:
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        name = "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cpu":
            return CPU
        if device.index is None:
            device = torch.device(device.type, _dealt(device.type))
        # A device can only be found out to be missing by using it; "meta" is there, and computes nothing.
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        there = ", ".join(["cpu", *_accelerators()])
        raise InputError(f"{name!r} is no device that torch can compute on here; give one of {there}.") from error
    return device


def _dealt(kind: str) -> int:
    """The number of this process's own device."""
    count = max(1, torch.get_device_module(kind).device_count())
    if local_count() > count:
        raise InputError(
            f"{local_count()} processes were launched on this machine, which has {count} of {kind!r}; launch as many "
            "as there are, or give --torch-device cpu."
        )
    return local_index() % count


def _accelerators() -> list[str]:
    """Names of the accelerators that torch finds on this machine."""
    kind = torch.accelerator.current_accelerator()
    return [] if kind is None else [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())]
