"""Quantisation of activations, and the compressed forms of constant weights.

`constexpr_` ops are evaluated once, when a function is prepared. Up to iOS 17 they pack their data in bytes,
from iOS 18 on the data have types of less than a byte and more axes; the arguments show which form it is.
"""

import numpy as np
import torch
from torch import Tensor

from export.mil.dtypes import dtype_from_name, unpack
from export.mil.errors import ExecutionError
from export.mil.registry import Call, Handlers

HANDLERS = Handlers()


# -- activations


@HANDLERS.op("quantize")
def _quantize(call: Call) -> Tensor:
    x, scale, zero_point = call.operand("input"), call.operand("scale"), call.stored("zero_point", None)
    dtype, axis = dtype_from_name(call.text("output_dtype")), call.scalar("axis", None)
    quantized = torch.round(x / _along(scale, x, axis))
    if zero_point is not None:
        quantized = quantized + _along(zero_point, x, axis)
    return quantized.clamp(*dtype.limits).to(dtype.carrier)


@HANDLERS.op("dequantize")
def _dequantize(call: Call) -> Tensor:
    return _affine(call, "input")


@HANDLERS.op("constexpr_affine_dequantize")
def _affine_dequantize(call: Call) -> Tensor:
    return _affine(call, "quantized_data")


def _affine(call: Call, name: str) -> Tensor:
    data, axis = call.stored(name), call.scalar("axis", None)
    values, zero_point = data.float(), call.stored("zero_point", None)
    if zero_point is not None:
        values = values - _along(zero_point, data, axis).float()
    return values * _along(call.operand("scale"), data, axis)


def _along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """A vector along `axis` of `x`, ready to broadcast; a scalar stays one."""
    if values.dim() == 0:
        return values
    if axis is None or values.numel() != x.shape[axis]:
        raise ExecutionError(f"{values.numel()} values along axis {axis} of {list(x.shape)}")
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


# -- weights


@HANDLERS.op("constexpr_cast")
def _constexpr_cast(call: Call) -> Tensor:
    return call.stored("source_val").to(dtype_from_name(call.text("output_dtype")).carrier)


@HANDLERS.op("constexpr_blockwise_shift_scale")
def _blockwise_shift_scale(call: Call) -> Tensor:
    return _shift_scale(call.stored("data"), call.operand("scale"), call.operand("offset", None))


@HANDLERS.op("constexpr_lut_to_dense")
def _lut_to_dense(call: Call) -> Tensor:
    lut, indices = call.stored("lut"), call.stored("indices")
    if not call.has("shape"):
        return _look_up(indices, lut, call.scalar("vector_axis", None))
    shape = call.ints("shape")
    bits = lut.numel().bit_length() - 1
    return lut[_unpacked(indices, f"uint{bits}", shape).long()]


@HANDLERS.op("constexpr_sparse_to_dense")
def _sparse_to_dense(call: Call) -> Tensor:
    mask, values = call.stored("mask"), call.stored("nonzero_data")
    return _dense(values, _unpacked(mask, "uint1", call.ints("shape")) if call.has("shape") else mask)


@HANDLERS.op("constexpr_lut_to_sparse")
def _lut_to_sparse(call: Call) -> list[Tensor]:
    mask, lut, axis = call.stored("indices_mask"), call.stored("lut"), call.scalar("vector_axis", None)
    values = _look_up(_dense(call.stored("indices_nonzero_data"), mask), lut, axis)
    if axis is not None:
        mask = mask.repeat_interleave(lut.shape[-1], axis)
    return [mask, values[mask != 0]]


@HANDLERS.op("constexpr_sparse_blockwise_shift_scale")
def _sparse_shift_scale(call: Call) -> list[Tensor]:
    mask = call.stored("data_mask")
    dense = _dense(call.stored("nonzero_data"), mask)
    return [mask, _shift_scale(dense, call.operand("scale"), call.operand("offset", None))[mask != 0]]


def _shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """scale * (data - offset), where each scale serves a block of values along every axis."""
    values = data.float()
    if offset is not None:
        values = values - _spread(offset.float(), data.shape)
    return values * _spread(scale, data.shape)


def _spread(values: Tensor, shape: torch.Size) -> Tensor:
    """Repeats each value over its block, so that the result has `shape`."""
    if values.dim() != len(shape) or any(size % part for size, part in zip(shape, values.shape, strict=True)):
        raise ExecutionError(f"blocks of {list(values.shape)} do not divide {list(shape)}")
    for axis, size in enumerate(shape):
        if 1 < values.shape[axis] < size:
            values = values.repeat_interleave(size // values.shape[axis], axis)
    return values


def _look_up(indices: Tensor, lut: Tensor, vector_axis: int | None) -> Tensor:
    """Table entries for indices of any rank K. `lut`: [tables per axis ..., entries, vector size]."""
    tables, vector = lut.shape[:-2], lut.shape[-1]
    if len(tables) != indices.dim() or any(n % t for n, t in zip(indices.shape, tables, strict=True)):
        raise ExecutionError(f"tables of {list(tables)} do not divide indices of {list(indices.shape)}")
    where = []
    for axis, (size, count) in enumerate(zip(indices.shape, tables, strict=True)):
        table = torch.arange(size) // (size // count)
        where.append(table.reshape([-1 if d == axis else 1 for d in range(indices.dim())]))
    entries = lut[(*where, indices.long())]  # [..., vector]
    if vector == 1:
        return entries.squeeze(-1)
    if vector_axis is None:
        raise ExecutionError("entries are vectors, and the argument 'vector_axis' is missing")
    axis = vector_axis % indices.dim()
    return entries.movedim(-1, axis + 1).flatten(axis, axis + 1)


def _dense(values: Tensor, mask: Tensor) -> Tensor:
    present = mask != 0
    if int(present.sum()) != values.numel():
        raise ExecutionError(f"the mask selects {int(present.sum())} values, {values.numel()} are stored")
    dense = torch.zeros(mask.shape, dtype=values.dtype)
    dense[present] = values.reshape(-1)
    return dense


def _unpacked(data: Tensor, dtype: str, shape: list[int]) -> Tensor:
    """Values of less than a byte from a tensor of bytes, in `shape`."""
    raw = data.reshape(-1).numpy().tobytes()
    return torch.from_numpy(np.array(unpack(raw, dtype_from_name(dtype), int(np.prod(shape))))).reshape(shape)
