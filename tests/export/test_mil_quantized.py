"""Compressed weights and quantised activations, against coremltools' own decompression."""

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from mil_programs import assert_equal, build_package, run_cases

from export.mil import InputError, Interpreter
from export.mil.weights import WeightStore

_RANDOM = np.random.default_rng(0)
_W1 = _RANDOM.standard_normal((64, 32)).astype(np.float32)
_W2 = _RANDOM.standard_normal((32, 64)).astype(np.float32)
_X = torch.from_numpy(_RANDOM.standard_normal((4, 32)).astype(np.float32))


def _config(operation: type, **options) -> cto.OptimizationConfig:
    return cto.OptimizationConfig(global_config=operation(weight_threshold=16, **options))


def _palettize(**options):
    return lambda model: cto.palettize_weights(model, _config(cto.OpPalettizerConfig, **options))


def _linear(**options):
    return lambda model: cto.linear_quantize_weights(model, _config(cto.OpLinearQuantizerConfig, **options))


def _prune(model):
    return cto.prune_weights(model, _config(cto.OpMagnitudePrunerConfig, target_sparsity=0.5))


def _pruned_and_palettized(model):
    config = _config(cto.OpPalettizerConfig, mode="uniform", nbits=4)
    return cto.palettize_weights(_prune(model), config, joint_compression=True)


def _pruned_and_quantized(model):
    config = _config(cto.OpLinearQuantizerConfig, mode="linear_symmetric", dtype="int8")
    return cto.linear_quantize_weights(_prune(model), config, joint_compression=True)


def _quantized_table(model):
    table = cto.palettize_weights(model, _config(cto.OpPalettizerConfig, mode="uniform", nbits=4))
    config = _config(cto.OpLinearQuantizerConfig, mode="linear_symmetric", dtype="int8", granularity="per_tensor")
    return cto.linear_quantize_weights(table, config, joint_compression=True)


COMPRESSIONS = {
    **{f"palettize_{bits}": _palettize(mode="uniform", nbits=bits) for bits in (1, 2, 3, 4, 6, 8)},
    "palettize_groups": _palettize(mode="uniform", nbits=4, granularity="per_grouped_channel", group_size=16),
    "palettize_channel_scale": _palettize(mode="kmeans", nbits=4, enable_per_channel_scale=True),
    "palettize_vectors": _palettize(mode="kmeans", nbits=4, cluster_dim=2),
    "int8_per_channel": _linear(mode="linear_symmetric", dtype="int8"),
    "uint8_asymmetric": _linear(mode="linear", dtype="uint8"),
    "int4_blocks": _linear(mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=16),
    "uint4_blocks": _linear(mode="linear", dtype="uint4", granularity="per_block", block_size=16),
    "int4_per_tensor": _linear(mode="linear_symmetric", dtype="int4", granularity="per_tensor"),
    "pruned": _prune,
    "pruned_and_palettized": _pruned_and_palettized,
    "pruned_and_quantized": _pruned_and_quantized,
    "quantized_table": _quantized_table,
}
# Compressions that the older, packed form of the ops can express.
OLD_COMPRESSIONS = (
    "palettize_1",
    "palettize_4",
    "palettize_6",
    "int8_per_channel",
    "uint8_asymmetric",
    "pruned",
)


def _model(folder, target) -> ct.models.MLModel:
    def build(x):
        return [mb.linear(x=mb.relu(x=mb.linear(x=x, weight=_W1)), weight=_W2, name="y")]

    path = build_package(folder, {"x": _X}, build, target=target)
    return ct.models.MLModel(str(path), skip_model_load=True)


def _check(model, compress, folder) -> None:
    compressed = compress(model)
    compressed.save(str(folder / "compressed.mlpackage"))
    cto.decompress_weights(compressed).save(str(folder / "decompressed.mlpackage"))
    text = str(compressed.get_spec().mlProgram)
    assert "constexpr_" in text
    for precision in ("float32", "declared"):
        given = Interpreter(folder / "compressed.mlpackage", precision=precision).run({"x": _X})["y"]
        wanted = Interpreter(folder / "decompressed.mlpackage", precision=precision).run({"x": _X})["y"]
        torch.testing.assert_close(given, wanted, atol=2e-5, rtol=1e-5)
    # What is compared must not be the uncompressed weights.
    dense = torch.relu(_X @ torch.from_numpy(_W1).T) @ torch.from_numpy(_W2).T
    assert (given - dense).abs().max() > 1e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    targets = (ct.target.iOS16, ct.target.iOS18)
    return {target: _model(tmp_path_factory.mktemp("dense"), target) for target in targets}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_compressed_weights_equal_their_decompression(models, tmp_path, name):
    _check(models[ct.target.iOS18], COMPRESSIONS[name], tmp_path)


