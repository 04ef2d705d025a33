"""One pass in several processes, as `accelerate launch` starts them: each computes its rows of every training batch.

    accelerate launch --multi_gpu --num_processes 2 -m comp_edge prune --model ... --task ... -o out

(`--multi_gpu` is what makes accelerate start several processes on one machine, with or without GPUs. Each computes on a GPU of
its own, or on the CPU, where they talk through gloo. With `--cpu` it starts one, unless an MPI is there to start more.)

Every process holds the whole model, draws the same batches and takes its rows; gradients are summed, so weights stay the
same everywhere. Whatever is decided (importance, probes, validation scores) is computed once, in the main process, and
handed to the others; only the main process writes. Sharded models (FSDP) are out of scope: masks, surgery and token
schedules need whole layers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import nn

from comp_edge.errors import InputError

T = TypeVar("T")
# What torchrun and MPIs tell a process of the others.
WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
LOCAL_WORLD = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
# The others wait while the main process chooses and scores. A process that has died is noticed at once.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Processes:
    """The processes that share a pass; by default this one alone, for which nothing here does anything.

    Attributes:
        count: how many there are.
        index: which one this is; 0 is the main process.
    """

    count: int = 1
    index: int = 0

    @property
    def main(self) -> bool:
        """Whether this process decides and writes."""
        return self.index == 0

    def own(self, each: int) -> slice:
        """Which of `count * each` parts of a batch are this process's."""
        return slice(self.index * each, (self.index + 1) * each)

    def once(self, compute: Callable[[], T]) -> T:
        """What `compute` gives in the main process, in every process; an error of it is raised in every process, too."""
        if self.count == 1:
            return compute()
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = compute()
            except (InputError, FloatingPointError) as error:
                outcome[1] = error
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def sum(self, value: float) -> float:
        """The sum of every process's value."""
        if self.count == 1:
            return value
        from accelerate import PartialState
        from accelerate.utils import reduce

        return float(reduce(torch.tensor(value, dtype=torch.float64, device=PartialState().device), "sum"))

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their sums over all processes; None stays where no process has one."""
        if self.count == 1:
            return
        from accelerate import PartialState
        from accelerate.utils import reduce

        held = torch.tensor([p.grad is not None for p in parameters], device=PartialState().device)
        for parameter, wanted in zip(parameters, reduce(held.int(), "sum").tolist(), strict=True):
            if wanted:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = reduce(own, "sum")

    @torch.no_grad()
    def align(self, model: nn.Module) -> None:
        """Give every process the main process's weights."""
        if self.count > 1:
            from accelerate.utils import broadcast

            for tensor in model.state_dict().values():
                tensor.copy_(broadcast(tensor))

    def wait(self) -> None:
        """Return when every process has come here."""
        self.sum(0.0)


ALONE = Processes()


def _told(names: Sequence[str], *, least: int) -> int:
    """The largest number that the environment gives under one of these names."""
    return max(least, *(int(os.environ.get(name, least)) for name in names))


def local_index() -> int:
    """Which of the processes that were launched together on this machine this is."""
    return _told(LOCAL_RANK, least=0)


def local_count() -> int:
    """How many processes were launched together on this machine, as far as their launcher says."""
    return _told(LOCAL_WORLD, least=1)


def speaks() -> bool:
    """Whether this process speaks for those that were launched together: known before anything is set up."""
    return _told(RANK, least=0) == 0


def launched(device: torch.device) -> Processes:
    """The processes that `accelerate launch` (or torchrun) started together with this one.

    Args:
        device: where the model of this process is.

    Raises:
        InputError: accelerate cannot make these processes compute together on such devices, or on this one.
    """
    count = _told(WORLD, least=1)
    if count == 1:
        return ALONE
    from accelerate import PartialState

    on_cpu = device.type == "cpu"
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    if state.num_processes != count:
        raise InputError(
            f"{count} processes were launched, but accelerate knows of {state.num_processes} on {device.type!r} devices; "
            "start them with accelerate launch, or compute on the CPU."
        )
    if (state.device.type == "cpu") != on_cpu or not on_cpu and state.device != device:
        raise InputError(
            f"the model is on {str(device)!r}, and process {state.process_index} of {count} computes on "
            f"{str(state.device)!r}; put it there (the commands do, without a number in --torch-device)."
        )
    return Processes(count=state.num_processes, index=state.process_index)
