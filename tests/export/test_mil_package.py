"""Opening packages: what is read, and every way in which a package can be damaged."""

import json
import shutil

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools import proto
from coremltools.converters.mil import Builder as mb
from hypothesis import given, settings
from hypothesis import strategies as st
from mil_programs import build_package

from export.mil import InputError, Interpreter, Package

_MODEL = "Data/com.apple.CoreML/model.mlmodel"
_WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
_INPUTS = {"x": torch.zeros(2, 8), "i": torch.zeros(3, dtype=torch.int32)}
_WEIGHT = np.arange(40, dtype=np.float32).reshape(5, 8)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    def build(x, i, cache):
        held = mb.cast(x=mb.read_state(input=cache), dtype="fp32", name="held")
        return [mb.linear(x=x, weight=_WEIGHT, name="y"), mb.add(x=i, y=np.int32(1), name="j"), held]

    return build_package(tmp_path_factory.mktemp("package"), _INPUTS, build, states={"cache": (1, 4)})


@pytest.fixture
def package(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy.mlpackage")


def _edit_manifest(package, change) -> None:
    path = package / "Manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def _edit_model(package, change) -> None:
    path = package / _MODEL
    spec = proto.Model_pb2.Model()
    spec.ParseFromString(path.read_bytes())
    change(spec)
    path.write_bytes(spec.SerializeToString())


def test_signature(package):
    opened = Package(package)
    signature = opened.signature()
    assert opened.default_function == signature.name == "main"
    assert signature.opset == "CoreML8"
    assert [(p.name, p.dtype.name, p.shape) for p in signature.inputs] == [
        ("x", "fp32", (2, 8)),
        ("i", "int32", (3,)),
    ]
    assert [(p.name, p.dtype.name, p.shape) for p in signature.outputs] == [
        ("y", "fp32", (2, 5)),
        ("j", "int32", (3,)),
        ("held", "fp32", (1, 4)),
    ]
    assert [(p.name, p.dtype.name, p.shape) for p in signature.states] == [("cache", "fp16", (1, 4))]


def test_images_and_open_sizes_are_told(tmp_path):
    class Pool(torch.nn.Module):
        def forward(self, image, values):
            return image.mean((1, 2, 3)), values * 2

    traced = torch.jit.trace(Pool(), (torch.rand(1, 3, 4, 4), torch.rand(2, 3)))
    model = ct.convert(
        traced,
        inputs=[
            ct.ImageType(name="image", shape=(1, 3, 4, 4), scale=1 / 255),
            ct.TensorType(name="values", shape=(ct.RangeDim(1, 5), 3)),
        ],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    model.save(str(tmp_path / "pool.mlpackage"))
    interpreter = Interpreter(tmp_path / "pool.mlpackage")
    image, values = interpreter.signature.inputs
    assert image.is_image and not values.is_image
    assert values.shape == (None, 3)
    inputs = {"image": torch.full((1, 3, 4, 4), 255.0), "values": torch.ones(4, 3)}
    mean, doubled = interpreter.run(inputs).values()
    torch.testing.assert_close(mean, torch.ones(1))
    assert torch.equal(doubled, torch.full((4, 3), 2.0))
    with pytest.raises(InputError, match=r"'values' has shape \[4, 2\]; expected \[\?, 3\]"):
        interpreter.run({**inputs, "values": torch.ones(4, 2)})


def test_not_a_package(tmp_path):
    with pytest.raises(InputError, match="does not exist; expected an .mlpackage folder"):
        Package(tmp_path / "none.mlpackage")
    (tmp_path / "file.mlpackage").write_text("")
    with pytest.raises(InputError, match="is a file; expected an .mlpackage folder"):
        Package(tmp_path / "file.mlpackage")
    (tmp_path / "empty.mlpackage").mkdir()
    with pytest.raises(InputError, match="cannot read Manifest.json"):
        Package(tmp_path / "empty.mlpackage")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"itemInfoEntries": {}, "rootModelIdentifier": "a"}'])
def test_a_damaged_manifest(package, text):
    (package / "Manifest.json").write_text(text)
    with pytest.raises(InputError, match="is not valid JSON|names no root model"):
        Package(package)


@pytest.mark.parametrize("path", ["../../outside.mlmodel", "/etc/passwd", "com.apple.CoreML/../../../outside", "a\0b"])
def test_a_manifest_that_leads_out_of_the_package(package, path):
    def change(manifest):
        manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = path

    _edit_manifest(package, change)
    (package.parent / "outside.mlmodel").write_bytes((package / _MODEL).read_bytes())
    with pytest.raises(InputError, match="outside the package"):
        Package(package)


def test_a_link_out_of_the_package(package):
    outside = package.parent / "outside.mlmodel"
    (package / _MODEL).rename(outside)
    (package / _MODEL).symlink_to(outside)
    with pytest.raises(InputError, match="outside the package"):
        Package(package)


@pytest.mark.parametrize("part", [_MODEL, "Data/com.apple.CoreML/weights"])
def test_a_missing_part(package, part):
    path = package / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match="listed in the manifest and missing"):
        Package(package)


