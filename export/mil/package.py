"""Opening an `.mlpackage`: manifest, model protobuf, weight files, and what its functions take and give."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from coremltools import proto
from google.protobuf.message import DecodeError

from export.mil.dtypes import DType, dtype_from_proto
from export.mil.errors import InputError
from export.mil.weights import WeightStore, decode

Shape = tuple[int | None, ...]
"""Sizes per dimension; None where the program leaves a size open."""


@dataclass(frozen=True)
class Port:
    """An input, output or state of a function. `is_image`: Core ML takes a picture here, not an array."""

    name: str
    dtype: DType
    shape: Shape
    is_image: bool = False


@dataclass(frozen=True)
class FunctionSignature:
    """What a function takes and gives, in the order of the program."""

    name: str
    opset: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    states: tuple[Port, ...]


class Package:
    """A validated `.mlpackage`, read once: later changes on disk are not seen.

    `path`: the folder. `functions`: signature by name. `default_function`: the one that Core ML runs when
    none is named. `weights`: its weight files.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens and validates a package.

        Raises:
            InputError: a part is missing, corrupt or truncated, a path leads out of the package, or the model
            is
                not an ML Program.
        """
        self.path = Path(path)
        model = _model_path(self.path)
        self._spec = _read_spec(model)
        self.weights = WeightStore(model.parent)
        program = self._spec.mlProgram
        names = _described_functions(self._spec.description)
        self.default_function = self._spec.description.defaultFunctionName or "main"
        self.functions = {
            name: self._signature(name, names.get(name, self._spec.description)) for name in program.functions
        }
        if self.default_function not in self.functions:
            raise InputError(
                f"'{self.path}' names '{self.default_function}' as its default function but has only "
                f"{', '.join(sorted(self.functions)) or 'none'}"
            )
        for name in self.functions:
            # Every constant is decoded here so that a damaged weight file is found before anything runs.
            for value in _values(self.block(name)):
                decode(value, self.weights)

    def signature(self, function: str | None = None) -> FunctionSignature:
        """The signature of a function, by default of the default one.

        Raises: InputError for an unknown name.
        """
        name = function or self.default_function
        if name not in self.functions:
            raise InputError(f"'{self.path}' has no function '{name}'; it has {', '.join(sorted(self.functions))}")
        return self.functions[name]

    def block(self, function: str) -> "proto.MIL_pb2.Block":
        """The protobuf of a function's body."""
        body = self._spec.mlProgram.functions[function]
        if body.opset not in body.block_specializations:
            raise InputError(f"function '{function}' of '{self.path}' has no body for its opset '{body.opset}'")
        return body.block_specializations[body.opset]

    def _signature(self, name: str, described: object) -> FunctionSignature:
        body = self._spec.mlProgram.functions[name]
        block = self.block(name)
        images = {
            feature.name
            for feature in [*described.input, *described.output]
            if feature.type.WhichOneof("Type") == "imageType"
        }
        inputs, states = [], []
        for value in body.inputs:
            if value.type.WhichOneof("type") == "stateType":
                states.append(_port(value.name, value.type.stateType.wrappedType))
            else:
                inputs.append(_port(value.name, value.type, is_image=value.name in images))
        types = {value.name: value.type for value in body.inputs}
        types |= {output.name: output.type for op in block.operations for output in op.outputs}
        outputs = []
        for output in block.outputs:
            if output not in types:
                raise InputError(f"function '{name}' of '{self.path}' returns '{output}', which nothing computes")
            outputs.append(_port(output, types[output], is_image=output in images))
        return FunctionSignature(name, body.opset, tuple(inputs), tuple(outputs), tuple(states))


def tensor_type(value_type: "proto.MIL_pb2.ValueType") -> tuple[DType, Shape]:
    """Data type and shape of a tensor type. Raises: InputError when it is of another kind."""
    kind = value_type.WhichOneof("type")
    if kind != "tensorType":
        raise InputError(f"the program uses values of {kind}, which are not supported")
    tensor = value_type.tensorType
    if tensor.rank != len(tensor.dimensions):
        raise InputError("the program declares a tensor of variable rank, which is not supported")
    shape = tuple(d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in tensor.dimensions)
    return dtype_from_proto(tensor.dataType), shape


def _port(name: str, value_type: "proto.MIL_pb2.ValueType", *, is_image: bool = False) -> Port:
    dtype, shape = tensor_type(value_type)
    return Port(name, dtype, shape, is_image)


def _model_path(path: Path) -> Path:
    """The model's protobuf, found through the manifest."""
    if not path.is_dir():
        what = "is a file" if path.is_file() else "does not exist"
        raise InputError(f"'{path}' {what}; expected an .mlpackage folder")
    manifest_path = path / "Manifest.json"
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"'{path}' is not an .mlpackage: cannot read Manifest.json ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"'{manifest_path}' is not valid JSON: {error}") from error
    try:
        entries = {key: str(entry["path"]) for key, entry in manifest["itemInfoEntries"].items()}
        root = entries[manifest["rootModelIdentifier"]]
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"'{manifest_path}' names no root model (itemInfoEntries, rootModelIdentifier)") from error
    data = path / "Data"
    for entry in entries.values():
        parts = PurePosixPath(entry)
        outside = parts.is_absolute() or ".." in parts.parts or "\0" in entry
        if outside or not (data / parts).resolve().is_relative_to(path.resolve()):
            raise InputError(f"'{manifest_path}' refers to '{entry}', outside the package")
        if not (data / parts).exists():
            raise InputError(f"'{path}' is incomplete: '{entry}' is listed in the manifest and missing")
    return data / root


def _read_spec(path: Path) -> "proto.Model_pb2.Model":
    spec = proto.Model_pb2.Model()
    try:
        spec.ParseFromString(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the model '{path}': {error.strerror}") from error
    except DecodeError as error:
        raise InputError(f"the model '{path}' is corrupt or truncated: not a Core ML protobuf") from error
    kind = spec.WhichOneof("Type")
    if kind is None:
        raise InputError(f"the model '{path}' is empty or truncated")
    if kind != "mlProgram":
        raise InputError(f"the model '{path}' is a {kind}; expected an ML Program")
    if not spec.mlProgram.functions:
        raise InputError(f"the model '{path}' is empty or truncated: it has no function")
    return spec


def _described_functions(description: object) -> dict[str, object]:
    return {function.name: function for function in description.functions}


def _values(block: "proto.MIL_pb2.Block") -> Iterator["proto.MIL_pb2.Value"]:
    """Every constant in a block and the blocks in it."""
    for op in block.operations:
        for name, value in op.attributes.items():
            if name != "name":
                yield value
        for argument in op.inputs.values():
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "value":
                    yield binding.value
        for inner in op.blocks:
            yield from _values(inner)
