"""Reading constants: from the weight files of a package and from the protobuf itself.

coremltools' own reader is not used: this one checks every reference against the declared type before it
reads, and works where coremltools' native library does not load.
"""

import math
import struct
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from coremltools import proto
from torch import Tensor

from export.mil.dtypes import DType, dtype_from_proto, unpack
from export.mil.errors import InputError

_PREFIX = "@model_path/"
_SENTINEL = 0xDEADBEEF
_HEADER = struct.Struct("<II")  # number of blobs, version
_VERSION = 2
_RECORD = struct.Struct("<IIQQQ")  # sentinel, data type, bytes, offset of the data, padding bits
# The number that a blob record uses for a data type is not the one of MIL.proto.
_BLOB_TYPES = {
    1: "fp16",
    2: "fp32",
    3: "uint8",
    4: "int8",
    6: "int16",
    7: "uint16",
    8: "int4",
    9: "uint1",
    10: "uint2",
    11: "uint4",
    12: "uint3",
    13: "uint6",
    14: "int32",
    15: "uint32",
}

Constant = Tensor | str | list
"""A decoded value: numbers and booleans are tensors (rank 0 for scalars), strings are str, lists are list."""


class WeightStore:
    """The weight files of one package."""

    def __init__(self, model_dir: Path) -> None:
        """`model_dir` is the folder that holds the model's protobuf; references are relative to it."""
        self._dir = model_dir
        self._cache: dict[tuple[str, int], Tensor] = {}

    def read(self, reference: "proto.MIL_pb2.Value.BlobFileValue", *, dtype: DType, shape: tuple[int, ...]) -> Tensor:
        """The constant at a reference, decoded once.

        Returns: a tensor of `shape`; shared between callers, so it must not be changed.

        Raises:
            InputError: the file is missing or truncated, or what it stores there is not of this type and
            size.
        """
        key = (reference.fileName, reference.offset)
        tensor = self._cache.get(key)
        if tensor is None:
            array = unpack(self._bytes(reference, dtype), dtype, math.prod(shape))
            tensor = self._cache[key] = _to_tensor(array, dtype).reshape(shape)
        if tensor.dtype != dtype.carrier or tensor.numel() != math.prod(shape):
            raise InputError(f"the constant at offset {key[1]} of '{key[0]}' is declared with two different types")
        return tensor.reshape(shape)

    def _bytes(self, reference: "proto.MIL_pb2.Value.BlobFileValue", dtype: DType) -> bytes:
        path = self._path(reference.fileName)
        where = f"offset {reference.offset} of '{reference.fileName}'"
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                head = file.read(_HEADER.size)
                if len(head) < _HEADER.size or _HEADER.unpack(head)[1] != _VERSION:
                    raise InputError(f"'{reference.fileName}' is not a Core ML weight file of version {_VERSION}")
                file.seek(min(reference.offset, size))
                record = file.read(_RECORD.size)
                if len(record) < _RECORD.size:
                    raise InputError(f"the package's weights are truncated: nothing at {where} ({size} bytes)")
                sentinel, blob_type, length, start, _ = _RECORD.unpack(record)
                if sentinel != _SENTINEL:
                    raise InputError(f"the package's weights are corrupt: no constant begins at {where}")
                if _BLOB_TYPES.get(blob_type) != dtype.name:
                    stored = _BLOB_TYPES.get(blob_type, f"unknown type {blob_type}")
                    raise InputError(f"the constant at {where} is {stored}, the program declares {dtype.name}")
                if start + length > size:
                    raise InputError(
                        f"the package's weights are truncated: the constant at {where} ends at byte "
                        f"{start + length}, the file has {size}"
                    )
                file.seek(start)
                return file.read(length)
        except OSError as error:
            raise InputError(f"cannot read the weight file '{reference.fileName}': {error.strerror}") from error

    def _path(self, name: str) -> Path:
        relative = PurePosixPath(name.removeprefix(_PREFIX))
        outside = relative.is_absolute() or ".." in relative.parts or "\0" in name
        if not name.startswith(_PREFIX) or outside:
            raise InputError(f"the weight file '{name}' lies outside the package; expected '{_PREFIX}...'")
        path = self._dir / relative
        if not path.resolve().is_relative_to(self._dir.resolve()):
            raise InputError(f"the weight file '{name}' is a link out of the package")
        return path


def decode(value: "proto.MIL_pb2.Value", store: WeightStore) -> Constant:
    """Decodes a value of the program.

    Raises:
        InputError: the value is malformed, or of a type that is not supported.
    """
    type_name = value.type.WhichOneof("type")
    if type_name == "listType":
        return [decode(item, store) for item in value.immediateValue.list.values]
    if type_name != "tensorType":
        raise InputError(f"the program holds a constant of {type_name}, which is not supported")
    declared = value.type.tensorType
    dtype = dtype_from_proto(declared.dataType)
    if any(d.WhichOneof("dimension") != "constant" for d in declared.dimensions):
        raise InputError("the program holds a constant whose shape is not fixed")
    shape = tuple(d.constant.size for d in declared.dimensions)
    if value.WhichOneof("value") == "blobFileValue":
        return store.read(value.blobFileValue, dtype=dtype, shape=shape)
    tensor = value.immediateValue.tensor
    field = tensor.WhichOneof("value")
    count = math.prod(shape)
    if field is None and count:
        raise InputError("the program holds a constant without a value")
    if dtype.kind == "str":
        strings = list(tensor.strings.values)
        if len(strings) != count:
            raise InputError(f"a constant of shape {list(shape)} stores {len(strings)} strings")
        return strings[0] if not shape else strings
    if field == "bytes" or dtype.storage is None:
        array = unpack(tensor.bytes.values, dtype, count)
    else:
        numbers = getattr(tensor, field).values if field else ()
        if len(numbers) != count:
            raise InputError(f"a constant of shape {list(shape)} stores {len(numbers)} values")
        array = np.array(numbers, dtype=dtype.storage)
    return _to_tensor(array, dtype).reshape(shape)


def _to_tensor(array: np.ndarray, dtype: DType) -> Tensor:
    # The copy makes the array writable and native-endian, which torch asks for.
    numpy_type = torch.empty(0, dtype=dtype.carrier).numpy().dtype
    return torch.from_numpy(array.astype(numpy_type, copy=True))