def test_a_missing_weight_file(package):
    (package / _WEIGHTS).unlink()
    with pytest.raises(InputError, match="cannot read the weight file"):
        Package(package)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_truncated_parts(original, tmp_path_factory, data):
    part = data.draw(st.sampled_from([_MODEL, _WEIGHTS]))
    package = shutil.copytree(original, tmp_path_factory.mktemp("truncated") / "m.mlpackage")
    whole = (package / part).read_bytes()
    # Zeros fill the weight file after the last constant, up to a border.
    size = data.draw(st.integers(0, len(whole) - 1 if part == _MODEL else 128 + _WEIGHT.nbytes - 1))
    (package / part).write_bytes(whole[:size])
    with pytest.raises(InputError):
        Interpreter(package)


@settings(max_examples=100, deadline=None)
@given(at=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_changed_byte_never_ends_in_anything_but_an_input_error(original, tmp_path_factory, at, value):
    package = shutil.copytree(original, tmp_path_factory.mktemp("changed") / "m.mlpackage")
    content = bytearray((package / _MODEL).read_bytes())
    content[at % len(content)] = value
    (package / _MODEL).write_bytes(bytes(content))
    try:
        Interpreter(package)
    except InputError:
        pass
    except RuntimeError as error:  # an op's name was hit
        assert type(error).__name__ == "UnknownOpError"


def test_damaged_weights(package):
    content = bytearray((package / _WEIGHTS).read_bytes())
    content[64] ^= 0xFF
    (package / _WEIGHTS).write_bytes(bytes(content))
    with pytest.raises(InputError, match="no constant begins at offset 64"):
        Package(package)
    (package / _WEIGHTS).write_bytes(b"PK" + bytes(500))
    with pytest.raises(InputError, match="is not a Core ML weight file"):
        Package(package)


def _constant(spec, name: str):
    """The operation that defines the weight."""
    (op,) = (
        op
        for op in spec.mlProgram.functions["main"].block_specializations["CoreML8"].operations
        if op.type == "const" and op.attributes["val"].WhichOneof("value") == name
    )
    return op


@pytest.mark.parametrize(
    "name",
    ["@model_path/../secret.bin", "/etc/passwd", "@model_path//etc/passwd", "weight.bin", "@model_path/a\0b"],
)
def test_weights_outside_the_package(package, name):
    def change(spec):
        _constant(spec, "blobFileValue").attributes["val"].blobFileValue.fileName = name

    _edit_model(package, change)
    with pytest.raises(InputError, match="outside the package"):
        Package(package)


def test_a_weight_of_another_size_or_type(package):
    def grow(spec):
        _constant(spec, "blobFileValue").attributes["val"].type.tensorType.dimensions[0].constant.size = 6

    def retype(spec):
        _constant(spec, "blobFileValue").attributes["val"].type.tensorType.dataType = proto.MIL_pb2.FLOAT16

    pristine = (package / _MODEL).read_bytes()
    _edit_model(package, grow)
    with pytest.raises(InputError, match="48 values of fp32 need 192 bytes, the package stores 160"):
        Package(package)
    (package / _MODEL).write_bytes(pristine)
    _edit_model(package, retype)
    with pytest.raises(InputError, match="is fp32, the program declares fp16"):
        Package(package)


def test_a_string_without_a_value(package):
    def change(spec):
        block = spec.mlProgram.functions["main"].block_specializations["CoreML8"]
        cast = next(op for op in block.operations if op.type == "cast")
        name = cast.inputs["dtype"].arguments[0].name
        (constant,) = (op for op in block.operations if op.type == "const" and op.outputs[0].name == name)
        del constant.attributes["val"].immediateValue.tensor.strings.values[:]

    _edit_model(package, change)
    with pytest.raises(InputError, match=r"a constant of shape \[\] stores 0 strings"):
        Package(package)


def test_a_model_of_another_kind(package):
    def change(spec):
        spec.neuralNetwork.SetInParent()

    _edit_model(package, change)
    with pytest.raises(InputError, match="is a neuralNetwork; expected an ML Program"):
        Package(package)


def test_an_unknown_function(package):
    with pytest.raises(InputError, match="has no function 'decode'; it has main"):
        Interpreter(package, function="decode")
    with pytest.raises(InputError, match="precision is 'fp8'; expected 'float32' or 'declared'"):
        Interpreter(package, precision="fp8")
