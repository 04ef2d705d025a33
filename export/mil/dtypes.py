"""The data types of MIL and the torch types that carry their values."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from coremltools import proto
from torch import Tensor

from export.mil.errors import ExecutionError, InputError

_MIL = proto.MIL_pb2.DataType
Kind = Literal["float", "int", "bool", "str"]


@dataclass(frozen=True)
class DType:
    """One MIL data type.

    `carrier` is the torch type that holds its values: torch has little arithmetic for unsigned types, so
    those are carried by the next wider signed one. `storage` is the little-endian numpy type of its bytes in
    a file; None for types of less than a byte, which are packed.
    """

    name: str
    kind: Kind
    bits: int
    carrier: torch.dtype | None
    storage: str | None
    signed: bool = True

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest value of an integer type."""
        if self.signed:
            return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        return 0, (1 << self.bits) - 1


def _unsigned(bits: int) -> DType:
    carrier = {16: torch.int32, 32: torch.int64}.get(bits, torch.uint8)
    return DType(f"uint{bits}", "int", bits, carrier, f"<u{bits // 8}" if bits >= 8 else None, signed=False)


FP16 = DType("fp16", "float", 16, torch.float16, "<f2")
FP32 = DType("fp32", "float", 32, torch.float32, "<f4")
INT32 = DType("int32", "int", 32, torch.int32, "<i4")
BOOL = DType("bool", "bool", 8, torch.bool, "|b1")
STRING = DType("string", "str", 0, None, None)

_BY_PROTO = {
    _MIL.FLOAT16: FP16,
    _MIL.FLOAT32: FP32,
    _MIL.FLOAT64: DType("fp64", "float", 64, torch.float64, "<f8"),
    _MIL.INT4: DType("int4", "int", 4, torch.int8, None),
    _MIL.INT8: DType("int8", "int", 8, torch.int8, "<i1"),
    _MIL.INT16: DType("int16", "int", 16, torch.int16, "<i2"),
    _MIL.INT32: INT32,
    _MIL.INT64: DType("int64", "int", 64, torch.int64, "<i8"),
    _MIL.UINT1: _unsigned(1),
    _MIL.UINT2: _unsigned(2),
    _MIL.UINT3: _unsigned(3),
    _MIL.UINT4: _unsigned(4),
    _MIL.UINT6: _unsigned(6),
    _MIL.UINT8: _unsigned(8),
    _MIL.UINT16: _unsigned(16),
    _MIL.UINT32: _unsigned(32),
    _MIL.BOOL: BOOL,
    _MIL.STRING: STRING,
}
_BY_NAME = {dtype.name: dtype for dtype in _BY_PROTO.values()}


def dtype_from_proto(number: int) -> DType:
    """The type with this number in MIL.proto. Raises: InputError for one that is not supported."""
    dtype = _BY_PROTO.get(number)
    if dtype is None:
        name = _MIL.Name(number) if number in _MIL.values() else f"number {number}"
        raise InputError(f"the program uses the data type {name}, which is not supported")
    return dtype


def dtype_from_name(name: str) -> DType:
    """The type with this name in an op's argument ("fp16", "int32", ...).

    Raises: InputError for another name.
    """
    if name not in _BY_NAME:
        raise InputError(f"the program names the data type '{name}'; known are {', '.join(sorted(_BY_NAME))}")
    return _BY_NAME[name]


def kind_of(tensor: Tensor) -> Kind:
    """The kind of a tensor's values."""
    if tensor.dtype == torch.bool:
        return "bool"
    return "float" if tensor.is_floating_point() else "int"


def to_integer(tensor: Tensor, dtype: DType) -> Tensor:
    """Converts to an integer type, refusing what does not fit (Core ML leaves the result undefined there).

    Floats are truncated towards zero.

    Raises:
        ExecutionError: a value is not finite or lies outside the range of `dtype`.
    """
    if tensor.dtype == torch.bool:
        return tensor.to(dtype.carrier)
    if tensor.is_floating_point():
        if not bool(torch.isfinite(tensor).all()):
            raise ExecutionError(f"a value that is not finite is converted to {dtype.name}")
        tensor = tensor.trunc()
    low, high = dtype.limits
    if tensor.numel() and not (low <= tensor.min().item() and tensor.max().item() <= high):
        raise ExecutionError(
            f"values in [{tensor.min().item()}, {tensor.max().item()}] exceed {dtype.name} [{low}, {high}]"
        )
    return tensor.to(dtype.carrier)


def unpack(raw: bytes, dtype: DType, count: int) -> np.ndarray:
    """Decodes `count` values from their bytes in a file.

    Types of less than a byte are packed from the least significant bit upwards, across byte borders.

    Raises:
        InputError: `raw` does not hold exactly `count` values.
    """
    expected = (count * dtype.bits + 7) // 8
    if len(raw) != expected:
        raise InputError(f"{count} values of {dtype.name} need {expected} bytes, the package stores {len(raw)}")
    if dtype.storage is not None:
        return np.frombuffer(raw, dtype=dtype.storage, count=count)
    bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), bitorder="little")[: count * dtype.bits]
    values = bits.reshape(count, dtype.bits).astype(np.int16) @ (1 << np.arange(dtype.bits, dtype=np.int16))
    if dtype.signed:
        values = np.where(values > dtype.limits[1], values - (1 << dtype.bits), values)
        return values.astype(np.int8)
    return values.astype(np.uint8)
