"""Shape, slice and padding ops of saved programs against torch, slices against coremltools' definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil.ops.defs._utils import solve_slice_by_index_slice
from hypothesis import given, settings
from hypothesis import strategies as st
from mil_programs import assert_equal, build_package, run_cases

from export.mil import ExecutionError, Interpreter

CASES = {
    "shape": ((lambda x: mb.shape(x=x)), (lambda x: torch.tensor([2, 3, 4]))),
    "reshape": ((lambda x: mb.reshape(x=x, shape=[4, -1])), (lambda x: x.reshape(4, -1))),
    "reshape_zero": ((lambda x: mb.reshape(x=x, shape=[0, 4, 3])), (lambda x: x.reshape(2, 4, 3))),
    "reshape_like": (
        (lambda x, y: mb.reshape_like(x=x, ref_tensors=[x, y], begins=[0, 0], ends=[1, 0], end_masks=[False, True])),
        (lambda x, y: x.reshape(2, 3, 4)),
    ),
    "flatten2d": ((lambda x: mb.flatten2d(x=x, axis=2)), (lambda x: x.reshape(6, 4))),
    "transpose": ((lambda x: mb.transpose(x=x, perm=[-1, 0, 1])), (lambda x: x.permute(2, 0, 1))),
    "expand_dims": (
        (lambda x: mb.expand_dims(x=x, axes=[0, -1])),
        (lambda x: x.reshape(1, 2, 3, 4, 1)),
    ),
    "squeeze": ((lambda s: mb.squeeze(x=s, axes=[0, -1])), (lambda s: s.reshape(3, 1, 2))),
    "squeeze_all": ((lambda s: mb.squeeze(x=s)), (lambda s: s.reshape(3, 2))),
    "reverse": ((lambda x: mb.reverse(x=x, axes=[0, -1])), (lambda x: x.flip(0, 2))),
    "reverse_all": ((lambda x: mb.reverse(x=x)), (lambda x: x.flip(0, 1, 2))),
    "tile": ((lambda x: mb.tile(x=x, reps=[1, 2, 3])), (lambda x: x.repeat(1, 2, 3))),
    "sliding_windows": (
        (lambda x: mb.sliding_windows(x=x, axis=2, size=2, stride=2)),
        (lambda x: torch.stack([x[..., :2], x[..., 2:]], 2)),
    ),
    "concat": ((lambda x, z: mb.concat(values=[x, z], axis=-1)), (lambda x, z: torch.cat([x, z], -1))),
    "concat_interleave": (
        (lambda x: mb.concat(values=[x, x], axis=1, interleave=True)),
        (lambda x: x.repeat_interleave(2, 1)),
    ),
    "stack": ((lambda x: mb.stack(values=[x, x], axis=-1)), (lambda x: torch.stack([x, x], -1))),
    "split": ((lambda x: mb.split(x=x, num_splits=2, axis=-1)), (lambda x: x.split(2, -1))),
    "split_sizes": (
        (lambda x: mb.split(x=x, split_sizes=[1, 2], axis=1)),
        (lambda x: x.split([1, 2], 1)),
    ),
    "slice_by_size": (
        (lambda x: mb.slice_by_size(x=x, begin=[1, -2, 1], size=[1, 2, -1])),
        (lambda x: x[1:2, 1:, 1:]),
    ),
    "slice_update": (
        (
            lambda x, z: mb.slice_update(
                x=x,
                update=z,
                begin=[0, 0, 1],
                end=[0, 0, 3],
                begin_mask=[True] * 2 + [False],
                end_mask=[True] * 2 + [False],
            )
        ),
        (lambda x, z: torch.cat([x[..., :1], z, x[..., 3:]], -1)),
    ),
    "slice_update_squeezed": (
        (
            lambda x, y: mb.slice_update(
                x=x, update=y, begin=[-1, 0, 0], end=[0, 3, 4], squeeze_mask=[True, False, False]
            )
        ),
        (lambda x, y: torch.stack([x[0], y])),
    ),
    "slice_update_reversed": (
        (
            lambda x: mb.slice_update(
                x=x,
                update=x,
                begin=[0] * 3,
                end=[0] * 3,
                stride=[1, -1, 1],
                begin_mask=[True] * 3,
                end_mask=[True] * 3,
            )
        ),
        (lambda x: x.flip(1)),
    ),
    "pad": (
        (lambda x: mb.pad(x=x, pad=[1, 0, 2, 3], constant_val=np.float32(7))),
        (lambda x: F.pad(x, [2, 3, 1, 0], value=7.0)),
    ),
    "pad_reflect": (
        (lambda r: mb.pad(x=r, pad=[1, 2, 3, 2], mode="reflect")),
        (lambda r: F.pad(r, [3, 2, 1, 2], mode="reflect")),
    ),
    "pad_replicate": (
        (lambda r: mb.pad(x=r, pad=[1, 2, 3, 2], mode="replicate")),
        (lambda r: F.pad(r, [3, 2, 1, 2], mode="replicate")),
    ),
    "fill": (
        (lambda x: mb.fill(shape=mb.shape(x=x), value=np.float32(2))),
        (lambda x: torch.full((2, 3, 4), 2.0)),
    ),
    "fill_like": ((lambda x: mb.fill_like(ref_tensor=x, value=5)), (lambda x: torch.full((2, 3, 4), 5))),
    "range_1d": (
        (lambda n: mb.range_1d(start=2, end=mb.squeeze(x=n, axes=[0]), step=3)),
        (lambda n: torch.arange(2, 11, 3)),
    ),
    "band_part": (
        (lambda x: mb.band_part(x=x, lower=1, upper=0)),
        (lambda x: x.tril() - x.tril(-2)),
    ),
    "band_part_upper": ((lambda x: mb.band_part(x=x, lower=0, upper=-1)), (lambda x: x.triu())),
    "pixel_shuffle": ((lambda q: mb.pixel_shuffle(x=q, upscale_factor=2)), (lambda q: F.pixel_shuffle(q, 2))),
    "pixel_unshuffle": (
        (lambda q: mb.pixel_unshuffle(x=q, downscale_factor=np.uint32(2))),
        (lambda q: F.pixel_unshuffle(q, 2)),
    ),
    "space_to_depth_and_back": (
        (lambda q: mb.depth_to_space(x=mb.space_to_depth(x=q, block_size=2), block_size=2)),
        (lambda q: q),
    ),
    "space_to_depth": (
        (lambda q: mb.space_to_depth(x=q, block_size=2)),
        (lambda q: torch.cat([q[:, :, a::2, b::2] for a in range(2) for b in range(2)], 1)),
    ),
    "upsample_nearest": (
        (lambda q: mb.upsample_nearest_neighbor(x=q, scale_factor_height=2, scale_factor_width=3)),
        (lambda q: F.interpolate(q, scale_factor=(2.0, 3.0))),
    ),
    "upsample_bilinear": (
        (lambda q: mb.upsample_bilinear(x=q, scale_factor_height=2, scale_factor_width=3)),
        (lambda q: F.interpolate(q, scale_factor=(2.0, 3.0), mode="bilinear", align_corners=True)),
    ),
    "upsample_bilinear_half_pixel": (
        (
            lambda q: mb.upsample_bilinear(
                x=q, scale_factor_height=2, scale_factor_width=2, align_corners=False, half_pixel_centers=True
            )
        ),
        (lambda q: F.interpolate(q, scale_factor=2.0, mode="bilinear", align_corners=False)),
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(2, 3, 4),
        "y": torch.randn(3, 4),
        "z": torch.randn(2, 3, 2),
        "s": torch.randn(1, 3, 1, 2, 1),
        "r": torch.randn(1, 2, 4, 5),
        "q": torch.randn(2, 4, 4, 6),
        "n": torch.tensor([11], dtype=torch.int32),
    }
    return run_cases(CASES, inputs, tmp_path_factory.mktemp("shape"))


@pytest.mark.parametrize("name", CASES)
def test_equals_torch(results, name):
    assert_equal(results[name])


_SIZES = (4, 5, 3)


@st.composite
def _slice_arguments(draw):
    """Arguments of a slice of a tensor of _SIZES that selects something and is legal MIL."""
    arguments = {"begin": [], "end": [], "stride": [], "begin_mask": [], "end_mask": [], "squeeze_mask": []}
    for size in _SIZES:
        squeeze = draw(st.booleans())
        stride = 1 if squeeze else draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
        begin = draw(st.integers(-size, size - 1))
        end = draw(st.integers(-size, size + 2))
        begin_mask, end_mask = (draw(st.booleans()) for _ in range(2))
        selected = range(*slice(None if begin_mask else begin, None if end_mask else end, stride).indices(size))
        if not squeeze and not selected:
            begin_mask = end_mask = True
        values = (begin, end, stride, begin_mask and not squeeze, end_mask, squeeze)
        for name, value in zip(arguments, values, strict=True):
            arguments[name].append(value)
    return arguments


@settings(max_examples=8, deadline=None)
@given(cases=st.lists(_slice_arguments(), min_size=12, max_size=12))
def test_slices_equal_the_definition(tmp_path_factory, cases):
    x = torch.arange(60, dtype=torch.float32).reshape(_SIZES)
    package = build_package(
        tmp_path_factory.mktemp("slices"),
        {"x": x},
        lambda x: [mb.slice_by_index(x=x, **case, name=f"slice_{n}") for n, case in enumerate(cases)],
    )
    given_values = Interpreter(package).run({"x": x})
    for case, value in zip(cases, given_values.values(), strict=True):
        arguments = {name: list(values) for name, values in case.items()}
        wanted = x.numpy()[solve_slice_by_index_slice(_SIZES, **arguments)]
        wanted = wanted.squeeze(tuple(d for d, squeezed in enumerate(case["squeeze_mask"]) if squeezed))
        assert np.array_equal(value.numpy(), wanted)


def test_slice_bounds_may_be_inputs(tmp_path):
    values = {
        "x": torch.arange(12.0).reshape(3, 4),
        "begin": torch.tensor([1, 0], dtype=torch.int32),
        "end": torch.tensor([3, 2], dtype=torch.int32),
    }
    package = build_package(
        tmp_path, values, lambda x, begin, end: [mb.slice_by_index(x=x, begin=begin, end=end, name="part")]
    )
    assert torch.equal(Interpreter(package).run(values)["part"], values["x"][1:3, :2])


def test_a_squeezed_index_out_of_bounds_is_refused(tmp_path):
    values = {"x": torch.arange(12.0).reshape(3, 4), "at": torch.tensor([1], dtype=torch.int32)}

    def build(x, at):
        begin = mb.concat(values=[at, np.array([0], np.int32)], axis=0)
        return [mb.slice_by_index(x=x, begin=begin, end=[0, 4], squeeze_mask=[True, False], name="row")]

    interpreter = Interpreter(build_package(tmp_path, values, build))
    assert torch.equal(interpreter.run(values)["row"], values["x"][1])
    with pytest.raises(ExecutionError, match="index 3 of dimension 0, which has 3 values"):
        interpreter.run({**values, "at": torch.tensor([3], dtype=torch.int32)})