@pytest.mark.parametrize("name", OLD_COMPRESSIONS)
def test_packed_weights_equal_their_decompression(models, tmp_path, name):
    _check(models[ct.target.iOS16], COMPRESSIONS[name], tmp_path)


_SCALES = np.array([0.1, 0.2, 0.05, 0.5], np.float32)
_ZEROS = np.array([0, 3, -4, 10], np.int8)
ACTIVATIONS = {
    "scalar": (
        (
            lambda x: mb.dequantize(
                input=mb.quantize(input=x, scale=np.float32(0.1), output_dtype="int8"), scale=np.float32(0.1)
            )
        ),
        (lambda x: (x / 0.1).round().clamp(-128, 127) * 0.1),
    ),
    "per_channel": (
        (
            lambda x: mb.dequantize(
                input=mb.quantize(input=x, scale=_SCALES, zero_point=_ZEROS, axis=-1, output_dtype="int8"),
                scale=_SCALES,
                zero_point=_ZEROS,
                axis=-1,
            )
        ),
        (
            lambda x: torch.fake_quantize_per_channel_affine(
                x, torch.from_numpy(_SCALES), torch.from_numpy(_ZEROS).int(), 1, -128, 127
            )
        ),
    ),
    "unsigned": (
        (
            lambda x: mb.cast(
                x=mb.quantize(input=x, scale=np.float32(0.02), zero_point=np.uint8(100), output_dtype="uint8"),
                dtype="int32",
            )
        ),
        (lambda x: ((x / 0.02).round() + 100).clamp(0, 255).int()),
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_quantized_activations_equal_torch(tmp_path, name):
    torch.manual_seed(0)
    values = {"x": torch.randn(6, 4) * 3}
    assert_equal(run_cases({name: ACTIVATIONS[name]}, values, tmp_path)[name])


def test_blobs_equal_coremltools_reader(tmp_path):
    """Our reader of weight files against coremltools' own, for every type that it writes."""
    storage = pytest.importorskip("coremltools.libmilstoragepython")
    from coremltools import proto

    from export.mil.dtypes import dtype_from_name

    numbers = {
        "float": ("fp32", np.float32),
        "int8": ("int8", np.int8),
        "uint8": ("uint8", np.uint8),
        "int16": ("int16", np.int16),
        "uint16": ("uint16", np.uint16),
        "int32": ("int32", np.int32),
        "uint32": ("uint32", np.uint32),
        "int4": ("int4", np.int8),
    } | {f"uint{bits}": (f"uint{bits}", np.uint8) for bits in (1, 2, 3, 4, 6)}
    writer = storage._BlobStorageWriter(str(tmp_path / "weight.bin"))
    written = {}
    for name, (dtype, numpy_type) in numbers.items():
        low, high = (-100, 100) if dtype == "fp32" else dtype_from_name(dtype).limits
        values = _RANDOM.integers(low, high, 37, endpoint=True).astype(numpy_type)
        written[name] = (getattr(writer, f"write_{name}_data")(values), values)
    del writer
    reader = storage._BlobStorageReader(str(tmp_path / "weight.bin"))
    store = WeightStore(tmp_path)
    for name, (offset, values) in written.items():
        reference = proto.MIL_pb2.Value.BlobFileValue(fileName="@model_path/weight.bin", offset=offset)
        mine = store.read(reference, dtype=dtype_from_name(numbers[name][0]), shape=(37,)).numpy()
        assert np.array_equal(mine, values)
        assert np.array_equal(mine, getattr(reader, f"read_{name}_data")(offset))
    with pytest.raises(InputError, match="is int8, the program declares fp16"):
        reference = proto.MIL_pb2.Value.BlobFileValue(fileName="@model_path/weight.bin", offset=written["int8"][0])
        WeightStore(tmp_path).read(reference, dtype=dtype_from_name("fp16"), shape=(37,))
