"""Methods as ONNX programs, for a Jetson's GPU: the same torch modules that are lowered for ExecuTorch.

The exporter is torch's older one, which traces: the newer one silently loses what a method writes into its own buffers before
it reads them, and its programs are of an opset that TensorRT 8.5 (JetPack 5) does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from devices.agent.quiet import quiet
from devices.errors import DeviceError

OPSET = 17  # the newest of TensorRT 8.5
LARGEST = 2**31 - 2**20  # bytes of weights; a protobuf file has at most 2 GiB


class Stateless(nn.Module):
    """A module whose state is handed in and out, for runtimes that keep none: first the inputs, then the state.

    64-bit integers come in as 32-bit ones, which every version of TensorRT takes.

    Args:
        module: its buffers are others while this is called.
        state: names of buffers that it changes.
        wide: which of its inputs are int64.
    """

    def __init__(self, module: nn.Module, state: Sequence[str], wide: Sequence[bool]) -> None:
        super().__init__()
        self.module, self.state, self.wide = module, tuple(state), tuple(wide)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        own, state = inputs[: len(self.wide)], inputs[len(self.wide) :]
        held = dict(zip(self.state, (tensor.clone() for tensor in state), strict=True))
        with _buffers(self.module, held):
            outputs = self.module(*(x.long() if wide else x for x, wide in zip(own, self.wide, strict=True)))
            # A buffer may have been replaced instead of written to.
            held = {name: self.module.get_buffer(name) for name in held}
        return (*(outputs if isinstance(outputs, tuple | list) else (outputs,)), *held.values())


def stateless(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Stateless, tuple[Tensor, ...]]:
    """A method with its state as inputs and outputs, and example inputs: those of the method and the state as it is."""
    state = _changed_buffers(module, inputs)
    wide = [tensor.dtype == torch.int64 for tensor in inputs]
    narrow = (tensor.int() if is_wide else tensor for tensor, is_wide in zip(inputs, wide, strict=True))
    values = (module.get_buffer(name).detach().clone() for name in state)
    return Stateless(module, state, wide), (*narrow, *values)


class OnnxFile(NamedTuple):
    """A program of one method, and the raw bytes of its inputs."""

    path: Path
    inputs: Path


def write_onnx(name: str, module: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> OnnxFile:
    """Write a method as `NAME.onnx`, of static shapes, and its inputs (state included) as `NAME.bin`.

    Raises:
        DeviceError: too large, or an operation has no ONNX form.
    """
    size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    if size > LARGEST:
        raise DeviceError(f"method {name!r} has {size} bytes of weights; an ONNX file takes at most {LARGEST}.")
    method, example = stateless(module.eval(), inputs)
    folder.mkdir(parents=True, exist_ok=True)
    program = OnnxFile(folder / f"{name}.onnx", folder / f"{name}.bin")
    names = [f"input_{index}" for index in range(len(example))]
    with quiet(), torch.no_grad():
        try:
            torch.onnx.export(method, example, program.path, input_names=names, opset_version=OPSET, dynamo=False)
        except (RuntimeError, ValueError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DeviceError(f"method {name!r} has no ONNX form: {reason[:300].rstrip('.')}.") from None
    program.inputs.write_bytes(b"".join(tensor.contiguous().numpy().tobytes() for tensor in example))
    return program


def _changed_buffers(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[str]:
    """Buffers that a call changes; it leaves them as they were."""
    values = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    with _buffers(module, values), torch.no_grad():
        versions = {name: tensor._version for name, tensor in values.items()}
        module(*inputs)
        return [
            name
            for name, tensor in values.items()
            if tensor._version != versions[name] or module.get_buffer(name) is not tensor
        ]


@contextmanager
def _buffers(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Other tensors in the place of buffers, for a while. (`torch.func.functional_call` refuses to be traced.)"""
    places = {name: (module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in values}
    before = {name: owner._buffers[leaf] for name, (owner, leaf) in places.items()}
    try:
        for name, (owner, leaf) in places.items():
            owner._buffers[leaf] = values[name]
        yield
    finally:
        for name, (owner, leaf) in places.items():
            owner._buffers[leaf] = before[name]
